"""Contestants take turns, percentiles are what was measured, and a fresh process is charged for itself alone."""

import json
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_src.core.deployment.benchmark import (
    END_TO_END,
    STAGES,
    Benchmark,
    Conditions,
    Contestant,
    Fresh,
    Timing,
    cpu_name,
    in_fresh_process,
    measure,
    num_usable_cores,
    percentile,
)
from ml_src.core.errors import MLError

CONDITIONS = Conditions((512, 384), 3, 2, {"torch": "2.15", "onnxruntime": "1.23"}, "AMD EPYC", 2)
MIB = 1 << 20


class Clock:
    """Time that passes only when someone works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[Any], Any]:
        def stage(value: Any) -> Any:
            self.now += seconds
            return value

        return stage


def test_each_stage_has_its_own_time_and_all_of_them_the_sum() -> None:
    clock = Clock()
    stages = {name: clock.work(seconds) for name, seconds in zip(STAGES, (0.25, 0.5, 2.0, 1.0), strict=True)}
    [timing] = measure([Contestant("a", stages, 1)], ["image"], 3, 1, clock=clock)
    assert timing.seconds == {
        "decode": [0.25] * 3,
        "pre-processing": [0.5] * 3,
        "network": [2.0] * 3,
        "post-processing": [1.0] * 3,
        END_TO_END: [3.75] * 3,
    }


def test_a_stage_is_given_what_the_one_before_it_returned() -> None:
    seen: list[Any] = []
    stages: dict[str, Callable[[Any], Any]] = {
        "decode": len,
        "network": lambda n: n * 10,
        "post-processing": seen.append,
    }
    measure([Contestant("a", stages, 1)], ["xx", "yyy"], 4, 0)
    assert seen == [20, 30, 20, 30]


def test_every_round_runs_all_on_one_item_and_begins_with_another() -> None:
    order: list[tuple[str, int]] = []
    contestants = [
        Contestant(name, {"network": lambda item, name=name: order.append((name, item))}, 1) for name in "abc"
    ]
    measure(contestants, range(2), 4, 0)
    rounds = [order[start : start + 3] for start in range(0, 12, 3)]
    assert [{item for _, item in one} for one in rounds] == [{0}, {1}, {0}, {1}]
    assert ["".join(name for name, _ in one) for one in rounds] == ["abc", "bca", "cab", "abc"]


def test_warm_up_is_run_but_not_kept() -> None:
    clock, calls = Clock(), count(1)

    def slow_at_first(item: Any) -> None:
        clock.now += 50.0 if next(calls) <= 2 else 1.0

    done: list[float] = []
    [timing] = measure([Contestant("a", {"network": slow_at_first}, 1)], [0], 5, 2, done.append, clock)
    assert timing.seconds["network"] == [1.0] * 5
    assert done == [1, 2, 3, 4, 5, 6, 7]


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=200), share=st.sampled_from([50, 95, 99]))
def test_percentiles_are_those_of_numpy_without_interpolation(values: list[float], share: int) -> None:
    assert percentile(values, share) == np.percentile(values, share, method="inverted_cdf")


def test_the_99th_percentile_of_fewer_than_a_hundred_is_the_largest() -> None:
    assert percentile(range(20), 99) == 19
    assert percentile(range(99), 99) == 98
    assert percentile(range(100), 99) == 98


def timing(name: str, seconds: list[float], fresh: Fresh | None = None) -> Timing:
    return Timing(name, 2, {"network": seconds, END_TO_END: [2 * one for one in seconds]}, fresh)


def test_the_ratio_is_of_medians_and_images_are_counted_over_all_runs() -> None:
    slow, fast = timing("PyTorch float32", [0.5, 0.4, 0.3]), timing("ONNX Runtime", [0.1, 0.2, 1.7])
    slow_json, fast_json = Benchmark([slow, fast], CONDITIONS).to_json()["contestants"]
    assert slow_json["stages"]["network"]["ratio"] == 1.0
    scores = fast_json["stages"]["network"]
    assert scores["ratio"] == pytest.approx(0.4 / 0.2)
    assert scores["images_per_second"] == pytest.approx(3 * 2 / 2.0)  # batches of 2
    assert [scores[f"p{share}_ms"] for share in (50, 95, 99)] == pytest.approx([200, 1700, 1700])


def test_a_stage_that_the_reference_has_not_has_no_ratio() -> None:
    other = timing("other", [1.0])
    other.seconds["decode"] = [1.0]
    found = Benchmark([timing("first", [1.0]), other], CONDITIONS).to_json()
    assert found["contestants"][1]["stages"]["decode"]["ratio"] is None


def test_a_clock_that_is_too_coarse_gives_no_infinite_speed() -> None:
    found = Benchmark([timing("first", [0.0, 0.0])], CONDITIONS).to_json()
    scores = found["contestants"][0]["stages"]["network"]
    assert (scores["images_per_second"], scores["ratio"]) == (None, None)
    json.dumps(found, allow_nan=False)


def test_tables_name_every_contestant_its_figures_and_the_conditions() -> None:
    fresh = Fresh(1.25, 300 * MIB)
    printed = Benchmark(
        [timing("PyTorch float32", [0.4] * 20), timing("ONNX Runtime", [0.2] * 20, fresh)], CONDITIONS
    ).block()
    rows = {line.split("  ")[0]: line.split() for line in reversed(printed.splitlines()) if line}
    assert rows["ONNX Runtime"] == ["ONNX", "Runtime", *["200.0"] * 3, "10", "2.00", "1.25", "300"]
    assert rows["PyTorch float32"][-2:] == ["-", "-"]
    assert "end to end" in printed
    for words in (
        "20 runs",
        "p99 of so few is the slowest.",
        "512x384",
        "Batches of 2",
        "ONNX Runtime 2",
        "torch 2.15",
    ):
        assert words in printed
    assert "AMD EPYC, 2 cores" in printed


@pytest.mark.parametrize(
    ("num_runs", "words"), [(19, "slowest and so is p95"), (99, "the slowest."), (100, "warm-up.")]
)
def test_percentiles_of_few_runs_say_so(num_runs: int, words: str) -> None:
    assert words in Benchmark([timing("a", [1.0] * num_runs)], CONDITIONS).lines()[0]


def test_a_fresh_process_is_charged_for_what_it_holds() -> None:
    small = in_fresh_process(["-c", "print('done')"])
    large = in_fresh_process(["-c", "text = b'x' * (150 << 20); print('done')"])
    assert 140 * MIB < large.peak_bytes - small.peak_bytes < 200 * MIB


def test_a_fresh_process_is_not_charged_for_what_its_parent_holds() -> None:
    ours = np.ones(200 * MIB, np.uint8)
    assert in_fresh_process(["-c", "print('done')"]).peak_bytes < 100 * MIB
    assert ours[-1] == 1


def test_start_up_ends_with_the_first_line_of_output(tmp_path: Path) -> None:
    """More than a pipe holds is written after it, which cannot end before the clock was read and the rest is."""
    end = tmp_path / "end"
    program = (
        "import pathlib, sys, time; print('first'); print('x' * 1_000_000, flush=True)\n"
        "pathlib.Path(sys.argv[1]).write_text(str(time.monotonic()))"
    )
    before = time.monotonic()
    seconds = in_fresh_process(["-c", program, str(end)]).seconds
    assert 0 < seconds < float(end.read_text()) - before


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("raise SystemExit('no model here')", "exit code 1: no model here"),
        ("pass", "exit code 0: it printed nothing"),
        ("import os, signal; print(1, flush=True); os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
    ],
)
def test_a_fresh_process_that_fails_is_an_error_with_its_last_words(program: str, why: str) -> None:
    with pytest.raises(MLError, match=why):
        in_fresh_process(["-c", program])


def test_the_machine_is_named() -> None:
    assert cpu_name().strip()
    assert num_usable_cores() >= 1
