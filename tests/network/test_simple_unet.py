"""SimpleUNet: any size in, the same size out, and it learns."""

import pytest
import torch

from ml_src.core.config import ModelConfig
from ml_src.core.errors import ConfigError
from ml_src.core.network import build_model
from ml_src.core.network.custom import MODEL_REGISTRY, SimpleUNet


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (16, 16), (17, 31), (64, 48), (33, 100)])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_size_comes_back_at_that_size_in_training_too(size: tuple[int, int], batch: int) -> None:
    model = SimpleUNet(in_channels=3, num_classes=4, base_channels=2)
    logits = model(torch.rand(batch, 3, *size))
    assert logits.shape == (batch, 4, *size)
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_any_number_of_channels_and_classes(channels: int) -> None:
    model = SimpleUNet(in_channels=channels, num_classes=300, base_channels=2)
    assert model(torch.rand(1, channels, 32, 32)).shape == (1, 300, 32, 32)


def test_default_widths_are_64_to_1024() -> None:
    model = SimpleUNet()
    widths = [model.stem[0].out_channels, *(level[0].out_channels for level in model.down)]
    assert widths == [64, 128, 256, 512, 1024]
    assert 31.0e6 < sum(p.numel() for p in model.parameters()) < 31.1e6  # as usual for a U-Net of these widths


def test_padding_does_not_change_what_lies_far_from_the_border() -> None:
    torch.manual_seed(0)
    model = SimpleUNet(base_channels=2).eval()
    images = torch.rand(1, 3, 256, 256)
    whole, cut = model(images), model(images[..., :250])
    assert torch.allclose(whole[..., :16], cut[..., :16], atol=1e-4)


def test_dropout_is_in_the_decoder_and_off_when_predicting() -> None:
    model = SimpleUNet(base_channels=4, dropout=0.5)
    images = torch.rand(1, 3, 32, 32)
    model.train()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_an_unknown_architecture_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'simple_unet'"):
        build_model(ModelConfig(custom_architecture="simple_unt", num_classes=2))


def test_a_class_that_takes_too_few_arguments_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow(torch.nn.Module):
        def __init__(self, in_channels: int) -> None:
            super().__init__()

    monkeypatch.setitem(MODEL_REGISTRY, "narrow", Narrow)
    with pytest.raises(ConfigError, match=r"'narrow' cannot be built .* \*\*kwargs"):
        build_model(ModelConfig(custom_architecture="narrow", num_classes=2))
