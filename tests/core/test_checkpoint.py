"""Checkpoints: whole or not there, and opened without running anything."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ml_src.core.checkpoint import load_checkpoint, previous_of, random_state, save_checkpoint, set_random_state
from ml_src.core.errors import CheckpointError


def contents() -> dict[str, Any]:
    return {
        "model_state_dict": {"w": torch.arange(3.0)},
        "raw_state_dict": {},
        "optimizer_state_dict": {},
        "scheduler_state_dict": {},
        "config": {"seed": 1},
        "class_names": ["a", "b"],
        "epoch": 3,
        "step": 12,
        "metrics": {"val_iou": 0.5},
        "epoch_step": 2,
        "batch_size": 4,
        "backend_state_dict": {},
        "callback_state_dicts": {},
        "processes": [{"random_state": random_state()}],
        "num_threads": 1,
        "seconds": 0.5,
    }


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", contents())
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded["model_state_dict"]["w"], torch.arange(3.0))
    assert loaded["format_version"] == 2 and loaded["class_names"] == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_the_file_before_is_kept_where_asked(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "last.pt", {**contents(), "step": step}, keep_previous=True)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3
    assert load_checkpoint(previous_of(tmp_path / "last.pt"))["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.previous.pt", "last.pt"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", contents())
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_checkpoint(tmp_path / "a.pt", {**contents(), "config": {"cannot": (lambda: None)}})
    assert load_checkpoint(tmp_path / "a.pt")["epoch"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("bomb_went_off"),))


def hostile(path: Path, kind: str) -> None:
    match kind:
        case "pickle":
            path.write_bytes(pickle.dumps(Bomb()))
        case "torch":
            torch.save({**contents(), "format_version": 2, "config": Bomb()}, path)
        case "old torch":
            torch.save(Bomb(), path, _use_new_zipfile_serialization=False)
        case "module":
            torch.save(torch.nn.Linear(1, 1), path)
        case "weights alone":
            torch.save({"w": torch.zeros(1)}, path)
        case "wrong types":
            torch.save({**contents(), "format_version": 2, "epoch": "3"}, path)
        case "numpy":
            torch.save({**contents(), "format_version": 2, "metrics": {"a": np.float64(1)}}, path)
        case "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("a/data.pkl", pickle.dumps(Bomb()))
        case "truncated":
            save_checkpoint(path, contents())
            path.write_bytes(path.read_bytes()[:-200])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not a checkpoint")


@pytest.mark.parametrize(
    "kind",
    [
        "pickle", "torch", "old torch", "module", "weights alone", "wrong types", "numpy", "zip",
        "truncated", "empty", "text",
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_one_sentence_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile(tmp_path / "a.pt", kind)
    with pytest.raises(CheckpointError, match="is not a checkpoint of this program") as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    assert not Path("bomb_went_off").exists()


def test_a_later_format_and_a_missing_file_are_named(tmp_path: Path) -> None:
    torch.save({**contents(), "format_version": 99}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="later version"):
        load_checkpoint(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "b.pt")


def test_the_random_state_survives_the_safe_loader(tmp_path: Path) -> None:
    import random

    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    np.random.normal(), random.gauss(0, 1)  # leaves a cached second value in both
    save_checkpoint(tmp_path / "a.pt", contents())
    expected = (torch.rand(3).tolist(), np.random.normal(size=3).tolist(), [random.gauss(0, 1) for _ in range(3)])
    set_random_state(load_checkpoint(tmp_path / "a.pt")["processes"][0]["random_state"])
    assert (
        torch.rand(3).tolist(),
        np.random.normal(size=3).tolist(),
        [random.gauss(0, 1) for _ in range(3)],
    ) == expected
