"""Per-sample gradients against torch's own gradient of one sample after another."""

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn import functional as F

from ml_src.core.network.custom import SimpleUNet
from ml_src.core.trainers.dp.grad_samplers import (
    LeanGradSampleModule,
    conv_grad_sample,
    group_norm_grad_sample,
    register_grad_samplers,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
FORMATS = [torch.contiguous_format, torch.channels_last]
WRAPPERS = [GradSampleModule, LeanGradSampleModule]
one_or_two = st.integers(1, 2)


def unet() -> nn.Module:
    model = ModuleValidator.fix(SimpleUNet(in_channels=3, num_classes=3, base_channels=4))
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # Opacus' backward hooks forbid a change in place
    return model


class Residual(nn.Module):
    """A strided block with a 1x1 shortcut, a grouped one that is used twice, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.GroupNorm(2, 8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.GroupNorm(4, 8))
        self.shortcut = nn.Conv2d(3, 8, 1, stride=2)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.second(self.first(images)) + self.shortcut(images))
        x = F.relu(self.second(x) + x)
        return self.head(x.mean((2, 3)))[:, :, None, None]


def summed_loss(logits: Tensor) -> Tensor:
    return ((logits - torch.linspace(-1, 1, logits.shape[1])[:, None, None]) ** 2).mean((1, 2, 3)).sum()


def ours(model: nn.Module, images: Tensor, wrap: type[GradSampleModule]) -> dict[str, Tensor]:
    register_grad_samplers()
    wrapped = wrap(copy.deepcopy(model), loss_reduction="sum")
    summed_loss(wrapped(images)).backward()
    return {name: p.grad_sample for name, p in wrapped._module.named_parameters() if p.requires_grad}


def one_by_one(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The oracle: autograd, one sample at a time."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(summed_loss(model(image[None])), list(parameters.values())) for image in images]
    return dict(zip(parameters, map(torch.stack, zip(*rows, strict=True)), strict=True))


def assert_sampler_agrees(layer: nn.Module, images: Tensor, tolerance: float) -> None:
    """Compare one layer's sampler with autograd, for backprops that are random."""
    layer = layer.to(images.dtype)
    outputs = layer(images)
    backprops = torch.randn_like(outputs)
    sampler = group_norm_grad_sample if isinstance(layer, nn.GroupNorm) else conv_grad_sample
    grads = sampler(layer, [images.detach()], backprops)
    assert set(grads) == {p for p in layer.parameters() if p.requires_grad}
    for parameter, grad in grads.items():
        assert grad.shape == (len(images), *parameter.shape)
        assert grad.dtype == images.dtype
        for index, ours in enumerate(grad):
            (theirs,) = torch.autograd.grad(outputs[index], parameter, backprops[index], retain_graph=True)
            assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-12


@given(
    data=st.data(),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(one_or_two, st.integers(1, 3)),
    dilation=st.tuples(one_or_two, one_or_two),
    groups=st.integers(1, 3),
    width=st.sampled_from([1, 2, 30]),
    mode=st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    memory_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_convolutions_of_every_kind_agree_with_autograd(
    data, size, kernel, stride, dilation, groups, width, mode, bias, memory_format, dtype
) -> None:
    """Widths on both sides of the choice between the two ways."""
    words = ["same", "valid"] if stride == (1, 1) else ["valid"]
    padding = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)) | st.sampled_from(words))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(padding != "valid" or (reach[0] <= size[0] and reach[1] <= size[1]))
    assume(padding in ("same", "valid") or all(r <= s + 2 * p for r, s, p in zip(reach, size, padding, strict=True)))
    torch.manual_seed(0)
    layer = nn.Conv2d(2 * groups, width * groups, kernel, stride, padding, dilation, groups, bias, mode)
    images = torch.randn(3, 2 * groups, *size, dtype=dtype).to(memory_format=memory_format)
    assert_sampler_agrees(layer, images, TOLERANCE[dtype])


@given(
    data=st.data(),
    size=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(one_or_two, st.integers(1, 3)),
    dilation=st.tuples(one_or_two, st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 2)),
    groups=st.integers(1, 3),
    width=st.sampled_from([1, 2, 30]),
    bias=st.booleans(),
    memory_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_transposed_convolutions_of_every_kind_agree_with_autograd(
    data, size, kernel, stride, dilation, padding, groups, width, bias, memory_format, dtype
) -> None:
    """Output padding up to what torch allows, which may exceed the stride."""
    extra = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    sides = [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, s, p, d, k, e in zip(size, stride, padding, dilation, kernel, extra, strict=True)
    ]
    assume(min(sides) > 0)
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(
        width * groups, 2 * groups, kernel, stride, padding, extra, groups, bias, dilation=dilation
    )
    images = torch.randn(3, width * groups, *size, dtype=dtype).to(memory_format=memory_format)
    assert_sampler_agrees(layer, images, TOLERANCE[dtype])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_group_norm_agrees_with_autograd(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 6, 7, 5, dtype=dtype).to(memory_format=memory_format)
    assert_sampler_agrees(nn.GroupNorm(3, 6), images, TOLERANCE[dtype])


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("build", [unet, Residual])
def test_networks_agree_with_autograd_sample_by_sample(build, memory_format, wrap) -> None:
    """In float64: in float32 the rounding of the two forward passes can put one value on two sides of a ReLU."""
    torch.manual_seed(0)
    model = build().double().to(memory_format=memory_format)
    images = torch.randn(3, 3, 16, 24, dtype=torch.float64).to(memory_format=memory_format)
    expected = one_by_one(model, images)
    for name, grads in ours(model, images, wrap).items():
        torch.testing.assert_close(grads, expected[name], rtol=0, atol=1e-10 * float(expected[name].norm()), msg=name)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("build", [unet, Residual])
def test_per_sample_gradients_add_up_to_the_gradient_of_the_batch(build, memory_format, wrap) -> None:
    """In float32, where both come from the same forward pass."""
    torch.manual_seed(0)
    model = build().to(memory_format=memory_format)
    images = torch.randn(4, 3, 16, 24).to(memory_format=memory_format)
    grads = ours(model, images, wrap)
    summed_loss(model(images)).backward()
    for name, parameter in model.named_parameters():
        assert (grads[name].sum(0) - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("build", [unet, Residual])
def test_an_empty_batch_gives_zero_size_gradients(build, wrap) -> None:
    """As Poisson sampling draws one now and then."""
    model = build().to(memory_format=torch.channels_last)
    grads = ours(model, torch.zeros(0, 3, 16, 16), wrap)
    for name, parameter in model.named_parameters():
        assert grads[name].shape == (0, *parameter.shape)


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(2, 4, 2, stride=2), nn.GroupNorm(2, 2)])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_parameter_that_is_not_trained_has_no_gradients(layer: nn.Module, frozen: str) -> None:
    layer = copy.deepcopy(layer)
    getattr(layer, frozen).requires_grad_(False)
    assert_sampler_agrees(layer, torch.randn(2, 2, 6, 6), 1e-5)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("frozen", ["first.0.weight", "second.0.weight", "shortcut.weight", "shortcut.bias"])
def test_a_network_may_be_frozen_in_part(frozen: str, wrap) -> None:
    torch.manual_seed(0)
    model = Residual().double()
    model.get_parameter(frozen).requires_grad_(False)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    grads, expected = ours(model, images, wrap), one_by_one(model, images)
    assert frozen not in grads
    assert grads.keys() == expected.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("width", [2, 64], ids=["by sample", "by product"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.GroupNorm])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_under_autocast_sums_are_taken_in_float32(kind: type[nn.Module], width: int, inside: bool) -> None:
    """Activations and backprops are bfloat16; their gradients equal the float64 ones of the same values."""
    torch.manual_seed(0)
    layer = nn.GroupNorm(2, width) if kind is nn.GroupNorm else kind(width, width, 2, stride=2)
    images, sampler = torch.randn(2, width, 8, 8).bfloat16(), conv_grad_sample
    if isinstance(layer, nn.GroupNorm):
        sampler = group_norm_grad_sample
    with torch.autocast("cpu", torch.bfloat16):
        backprops = torch.randn_like(layer(images))
    assert backprops.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        grads = sampler(layer, [images], backprops)
    exact = copy.deepcopy(layer).double()
    expected = sampler(exact, [images.double()], backprops.double())
    for parameter, same in zip(layer.parameters(), exact.parameters(), strict=True):
        assert grads[parameter].dtype == torch.float32
        torch.testing.assert_close(grads[parameter].double(), expected[same], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_under_autocast_gradients_of_a_network_add_up_in_float32(wrap) -> None:
    """Within 1 %: the gradient of the batch is rounded to bfloat16, these are not."""
    torch.manual_seed(0)
    model = Residual().to(memory_format=torch.channels_last)
    images = torch.randn(3, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        grads, loss = ours(model, images, wrap), summed_loss(model(images))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (grads[name].sum(0) - parameter.grad).norm() < 0.01 * parameter.grad.norm(), name
        assert grads[name].dtype == torch.float32 or name.startswith("head")  # the linear head is Opacus' own


def test_the_lean_module_leaves_out_the_gradient_that_dp_throws_away() -> None:
    """Of convolutions; and the step of the DP optimizer is the same to the bit."""
    torch.manual_seed(0)
    register_grad_samplers()
    start, images = unet(), torch.randn(4, 3, 16, 16)
    ends = []
    for wrap in WRAPPERS:
        model = wrap(copy.deepcopy(start))
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=4,
            generator=torch.Generator().manual_seed(1),
        )
        (summed_loss(model(images)) / 4).backward()
        has_grad = [layer.weight.grad is not None for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        assert set(has_grad) == {wrap is GradSampleModule}
        optimizer.step()
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("how", ["evaluation", "hooks disabled", "hooks removed", "unwrapped"])
def test_without_hooks_the_lean_module_has_ordinary_gradients(how: str) -> None:
    torch.manual_seed(0)
    start, images = unet(), torch.randn(2, 3, 16, 16)
    model = LeanGradSampleModule(copy.deepcopy(start))
    match how:
        case "evaluation":
            model.eval()
            start.eval()
            model.disable_hooks()  # Opacus' backward hook takes activations for granted
        case "hooks disabled":
            model.disable_hooks()
        case "hooks removed":
            model.remove_hooks()
        case "unwrapped":
            model = copy.deepcopy(model.to_standard_module())
            assert not any("forward" in vars(layer) for layer in model.modules())
    for network in (start, model):
        summed_loss(network(images)).backward()
    for ours, theirs in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_the_lean_module_passes_on_what_a_layer_is_called_with() -> None:
    """A transposed convolution may be given the size of its output, which sets its output padding."""

    class Enlarge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 3, 3, stride=2, padding=1)

        def forward(self, images: Tensor) -> Tensor:
            return self.up(images, output_size=[8, 7])

    model, images = Enlarge().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = one_by_one(model, images)
    for name, grads in ours(model, images, LeanGradSampleModule).items():
        torch.testing.assert_close(grads, expected[name])
