"""What the tests of simulations share: a small data set in three folds, and configurations of federations over it."""

from pathlib import Path
from typing import Any

import pytest
from known_sites import Configure, plain_config

from ml_src.core.config import Config
from ml_src.core.config_file import parse_config


@pytest.fixture(scope="session")
def site_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 30 generated images of 64x64 in 3 folds. Tests must not write into it."""
    from ml_src.cli import split
    from ml_src.core.data.sample import write_sample

    data = tmp_path_factory.mktemp("federated") / "sample"
    write_sample(data, num_images=30, height=64, width=64)
    folders = ["--raw_data", str(data / "images"), "--mask_data", str(data / "masks")]
    assert split.main([*folders, "--folds", "3", "--task", "segmentation"]) == 0
    return data


@pytest.fixture
def raw(site_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Plain data of a federation of three sites over two rounds; runs are written below tmp_path."""
    monkeypatch.chdir(tmp_path)
    return plain_config(site_data)


@pytest.fixture
def configure(raw: dict[str, Any]) -> Configure:
    """Call it with keys of `federated`, and with dotted keys of anything else in `also`."""

    def make(also: dict[str, Any] | None = None, **federated: Any) -> Config:
        return parse_config(raw | {"federated": raw["federated"] | federated}, also or {})

    return make
