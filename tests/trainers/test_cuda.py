"""What only a CUDA GPU can show: gradient scaling, skipped steps, compiled networks, numbers on their way."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.config_file import parse_config
from ml_src.core.device import Peek
from ml_src.core.trainers import Outcome, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(raw: dict[str, Any], resume: Path | None = None, **overrides: Any) -> Outcome:
    half = {"training.trainer_type": "mixed_precision", "training.device": "cuda", "training.amp_dtype": "float16"}
    return train(parse_config(raw, half | overrides), resume)


def last_of(outcome: Outcome) -> dict[str, Any]:
    return load_checkpoint(outcome.run_dir / "weights" / "last.pt")


def test_float16_learns_with_clipping_and_counts_its_skipped_steps(small_config: dict[str, Any]) -> None:
    """The first scale of 65536 is usually too large for some step; a skipped one leaves weights that are numbers."""
    small_config["training"]["callbacks"] = [{"type": "gradient_clipping", "max_norm": 1.0}]
    last = last_of(run(small_config, **{"training.num_epochs": 8, "training.ema": 0.9}))
    assert last["metrics"]["train_loss"] < 0.75 and last["metrics"]["amp_scale"] > 0
    assert last["metrics"]["amp_skipped_steps"] == last["backend_state_dict"]["num_skipped"]
    assert all(bool(value.isfinite().all()) for value in last["raw_state_dict"].values())


def test_a_resumed_run_goes_on_with_its_scale_to_the_same_bits(small_config: dict[str, Any]) -> None:
    small_config["deterministic"] = True
    whole = last_of(run(small_config, run_name="whole", **{"training.num_epochs": 4}))
    half = run(small_config, run_name="half", **{"training.num_epochs": 2})
    more = {"run_name": "half", "training.num_epochs": 4}
    rest = last_of(run(small_config, half.run_dir / "weights" / "last.pt", **more))
    assert whole["backend_state_dict"] == rest["backend_state_dict"]
    assert all(torch.equal(whole["model_state_dict"][key], value) for key, value in rest["model_state_dict"].items())


def test_a_compiled_network_gives_the_losses_of_the_plain_one(small_config: dict[str, Any]) -> None:
    small_config["model"]["norm"] = "group"
    losses = [
        last_of(run(small_config, run_name=str(compiled), **{"training.compile": compiled, "training.tf32": False}))
        for compiled in (False, True)
    ]
    assert losses[0]["metrics"]["train_loss"] == pytest.approx(losses[1]["metrics"]["train_loss"], rel=1e-2)


def test_a_peek_reads_the_number_although_more_was_queued() -> None:
    numbers = [torch.full((), float(index), device="cuda") for index in range(100)]
    peeks = [Peek(number) for number in numbers]
    busy = torch.ones(2000, 2000, device="cuda")
    for number in numbers:
        number.add_((busy @ busy)[0, 0])
    assert [peek.value() for peek in peeks] == [float(index) for index in range(100)]
