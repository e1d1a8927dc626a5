"""Images in, label maps out: the same whatever the tiles, batches, members and bands of rows."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from known_networks import Blurred, ByBrightness, drawn_data, member_of, write_gray
from PIL import Image
from torch import Tensor, nn

from ml_src.core.inference import planes, scene
from ml_src.core.inference.inputs import Input
from ml_src.core.inference.members import Member, weighted
from ml_src.core.inference.predictor import Failed, Options, Predicted, most_probable, predict
from ml_src.core.inference.views import parse_views


def inputs(*paths: Path) -> list[Input]:
    return [Input(PurePosixPath(path.stem), path) for path in paths]


def predicted(paths: Sequence[Path], members: Sequence[Member], **options: Any) -> list[Predicted]:
    found = list(predict(inputs(*paths), weighted(members, None), Options(**options)))
    assert all(isinstance(one, Predicted) for one in found)
    return found  # type: ignore[return-value]


def labels_of(paths: Sequence[Path], members: Sequence[Member], **options: Any) -> list[np.ndarray]:
    return [one.labels.whole().copy() for one in predicted(paths, members, **options)]


@pytest.fixture
def grays(tmp_path: Path) -> list[Path]:
    sizes = [(40, 40), (1, 1), (17, 163), (164, 16), (133, 100), (40, 40)]
    for number, size in enumerate(sizes):
        write_gray(tmp_path / f"{number}.png", *size, seed=number)
    return [tmp_path / f"{number}.png" for number in range(len(sizes))]


def test_images_of_any_size_come_back_in_order_at_their_own_size(tmp_path: Path) -> None:
    sizes = [(40, 40), (17, 63), (64, 16), (33, 100), (1, 1)]
    data = drawn_data(tmp_path / "d", sizes)
    paths = [data / f"images/{number}.png" for number in range(len(sizes))]
    found = labels_of(paths, [member_of(ByBrightness())])
    for number, labels in enumerate(found):
        assert np.array_equal(labels, np.array(Image.open(data / f"masks/{number}.png")))


@pytest.mark.parametrize("options", [{"tile": 64}, {"tile": 128, "overlap": 0.5}, {"tile": 96, "blend": "cosine"}])
def test_tiles_leave_no_seam(grays: list[Path], options: dict[str, Any]) -> None:
    """Where tiles overlap by more than the network sees, nothing of the tiles is left."""
    whole = labels_of(grays, [member_of(Blurred())])
    tiled = labels_of(grays, [member_of(Blurred())], **options)
    pixels = [np.concatenate([labels.ravel() for labels in each]) for each in (whole, tiled)]
    assert (pixels[0] == pixels[1]).mean() >= 0.999


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_size_of_a_batch_changes_nothing(grays: list[Path], batch_size: int) -> None:
    tiled = [labels_of(grays, [member_of(Blurred())], tile=32, batch_size=size) for size in (3, batch_size)]
    assert all(np.array_equal(one, other) for one, other in zip(*tiled, strict=True))


def test_what_does_not_fit_into_memory_is_the_same(grays: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"tile": 64, "probabilities": True, "uncertainty": True}
    usual = predicted(grays, [member_of(Blurred())], **asked)
    monkeypatch.setattr(planes, "IN_MEMORY", 100)
    monkeypatch.setattr(planes, "BAND", 500)
    banded = predicted(grays, [member_of(Blurred())], **asked)
    assert not banded[-1].labels.in_memory
    for one, other in zip(usual, banded, strict=True):
        assert np.array_equal(one.labels.whole(), other.labels.whole())
        assert one.probs and other.probs and np.array_equal(one.probs.whole(), other.probs.whole())
        assert one.uncertainty and other.uncertainty
        assert np.array_equal(one.uncertainty.whole(), other.uncertainty.whole())


def test_an_image_that_is_resized_is_read_at_the_size_of_training_and_enlarged(tmp_path: Path) -> None:
    gray = write_gray(tmp_path / "a.png", 90, 70)
    resize = [{"type": "resize", "size": [45, 35]}, {"type": "normalize", "mean": [0.0], "std": [1.0]}]
    member = member_of(ByBrightness(), **{"transforms.train": resize})
    labels = labels_of([tmp_path / "a.png"], [member])[0]
    assert labels.shape == (90, 70)
    assert (labels == np.rint(gray / 127.5)).mean() > 0.97


@pytest.mark.parametrize("band", [300, 1 << 22])
def test_members_of_different_sizes_and_architectures_mix(
    grays: list[Path], band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their probabilities are averaged at the size of the file, by hand as by the ensemble."""
    monkeypatch.setattr(planes, "BAND", band)
    resize = [{"type": "resize", "size": [48, 64]}, {"type": "normalize", "mean": [0.0], "std": [1.0]}]
    members = [
        member_of(Blurred()),
        member_of(ByBrightness(), **{"transforms.train": resize}),
        member_of(Blurred(), **{"transforms.train": [{"type": "normalize", "mean": [0.1], "std": [0.9]}]}),
    ]
    alone = [predicted(grays, [member], probabilities=True) for member in members]
    together = list(predict(inputs(*grays), weighted(members, [2, 1, 1]), Options(probabilities=True, tile=64)))
    for index, merged in enumerate(together):
        assert isinstance(merged, Predicted) and merged.probs
        parts = [each[index].probs.whole().astype(np.float64) for each in alone]  # type: ignore[union-attr]
        by_hand = (2 * parts[0] + parts[1] + parts[2]) / 4
        assert np.allclose(merged.probs.whole(), by_hand, atol=0.02)


class Certain(nn.Module):
    """Says one class everywhere, with a certainty."""

    def __init__(self, label: int, logit: float) -> None:
        super().__init__()
        self.label, self.logit = label, logit

    def forward(self, images: Tensor) -> Tensor:
        logits = images.new_zeros(len(images), 3, *images.shape[2:])
        logits[:, self.label] = self.logit
        return logits


def test_hard_voting_counts_heads_and_soft_voting_how_sure_they_are(grays: list[Path]) -> None:
    members = [member_of(Certain(0, 1.0)), member_of(Certain(0, 1.0)), member_of(Certain(2, 20.0))]
    assert (labels_of(grays[:1], members, ensemble_aggregation="voting")[0] == 0).all()
    assert (labels_of(grays[:1], members)[0] == 2).all()


def test_uncertainty_is_0_to_1_and_disagreement_shows_in_its_second_band(grays: list[Path]) -> None:
    agreed = predicted(grays[:1], [member_of(Certain(1, 0.0))] * 2, uncertainty=True)[0].uncertainty
    divided = predicted(grays[:1], [member_of(Certain(0, 50.0)), member_of(Certain(1, 50.0))], uncertainty=True)[
        0
    ].uncertainty
    assert agreed and divided
    assert np.allclose(agreed.whole(), [1, 0], atol=1e-3)  # each knows nothing, and all say the same
    assert np.allclose(divided.whole(), [np.log(2) / np.log(3)] * 2, atol=1e-3)  # each is sure of something else
    single = predicted(grays[:1], [member_of(Certain(1, 50.0))], uncertainty=True)[0].uncertainty
    assert single and single.shape[2] == 1 and np.allclose(single.whole(), 0, atol=1e-3)


def test_augmentation_leaves_a_symmetric_network_as_it_is(grays: list[Path]) -> None:
    views = parse_views(
        ["horizontal_flip", "vertical_flip", "rotate_90", "rotate_180", "rotate_270", "transpose"], True
    )
    plain = predicted(grays, [member_of(Blurred())], probabilities=True, tile=64)
    for how in ("mean", "max"):
        augmented = predicted(
            grays, [member_of(Blurred())], probabilities=True, tile=64, views=views, tta_aggregation=how
        )
        for one, other in zip(plain, augmented, strict=True):
            assert one.probs and other.probs
            assert np.allclose(one.probs.whole(), other.probs.whole(), atol=2e-3)


def test_a_damaged_file_fails_alone(grays: list[Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(grays[4].read_bytes()[:-900])
    (tmp_path / "text.png").write_text("no picture")
    paths = [grays[0], damaged, grays[5], tmp_path / "text.png", tmp_path / "gone.png", grays[3]]
    members = [member_of(Blurred()), member_of(Blurred(), **{"data.num_classes": 3, "model.in_channels": 3,
               "transforms.train": [{"type": "normalize", "mean": [0.1], "std": [0.9]}]})]  # fmt: skip
    for ensemble in (members[:1], members):
        found = list(predict(inputs(*paths), weighted(ensemble, None), Options(tile=32)))
        assert [isinstance(one, Failed) for one in found] == [False, True, False, True, True, False]
        assert [one.item.path for one in found] == paths
        for index, path in ((1, damaged), (3, tmp_path / "text.png"), (4, tmp_path / "gone.png")):
            failed = found[index]
            assert isinstance(failed, Failed) and str(path) in failed.problem
        last = found[-1]
        assert isinstance(last, Predicted) and last.labels.shape == (164, 16)


def test_a_large_scene_is_read_by_windows_and_predicted_as_a_whole_one(tmp_path: Path) -> None:
    gray = write_gray(tmp_path / "a.png", 1100, 1030)
    tifffile.imwrite(tmp_path / "tiled.tif", gray, tile=(256, 256), compression="deflate")
    expected = labels_of([tmp_path / "a.png"], [member_of(Blurred())])[0]
    scene = predicted([tmp_path / "tiled.tif"], [member_of(Blurred())], tile=256)[0]
    assert scene.image is None  # it was never whole
    assert (scene.labels.whole() == expected).mean() >= 0.999
    assert np.array_equal(scene.guide(700, 720)[:, :, 0], gray[700:720])


@pytest.mark.parametrize("damaged", [0, 7, 24])
def test_a_scene_with_a_damaged_tile_fails_alone_wherever_the_tile_is(tmp_path: Path, damaged: int) -> None:
    gray = write_gray(tmp_path / "a.png", 1100, 1030)
    path = tmp_path / "scene.tif"
    tifffile.imwrite(path, gray, tile=(256, 256), compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        start, length = page.dataoffsets[damaged], page.databytecounts[damaged]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * length)
    found = list(predict(inputs(tmp_path / "a.png", path, tmp_path / "a.png"), weighted([member_of(Blurred())], None),
                         Options(tile=256)))  # fmt: skip
    assert [isinstance(one, Failed) for one in found] == [False, True, False]
    first, last = found[0], found[2]
    assert isinstance(first, Predicted) and isinstance(last, Predicted)
    assert np.array_equal(first.labels.whole(), last.labels.whole())


def test_a_member_without_weight_has_no_say(grays: list[Path]) -> None:
    resize = [{"type": "resize", "size": [48, 64]}, {"type": "normalize", "mean": [0.0], "std": [1.0]}]
    members = [member_of(Blurred()), member_of(Certain(2, 9.0), **{"transforms.train": resize})]
    alone = labels_of(grays, members[:1])
    asked = Options(uncertainty=True)
    for one, other in zip(alone, predict(inputs(*grays), weighted(members, [1, 0]), asked), strict=True):
        assert isinstance(other, Predicted) and np.array_equal(one, other.labels.whole())


def test_a_class_that_is_ignored_is_not_the_label_of_pixels_without_data(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30), np.float32)
    pixels[:4] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    one = predicted([tmp_path / "a.tif"], [member_of(ByBrightness(), **{"data.ignore_index": 0})])[0]
    assert one.nodata == 255 and np.bincount(one.labels.whole().ravel()).nonzero()[0].tolist() == [0, 255]


def test_a_large_image_that_is_resized_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gray(tmp_path / "a.png", 90, 70)
    resize = [{"type": "resize", "size": [45, 35]}, {"type": "normalize", "mean": [0.0], "std": [1.0]}]
    members = [member_of(ByBrightness(), **{"transforms.train": resize})]
    kept = predicted([tmp_path / "a.png"], members)[0]
    monkeypatch.setattr(scene, "KEPT_BYTES", 100)
    dropped = predicted([tmp_path / "a.png"], members)[0]
    assert kept.image is not None and dropped.image is None
    assert np.array_equal(kept.guide(10, 20), dropped.guide(10, 20))
    assert np.array_equal(kept.labels.whole(), dropped.labels.whole())


def test_pixels_without_data_get_no_class(tmp_path: Path) -> None:
    pixels = np.linspace(0, 1, 64 * 80, dtype=np.float32).reshape(64, 80)
    pixels[10:20, 30:50] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    asked = {"probabilities": True, "uncertainty": True}
    one = predicted([tmp_path / "a.tif"], [member_of(ByBrightness(), **{"data.num_classes": 3})], **asked)[0]
    labels = one.labels.whole()
    assert one.nodata == 255 and (labels[10:20, 30:50] == 255).all() and (labels == 255).sum() == 200
    assert one.probs and one.uncertainty
    assert np.isnan(one.probs.whole()[10:20, 30:50]).all() and np.isnan(one.probs.whole()).sum() == 600
    assert np.isnan(one.uncertainty.whole()).sum() == 200


@pytest.mark.parametrize("num_classes", [1, 2, 3, 300])
def test_the_most_probable_class_is_that_of_an_argmax_and_of_equals_the_first(num_classes: int) -> None:
    probs = np.random.default_rng(0).integers(0, 4, (num_classes, 30, 20)).astype(np.float32)
    labels = most_probable(probs, np.dtype(np.uint16))
    assert np.array_equal(labels, probs.argmax(axis=0)) and labels.dtype == np.uint16


def test_progress_is_told_in_parts_of_images(grays: list[Path]) -> None:
    told: list[float] = []
    list(predict(inputs(*grays), weighted([member_of(Blurred())], None), Options(tile=32), told.append))
    assert told == sorted(told) and told[-1] == len(grays) and any(number % 1 for number in told)


def test_half_precision_is_used_only_where_training_used_it() -> None:
    mixed = {"training.trainer_type": "mixed_precision"}
    assert member_of(Blurred()).amp_dtype is None
    dtype = member_of(Blurred(), **mixed).amp_dtype
    assert dtype is (torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None)


class OnlyMultiples(Blurred):
    """Fails unless both sides are multiples of 32, as encoders that halve do."""

    def forward(self, images: Tensor) -> Tensor:
        if any(side % 32 for side in images.shape[-2:]):
            raise RuntimeError(f"{tuple(images.shape)} does not fit together")
        return super().forward(images)


def test_a_network_that_takes_multiples_only_is_given_them(grays: list[Path]) -> None:
    found = labels_of(grays, [member_of(OnlyMultiples())])
    expected = labels_of(grays, [member_of(Blurred())])
    for one, other in zip(found, expected, strict=True):
        inner = (slice(0, one.shape[0] - 5), slice(0, one.shape[1] - 5))  # what is repeated at the edges is seen there
        assert np.array_equal(one[inner], other[inner])
