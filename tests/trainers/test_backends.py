"""What every trainer does alike: accumulation, clipping, averages, schedules, callbacks, plateau logic."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ml_src.core.callbacks import Callback
from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.config import Config, Every
from ml_src.core.config_file import parse_config
from ml_src.core.errors import ConfigError, TrainingError
from ml_src.core.inference.jobs import Request, measure_split
from ml_src.core.tasks import task_for
from ml_src.core.trainers import Outcome, build_training, choose_backend, train
from ml_src.core.trainers.loop import fit
from ml_src.core.trainers.training import Training

TRAINERS = ["standard", "mixed_precision", "accelerate", "dp"]
PRIVACY = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "target_delta": 1e-3}


PUBLIC = {"training.dp": PRIVACY | {"public_statistics": True}}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=TRAINERS)
def raw(request: pytest.FixtureRequest, small_config: dict[str, Any]) -> dict[str, Any]:
    """The small configuration for each trainer; all with group normalisation, which dp needs."""
    small_config["model"]["norm"] = "group"
    small_config["transforms"]["train"][-1] = {"type": "normalize", "mean": [0.5], "std": [0.25]}
    small_config["training"]["trainer_type"] = request.param
    small_config["training"]["dp"] = PRIVACY if request.param == "dp" else None
    return small_config


class Watch(Callback):
    """Notes the learning rate and the weights after each step."""

    name = "watch"

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.weights: list[list[Tensor]] = []

    def on_start(self, t: Training) -> None:
        self.rates.append(t.schedule.lr)
        self.weights.append([p.detach().clone() for p in t.network.parameters()])

    on_step = lambda self, t, num_samples: self.on_start(t)  # noqa: E731


def watched(raw: dict[str, Any], **overrides: Any) -> tuple[Training, Watch]:
    config = parse_config(raw, {"training.device": "cpu", **overrides})
    training = build_training(config, task_for(config), choose_backend(config), config.run_dir)
    watch = Watch()
    config.run_dir.mkdir(parents=True, exist_ok=True)
    training.callbacks = [*training.backend.callbacks(), watch]
    fit(training)
    return training, watch


def run(raw: dict[str, Any], resume: Path | None = None, **overrides: Any) -> Outcome:
    return train(parse_config(raw, overrides), resume)


def test_a_schedule_is_followed_step_by_step(raw: dict[str, Any]) -> None:
    """Warm-up over one epoch of 3 steps, then a straight line down to 0 over another."""
    _, watch = watched(raw, scheduler={"type": "poly", "power": 1.0, "warmup_epochs": 1})
    assert watch.rates == pytest.approx([0.002 * factor for factor in (1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3, 0)])


def test_accumulation_halves_the_steps(raw: dict[str, Any]) -> None:
    _, one = watched(raw)
    training, two = watched(raw, **{"training.gradient_accumulation_steps": 2})
    assert len(one.rates) - 1 == 6 and len(two.rates) - 1 == 4  # of 9 images: 4+4+1, and 8+1
    assert training.progress.step == 4


def test_accumulated_batches_make_the_step_of_one_batch(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if raw["training"]["trainer_type"] == "dp":
        raw["training"]["dp"] = {**PRIVACY, "noise_multiplier": 0.0, "max_physical_batch_size": 2}
        raw["deterministic"] = True
        monkeypatch.setattr("ml_src.core.trainers.dp.replay_key", lambda config: 7)  # the same images in both
    raw["transforms"]["train"] = raw["transforms"]["train"][-1:]
    raw["optimizer"] = {"type": "sgd", "lr": 0.1, "momentum": 0.0}
    once, split = {}, {"training.batch_size": 2, "training.gradient_accumulation_steps": 2}
    (_, whole), (_, parts) = watched(raw, **once), watched(raw, **split)
    for before, a, b in zip(whole.weights[0], whole.weights[1], parts.weights[1], strict=True):
        moved = (a - before).norm()
        assert moved > 0 and (a - b).norm() <= (0.1 if "mixed" in raw["training"]["trainer_type"] else 1e-3) * moved


def test_clipping_bounds_every_step(raw: dict[str, Any]) -> None:
    raw["training"]["callbacks"] = [{"type": "gradient_clipping", "max_norm": 0.01}]
    _, watch = watched(raw, optimizer={"type": "sgd", "lr": 1.0, "momentum": 0.0})
    for before, after in zip(watch.weights, watch.weights[1:], strict=False):
        moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm()
        assert 0 < moved <= 0.01 * (1 + 1e-4)


def test_the_average_is_the_one_its_formula_gives_and_is_what_is_kept(raw: dict[str, Any]) -> None:
    training, watch = watched(raw, **{"training.ema": 0.5})
    expected = watch.weights[0]
    for step, weights in enumerate(watch.weights[1:], start=1):
        keep = min(0.5, (1 + step) / (10 + step))
        expected = [keep * mean + (1 - keep) * new for mean, new in zip(expected, weights, strict=True)]
    contents = training.checkpoint()
    for name, mean in zip(dict(training.network.named_parameters()), expected, strict=True):
        torch.testing.assert_close(contents["model_state_dict"][name], mean)
    assert torch.equal(next(iter(contents["raw_state_dict"].values())), next(iter(training.network.parameters())))


def test_early_stopping_and_plateau_act_alike(raw: dict[str, Any]) -> None:
    """With a min_delta that nothing beats, the first epoch is the best, and two later ones end the run."""
    raw["training"]["callbacks"] = [{"type": "early_stopping", "patience": 2, "min_delta": 1.0}]
    raw["scheduler"] = {"type": "plateau", "patience": 1, "factor": 0.5, "monitor": "train_pixel_accuracy"}
    outcome = run(raw, **{"training.num_epochs": 9})
    last = load_checkpoint(outcome.run_dir / "weights" / "last.pt")
    assert last["epoch"] == 3 and "has not improved" in outcome.summary
    assert set(last["metrics"]) >= {"train_loss", "val_loss", "val_iou", "val_dice", "train_iou"}


def test_the_best_weights_are_those_that_are_measured_again(raw: dict[str, Any], sample_dir: Path) -> None:
    raw["training"]["ema"] = 0.5
    outcome = run(raw)
    best = outcome.run_dir / "weights" / "best.pt"
    assert measure_split(Request([best]), "val").block in outcome.summary


def test_a_run_stopped_within_an_epoch_is_validated_where_a_trainer_says_so(small_config: dict[str, Any]) -> None:
    """`stop` without a signal ends the epoch early and counts it: what an exhausted privacy budget does."""

    class Enough(Callback):
        name = "enough"

        def on_step(self, t: Training, num_samples: int) -> None:
            t.stop = "enough" if t.progress.step == 4 else ""

    config = parse_config(small_config, {"training.device": "cpu", "training.num_epochs": 5})
    training = build_training(config, task_for(config), choose_backend(config), config.run_dir)
    training.callbacks = [Enough()]
    fit(training)
    assert (training.progress.step, training.progress.epoch) == (4, 2) and "val_iou" in training.metrics


def test_a_loss_that_is_no_number_stops_before_the_step_and_saves(small_config: dict[str, Any]) -> None:
    """The second step already starts from weights of 1e30: it is not taken, and last.pt is from before it."""
    small_config["model"]["norm"] = "group"  # no running statistics that the bad batch could have spoilt
    sentence = r"epoch 1, step 2, at learning rate 1e\+30: lower optimizer\.lr tenfold.* last\.pt is the state before"
    with pytest.raises(TrainingError, match=sentence.replace(" last", ".*last")):
        run(small_config, **{"optimizer.lr": 1e30, "optimizer.type": "sgd"})
    last = load_checkpoint(next(Path("runs").glob("*/weights/last.pt")))
    assert last["step"] == 1 and last["epoch_step"] == 1


def test_mixed_precision_names_its_number_format_when_it_stops(small_config: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="in bfloat16: lower"):
        run(small_config, **{"optimizer.lr": 1e30, "optimizer.type": "sgd", "training.trainer_type": "mixed_precision"})


def test_float16_on_a_cpu_is_said_and_bfloat16_used(
    small_config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    small_config["training"]["trainer_type"] = "mixed_precision"
    config = parse_config(small_config, {"training.device": "cpu"})
    with caplog.at_level("INFO", logger="ml_src"):
        backend = choose_backend(config)
    assert caplog.messages == ["float16 is for CUDA GPUs: bfloat16 is used on cpu"]
    with backend.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


GREEDY = """
import torch
from ml_src.core.losses.segmentation import LOSS_REGISTRY, DiceLoss

class Greedy(DiceLoss):
    \"\"\"Needs more memory than any machine has for more than two images.\"\"\"
    def forward(self, logits, targets):
        if len(logits) > 2:
            torch.empty(1 << 55)
        return super().forward(logits, targets)

LOSS_REGISTRY["greedy"] = Greedy
"""


def test_a_batch_too_large_for_the_memory_is_divided_and_the_step_stays(
    small_config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    Path("greedy.py").write_text(GREEDY)
    small_config |= {"plugins": ["greedy.py"], "loss": {"type": "greedy"}}
    small_config["model"]["norm"] = "group"
    outcome = run(small_config, run_name="auto", **{"training.batch_size": 8, "training.auto_batch": True})
    assert "going on with batches of 2, 4 a step" in caplog.text
    by_hand = {"training.batch_size": 2, "training.gradient_accumulation_steps": 4}
    other = run(small_config, run_name="by_hand", **by_hand)
    a, b = (load_checkpoint(one.run_dir / "weights" / "last.pt") for one in (outcome, other))
    assert all(torch.equal(a["model_state_dict"][key], b["model_state_dict"][key]) for key in a["model_state_dict"])
    assert a["step"] == b["step"] == 4


def test_a_full_memory_says_what_to_set(small_config: dict[str, Any]) -> None:
    Path("greedy.py").write_text(GREEDY)
    small_config |= {"plugins": ["greedy.py"], "loss": {"type": "greedy"}}
    advice = r"does not fit .*batch_size: 2 and training\.gradient_accumulation_steps: 2, or training\.auto_batch: true"
    with pytest.raises(TrainingError, match=advice):
        run(small_config)


def test_an_error_that_is_not_about_memory_is_passed_on(small_config: dict[str, Any]) -> None:
    Path("broken.py").write_text(GREEDY.replace("torch.empty(1 << 55)", "raise RuntimeError('something else')"))
    small_config |= {"plugins": ["broken.py"], "loss": {"type": "greedy"}}
    with pytest.raises(RuntimeError, match=r"^something else$"):
        run(small_config, **{"training.auto_batch": True})


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (Every(steps=2), [0, 2, 3, 4, 6, 6]),
        (Every(seconds=0.0), [0, 1, 2, 3, 3, 4, 5, 6, 6]),
        (Every(seconds=3600.0), [0, 3, 6]),
    ],
)
def test_checkpoints_are_written_within_an_epoch(
    small_config: dict[str, Any], every: Every, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3 steps, twice; at the start and after each epoch whatever is asked for."""
    seen = []
    save = Training.save
    monkeypatch.setattr(Training, "save", lambda t, *names: (seen.append(t.progress.step), save(t, *names)))
    monkeypatch.setattr(Config, "checkpoint_every", every)
    run(small_config)
    assert seen == steps


@pytest.mark.parametrize(
    ("word", "every"),
    [
        ("90s", Every(seconds=90)),
        ("10m", Every(seconds=600)),
        ("2h", Every(seconds=7200)),
        ("500steps", Every(steps=500)),
    ],
)
def test_an_interval_is_a_time_or_a_number_of_steps(small_config: dict[str, Any], word: str, every: Every) -> None:
    assert parse_config(small_config, {"training.checkpoint_every": word}).checkpoint_every == every


@pytest.mark.parametrize("word", ["10", "0steps", "1.5h", "often"])
def test_an_interval_that_cannot_be_read_is_refused(small_config: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match="checkpoint_every"):
        parse_config(small_config, {"training.checkpoint_every": word})


def test_a_profile_has_a_table_and_a_trace_and_changes_nothing(small_config: dict[str, Any]) -> None:
    plain, measured = run(small_config, run_name="plain"), run(small_config, run_name="m", **{"training.profile": True})
    table = (measured.run_dir / "profile" / "table.txt").read_text()
    for part in ("loader wait", "copy", "forward", "loss", "backward", "step", "everything else"):
        assert part in table
    assert "mean of 3" in table  # of the 6 steps, the first 3 are the warm-up
    assert (measured.run_dir / "profile" / "trace.json.gz").stat().st_size > 1000
    a, b = (load_checkpoint(one.run_dir / "weights" / "last.pt") for one in (plain, measured))
    assert all(torch.equal(a["model_state_dict"][key], b["model_state_dict"][key]) for key in a["model_state_dict"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"training.trainer_type": "dp"}, "needs a noise_multiplier"),
        ({"training.num_processes": 2}, "num_processes is for trainer_type accelerate"),
        ({"training.trainer_type": "dp", "training.dp": PRIVACY, "model.norm": "batch"}, "model.norm must be group"),
        ({"training.trainer_type": "dp", "training.dp": PRIVACY, "loss.class_weights": [1, 2, 3]}, "public_statistics"),
        ({"training.trainer_type": "accelerate", "training.auto_batch": True}, "auto_batch does not go with"),
    ],
)
def test_what_a_trainer_cannot_do_is_said_at_once(
    small_config: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_config(copy.deepcopy(small_config), changes)


def test_without_opacus_the_sentence_says_what_to_install(
    small_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("opacus", "ml_src.core.trainers.dp"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opacus", None)
    config = parse_config(small_config, {"training.trainer_type": "dp", **PUBLIC})
    with pytest.raises(ConfigError, match=r"needs Opacus: run pip install 'ml-src\[dp\]'"):
        choose_backend(config)


def test_what_a_private_run_repeats_to_the_bit_is_free_in_its_plan_too(small_config: dict[str, Any]) -> None:
    """Gone on with from its first epoch, a run that has spent its whole budget ends with the same bits."""
    small_config |= {"deterministic": True}
    small_config["transforms"]["train"][-1] = {"type": "normalize", "mean": [0.5], "std": [0.25]}
    small_config["training"] |= {
        "trainer_type": "dp",
        "dp": {"target_epsilon": 50.0, "target_delta": 1e-3, "accountant": "rdp"},
        "callbacks": [{"type": "model_checkpoint", "save_top_k": 2}],
    }
    weights = run(small_config).run_dir / "weights"
    last, spent = load_checkpoint(weights / "last.pt"), (weights.parent / "privacy.json").read_text()
    run(small_config, weights / "epoch_1.pt")
    again = load_checkpoint(weights / "last.pt")
    assert last["step"] == again["step"] == 6 and (weights.parent / "privacy.json").read_text() == spent
    assert all(torch.equal(last["model_state_dict"][key], value) for key, value in again["model_state_dict"].items())
