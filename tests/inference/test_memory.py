"""--max_ram: sizes in words, what a forward pass takes, which tiles fit, and refusals beforehand."""

import json
import mmap
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ml_src.core.errors import ConfigError
from ml_src.core.inference import memory
from ml_src.core.inference.memory import (
    MIB,
    available,
    choose,
    format_size,
    measure,
    parse_size,
    resident,
)
from ml_src.core.inference.torch_member import torch_peak

CHILD = """
import json
from pathlib import Path
import torch
from ml_src.core.allocator import give_back_freed_memory, keep_freed_memory
from ml_src.core.inference.memory import measure, resident
from ml_src.core.inference.torch_member import torch_peak
from ml_src.core.network.custom import SimpleUNet

keep_freed_memory()
give_back_freed_memory()
torch.set_num_threads(1)
network = SimpleUNet(3, 2, base_channels=4).to(memory_format=torch.channels_last).eval()

@torch.inference_mode()
def predict(side, batch=1):
    return network(torch.zeros(batch, 3, side, side).to(memory_format=torch.channels_last))

need = measure(lambda side: torch_peak(lambda: predict(side)))
base = resident()
for side, batch in [(256, 3), (512, 1), (512, 4)]:
    predict(side, batch)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
took = int(status["VmHWM"].split()[0]) * 1024 - base
print(json.dumps([took, need.fixed + need.per_pixel * 4 * 512**2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_estimate_is_above_what_a_process_takes_and_not_far_above() -> None:
    """Batches change their shape in between, and the process kept its freed memory before."""
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=100, check=True)
    took, estimate = json.loads(child.stdout)
    assert 80 * MIB < took <= estimate < 1.6 * took
    assert child.stderr == ""


def test_blocks_that_go_with_the_pixels_and_blocks_that_do_not_are_told_apart() -> None:
    def predict(side: int) -> Tensor:
        weights = torch.ones(10 * MIB, dtype=torch.uint8)
        images = torch.ones(1, 6, side, side)
        return images + weights[0]  # images and the sum are there at once: 6 channels x 4 bytes, twice

    need = measure(lambda side: torch_peak(lambda: predict(side)))
    assert 10 * MIB <= need.fixed - memory.SPARE < 11 * MIB
    for pixels in (128**2, 3 * 512**2):
        truth = 10 * MIB + 48 * pixels
        assert truth <= need.fixed + need.per_pixel * pixels <= 48 * pixels * 5 + 11 * MIB * 1.1 + memory.SPARE


def test_memory_that_is_freed_before_the_next_is_taken_counts_once() -> None:
    def predict(side: int) -> None:
        for _ in range(5):
            torch.zeros(1, 4, side, side)

    assert 16 <= measure(lambda side: torch_peak(lambda: predict(side))).per_pixel < 18


PEAKS = """
import numpy as np
from ml_src.core.allocator import give_back_freed_memory
from ml_src.core.inference.memory import MIB, peak_of_process

give_back_freed_memory()
np.ones(200 * MIB, np.uint8)
print(peak_of_process(lambda: np.ones(100 * MIB, np.uint8)) // MIB, peak_of_process(lambda: None) // MIB)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be counted anew")
def test_the_peak_of_the_process_is_that_of_the_work_and_not_of_what_came_before() -> None:
    child = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, timeout=100, check=True)
    of_work, of_none = map(int, child.stdout.split())
    assert 90 < of_work < 150 and of_none < 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2G", 2 * 2**30),
        ("2GiB", 2 * 2**30),
        ("1500M", 1500 * 2**20),
        ("1.5g", 3 * 2**29),
        (" 64 kib ", 2**16),
        ("2GB", 2 * 10**9),
        ("0.5TB", 5 * 10**11),
    ],
)
def test_sizes_are_read_as_they_are_written(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "2", "G", "-2G", "0G", "0.0001K", "2X", "2 G B", "1,5G", "2G2", "1e3M"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(repr(text))} is not an amount of memory: write it as 2G"):
        parse_size(text)


@given(st.integers(1, 2**44))
def test_a_size_that_was_printed_can_be_given_and_is_no_less(size: int) -> None:
    assert size <= parse_size(format_size(size)) < size + MIB


def test_sizes_are_printed_in_the_unit_that_is_exact() -> None:
    assert [format_size(size) for size in (1, 812 * MIB, 812 * MIB + 1, 2048 * MIB)] == ["1M", "812M", "813M", "2G"]


def test_resident_memory_grows_by_the_pages_that_are_written() -> None:
    before = resident()
    with mmap.mmap(-1, 64 * MIB) as block:
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1
        assert resident() - before > 60 * MIB


def test_what_a_container_leaves_counts_its_file_cache_as_free(tmp_path: Path) -> None:
    assert 0 < available() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert list(memory._left_in_container(tmp_path)) == []
    old = tmp_path / "memory"
    old.mkdir()
    for folder, names in ((tmp_path, ("max", "current")), (old, ("limit_in_bytes", "usage_in_bytes"))):
        (folder / f"memory.{names[0]}").write_text("1000\n")
        (folder / f"memory.{names[1]}").write_text("900\n")
        (folder / "memory.stat").write_text("inactive_file 50\ntotal_inactive_file 300\n")
    assert list(memory._left_in_container(tmp_path)) == [1000 - 900 + 50, 1000 - 900 + 300]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(memory._left_in_container(tmp_path)) == [400]


def rows_in_flight(tile: int) -> int:
    return 1000 * tile


def estimate(tile: int, batch: int) -> int:
    """Two bytes a pixel and a base of 10 000."""
    return 10_000 + 1000 * tile + 2 * batch * tile * tile


@pytest.mark.parametrize(
    ("limit", "tile", "batch"),
    [
        (estimate(512, 4) + 10**9, 512, 4),
        (estimate(512, 4), 512, 4),
        (estimate(512, 4) - 1, 512, 3),
        (estimate(512, 1), 512, 1),
        (estimate(512, 1) - 1, 480, 1),  # one tile of 512 is better than four of 256, and one of 480 is next
        (estimate(160, 1), 160, 1),
        (estimate(160, 1) - 1, 128, 2),
        (estimate(128, 1), 128, 1),
    ],
)
def test_a_smaller_batch_is_taken_before_a_smaller_tile(limit: int, tile: int, batch: int) -> None:
    choice = choose(limit, 10_000, 2.0, rows_in_flight, 512, 4)
    assert choice == (tile, batch, estimate(tile, batch))


def test_a_tile_that_is_wanted_is_taken_as_it_is_and_counted_as_it_is_padded() -> None:
    assert choose(10**9, 0, 1.0, lambda tile: 0, 500, 1) == (500, 1, 512**2)
    assert choose(512**2 - 1, 0, 1.0, lambda tile: 0, 500, 1) == (480, 1, 480**2)
    assert choose(10**9, 0, 1.0, lambda tile: 0, 64, 2) == (64, 2, 2 * 64**2)


SIZES = st.integers(1, 40).map(lambda steps: steps * 16)


@given(
    limits=st.lists(st.integers(0, 10**8), min_size=2, max_size=6),
    base=st.integers(0, 10**7),
    per_pixel=st.floats(0, 500),
    row=st.integers(0, 10**5),
    tile=SIZES,
    batch=st.integers(1, 8),
)
def test_the_bound_holds_and_more_memory_never_gives_less(
    limits: list[int], base: int, per_pixel: float, row: int, tile: int, batch: int
) -> None:
    choices = []
    for limit in sorted(limits):
        try:
            choices.append(choose(limit, base, per_pixel, lambda side: row * side, tile, batch))
        except ConfigError:
            assert not choices  # a larger limit is never refused where a smaller one was enough
            continue
        chosen = choices[-1]
        assert base + row * chosen.tile + per_pixel * chosen.batch * chosen.tile**2 <= chosen.estimate <= limit
        assert min(tile, 128) <= chosen.tile <= tile and 1 <= chosen.batch <= batch
        assert chosen.tile == tile or chosen.tile % 32 == 0
    assert all(less[:2] <= more[:2] for less, more in pairwise(choices))


def test_a_refusal_says_how_much_is_needed_and_for_what() -> None:
    with pytest.raises(ConfigError) as refusal:
        choose(500 * MIB, 600 * MIB, 84 * MIB / 128**2, lambda tile: tile * MIB, 512, 4)
    assert str(refusal.value) == (
        "--max_ram 500M is too little for this network: at least 812M is needed with tiles of 128 pixels; "
        "600M of it are the program and the network, so give that much or take a smaller network"
    )


@given(base=st.integers(0, 10**10), per_pixel=st.floats(0.1, 10**4), tile=SIZES)
def test_what_a_refusal_asks_for_is_enough(base: int, per_pixel: float, tile: int) -> None:
    with pytest.raises(ConfigError) as refusal:
        choose(0, base, per_pixel, rows_in_flight, tile, 4)
    found = re.search(r"at least (\w+) is needed with tiles of (\d+) pixels", str(refusal.value))
    assert found
    choice = choose(parse_size(found[1]), base, per_pixel, rows_in_flight, tile, 4)
    assert choice.tile >= int(found[2])


def test_a_choice_can_be_shown() -> None:
    choice = choose(2**31, 2**30, 2.0, rows_in_flight, 512, 4)
    assert str(choice) == "tiles of 512 pixels, 4 at once, at most about 1027M"
