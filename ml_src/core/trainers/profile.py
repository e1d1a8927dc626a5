"""Where the time of a step goes: `training.profile` measures some steps and writes a table and a trace.

The parts of the Training are labelled from outside while it measures, so that the loop stays a page.
"""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ml_src.core.atomic import write_text
from ml_src.core.callbacks import Callback
from ml_src.core.data.loaders import Batch, Step
from ml_src.core.trainers.training import Training

WARM_UP, MEASURED = 3, 20  # steps
PARTS = ("loader wait", "copy", "forward", "loss", "backward", "step")
log = logging.getLogger("ml_src")


class Profile(Callback):
    """Measures steps 4 to 23 of this process; writes table.txt and trace.json.gz into the run folder's profile/."""

    name = "profile"

    def on_start(self, t: Training) -> None:
        self.num_steps, self.seconds = 0, 0.0
        self.profiler: profile | None = None
        # A function found on the instance comes before that of its class.
        self.labelled: list[tuple[Any, str, Any]] = []
        self._label(t.task, "prepare", "copy")
        self._label(t.model, "forward", "forward")
        self._label(t.criterion, "forward", "loss")
        self._label(t.backend, "backward", "backward")
        self._label(t.backend, "step", "step")
        self._replace(t.train_loader, "steps", self._waited_for(t.train_loader.steps))

    def on_step(self, t: Training, num_samples: int) -> None:
        self.num_steps += 1
        if self.profiler is not None:
            self.seconds += time.perf_counter() - self.started
        if self.num_steps == WARM_UP:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (t.device.type == "cuda")
            self.profiler = profile(activities=activities)
            self.profiler.start()
        if self.num_steps == WARM_UP + MEASURED:
            self._write(t)

    def on_end(self, t: Training) -> None:
        self._write(t)
        if self.num_steps <= WARM_UP:
            log.info("profile: fewer than %d steps, nothing was measured", WARM_UP + 1)
        for owner, name, before in reversed(self.labelled):
            if before is None:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = before

    def _write(self, t: Training) -> None:
        if self.profiler is None:
            return
        if t.device.type == "cuda":
            torch.cuda.synchronize()
        self.profiler.stop()
        folder = t.run_dir / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        text = self._table(min(self.num_steps - WARM_UP, MEASURED))
        write_text(folder / "table.txt", text)
        log.info("%strace for a browser's tracing page: %s", text, folder / "trace.json.gz")
        self.profiler = None

    def _table(self, num_steps: int) -> str:
        assert self.profiler is not None
        events = {event.key: event for event in self.profiler.key_averages() if event.key in PARTS}
        total = max(self.seconds, 1e-9) * 1000 / max(num_steps, 1)
        rows = []
        for part in PARTS:
            event = events.get(part)
            host = 0.0 if event is None else event.cpu_time_total / 1000 / max(num_steps, 1)
            device = 0.0 if event is None else event.device_time_total / 1000 / max(num_steps, 1)
            rows.append((part, host, device))
        rows.append(("everything else", total - sum(host for _, host, _ in rows), 0.0))
        lines = [f"A step takes {total:.1f} ms (mean of {num_steps}, profiler included):"]
        lines += [
            f"  {part:<16}{host:9.1f} ms {host / total:6.1%}" + (f"   GPU {device:9.1f} ms" if device else "")
            for part, host, device in rows
        ]
        return "\n".join(lines) + "\n"

    def _label(self, owner: Any, name: str, label: str) -> None:
        call = getattr(owner, name)

        def labelled(*args: Any, **kwargs: Any) -> Any:
            if self.profiler is None or torch.is_inference_mode_enabled():  # validation has steps of its own
                return call(*args, **kwargs)
            with record_function(label):
                return call(*args, **kwargs)

        self._replace(owner, name, labelled)

    def _replace(self, owner: Any, name: str, value: Callable[..., Any]) -> None:
        self.labelled.append((owner, name, vars(owner).get(name)))
        vars(owner)[name] = value

    def _waited_for(self, steps: Callable[..., Iterator[Step]]) -> Callable[..., Iterator[Step]]:
        def timed_steps(*args: Any) -> Iterator[Step]:
            for step in steps(*args):
                self.started = time.perf_counter()
                yield step._replace(batches=timed(step.batches))

        def timed(batches: Iterator[Batch]) -> Iterator[Batch]:
            while True:
                with record_function("loader wait"):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

        return timed_steps
