"""How fast an exported file is beside its checkpoint: `ml-export --benchmark`. Next to read: `card.py`.

All contestants take turns, image by image, so that what else the machine does falls on all of them alike.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from ml_src.core.checking.grouping import printable
from ml_src.core.errors import MLError

END_TO_END = "end to end"
NETWORK = "network"
STAGES = ("decode", "pre-processing", NETWORK, "post-processing")
"""What a contestant's stages are called, where it has them."""
PERCENTILES = (50, 95, 99)
LAUNCHER = Path(__file__).with_name("fresh_process.py")


class Contestant(NamedTuple):
    """A way to predict an image: stages in their order, each given what the one before it returned.

    The first is given the item of the round. A stage returns when it is done: one that computes on a GPU waits for it.
    """

    name: str
    stages: Mapping[str, Callable[[Any], Any]]
    threads: int


class Fresh(NamedTuple):
    """What a process took that was started for one prediction."""

    seconds: float
    """From its start to its first line of output."""
    peak_bytes: int
    """Most memory that it held at once, libraries included."""


@dataclass
class Timing:
    """What was measured of a contestant."""

    name: str
    threads: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of each stage and end to end: one a round, in their order."""
    fresh: Fresh | None = None


@dataclass(frozen=True)
class Conditions:
    """What the figures hold for."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    channels: int
    batch_size: int
    versions: Mapping[str, str]
    """Of the programs that took part."""
    cpu: str
    num_cores: int
    device: str = "cpu"


def measure(
    contestants: Sequence[Contestant],
    items: Sequence[Any],
    num_rounds: int,
    num_warm_up: int,
    advance: Callable[[float], None] = lambda done: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time the stages of contestants, and all of them together.

    Each round runs every contestant once, on the same item; who begins changes from round to round. `items` are gone
    through again and again.

    Args:
        contestants: of unequal names.
        items: one or more of what the first stage takes.
        num_rounds: that are kept, 1 or more.
        num_warm_up: rounds before them, which are not.
        advance: told how many runs are finished, of (num_warm_up + num_rounds) * contestants.
        clock: seconds, from any zero.
    """
    timings = [Timing(one.name, one.threads, {name: [] for name in [*one.stages, END_TO_END]}) for one in contestants]
    both, finished = list(zip(contestants, timings, strict=True)), 0
    for number in range(-num_warm_up, num_rounds):
        first = number % len(both)
        for contestant, timing in both[first:] + both[:first]:
            seconds = _run(contestant, items[number % len(items)], clock)
            if number >= 0:
                for name, value in seconds.items():
                    timing.seconds[name].append(value)
            finished += 1
            advance(finished)
    return timings


def _run(contestant: Contestant, item: Any, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each stage, and of all of them as one: the sum, for they follow each other without a gap."""
    marks, value = [clock()], item
    for stage in contestant.stages.values():
        value = stage(value)
        marks.append(clock())
    seconds = {name: after - before for name, before, after in zip(contestant.stages, marks, marks[1:], strict=False)}
    return {**seconds, END_TO_END: marks[-1] - marks[0]}


def percentile(values: Sequence[float], share: int) -> float:
    """Return the smallest of the values that at least `share` percent of them do not exceed.

    Nothing is interpolated: it is one that was measured, and of fewer than 100 the 99th is the largest.
    """
    return sorted(values)[max(0, -(-len(values) * share // 100) - 1)]


def in_fresh_process(arguments: Sequence[str]) -> Fresh:
    """Run Python with `arguments`, such as `-m module --flag`; return how long its first line and how much it took.

    The command prints a line when it has its first result. Its other output is dropped. Linux and macOS.
    Raises: MLError where it fails or prints nothing.
    """
    launched = subprocess.run([sys.executable, "-I", "-S", str(LAUNCHER), *arguments], capture_output=True, check=False)
    try:
        found = json.loads(launched.stdout)
    except ValueError:
        found = {"exit_code": launched.returncode, "first_line": False}
    if found["exit_code"] or not found["first_line"]:
        said = launched.stderr.decode(errors="replace").strip().splitlines()
        why = printable(said[-1]) if said else "it printed nothing"
        raise MLError(
            f"a process to measure start-up and memory ended with exit code {found['exit_code']}: {why}; "
            f"run it alone to see more: {subprocess.list2cmdline([sys.executable, *arguments])}"
        )
    return Fresh(found["seconds"], found["peak_bytes"])


def cpu_name() -> str:
    """Return what the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        if lines:
            return lines[0].partition(":")[2].strip()
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            return asked.stdout.strip()
    return platform.processor() or platform.machine()


def num_usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Benchmark:
    """Timings side by side; the first contestant is what the others are compared with."""

    timings: Sequence[Timing]
    conditions: Conditions

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data: what best.benchmark.json has.

        conditions; num_runs; reference (the name of the first); contestants: name, threads, startup_seconds,
        peak_bytes (None where not measured), and of each stage and `end to end`: p50_ms, p95_ms, p99_ms,
        images_per_second (over all runs), ratio (of medians: how many times as fast as the reference; None where that
        has no such stage), seconds (of each run, in their order).
        """
        conditions = self.conditions
        return {
            "conditions": {
                "image_size": list(conditions.image_size),
                "channels": conditions.channels,
                "batch_size": conditions.batch_size,
                "device": conditions.device,
                "cpu": conditions.cpu,
                "num_cores": conditions.num_cores,
                "versions": dict(conditions.versions),
            },
            "num_runs": self._num_runs,
            "reference": self.timings[0].name,
            "contestants": [
                {
                    "name": timing.name,
                    "threads": timing.threads,
                    "startup_seconds": timing.fresh and timing.fresh.seconds,
                    "peak_bytes": timing.fresh and timing.fresh.peak_bytes,
                    "stages": {stage: self._scores(timing, stage) for stage in timing.seconds},
                }
                for timing in self.timings
            ],
        }

    @property
    def _num_runs(self) -> int:
        return len(self.timings[0].seconds[END_TO_END])

    def _scores(self, timing: Timing, stage: str) -> dict[str, Any]:
        seconds = timing.seconds[stage]
        before = self.timings[0].seconds.get(stage)
        median, total = percentile(seconds, 50), sum(seconds)
        return {
            **{f"p{share}_ms": percentile(seconds, share) * 1000 for share in PERCENTILES},
            "images_per_second": len(seconds) * self.conditions.batch_size / total if total else None,
            "ratio": percentile(before, 50) / median if before and median else None,
            "seconds": list(seconds),
        }

    def block(self) -> str:
        """Return what is printed: a table of the networks, one of the stages, and what they hold for."""
        contents = self.to_json()
        networks, stages = [], []
        for one in contents["contestants"]:
            name = printable(one["name"])
            network = one["stages"].get(NETWORK, one["stages"][END_TO_END])
            networks.append([name, *_cells(network), _seconds(one["startup_seconds"]), _mebibytes(one["peak_bytes"])])
            for number, (stage, scores) in enumerate(one["stages"].items()):
                stages.append(["" if number else name, stage, *_cells(scores)])
        measured = [f"p{share} ms" for share in PERCENTILES] + ["images/s", "ratio"]
        parts = [
            ["The network alone:", *_table(["", *measured, "start-up s", "peak MiB"], networks)],
            ["All stages:", *_table(["", "stage", *measured], stages)],
            self.lines(),
        ]
        return "\n\n".join("\n".join(part) for part in parts)

    def lines(self) -> list[str]:
        """Return, in sentences, what the figures are and what they hold for."""
        conditions, number = self.conditions, self._num_runs
        height, width = conditions.image_size
        threads = ", ".join(f"{printable(one.name)} {one.threads}" for one in self.timings)
        versions = ", ".join(f"{name} {version}" for name, version in conditions.versions.items())
        few = f"; p99 of so few is the slowest{' and so is p95' if number < 20 else ''}" if number < 100 else ""
        return [
            f"{number} runs of each, in turn, after a warm-up{few}. images/s: over all runs. ratio: how many times as "
            f"fast as {printable(self.timings[0].name)}, by p50.",
            "start-up s: from the start of a fresh process to its first prediction; peak MiB: the most that this "
            "process held.",
            f"Batches of {conditions.batch_size}, {height}x{width} pixels, {conditions.channels} channels, on "
            f"{conditions.device}; {conditions.cpu}, {conditions.num_cores} cores. Threads: {threads}. {versions}.",
        ]


def _cells(scores: Mapping[str, Any]) -> list[str]:
    times = [f"{scores[f'p{share}_ms']:.1f}" for share in PERCENTILES]
    return [*times, _figure(scores["images_per_second"], ".3g"), _figure(scores["ratio"], ".2f")]


def _figure(value: float | None, how: str) -> str:
    return "-" if value is None else f"{value:{how}}"


def _seconds(value: float | None) -> str:
    return _figure(value, ".2f")


def _mebibytes(value: int | None) -> str:
    return _figure(value and value / (1 << 20), ".0f")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: words to the left, figures to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head in ("", "stage") else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    with (console := Console(width=10_000, file=StringIO())).capture() as drawn:
        console.print(table)
    return [line.rstrip() for line in drawn.get().splitlines()]
