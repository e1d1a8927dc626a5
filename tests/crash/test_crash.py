"""Runs that are killed, damaged or out of disk go on to the same bits; `make crash` does it at length."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from crash import Crash, Process, Start, sha256, survive
from known_forks import Forks

pytestmark = pytest.mark.xdist_group("crash")  # what they share is made once

# Accelerate with one process is left to `make crash`: each start costs seconds.
SHORT = {
    "standard": [Crash("write", then="cut"), Crash("full disk")],
    "mixed_precision": [Crash("step", then="between renames")],
    "accelerate, 2 processes": [Crash("write")],
    "dp": [Crash("write")],
}


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts ml-train in a fork of a process that has imported what it needs; `make crash` starts it as users do."""
    with Forks("ml_src.core.trainers.dp", "ml_src.core.trainers.mixed_precision") as forks:

        def fork(words: list[str], folder: Path) -> Process:
            return forks.start("ml_src.cli.train:main", words, folder)

        yield fork


@pytest.mark.parametrize("trainer", SHORT)
def test_a_run_that_is_killed_damaged_or_out_of_disk_ends_with_the_bits_of_one_that_was_left_alone(
    trainer: str, tmp_path: Path, start: Start
) -> None:
    """`survive` also asserts that a fallback is said, and that a full disk is one sentence and leaves a good file."""
    crashes = SHORT[trainer]
    result = survive(trainer, crashes, tmp_path, num_epochs=len(crashes), start=start)
    assert result.equal == "yes" and result.kills and result.resumes >= len(crashes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_the_hash_sees_one_bit_a_name_a_shape_and_a_setting(dtype: torch.dtype) -> None:
    state = {"state": {0: {"step": torch.ones((), dtype=dtype)}}, "groups": [{"lr": 0.1, "params": [0]}]}
    same = copy.deepcopy(state)
    assert sha256(same) == sha256(state)
    bit = copy.deepcopy(state)
    bit["state"][0]["step"].view(-1).view(torch.uint8)[0] ^= 1
    shape = copy.deepcopy(state)
    shape["state"][0]["step"] = shape["state"][0]["step"].view(1)
    name = {**state, "state": {1: state["state"][0]}}
    setting = {**state, "groups": [{"lr": 0.2, "params": [0]}]}
    assert len({sha256(one) for one in (state, bit, shape, name, setting)}) == 5
