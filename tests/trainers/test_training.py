"""The loop on real small images: it learns, it resumes to the bit, it stops cleanly, it never overwrites a run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from ml_src.cli import train as command
from ml_src.core.callbacks import Callback
from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.config_file import parse_config
from ml_src.core.errors import CheckpointError, ConfigError, MLError, TrainingError
from ml_src.core.tasks import task_for
from ml_src.core.trainers import Outcome, build_training, choose_backend, train
from ml_src.core.trainers.loop import fit
from ml_src.core.trainers.training import Training

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    torch.use_deterministic_algorithms(False)


def run(raw: dict[str, Any], resume: Path | None = None, **overrides: Any) -> Outcome:
    return train(parse_config(raw, overrides), resume)


def training_of(raw: dict[str, Any], **overrides: Any) -> Training:
    config = parse_config(raw, {"training.device": "cpu", **overrides})
    training = build_training(config, task_for(config), choose_backend(config), config.run_dir)
    training.callbacks = []
    return training


def equal(a: Any, b: Any) -> bool:
    """Equal to the bit, through nested containers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)


STATE = ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "epoch", "step", "metrics", "processes")


def assert_same_run(a: Path, b: Path) -> None:
    first, second = load_checkpoint(a), load_checkpoint(b)
    for key in STATE:
        assert equal(first[key], second[key]), key


def test_four_images_are_learned_by_heart(small_config: dict[str, Any], sample_dir: Path, tmp_path: Path) -> None:
    """SimpleUNet reaches a mean IoU above 0.95 on four images in a few dozen steps."""
    splits = tmp_path / "splits"
    splits.mkdir()
    for kind in ("images", "masks"):
        lines = (sample_dir / "splits" / f"fold_0_train_{kind}.txt").read_text().splitlines()[:4]
        for name in ("fold_0_train", "fold_0_val", "test"):
            (splits / f"{name}_{kind}.txt").write_text("\n".join(lines) + "\n")
    small_config["data"]["splits_dir"] = str(splits)
    small_config["transforms"]["train"] = small_config["transforms"]["train"][-1:]
    training = training_of(small_config, **{"model.base_channels": 8, "training.num_epochs": 80, "optimizer.lr": 0.005})
    fit(training)
    assert training.metrics["val_iou"] > 0.95


@pytest.mark.parametrize("num_workers", [0, 2])
def test_four_epochs_are_two_and_two_more_to_the_bit(small_config: dict[str, Any], num_workers: int) -> None:
    """Weights, optimizer, schedule, metrics and random state agree, with dropout and augmentation."""
    small_config["model"]["dropout"] = 0.3
    small_config["scheduler"] = {"type": "cosine", "T_max": 4, "warmup_epochs": 1}
    settings = {"training.num_workers": num_workers}
    whole = run(small_config, **settings, **{"training.num_epochs": 4, "run_name": "whole"})
    half = run(small_config, **settings, **{"training.num_epochs": 2, "run_name": "half"})
    last = half.run_dir / "weights" / "last.pt"
    run(small_config, last, **settings, **{"training.num_epochs": 4, "run_name": "half"})
    assert_same_run(whole.run_dir / "weights" / "last.pt", last)


class StopAt(Callback):
    """Raises Ctrl-C's signal after a step."""

    name = "stop_at"

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, t: Training, num_samples: int) -> None:
        if t.progress.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_the_middle_of_an_epoch_loses_no_step(
    small_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a real signal after step 2 of 3 of an epoch, then resumed: the same bits as never stopped."""
    import ml_src.core.trainers as trainers

    whole = run(small_config, run_name="whole")
    build = trainers.build_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(trainers, "build_callbacks", lambda *args: [StopAt(5), *build(*args)])
        stopped = run(small_config, run_name="stopped")
    assert stopped.interrupted and "ml-train --resume runs/stopped_fold_0" in stopped.summary
    last = stopped.run_dir / "weights" / "last.pt"
    assert load_checkpoint(last)["step"] == 5
    assert not (stopped.run_dir / "metrics.json").exists()
    assert command.main(["--resume", str(stopped.run_dir)]) == 0
    assert_same_run(whole.run_dir / "weights" / "last.pt", last)


def test_results_do_not_depend_on_the_number_of_workers(small_config: dict[str, Any]) -> None:
    runs = [run(small_config, run_name=f"w{n}", **{"training.num_workers": n}) for n in (0, 1, 2)]
    for other in runs[1:]:
        assert_same_run(runs[0].run_dir / "weights" / "last.pt", other.run_dir / "weights" / "last.pt")


def test_accumulated_batches_give_the_gradient_of_one_large_batch(small_config: dict[str, Any]) -> None:
    """Three batches of 4, 4 and a short one weigh as much as their images; the network has no batch statistics here."""
    small_config["loss"] = {"type": "dice_loss"}

    def gradient(batch_size: int, accumulation: int) -> list[torch.Tensor]:
        overrides = {"training.batch_size": batch_size, "training.gradient_accumulation_steps": accumulation}
        training = training_of(small_config, **overrides, **{"training.num_epochs": 1})
        torch.manual_seed(0)
        training.model = nn.Conv2d(3, 3, 3, padding=1)
        training.optimizer = torch.optim.SGD(training.model.parameters(), lr=1.0)
        before = [p.detach().clone() for p in training.model.parameters()]
        fit(training)
        assert training.progress.step == 1
        return [p.detach() - b for p, b in zip(training.model.parameters(), before, strict=True)]

    num_images = len(task_for(parse_config(small_config)).loader("train").dataset)
    assert num_images % 4 != 0, "the last batch must be short for this test"
    large = gradient(num_images, 1)
    accumulated = gradient(4, -(-num_images // 4))
    for a, b in zip(large, accumulated, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_clipping_bounds_the_step(small_config: dict[str, Any]) -> None:
    small_config["training"]["callbacks"] = [{"type": "gradient_clipping", "max_norm": 1e-3}]
    training = training_of(small_config, **{"training.num_epochs": 1})
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=1.0)

    def weights() -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in training.model.parameters()])

    before = weights()
    fit(training)
    moved = weights() - before
    assert 0 < moved.norm() <= 1e-3 * training.progress.step * 1.01


def test_a_run_folder_holds_what_the_guide_lists(small_config: dict[str, Any]) -> None:
    outcome = run(small_config, run_name="a")
    for name in ("config.yaml", "summary.txt", "metrics.json", "weights/best.pt", "weights/last.pt", "logs/train.log"):
        assert (outcome.run_dir / name).is_file(), name
    assert list((outcome.run_dir / "tensorboard").glob("events*"))
    assert parse_config(yaml.safe_load((outcome.run_dir / "config.yaml").read_text())).run_name == "a"
    metrics = json.loads((outcome.run_dir / "metrics.json").read_text())
    assert metrics["test"]["num_images"] == len(metrics["test"]["per_image"]) > 0
    assert 0 <= metrics["val"]["iou"] <= 1
    assert "Test Results:" in outcome.summary and "epoch 2/2" in (outcome.run_dir / "logs" / "train.log").read_text()


def test_tensorboard_has_every_curve_and_a_picture(small_config: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small_config["training"]["callbacks"] = [{"type": "lr_monitor"}]
    outcome = run(small_config)
    events = EventAccumulator(str(outcome.run_dir / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    for tag in ("loss/train", "loss/val", "iou/val", "dice/val", "pixel_accuracy/val", "lr/epoch", "lr/step"):
        assert tag in tags["scalars"], tag
    assert {"val_iou/cell", "val_dice/fibre"} <= set(tags["scalars"])
    assert len(events.Images(tags["images"][0])) == 2


def test_a_run_is_not_overwritten_unless_asked(small_config: dict[str, Any]) -> None:
    run(small_config)
    note = Path("runs/sample_fold_0/note.txt")
    note.write_text("mine")
    with pytest.raises(TrainingError, match=r"a finished run: give --run_name .*--overwrite"):
        run(small_config)
    train(parse_config(small_config), overwrite=True)
    assert note.read_text() == "mine"


def test_early_stopping_stops_and_says_why(small_config: dict[str, Any]) -> None:
    small_config["training"]["callbacks"] = [{"type": "early_stopping", "patience": 1, "min_delta": 1.0}]
    outcome = run(small_config, **{"training.num_epochs": 9})
    assert load_checkpoint(outcome.run_dir / "weights" / "last.pt")["epoch"] == 2
    assert "Stopped early: val_iou has not improved" in outcome.summary


def test_the_best_k_epochs_are_kept_and_best_is_one_of_them(small_config: dict[str, Any]) -> None:
    small_config["training"]["callbacks"] = [{"type": "model_checkpoint", "monitor": "val_dice", "save_top_k": 2}]
    outcome = run(small_config, **{"training.num_epochs": 5})
    weights = outcome.run_dir / "weights"
    kept = {path.name for path in weights.glob("epoch_*.pt")}
    best = load_checkpoint(weights / "best.pt")
    assert len(kept) == 2 and f"epoch_{best['epoch']}.pt" in kept
    scores = [load_checkpoint(weights / name)["metrics"]["val_dice"] for name in kept]
    assert max(scores) == best["metrics"]["val_dice"]


def test_an_unknown_metric_gets_a_suggestion(small_config: dict[str, Any]) -> None:
    small_config["training"]["callbacks"] = [{"type": "early_stopping", "monitor": "val_iuo"}]
    with pytest.raises(ConfigError, match="did you mean 'val_iou'"):
        run(small_config)


def test_a_federation_without_a_section_of_its_own_says_what_is_missing(
    small_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.yaml").write_text(yaml.safe_dump(small_config))
    assert command.main(["--config", "a.yaml", "--set", "training.trainer_type=federated"]) == 2
    error = capsys.readouterr().err
    assert "trainer_type federated needs a section federated: with sites or num_sites" in error
    assert not Path("runs").exists()


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_good_epoch(small_config: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"lower optimizer\.lr"):
        run(small_config, **{"optimizer.lr": 1e30, "optimizer.type": "sgd", "training.num_epochs": 3})


def test_resume_refuses_what_is_no_run(tmp_path: Path) -> None:
    assert command.main(["--resume", str(tmp_path)]) == 2
    (tmp_path / "junk.pt").write_text("junk")
    assert command.main(["--resume", str(tmp_path / "junk.pt")]) == 2


def test_resume_with_another_network_says_that_it_does_not_fit(small_config: dict[str, Any]) -> None:
    outcome = run(small_config)
    with pytest.raises(CheckpointError, match="do not fit the network"):
        run(small_config, outcome.run_dir / "weights" / "last.pt", **{"model.base_channels": 2})


def test_wrong_masks_are_named_before_anything_is_written(small_config: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"num_classes is 2") as caught:
        run(small_config, **{"data.num_classes": 2, "data.class_names": None})
    assert "masks/" in str(caught.value)
    assert not Path("runs").exists()


PLUGIN = """
import torch
from torch import nn
from ml_src.core.losses.segmentation import LOSS_REGISTRY
from ml_src.core.network.custom import MODEL_REGISTRY

class MyCustomUNet(nn.Module):
    def __init__(self, in_channels=3, num_classes=2, **kwargs):
        super().__init__()
        self.layer = nn.Conv2d(in_channels, num_classes, 3, padding=1)

    def forward(self, x):
        return self.layer(x)

class MyCustomLoss(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ignore_index = config.ignore_index

    def forward(self, logits, targets):
        return nn.functional.cross_entropy(logits, targets, ignore_index=self.ignore_index)

MODEL_REGISTRY['my_custom_unet'] = MyCustomUNet
LOSS_REGISTRY['my_custom_loss'] = MyCustomLoss
"""


def test_a_users_own_model_and_loss_train_and_opening_them_needs_the_users_word(
    small_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from ml_src.cli import inference

    Path("my_models.py").write_text(PLUGIN)
    small_config["plugins"] = ["my_models.py"]
    small_config["model"] = {"custom_architecture": "my_custom_unet"}
    small_config["loss"] = {"type": "my_custom_loss"}
    best = run(small_config).run_dir / "weights" / "best.pt"
    Path("my_models.py").write_text("raise SystemExit('imported without being asked')")
    assert inference.main(["--checkpoint_path", str(best)]) == 2
    assert "needs my_models.py: pass --plugin my_models.py if you trust that file" in capsys.readouterr().err
    Path("my_models.py").write_text(PLUGIN)
    assert inference.main(["--checkpoint_path", str(best), "--plugin", "my_models.py"]) == 0


def test_a_broken_plugin_is_one_sentence(small_config: dict[str, Any]) -> None:
    Path("bad.py").write_text("import nonexistent_module_xyz")
    with pytest.raises(ConfigError, match=r"plugins: bad.py failed: ModuleNotFoundError"):
        run({**small_config, "plugins": ["bad.py"]})


def test_without_test_images_the_validation_images_alone_are_measured(
    small_config: dict[str, Any], sample_dir: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(sample_dir / "splits", tmp_path / "splits")
    for kind in ("images", "masks"):
        (tmp_path / "splits" / f"test_{kind}.txt").write_text("")
    outcome = run(small_config, **{"data.splits_dir": str(tmp_path / "splits"), "training.num_epochs": 1})
    assert "Validation Results:" in outcome.summary and "Test Results:" not in outcome.summary


def test_ctrl_c_in_a_terminal_reaches_all_processes_and_still_ends_cleanly(small_config: dict[str, Any]) -> None:
    """A terminal sends the signal to the loader's workers as well; the run stops with last.pt and can go on."""
    small_config["training"] |= {"num_workers": 2, "num_epochs": 500}
    Path("a.yaml").write_text(yaml.safe_dump(small_config))
    words = [sys.executable, "-m", "ml_src.cli.train", "--config", "a.yaml"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0) as process:
        assert process.stderr is not None and process.stdout is not None
        while "epoch 2/500" not in process.stderr.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "To go on: ml-train --resume runs/sample_fold_0" in printed
    epoch = load_checkpoint(Path("runs/sample_fold_0/weights/last.pt"))["epoch"]
    assert command.main(["--resume", "runs/sample_fold_0", "--num_epochs", str(epoch + 1)]) == 0


@pytest.mark.parametrize(
    "mistake",
    [{"loss.type": "nope"}, {"model.custom_architecture": "nope"}, {"training.device": "nope"}, {"data.fold": 9}],
)
def test_a_mistake_leaves_no_run_folder_behind(small_config: dict[str, Any], mistake: dict[str, Any]) -> None:
    with pytest.raises(MLError):
        run(small_config, **mistake)
    assert not Path("runs").exists()


def test_a_checkpoint_outside_a_run_cannot_go_on(small_config: dict[str, Any], capsys: Any) -> None:
    last = run(small_config).run_dir / "weights" / "last.pt"
    Path("copied.pt").write_bytes(last.read_bytes())
    assert command.main(["--resume", "copied.pt"]) == 2
    assert "copied.pt is not in a run's folder" in capsys.readouterr().err


def test_a_resumed_run_writes_down_its_new_settings_and_its_whole_time(small_config: dict[str, Any]) -> None:
    run_dir = run(small_config).run_dir
    last = run_dir / "weights" / "last.pt"
    torch.save(load_checkpoint(last) | {"seconds": 1000.0}, last)  # as if it had taken long
    assert command.main(["--resume", str(run_dir), "--num_epochs", "3"]) == 0
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["training"]["num_epochs"] == 3
    after = json.loads((run_dir / "metrics.json").read_text())
    assert after["num_epochs"] == 3 and after["seconds"] >= 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.fold": 1}, "data.fold 0, not 1"),
        ({"optimizer.type": "sgd"}, "optimizer.type adam, not sgd"),
        ({"data.dataset_name": "other"}, "the data set sample, not other"),
    ],
)
def test_a_resume_that_would_be_another_run_is_refused(
    small_config: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    last = run(small_config).run_dir / "weights" / "last.pt"
    with pytest.raises(CheckpointError, match=words):
        run(small_config, last, **changes, **{"training.num_epochs": 3})


def test_a_resume_takes_the_optimizers_settings_of_the_config(small_config: dict[str, Any]) -> None:
    last = run(small_config).run_dir / "weights" / "last.pt"
    run(small_config, last, **{"optimizer.weight_decay": 0.5, "training.num_epochs": 3})
    assert load_checkpoint(last)["optimizer_state_dict"]["param_groups"][0]["weight_decay"] == 0.5


def test_a_folder_is_taken_before_the_first_step_and_a_run_that_is_killed_there_can_go_on(
    small_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ml_src.core.trainers as trainers

    class Killed(BaseException):
        pass

    class Kill(Callback):
        name = "kill"

        def on_step(self, t: Training, num_samples: int) -> None:
            raise Killed

    build = trainers.build_callbacks
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainers, "build_callbacks", lambda *args: [*build(*args), Kill()])
        run(small_config, run_name="killed")
    with pytest.raises(TrainingError, match=r"an unfinished run: go on with ml-train --resume runs/killed_fold_0"):
        run(small_config, run_name="killed")
    whole = run(small_config, run_name="whole")
    assert command.main(["--resume", "runs/killed_fold_0"]) == 0
    assert_same_run(whole.run_dir / "weights" / "last.pt", Path("runs/killed_fold_0/weights/last.pt"))


def test_sigterm_to_the_whole_process_group_ends_cleanly(small_config: dict[str, Any]) -> None:
    """As by `timeout 6 ml-train ...`: the workers must not die before the main process has saved."""
    small_config["training"] |= {"num_workers": 2, "num_epochs": 500}
    Path("a.yaml").write_text(yaml.safe_dump(small_config))
    words = [sys.executable, "-m", "ml_src.cli.train", "--config", "a.yaml"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0) as process:
        assert process.stderr is not None
        while "epoch 1/500" not in process.stderr.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "rror" not in errors, errors


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_is_damaged_after_the_check_is_one_sentence(
    small_config: dict[str, Any], sample_dir: Path, tmp_path: Path, num_workers: int
) -> None:
    """The start reads the headers of the images alone; what a worker finds later comes without its traceback."""
    import shutil

    shutil.copytree(sample_dir, tmp_path / "data")
    image = tmp_path / "data" / (tmp_path / "data/splits/fold_0_train_images.txt").read_text().split()[0]
    image.write_bytes(image.read_bytes()[:-400])
    with pytest.raises(MLError, match=image.name) as caught:
        run(small_config, **{"data.data_dir": str(tmp_path / "data"), "training.num_workers": num_workers})
    assert "\n" not in str(caught.value)
