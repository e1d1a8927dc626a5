"""What the tests share: a small generated data set with splits, and a configuration that trains on it in seconds."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# the same examples on every machine, however slow
settings.register_profile(
    "ours", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ours")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers of pytest-xdist on two cores


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Whatever a test draws does not depend on the tests before it: a failure comes back when it is run alone."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def registries_as_they_were() -> Iterator[None]:
    """What a test's plugin registers is not there for the next one."""
    from ml_src.core.losses.segmentation import LOSS_REGISTRY
    from ml_src.core.network import MODEL_REGISTRY

    registries: list[dict[str, Any]] = [LOSS_REGISTRY, MODEL_REGISTRY]
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture(scope="session")
def sample_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 16 generated images of 64x64, split into 3 folds. Tests must not write into it."""
    from ml_src.cli import split
    from ml_src.core.data.sample import write_sample

    data = tmp_path_factory.mktemp("shared") / "sample"
    write_sample(data, num_images=16, height=64, width=64)
    folders = ["--raw_data", str(data / "images"), "--mask_data", str(data / "masks")]
    assert split.main([*folders, "--folds", "3", "--task", "segmentation"]) == 0
    return data


@pytest.fixture
def small_config(sample_dir: Path) -> dict[str, Any]:
    """Plain data of a configuration: 8 base channels, 2 epochs, no worker processes."""
    return {
        "data": {"data_dir": str(sample_dir), "num_classes": 3, "class_names": ["background", "cell", "fibre"]},
        "model": {"base_channels": 4},
        "loss": {"type": "dice_bce_loss"},
        "training": {"batch_size": 4, "num_epochs": 2, "num_workers": 0},
        "optimizer": {"type": "adam", "lr": 0.002},
        "transforms": {
            "train": [
                {"type": "random_horizontal_flip"},
                {"type": "random_rotation", "degrees": 20},
                {"type": "normalize", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
            ],
        },
    }


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, where there is one; its tests are skipped where there is not."""
    folder = Path(os.environ.get("ML_SRC_DATA", "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set ML_SRC_DATA)")
    return folder
