"""Private training as a user meets it: plan, budget, noise, groups, what is written down, and what a resume costs."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy import stats
from torch import Tensor, nn

from ml_src.cli import split
from ml_src.core.callbacks import Callback
from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.config_file import parse_config
from ml_src.core.errors import CheckpointError, ConfigError, DataError, TrainingError
from ml_src.core.network.custom import MODEL_REGISTRY
from ml_src.core.tasks import task_for
from ml_src.core.trainers import Outcome, build_training, choose_backend, train
from ml_src.core.trainers.dp import DP
from ml_src.core.trainers.dp.ledger import Ledger
from ml_src.core.trainers.loop import fit
from ml_src.core.trainers.training import Training

DELTA = 1e-3
NUM_IMAGES, EXPECTED, RATE = 9, 3.0, 1 / 3  # three steps an epoch, of 4 images asked for


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def raw(small_config: dict[str, Any]) -> dict[str, Any]:
    """Two epochs of three steps."""
    small_config["transforms"]["train"] = [
        {"type": "random_horizontal_flip"},
        {"type": "normalize", "mean": [0.5], "std": [0.25]},
    ]
    small_config["training"] |= {"trainer_type": "dp", "device": "cpu"}
    small_config["training"]["dp"] = {"noise_multiplier": 1.0, "target_delta": DELTA, "accountant": "rdp"}
    small_config["optimizer"] = {"type": "sgd", "lr": 0.1}
    return small_config


def run(raw: dict[str, Any], resume: Path | None = None, **overrides: Any) -> Outcome:
    return train(parse_config(raw, overrides), resume)


def privacy(run_dir: Path) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads((run_dir / "privacy.json").read_text())
    return contents


def charged(run_dir: Path) -> int:
    return sum(mechanism["steps"] for mechanism in privacy(run_dir)["mechanisms"])


def log_of(outcome: Outcome) -> str:
    return (outcome.run_dir / "logs" / "train.log").read_text()


def epsilon_after(steps: int, noise_multiplier: float = 1.0) -> float:
    return Ledger().plus(noise_multiplier, RATE, steps).epsilon(DELTA, "rdp")


class Watch(Callback):
    """Notes the weights around each step, and how many images were in it."""

    name = "watch"

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.sizes: list[int] = []

    def on_start(self, t: Training) -> None:
        self.weights.append(torch.cat([p.detach().flatten() for p in t.network.parameters()]))

    def on_step(self, t: Training, num_samples: int) -> None:
        self.sizes.append(num_samples)
        self.on_start(t)

    def change(self, step: int) -> Tensor:
        return self.weights[step] - self.weights[step + 1]


def watched(raw: dict[str, Any], **overrides: Any) -> tuple[Training, Watch]:
    """Train without the callbacks that write, under SGD of rate 1: a step subtracts the gradient."""
    sgd = {"type": "sgd", "lr": 1.0, "momentum": 0.0}
    config = parse_config(raw, {"optimizer": sgd, "deterministic": True, "training.num_epochs": 1, **overrides})
    training = build_training(config, task_for(config), choose_backend(config), config.run_dir)
    watch = Watch()
    training.callbacks = [watch]
    fit(training)
    return training, watch


@pytest.fixture
def one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of different configurations draw the same images and the same standard normal values."""
    monkeypatch.setattr("ml_src.core.trainers.dp.replay_key", lambda config: 7)


class Saved(NamedTuple):
    """A checkpoint as it was after a step, and the key of the noise, which only the process knows."""

    path: Path
    key: int


@pytest.fixture
def saved(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[int, Saved]:
    """By step, what the run in progress has saved: a run that is killed after it would have just that."""
    raw["training"]["checkpoint_every"] = "1steps"
    kept: dict[int, Saved] = {}
    save = Training.save

    def save_and_copy(t: Training, *names: str) -> None:
        save(t, *names)
        path = tmp_path / f"copy_{len(list(tmp_path.glob('copy_*')))}.pt"
        shutil.copyfile(t.run_dir / "weights" / "last.pt", path)
        assert isinstance(t.backend, DP)
        kept[t.progress.step] = Saved(path, t.backend.noise.key)

    monkeypatch.setattr(Training, "save", save_and_copy)
    return kept


def back_to(saved: Saved, run_dir: Path) -> Path:
    """Put a checkpoint back into a run's folder, beside what that has there, or into a new one."""
    (run_dir / "weights").mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(saved.path, run_dir / "weights" / "last.pt"))


# The plan and the budget


def test_the_plan_stands_in_the_log_before_the_first_epoch(raw: dict[str, Any]) -> None:
    log = log_of(run(raw))
    said = [
        "Group normalisation in the place of batch normalisation: stem.1, stem.4, down.0.1,",
        f"Privacy: epsilon {epsilon_after(6):.4g} after 6 steps, 2 epochs, with noise multiplier 1 (delta 0.001, unit "
        "of privacy one image, accountant rdp)",
        "Not covered: the validation and test images",
        "epoch 1/2: train_loss",
    ]
    places = [log.find(sentence) for sentence in said]
    assert -1 not in places and places == sorted(places)


def test_a_budget_ends_a_run_within_an_epoch_before_it_is_exceeded(raw: dict[str, Any]) -> None:
    """Noise and epsilon given. Five steps would be too many; what there is after four is validated and kept."""
    target = (epsilon_after(4) + epsilon_after(5)) / 2
    raw["training"]["num_epochs"] = 4
    outcome = run(raw, **{"training.dp.target_epsilon": target})
    last = load_checkpoint(outcome.run_dir / "weights" / "last.pt")
    assert (last["step"], last["epoch"]) == (4, 2)
    assert math.isfinite(last["metrics"]["val_iou"]) and (outcome.run_dir / "weights" / "best.pt").is_file()
    assert privacy(outcome.run_dir)["epsilon"] == pytest.approx(epsilon_after(4))
    assert privacy(outcome.run_dir)["epsilon"] <= target < epsilon_after(5)
    sentence = f"the budget ends after step 4 of 12, in epoch 2 of 4, at epsilon {epsilon_after(4):.4g}"
    assert sentence in log_of(outcome)
    assert "the privacy budget allows no step after 4" in outcome.summary

    with pytest.raises(TrainingError, match=rf"the privacy budget allows no step: .*{epsilon_after(5):.4g}.*raise it"):
        run(raw, outcome.run_dir / "weights" / "last.pt", **{"training.dp.target_epsilon": target})
    less = {"training.dp.target_epsilon": epsilon_after(3)}
    with pytest.raises(TrainingError, match=r"the privacy budget is spent: .*stop here, or raise it"):
        run(raw, outcome.run_dir / "weights" / "last.pt", **less)
    assert charged(outcome.run_dir) == 4


def test_a_larger_budget_goes_on_and_its_plan_holds(raw: dict[str, Any]) -> None:
    """The epoch that the first budget cut short counts as one: two of three steps are left."""
    changes = {"training.dp.target_epsilon": epsilon_after(4), "training.num_epochs": 3}
    first = run(raw, **changes)
    second = run(raw, first.run_dir / "weights" / "last.pt", **changes | {"training.dp.target_epsilon": 100.0})
    assert load_checkpoint(second.run_dir / "weights" / "last.pt")["step"] == charged(second.run_dir) == 7
    assert f"Privacy: epsilon {epsilon_after(7):.4g} after 7 steps, 3 epochs" in log_of(second)
    assert privacy(second.run_dir)["epsilon"] == pytest.approx(epsilon_after(7))


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_noise_is_calibrated_to_the_epsilon_that_is_asked_for(raw: dict[str, Any], accountant: str) -> None:
    raw["training"]["dp"] = {"target_epsilon": 2.0, "target_delta": DELTA, "accountant": accountant}
    outcome = run(raw)
    report = privacy(outcome.run_dir)
    assert 0.99 * 2 < report["epsilon"] <= 2 and report["accountant"] == accountant
    (mechanism,) = report["mechanisms"]
    assert mechanism["steps"] == 6 and mechanism["noise_multiplier"] > 1
    assert f"with noise multiplier {mechanism['noise_multiplier']:.4g}" in log_of(outcome)


def test_a_resume_does_not_calibrate_anew(raw: dict[str, Any], saved: dict[int, Saved]) -> None:
    """With more epochs the noise stays what it was, and the budget ends training where it ended before."""
    raw["training"]["dp"] = {"target_epsilon": 2.0, "target_delta": DELTA, "accountant": "rdp"}
    first = run(raw)
    sigma = privacy(first.run_dir)["mechanisms"][0]["noise_multiplier"]
    second = run(raw, back_to(saved[2], Path("runs/longer_fold_0")), **{"training.num_epochs": 4})
    (mechanism,) = privacy(second.run_dir)["mechanisms"]
    assert mechanism["noise_multiplier"] == sigma and mechanism["steps"] == 6


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "adaptive"])
def test_epsilon_is_told_after_every_epoch_everywhere(raw: dict[str, Any], clipping: str) -> None:
    """The metrics, TensorBoard, the line of the log and the checkpoint; as an independent accountant has it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    outcome = run(raw, **{"training.dp.clipping": clipping})
    expected = []
    for steps in (3, 6):
        judge = RdpAccountant()
        judge.compose(PoissonSampledDpEvent(RATE, GaussianDpEvent(1.0)), steps)
        expected.append(judge.get_epsilon(DELTA))
    events = EventAccumulator(str(outcome.run_dir / "tensorboard"))
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("epsilon/dp")]
    assert [step for step, _ in values] == [3, 6]
    assert [value for _, value in values] == pytest.approx(expected, rel=0.01)
    metrics = load_checkpoint(outcome.run_dir / "weights" / "last.pt")["metrics"]
    assert metrics["dp_epsilon"] == pytest.approx(expected[1], rel=0.01)
    assert ("dp_clip_norm" in metrics) == (clipping == "adaptive")
    for epoch, epsilon in enumerate((epsilon_after(3), epsilon_after(6)), start=1):
        (line,) = [line for line in log_of(outcome).splitlines() if f"epoch {epoch}/2" in line]
        assert f"dp epsilon {epsilon:.6g}" in line
    report = privacy(outcome.run_dir)
    assert set(report) == {"epsilon", "delta", "accountant", "unit", "mechanisms", "not_covered", "replays"}
    assert report["epsilon"] == metrics["dp_epsilon"] and report["delta"] == DELTA and report["unit"] == "image"
    assert report["mechanisms"] == [
        {"noise_multiplier": 1.0, "sample_rate": RATE, "steps": 6, "max_grad_norm": 1.0}
    ]  # fmt: skip


def test_what_privacy_does_not_cover_is_named(raw: dict[str, Any]) -> None:
    raw["training"]["callbacks"] = [{"type": "early_stopping"}, {"type": "model_checkpoint"}]
    raw["training"]["num_epochs"] = 1
    raw["training"]["dp"]["public_statistics"] = True
    outcome = run(raw, scheduler={"type": "plateau"}, deterministic=True)
    named = "; ".join(privacy(outcome.run_dir)["not_covered"])
    for words in (
        "validation and test images",
        "best.pt, early_stopping, the plateau schedule",
        "class shares of training images in logs/, tensorboard/, summary.txt",
        "which the configuration declares to be public",
        "deterministic: true",
    ):
        assert words in named
    assert all(f"Not covered: {one}" in log_of(outcome) for one in privacy(outcome.run_dir)["not_covered"])


# Public statistics


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.5], [0.25]), ([0.5] * 3, [0.5] * 3), ([0.5] * 3, [0.25] * 3)],
)
def test_statistics_known_beforehand_are_accepted(raw: dict[str, Any], mean: list[float], std: list[float]) -> None:
    raw["transforms"]["train"] = [{"type": "normalize", "mean": mean, "std": std}]
    assert parse_config(raw, {}).train_transforms[0].mean == mean


def test_statistics_of_the_data_must_be_declared_public(raw: dict[str, Any]) -> None:
    raw["transforms"]["train"] = [{"type": "normalize", "mean": [0.31, 0.4, 0.5], "std": [0.2, 0.2, 0.2]}]
    with pytest.raises(ConfigError, match=r"normalize may have been .*training\.dp\.public_statistics: true"):
        parse_config(raw, {})
    parse_config(raw, {"training.dp.public_statistics": True})
    parse_config(raw, {"training.trainer_type": "standard", "training.dp": None})


# A step


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_step_that_nobody_was_drawn_for_is_noise_of_the_right_size(
    raw: dict[str, Any], clipping: str, one_key: None
) -> None:
    """Steps of one image on average: a third of them are empty. Each weight moves by sigma C / expected size."""
    private = {"noise_multiplier": 1.5, "max_grad_norm": 0.7, "clipping": clipping, "accountant": "rdp"}
    training, watch = watched(raw, **{"training.dp": private, "training.batch_size": 1})
    empty = [watch.change(step) for step, size in enumerate(watch.sizes) if size == 0]
    assert empty and any(watch.sizes) and training.progress.step == NUM_IMAGES
    for change in empty:
        assert float(change.std()) == pytest.approx(1.5 * 0.7 / 1, rel=0.01)  # five standard errors
        assert stats.kstest((change / (1.5 * 0.7)).numpy(), "norm").pvalue > 1e-6
    assert isinstance(training.backend, DP) and training.backend.ledger.num_steps == NUM_IMAGES


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "adaptive"])
def test_the_noise_of_a_step_is_scaled_by_clip_norm_and_expected_size(
    raw: dict[str, Any], clipping: str, one_key: None
) -> None:
    """What the same step with and without noise differ by; divided by the expected size, not by the true one."""
    steps = []
    for sigma in (0.0, 1.3):
        private = {"noise_multiplier": sigma, "max_grad_norm": 0.6, "clipping": clipping, "accountant": "rdp"}
        training, watch = watched(raw, **{"training.dp": private})
        steps.append(watch.change(0))
    assert isinstance(training.backend, DP) and training.backend.order.expected_size == EXPECTED
    noise = (steps[1] - steps[0]) * EXPECTED / 0.6
    # beside the gradients, adaptive clipping releases a count with a noise of 2.6
    sigma = (1.3**-2 - (2 * 2.6) ** -2) ** -0.5 if clipping == "adaptive" else 1.3
    assert float(noise.std()) == pytest.approx(sigma, rel=0.01)
    assert stats.kstest((noise / sigma).numpy(), "norm").pvalue > 1e-6


def test_gradient_clipping_shortens_what_comes_out_of_a_private_step(raw: dict[str, Any], one_key: None) -> None:
    _, free = watched(raw)
    _, short = watched(raw, **{"training.callbacks": [{"type": "gradient_clipping", "max_norm": 0.5}]})
    assert float(free.change(0).norm()) > 1
    assert float(short.change(0).norm()) == pytest.approx(0.5, rel=1e-3)
    assert float(torch.cosine_similarity(free.change(0), short.change(0), dim=0)) == pytest.approx(1, abs=1e-5)


class Smooth(nn.Module):
    """Has no kink, where a rounding error decides which way a gradient goes: ReLU and max pooling have thousands."""

    def __init__(self, in_channels: int, num_classes: int, **_: object) -> None:
        super().__init__()
        first = [nn.Conv2d(in_channels, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.SiLU()]
        self.layers = nn.Sequential(*first, nn.ConvTranspose2d(8, num_classes, 2, stride=2))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "adaptive"])
def test_the_images_held_at_once_change_nothing(
    raw: dict[str, Any], sigma: float, clipping: str, one_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_REGISTRY, "smooth", Smooth)
    runs = {}
    for held in (1, 16):
        private = {"noise_multiplier": sigma, "max_physical_batch_size": held, "clipping": clipping}
        changes = {"training.dp": private | {"accountant": "rdp"}, "model.custom_architecture": "smooth"}
        training, runs[held] = watched(raw, **changes, **{"training.batch_size": 8})
        batches = [batch for step in training.train_loader.order.epoch(0) for batch in step.batches]
        assert max(map(len, batches)) <= held
    assert max(runs[1].sizes) > 3 and runs[1].sizes == runs[16].sizes
    for step in range(len(runs[1].sizes)):
        a, b = runs[1].change(step), runs[16].change(step)
        assert a.norm() > 0 and (a - b).norm() <= 1e-5 * a.norm()


# Patients


@pytest.fixture
def patients(sample_dir: Path, tmp_path: Path) -> dict[str, str]:
    """The 16 images belong to 8 patients: the first two have four and three images."""
    names = sorted(path.name for path in (sample_dir / "images").iterdir())
    groups = ["A"] * 4 + ["B"] * 3 + ["C"] * 3 + ["D"] * 2 + ["E", "F", "G", "H"]
    (tmp_path / "patients.csv").write_text("image,group\n" + "\n".join(map(",".join, zip(names, groups, strict=True))))
    return dict(zip(names, groups, strict=True))


def ml_split(sample_dir: Path, *words: str) -> int:
    folders = ["--raw_data", str(sample_dir / "images"), "--mask_data", str(sample_dir / "masks")]
    return split.main([*folders, "--folds", "3", "--output", "splits", *words])


def test_a_patient_has_at_most_one_image_in_a_step_and_is_what_epsilon_protects(
    raw: dict[str, Any], sample_dir: Path, patients: dict[str, str]
) -> None:
    assert ml_split(sample_dir, "--groups", "patients.csv") == 0
    changes = {"data.splits_dir": "splits", "training.dp.group": "patient", "training.batch_size": 2}
    config = parse_config(raw, changes)
    task = task_for(config)
    training = build_training(config, task, choose_backend(config), config.run_dir)
    order, groups = training.train_loader.order, task.groups("train")
    assert groups == [patients[pair.image.name] for pair in task.pairs("train")]
    num_groups = len(set(groups))
    assert num_groups < len(groups) and order.num_steps == -(-num_groups // 2)
    seen: set[int] = set()
    for epoch in range(60):
        for step in order.epoch(epoch):
            images = [image for batch in step.batches for image in batch]
            assert len({groups[image] for image in images}) == len(images) == step.num_samples
            seen.update(images)
    assert seen == set(range(len(groups)))

    outcome = run(raw, **changes, **{"training.num_epochs": 1})
    report = privacy(outcome.run_dir)
    assert report["unit"] == "patient" and "unit of privacy one patient" in log_of(outcome)
    assert report["mechanisms"][0]["sample_rate"] == pytest.approx(1 / order.num_steps)
    assert report["mechanisms"][0]["steps"] == order.num_steps

    with pytest.raises(CheckpointError, match=r"dp\.group is none, but .* protect one patient each: start a new run"):
        run(raw, outcome.run_dir / "weights" / "last.pt", **changes | {"training.dp.group": "none"})


def test_patients_without_a_table_of_groups_are_asked_for(raw: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"groups\.csv does not exist: run ml-split again with --groups or --group_reg"):
        run(raw, **{"training.dp.group": "patient"})


@pytest.mark.parametrize("words", [["--groups", "patients.csv"], ["--group_regex", "[0-9]$"]])
def test_a_split_with_groups_keeps_their_table_and_again_changes_nothing(
    sample_dir: Path, patients: dict[str, str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ml_split(sample_dir, *words) == 0
    rows = Path("splits/groups.csv").read_text().splitlines()
    expected = patients if words[0] == "--groups" else {name: Path(name).stem[-1] for name in patients}
    assert rows == ["image,group", *map(",".join, expected.items())]
    before = {path: path.read_bytes() for path in Path("splits").iterdir()}
    capsys.readouterr()
    assert ml_split(sample_dir, *words) == 0
    assert "(unchanged)" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path("splits").iterdir()} == before


def test_a_split_from_before_there_was_a_table_of_groups_gets_it_without_force(
    sample_dir: Path, patients: dict[str, str]
) -> None:
    assert ml_split(sample_dir, "--groups", "patients.csv") == 0
    before = {path: path.read_bytes() for path in Path("splits").iterdir()}
    Path("splits/groups.csv").unlink()
    assert ml_split(sample_dir, "--group_regex", "[0-9]$") == 2  # another split
    assert not Path("splits/groups.csv").exists()
    assert ml_split(sample_dir, "--groups", "patients.csv") == 0
    assert {path: path.read_bytes() for path in Path("splits").iterdir()} == before


# Resume


def weights_of(path: Path) -> Tensor:
    return torch.cat([value.flatten() for value in load_checkpoint(path)["model_state_dict"].values()])


def same_run(a: Path, b: Path) -> bool:
    """To the bit, with the optimizer's state, which is momentum: every gradient so far."""
    first, second = load_checkpoint(a), load_checkpoint(b)
    state = [one["optimizer_state_dict"]["state"] for one in (first, second)]
    momenta = [torch.cat([state["momentum_buffer"].flatten() for state in one.values()]) for one in state]
    return torch.equal(weights_of(a), weights_of(b)) and torch.equal(*momenta) and first["metrics"] == second["metrics"]


def numbers_in(value: Any) -> Iterator[Any]:
    """Everything that a checkpoint holds, tensors as lists."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from numbers_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from numbers_in(one)
    elif isinstance(value, Tensor):
        yield from value.flatten().tolist() if not value.is_floating_point() else []
    else:
        yield value


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_a_deterministic_run_goes_on_to_the_same_bits_and_pays_once(
    raw: dict[str, Any], saved: dict[int, Saved], clipping: str
) -> None:
    """Killed in the middle of the second epoch: with the folder's ledger as it was left, and as it was at the kill."""
    options = {"deterministic": True, "training.dp.clipping": clipping}
    whole = run(raw, **options).run_dir
    shutil.copyfile(whole / "weights" / "last.pt", "whole.pt")
    killed = saved[4]
    for run_dir in (whole, Path("runs/killed_fold_0")):
        again = run(raw, back_to(killed, run_dir), **options).run_dir
        assert again.resolve() == run_dir.resolve()
        assert same_run(again / "weights" / "last.pt", Path("whole.pt"))
        assert charged(again) == 6 and privacy(again)["epsilon"] == pytest.approx(epsilon_after(6))


def test_two_resumes_draw_other_noise_and_other_images_and_are_both_charged(
    raw: dict[str, Any], saved: dict[int, Saved]
) -> None:
    run_dir = run(raw).run_dir
    killed, ends, keys = saved[4], [weights_of(run_dir / "weights" / "last.pt")], {saved[6].key}
    for number, steps in enumerate((8, 10), start=1):
        run(raw, back_to(killed, run_dir))
        ends.append(weights_of(run_dir / "weights" / "last.pt"))
        keys.add(saved[6].key)
        assert charged(run_dir) == steps
        assert len(keys) == 1 + number
        assert privacy(run_dir)["epsilon"] == pytest.approx(epsilon_after(steps))
        assert load_checkpoint(saved[6].path)["metrics"]["dp_epsilon"] == pytest.approx(epsilon_after(steps))
    noise = 0.1 * 1.0 / EXPECTED  # of one step; two were taken, each resume its own, with momentum
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float((ends[a] - ends[b]).std()) > 1.5 * noise


def test_the_key_of_the_noise_is_written_nowhere(raw: dict[str, Any], saved: dict[int, Saved]) -> None:
    run_dir = run(raw).run_dir
    key = saved[4].key
    assert key > 2**32  # to be found, where it is
    contents = load_checkpoint(saved[4].path)
    assert key not in set(numbers_in(contents)) and str(key) not in str(contents)
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(written) > 6
    for path in written:
        found = path.read_bytes()
        assert all(
            form not in found
            for form in (str(key).encode(), f"{key:x}".encode(), key.to_bytes(8), key.to_bytes(8, "little"))
        )
    assert privacy(run_dir)["replays"] == {}


def test_another_configuration_has_other_noise_and_so_has_the_way_back(
    raw: dict[str, Any], saved: dict[int, Saved]
) -> None:
    """Weights of other steps under noise that was used before would show, by a difference, what the noise hides."""
    slow, fast = {"deterministic": True}, {"deterministic": True, "optimizer.lr": 0.3}
    run_dir = run(raw, **slow).run_dir
    first = dict(saved)
    run(raw, back_to(first[2], run_dir), **fast)
    second = dict(saved)
    assert charged(run_dir) == 6 + 4 and second[6].key != first[6].key
    end = weights_of(run_dir / "weights" / "last.pt")

    run(raw, back_to(first[2], run_dir), **fast)  # what was done before, to the bit
    assert charged(run_dir) == 6 + 4 and torch.equal(weights_of(run_dir / "weights" / "last.pt"), end)

    run(raw, back_to(second[4], run_dir), **slow)  # its own noise of these steps met other weights
    assert saved[6].key not in (first[6].key, second[6].key)
    assert charged(run_dir) == 6 + 4 + 2

    assert "deterministic: true" in str(privacy(run_dir)["not_covered"])


def test_noise_does_not_come_again_when_an_image_is_taken_away(
    raw: dict[str, Any], saved: dict[int, Saved], sample_dir: Path
) -> None:
    """Someone withdraws consent: a run with the same noise and without the image would give away the image."""
    shutil.copytree(sample_dir / "splits", "splits")
    options = {"deterministic": True, "data.splits_dir": "splits", "training.num_epochs": 1}
    run_dir = run(raw, **options).run_dir
    first = dict(saved)
    for path in Path("splits").glob("fold_0_train_*.txt"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    run(raw, **options, run_name="without")
    again = saved[2].key
    run(raw, back_to(first[1], run_dir), **options)  # of now two steps, the second
    assert len({first[2].key, again, saved[2].key}) == 3 and charged(run_dir) == 3 + 1


def test_secure_noise_does_not_repeat_and_says_so(raw: dict[str, Any], saved: dict[int, Saved]) -> None:
    options = {"deterministic": True, "training.dp.secure": True}
    outcome = run(raw, **options)
    end, killed = weights_of(outcome.run_dir / "weights" / "last.pt"), saved[4]
    run(raw, back_to(killed, outcome.run_dir), **options)
    assert not torch.equal(weights_of(outcome.run_dir / "weights" / "last.pt"), end)
    assert charged(outcome.run_dir) == 6 + 2
    assert "training.dp.secure: the noise is the system's, so that a resumed run does not repeat" in log_of(outcome)
    assert "deterministic" not in str(privacy(outcome.run_dir)["not_covered"])


def test_a_ledger_that_cannot_be_read_is_not_forgotten(raw: dict[str, Any], saved: dict[int, Saved]) -> None:
    run_dir = run(raw).run_dir
    (run_dir / "privacy.json").write_text("{")
    with pytest.raises(TrainingError, match=r"privacy\.json cannot be read .*so what this run has spent is not known"):
        run(raw, back_to(saved[4], run_dir))
    assert (run_dir / "privacy.json").read_text() == "{"
