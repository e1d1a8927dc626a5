"""Batches: their order, their one size, and what fills up the smaller samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ml_src.core.config_file import parse_config
from ml_src.core.data.loaders import Collate, Loader
from ml_src.core.data.order import EpochOrder, ShareOfBatches
from ml_src.core.data.segmentation import Sample, SampleKey
from ml_src.core.tasks import task_for
from ml_src.core.transforms import TRANSFORM_REGISTRY


def loader_of(raw: dict[str, Any], **overrides: Any) -> Loader:
    task = task_for(parse_config(raw, overrides))
    order = EpochOrder(task.num_images("train"), 4, 4, overrides.get("seed", 42), shuffle=True)
    return task.loader("train", order, training=True)


Epoch = list[tuple[torch.Tensor, torch.Tensor]]


def epoch_of(loader: Loader, epoch: int, first_step: int = 0) -> Epoch:
    return [(batch.images, batch.masks) for batch in loader.epoch(epoch, first_step) if batch.masks is not None]


def same(a: Epoch, b: Epoch) -> bool:
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in pairs for x, y in zip(p, q, strict=True))


def test_every_sample_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    order = EpochOrder(10, batch_size=2, step_size=4, seed=3, shuffle=True)
    orders = []
    for epoch in range(3):
        steps = order.epoch(epoch)
        assert len(steps) == order.num_steps == 3
        assert [[len(batch) for batch in step.batches] for step in steps] == [[2, 2], [2, 2], [2]]
        assert [step.num_samples for step in steps] == [4, 4, 2]
        orders.append([index for step in steps for batch in step.batches for index in batch])
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_a_step_has_the_same_images_however_many_processes_share_it(num_processes: int) -> None:
    alone = EpochOrder(31, batch_size=30, step_size=30, seed=1, shuffle=True)
    shares = [
        EpochOrder(31, 30 // num_processes // 2, 30, 1, True, rank, num_processes).epoch(4)
        for rank in range(num_processes)
    ]
    for number, step in enumerate(alone.epoch(4)):
        together = [share[number] for share in shares]
        assert {part.num_samples for part in together} == {step.num_samples}
        assert len({len(part.batches) for part in together}) == 1  # none waits for a batch that another has not
        assert sorted(i for part in together for b in part.batches for i in b) == sorted(step.batches[0])


@pytest.mark.parametrize("num_samples", [1, 2, 7])
def test_measuring_counts_every_image_once_also_with_more_processes_than_images(num_samples: int) -> None:
    shares = [ShareOfBatches(num_samples, 2, rank, 5) for rank in range(5)]
    images = [index for share in shares for step in share.epoch(0) for batch in step.batches for index in batch]
    assert sorted(images) == list(range(num_samples))


def test_an_empty_batch_has_the_size_of_an_image_and_no_image(small_config: dict[str, Any]) -> None:
    """One image, three processes: two of them get nothing, but must take part in the step."""
    task = task_for(parse_config(small_config))
    order = EpochOrder(1, 2, 6, rank=2, num_processes=3)
    (step,) = task.loader("train", order, training=True).steps()
    (batch,) = step.batches
    assert step.num_samples == 1 and len(batch) == 0 and batch.images.shape == (0, 3, 64, 64)
    assert batch.masks is not None and batch.masks.shape == (0, 64, 64) and batch.sizes == []


def test_an_epoch_entered_later_has_the_rest_of_the_same_batches(small_config: dict[str, Any]) -> None:
    whole, late = loader_of(small_config), loader_of(small_config)
    assert same(epoch_of(whole, 4)[1:], epoch_of(late, 4, first_step=1))


EVERY_TRANSFORM: list[dict[str, Any]] = [
    {"type": "random_crop", "size": [48, 40], "classes": [1, 2]},
    {"type": "random_horizontal_flip"},
    {"type": "random_vertical_flip"},
    {"type": "random_transpose"},
    {"type": "random_rotate90"},
    {"type": "random_rotation", "degrees": 30},
    {"type": "random_scale"},
    {"type": "random_shift"},
    {"type": "random_shear", "degrees": 10},
    {"type": "random_perspective"},
    {"type": "grid_distortion"},
    {"type": "elastic"},
    {"type": "random_resize_crop", "sizes": [[24, 32], [32, 24]]},
    {"type": "resize", "size": [32, 32]},
    {"type": "color_jitter", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1},
    {"type": "random_brightness_contrast"},
    {"type": "random_gamma"},
    {"type": "gaussian_noise"},
    {"type": "gaussian_blur"},
    {"type": "coarse_dropout"},
    {"type": "normalize", "mean": [0.5], "std": [0.25]},
]


def test_the_list_of_every_transform_has_every_transform() -> None:
    assert {line["type"] for line in EVERY_TRANSFORM} == set(TRANSFORM_REGISTRY)


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("transforms", [None, EVERY_TRANSFORM])
def test_samples_do_not_depend_on_the_workers(
    small_config: dict[str, Any], num_workers: int, transforms: list[dict[str, Any]] | None
) -> None:
    if transforms is not None:
        small_config["transforms"] = {"train": transforms}
    alone = loader_of(small_config)
    with_workers = loader_of(small_config, **{"training.num_workers": num_workers})
    for epoch in (0, 1, 5):
        assert same(epoch_of(alone, epoch), epoch_of(with_workers, epoch))


def test_epochs_differ_and_seeds_differ(small_config: dict[str, Any]) -> None:
    loader = loader_of(small_config)
    first = epoch_of(loader, 0)
    assert not same(first, epoch_of(loader, 1)) and same(first, epoch_of(loader, 0))
    assert not same(first, epoch_of(loader_of(small_config, seed=7), 0))


def test_random_resize_crop_gives_each_batch_one_size_and_the_run_several(small_config: dict[str, Any]) -> None:
    small_config["transforms"] = {"train": [{"type": "random_resize_crop", "sizes": [[16, 16], [24, 32], [48, 40]]}]}
    loader = loader_of(small_config)
    sizes = {tuple(images.shape[2:]) for epoch in range(6) for images, _ in epoch_of(loader, epoch)}
    assert sizes == {(16, 16), (24, 32), (48, 40)}


def sample(height: int, width: int, dtype: type = np.uint8) -> Sample:
    return Sample(np.full((height, width, 3), 9, np.uint8), np.ones((height, width), dtype), (height, width))


def test_smaller_samples_are_filled_up_with_what_is_ignored() -> None:
    batch = Collate(ignore_index=255)([sample(4, 6), sample(5, 3)])
    assert batch.images.shape == (2, 3, 5, 6) and batch.masks is not None
    assert batch.masks.dtype == torch.uint8
    assert (batch.masks[1, :, 3:] == 255).all() and (batch.masks[1, :, :3] == 1).all()
    assert (batch.images[1, :, :, 3:] == 0).all() and (batch.images[0, :, :4] == 9).all()
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.sizes == [(4, 6), (5, 3)]


def test_one_wide_mask_in_a_batch_keeps_its_values_too() -> None:
    wide = Sample(np.zeros((2, 2, 3), np.uint8), np.full((2, 2), 299, np.uint16), (2, 2))
    batch = Collate(ignore_index=255)([sample(2, 2), wide])
    assert batch.masks is not None and (batch.masks[1] == 299).all()


def test_wide_masks_keep_their_values() -> None:
    batch = Collate(ignore_index=65535)([sample(2, 2, np.uint16)])
    assert batch.masks is not None and batch.masks.dtype == torch.int32


def test_eight_bit_masks_can_have_a_sixteen_bit_ignore_value(small_config: dict[str, Any], sample_dir: Path) -> None:
    small_config["data"] = {"data_dir": str(sample_dir), "num_classes": 300}
    task = task_for(parse_config(small_config))
    _, mask, size = task.loader("train", training=True).dataset[SampleKey(0, 1, 0)]
    assert mask is not None and mask.dtype == np.uint16 and size == (64, 64)
    assert set(np.unique(mask)) <= {0, 1, 2, 65535} and (mask == 65535).any()
