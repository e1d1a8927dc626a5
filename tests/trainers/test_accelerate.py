"""Several processes train as one: real processes on the loopback, started in each way in which a user starts them.

Starting one takes seconds, so most trainings are cases of one program: this file, run as a script in all processes.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from PIL import Image
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from ml_src.cli import train as command
from ml_src.core import trainers
from ml_src.core.callbacks import Callback
from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.config import Config
from ml_src.core.config_file import parse_config
from ml_src.core.errors import ConfigError, MLError
from ml_src.core.inference.jobs import Request, measure_split
from ml_src.core.tasks import task_for
from ml_src.core.trainers import build_training, choose_backend, launch, stop_on_ctrl_c
from ml_src.core.trainers.accelerate import start
from ml_src.core.trainers.sharded import FSDP
from ml_src.core.trainers.training import Training

pytestmark = pytest.mark.xdist_group("accelerate")  # what they share is made once

NUM_VAL, SIDE = 5, 64  # images of the sample data
CLIPPED = [{"type": "gradient_clipping", "max_norm": 0.05}]
ADAM = {"optimizer": {"type": "adam", "lr": 0.002}, "training.callbacks": CLIPPED, "training.num_epochs": 3}

# What differs from `config_of`; a batch size is that of one process, and several share it.
# Those with FSDP are last: what they set up stays in their processes.
CASES: dict[str, dict[str, Any]] = {
    "three": {"training.batch_size": 6, "data.splits_dir": "two_validation_images"},
    "batch": {},
    "group": {"model.norm": "group", "optimizer.lr": 0.1},
    "accumulated": {"training.batch_size": 2, "training.gradient_accumulation_steps": 2, "training.callbacks": CLIPPED},
    "stopped": {},
    "nan": {"model.norm": "group", "optimizer": {"type": "sgd", "lr": 1e30}},
    "adam": ADAM,
    "fsdp1": ADAM,
    "fsdp2": ADAM,
    "fsdp1_ema": {"training.ema": 0.5},
}


def config_of(data_dir: Path, **changes: Any) -> dict[str, Any]:
    training = {"trainer_type": "accelerate", "device": "cpu", "batch_size": 4, "num_epochs": 2, "num_workers": 0}
    return {
        "data": {"data_dir": str(data_dir), "num_classes": 3},
        "model": {"base_channels": 4},
        "loss": {"type": "dice_bce_loss"},
        "training": training,
        "optimizer": {"type": "sgd", "lr": 0.02},
        "transforms": {
            "train": [
                {"type": "random_horizontal_flip"},
                {"type": "random_rotation", "degrees": 20},
                {"type": "normalize", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
            ],
        },
        **changes,
    }


def shared(raw: dict[str, Any], case: str, num_processes: int, **overrides: Any) -> Config:
    """The configuration of a case, whose batches are divided among the processes."""
    settings = {"training.batch_size": 4, "run_name": f"{case}_{num_processes}"} | CASES[case] | overrides
    settings["training.batch_size"] //= num_processes
    return parse_config(raw, settings)


# The program.


class Watch(Callback):
    """Notes what an epoch comes to, how many pixels its validation counts, and how often gradients travel in a step."""

    name = "watch"

    def __init__(self, told_at: int | None) -> None:
        self.told_at = told_at
        self.curve: list[dict[str, float]] = []
        self.counted: list[int] = []
        self.travels: list[int] = []
        self.held = 0.0

    def on_start(self, t: Training) -> None:
        self.metrics: list[Any] = []
        make = t.task.metric
        t.task.metric = lambda: self.metrics.append(make()) or self.metrics[-1]  # type: ignore[func-returns-value]
        self.travels.append(0)
        if isinstance(t.model, torch.nn.parallel.DistributedDataParallel):
            t.model.register_comm_hook(None, self._travel)
        local = [getattr(p, "_local_tensor", p).numel() for p in t.model.parameters()]
        self.held = sum(local) / sum(p.numel() for p in t.measured.parameters())

    def _travel(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.travels[-1] += 1
        return allreduce_hook(None, bucket)

    def on_step(self, t: Training, num_samples: int) -> None:
        self.travels.append(0)
        if t.progress.step == self.told_at:
            os.kill(os.getpid(), signal.SIGINT)

    def on_epoch_end(self, t: Training) -> None:
        self.curve.append(dict(t.metrics))
        self.counted.append(int(self.metrics[-1].counts.sum()))


def observed(config: Config, resume: Path | None = None, told_at: int | None = None) -> dict[str, Any]:
    """Train, and return what was seen of it as plain data."""
    watch, build = Watch(told_at), trainers.build_callbacks
    trainers.build_callbacks = lambda *args: [watch, *build(*args)]
    try:
        outcome = trainers.train(config, resume)
    except MLError as error:
        return {"error": str(error)}
    finally:
        trainers.build_callbacks = build
    return {
        "curve": watch.curve,
        "counted": watch.counted,
        "travels": watch.travels[:-1],
        "held": watch.held,
        "interrupted": outcome.interrupted,
        "summary": outcome.summary,
        "open": dist.is_initialized(),
    }


def divided(config: Config, version: int) -> FSDP:
    """FSDP as accelerate sets it up on several GPUs; on a CPU it has to be told."""
    accelerator = start(config)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["DoubleConv"],
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True if version == 2 else None,
    )
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        state |= {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
    AcceleratorState._shared_state["fsdp_plugin"] = accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    return FSDP(config, accelerator)


def processes_of(case: str) -> int:
    return 3 if case == "three" else 2


def program(folder: Path, cases: Sequence[str]) -> None:
    """Train each case together with the other processes, where it is for so many; write down what this one has seen."""
    os.chdir(folder)
    torch.set_num_threads(1)
    raw = yaml.safe_load(Path("config.yaml").read_text())
    rank, _ = launch.world()
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    def together(config: Config, resume: Path | None = None, told_at: int | None = None) -> dict[str, Any]:
        AcceleratorState._reset_state(reset_partial_state=True)
        # what one training leaves in the store would confuse the next
        own = dist.PrefixStore(f"{config.run_name} {resume}", store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size)
        seen = observed(config, resume, told_at)
        if dist.is_initialized():  # it failed
            dist.destroy_process_group()
        return seen

    for case in cases:
        size = processes_of(case)
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(size)
        if rank >= size:
            continue
        if case.startswith("fsdp"):
            trainers.choose_backend = lambda config, version=int(case[4]): divided(config, version)
            half = shared(raw, case, size, **{"training.num_epochs": 1})
            seen = together(half)
            if "error" not in seen:
                whole = shared(raw, case, size, **{"training.num_epochs": 2})
                seen = together(whole, half.run_dir / "weights" / "last.pt")
        else:
            seen = together(shared(raw, case, size), told_at=4 if case == "stopped" and rank == 1 else None)
        Path(f"{case}_{rank}.json").write_text(json.dumps(seen))


# What it shows.


@dataclass(frozen=True)
class Seen:
    """A folder with the runs of several processes, and of one; what each of them has observed."""

    folder: Path
    raw: dict[str, Any]

    def of(self, case: str, rank: int = 0) -> dict[str, Any]:
        return dict(json.loads((self.folder / f"{case}_{rank}.json").read_text()))

    def last(self, case: str, num_processes: int) -> Path:
        return self.folder / "runs" / f"{case}_{num_processes}_fold_0" / "weights" / "last.pt"


@contextlib.contextmanager
def not_launched() -> Iterator[None]:
    """Without what a launcher above the tests may have set."""
    with pytest.MonkeyPatch.context() as patch:
        for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
            patch.delenv(key, raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def several(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """All cases with several processes, and some with one."""
    folder = tmp_path_factory.mktemp("several")
    raw = config_of(sample_dir)
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    splits = shutil.copytree(sample_dir / "splits", folder / CASES["three"]["data.splits_dir"])
    for kind in ("images", "masks"):
        path = Path(splits) / f"fold_0_val_{kind}.txt"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with not_launched(), contextlib.chdir(folder):
        assert launch.relaunch(3, [__file__, str(folder), *CASES], "") == 0
        for case in ("batch", "group", "accumulated", "adam", "three"):
            (folder / f"{case}_alone.json").write_text(json.dumps(observed(shared(raw, case, 1))))
    return Seen(folder, raw)


def assert_same_curve(ours: Sequence[dict[str, float]], expected: Sequence[dict[str, float]]) -> None:
    assert len(ours) == len(expected)
    for epoch, other in zip(ours, expected, strict=True):
        for key in ("train_loss", "val_loss"):
            assert epoch[key] == pytest.approx(other[key], rel=1e-4), key
        for key in ("train_iou", "val_iou"):  # a pixel between two classes may fall to either
            assert epoch[key] == pytest.approx(other[key], abs=1e-3), key


def assert_close_weights(ours: Path, expected: Path) -> None:
    first, second = (load_checkpoint(path)["model_state_dict"] for path in (ours, expected))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("case", ["batch", "group", "accumulated"])
def test_two_processes_train_as_one_with_the_whole_batch(case: str, several: Seen) -> None:
    """With joined batch statistics too, and although the ninth image leaves one of them an empty batch."""
    expected = json.loads((several.folder / f"{case}_alone.json").read_text())
    for rank in range(2):
        assert_same_curve(several.of(case, rank)["curve"], expected["curve"])
    assert_close_weights(several.last(case, 2), several.last(case, 1))


def test_three_processes_train_as_one_and_count_each_of_two_validation_images_once(several: Seen) -> None:
    expected = json.loads((several.folder / "three_alone.json").read_text())
    for rank in range(3):
        seen = several.of("three", rank)
        assert_same_curve(seen["curve"], expected["curve"])
        assert seen["counted"] == expected["counted"] == [2 * SIDE**2] * 2
    assert_close_weights(several.last("three", 3), several.last("three", 1))


def test_each_validation_image_is_counted_once(several: Seen) -> None:
    assert several.of("batch")["counted"] == several.of("fsdp1")["counted"] * 2 == [NUM_VAL * SIDE**2] * 2


def test_gradients_travel_once_a_step_however_many_batches_it_has(several: Seen) -> None:
    assert several.of("batch")["travels"] == several.of("accumulated")["travels"] == [1] * 6


def test_the_processes_have_parted_at_the_end(several: Seen) -> None:
    assert not any(several.of(case, rank)["open"] for case in ("batch", "stopped", "fsdp2") for rank in range(2))


def test_all_processes_stop_at_the_same_loss_that_is_no_number(several: Seen) -> None:
    assert several.of("nan", 0) == several.of("nan", 1)
    assert "the loss is no finite number in epoch 1, step 2" in several.of("nan")["error"]
    assert load_checkpoint(several.last("nan", 2))["step"] == 1


@pytest.fixture
def resumable(several: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """A copy, to go on with the runs in."""
    shutil.copytree(several.folder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return Seen(tmp_path, several.raw)


def test_one_process_goes_on_within_the_epoch_of_two(several: Seen, resumable: Seen) -> None:
    """Ctrl-C reached only the second of them; both stopped after step 4 of 6."""
    assert several.of("stopped", 0)["interrupted"] and several.of("stopped", 1)["interrupted"]
    last = resumable.last("stopped", 2)
    assert load_checkpoint(last)["epoch_step"] == 1
    observed(shared(several.raw, "stopped", 1, run_name="stopped_2"), last)
    assert_close_weights(last, several.last("batch", 1))
    metrics = [load_checkpoint(path)["metrics"] for path in (last, several.last("batch", 1))]
    assert_same_curve(metrics[:1], metrics[1:])


def test_one_process_with_other_steps_goes_on_only_between_epochs(several: Seen, resumable: Seen) -> None:
    settings = {"training.batch_size": 2, "training.num_epochs": 3}
    config = shared(several.raw, "stopped", 1, run_name="stopped_2", **settings)
    assert "images a step 4, not 2" in observed(config, resumable.last("stopped", 2))["error"]
    seen = observed(shared(several.raw, "batch", 1, run_name="batch_2", **settings), resumable.last("batch", 2))
    assert len(seen["curve"]) == 1 and load_checkpoint(resumable.last("batch", 2))["epoch"] == 3


@pytest.mark.parametrize("case", ["fsdp1", "fsdp2"])
def test_divided_weights_are_trained_as_whole_ones(case: str, several: Seen) -> None:
    """FSDP on CPUs, with clipping; resumed after the first epoch, by two processes, and after the second, by one."""
    expected = json.loads((several.folder / "adam_alone.json").read_text())["curve"]
    for rank in range(2):
        seen = several.of(case, rank)
        assert 0.4 < seen["held"] < 0.6
        assert_same_curve(seen["curve"], expected[1:2])


@pytest.mark.parametrize("case", ["fsdp1", "fsdp2"])
def test_the_checkpoints_of_divided_weights_are_those_of_any_trainer(case: str, several: Seen, resumable: Seen) -> None:
    last = resumable.last(case, 2)
    contents, expected = load_checkpoint(last), load_checkpoint(several.last("adam", 1))
    assert list(contents["model_state_dict"]) == list(expected["model_state_dict"])
    assert contents["optimizer_state_dict"]["state"].keys() == expected["optimizer_state_dict"]["state"].keys()
    assert measure_split(Request([last.with_name("best.pt")]), "val").block in several.of(case)["summary"]
    settings = {"run_name": f"{case}_2", "training.trainer_type": "standard"}
    assert_same_curve(
        observed(shared(several.raw, case, 1, **settings), last)["curve"],
        json.loads((several.folder / "adam_alone.json").read_text())["curve"][2:],
    )


def test_an_average_of_divided_weights_is_refused(several: Seen) -> None:
    assert several.of("fsdp1_ema", 1)["error"].startswith("training.ema does not go with FSDP")


# The commands, as users type them.

LONG = {
    "model": {"base_channels": 4, "dropout": 0.3},
    "optimizer": {"type": "adam", "lr": 0.002},
    "scheduler": {"type": "cosine", "warmup_epochs": 1},
}
TORCHRUN = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", "2", "-m"]
PATIENCE = 120  # seconds, much more than anything takes


class Command:
    """An ml-train that runs in a folder, with what it says."""

    def __init__(self, folder: Path, *words: str, launcher: Sequence[str] = ()) -> None:
        self.log = folder / f"stderr_{len(list(folder.glob('stderr_*')))}"
        with not_launched(), self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *launcher, "ml_src.cli.train", *["--"] * (launcher == TORCHRUN), *words],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def wait(self) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr."""
        stdout, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, stdout, self.log.read_text()

    def until_saved(self, last: Path) -> None:
        """Wait until a checkpoint has been written twice; to open it would take as long as several steps."""
        deadline, seen = time.monotonic() + PATIENCE, [_written(last)]
        while len(seen) < 3:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            if (now := _written(last)) not in (0, seen[-1]):
                seen.append(now)
            time.sleep(0.005)

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in children.read_text().split()]


def _written(path: Path) -> int:
    """When a file was written; 0 while it is not there."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return 0


@dataclass(frozen=True)
class Runs:
    """One run that was left alone, under torchrun, and one that was stopped, killed and resumed, started plainly."""

    folder: Path
    whole: tuple[int, str, str]
    stopped: tuple[int, str, str]
    killed: tuple[int, str, str]
    resumed: tuple[int, str, str]
    steps: tuple[int, int]  # where it was stopped and killed


@pytest.fixture(scope="module")
def runs(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two processes, dropout, an average of the weights, and 12 steps, each of them saved."""
    folder = tmp_path_factory.mktemp("commands")
    raw = config_of(sample_dir, **LONG)
    raw["training"] |= {"batch_size": 2, "num_epochs": 4, "ema": 0.9, "checkpoint_every": "1steps", "num_processes": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    whole = Command(folder, "--config", "config.yaml", "--run_name", "whole", launcher=TORCHRUN)
    last, run_dir = folder / "runs/torn_fold_0/weights/last.pt", "runs/torn_fold_0"

    stopping = Command(folder, "--config", "config.yaml", "--run_name", "torn")
    stopping.until_saved(last)
    for pid in [stopping.process.pid, *stopping.workers()]:  # as a cluster's scheduler does: each is told twice
        os.kill(pid, signal.SIGTERM)
    stopped = stopping.wait()
    step = load_checkpoint(last)["step"]
    killing = Command(folder, "--resume", run_dir)
    killing.until_saved(last)
    os.kill(killing.workers()[1], signal.SIGKILL)
    killed = killing.wait()
    steps = step, load_checkpoint(last)["step"]
    return Runs(folder, whole.wait(), stopped, killed, Command(folder, "--resume", run_dir).wait(), steps)


def test_torchrun_trains_to_the_end_and_says_nothing_twice(runs: Runs) -> None:
    code, stdout, stderr = runs.whole
    assert code == 0 and stdout.count("Validation Results:") == 1
    lines = stderr.splitlines()
    assert lines[0] == "accelerate with 2 processes (MULTI_CPU)" and lines[-1].startswith("Measuring epoch ")
    assert len(lines) == len(set(lines)) == 8  # no warning either


def test_only_the_main_process_writes(runs: Runs) -> None:
    run_dir = runs.folder / "runs/whole_fold_0"
    log = (run_dir / "logs" / "train.log").read_text()
    assert [log.count(f"epoch {epoch}/4: ") for epoch in range(1, 5)] == [1] * 4
    assert len(list((run_dir / "tensorboard").iterdir())) == 1
    assert not list(run_dir.rglob("*.tmp"))


def test_a_signal_stops_all_processes_with_one_sentence(runs: Runs) -> None:
    code, stdout, stderr = runs.stopped
    assert code == 130 and runs.steps[0] < 12
    assert stdout == "Stopped. To go on: ml-train --resume runs/torn_fold_0\n"
    assert stderr.count("Stopping after this step") == 1


def test_a_process_that_is_killed_ends_all_with_the_command_to_go_on(runs: Runs) -> None:
    code, _, stderr = runs.killed
    assert code == 2 and runs.steps[0] < runs.steps[1] < 12
    *_, line = stderr.splitlines()
    assert line.startswith("error: process 1 of 2 was ended by SIGKILL") and stderr.count("error") == 1
    assert line.endswith("go on with ml-train --resume runs/torn_fold_0")


def test_a_stopped_and_killed_run_ends_with_the_bits_of_one_left_alone(runs: Runs) -> None:
    """Every process draws its own dropout, and goes on with it."""
    assert runs.resumed[0] == 0
    torn, whole = (load_checkpoint(runs.folder / f"runs/{name}_fold_0/weights/last.pt") for name in ("torn", "whole"))
    for key in ("model_state_dict", "raw_state_dict", "metrics"):
        torch.testing.assert_close(torn[key], whole[key], rtol=0, atol=0, equal_nan=True)
    both = [contents["optimizer_state_dict"]["state"] for contents in (torn, whole)]
    torch.testing.assert_close(*both, rtol=0, atol=0)
    states = [[own["random_state"]["torch"] for own in contents["processes"]] for contents in (torn, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert not torch.equal(*states[0])


def test_accelerate_launch_starts_one_process(sample_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_of(sample_dir)))
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]
    code, stdout, stderr = Command(tmp_path, "--config", "config.yaml", "--num_epochs", "1", launcher=launcher).wait()
    assert code == 0 and "Validation Results:" in stdout, stderr
    assert "accelerate with 1 process (NO)" in stderr.splitlines()


@pytest.fixture
def raw(sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    with not_launched():
        yield config_of(sample_dir)


def test_a_mistake_in_the_data_is_one_sentence(
    raw: dict[str, Any], sample_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The main process finds it, while the other waits for it to end its checks."""
    data = Path(shutil.copytree(sample_dir, "data"))
    mask = data / next(iter((data / "splits" / "fold_0_train_masks.txt").read_text().splitlines()))
    Image.fromarray(np.full((SIDE, SIDE), 77, np.uint8)).save(mask)
    raw["data"]["data_dir"] = "data"
    Path("config.yaml").write_text(yaml.safe_dump(raw))
    assert command.main(["--config", "config.yaml", "--set", "training.num_processes=2"]) == 2
    assert not Path("runs").exists()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and mask.name in line and "77" in line


def test_another_number_of_processes_than_started_is_one_sentence(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torchrun starts it."""
    Path("config.yaml").write_text(yaml.safe_dump(raw))
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)
    assert command.main(["--config", "config.yaml", "--set", "training.num_processes=2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: training.num_processes is 2 but 1 was started")


def training_of(raw: dict[str, Any]) -> Training:
    config = parse_config(raw)
    return build_training(config, task_for(config), choose_backend(config), config.run_dir)


def test_fsdp_without_several_gpus_is_said_not_to_be_used(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with caplog.at_level("INFO", logger="ml_src"):
        training_of(raw)
    assert sum("Not used: the FSDP of `accelerate config`" in message for message in caplog.messages) == 1


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_installed_is_one_sentence(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"^accelerate cannot start as .* DeepSpeed is not installed"):
        choose_backend(parse_config(raw))


def test_two_sigterms_at_once_are_one_but_a_second_ctrl_c_ends_at_once(raw: dict[str, Any]) -> None:
    training = training_of(raw)
    with pytest.raises(KeyboardInterrupt), stop_on_ctrl_c(training):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert training.signalled
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    program(Path(sys.argv[1]), sys.argv[2:])
