"""What `--max_ram` needs: sizes in words, what the process holds, what a network takes, and which tiles then fit.

The order of things: `give_back_freed_memory` before the first large allocation, `measure` the network, then take
`resident`, then `choose`. Next to read: `predictor.py`.
"""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ml_src.core.errors import ConfigError

MIB = 1 << 20
STEP = 32  # tiles are multiples of it, pixels
SMALL, LARGE = 32, 512  # sides of the tiles on which a network is measured, pixels
SPARE = 32 * MIB  # that heap, and code that is first used with larger tiles
MARGIN = 1.05  # the whole of a page, and what an engine allocates past its own record


def parse_size(text: str) -> int:
    """Return the bytes that a size such as `2G`, `2GiB`, `1500M` or `1.5GB` stands for, rounded down.

    K, M, G and T, also as KiB and so on, count in steps of 1024; KB, MB, GB and TB in steps of 1000. In any case.
    Raises: ConfigError for anything else, and for less than one byte.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(IB|B)?", text.strip().upper())
    size = 0
    if found:
        size = int(float(found[1]) * (1000 if found[3] == "B" else 1024) ** ("KMGT".index(found[2]) + 1))
    if size < 1:
        raise ConfigError(f"{text!r} is not an amount of memory: write it as 2G, 1500M or 1.5GB")
    return size


def format_size(size: float) -> str:
    """Return bytes, rounded up to whole MiB, in a form that `parse_size` reads: `812M`, `2G`."""
    mebibytes = math.ceil(size / MIB)
    return f"{mebibytes // 1024}G" if mebibytes % 1024 == 0 else f"{mebibytes}M"


def resident() -> int:
    """Return the bytes of memory that this process holds now; where there is no /proc, the most that it ever held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _most_ever()


def _most_ever() -> int:
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available() -> int:
    """Return the bytes that a process can still take without swapping: the machine's or, if less, its container's.

    Where the system does not say it (no /proc), all memory that the machine has.
    """
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_left_in_container(Path("/sys/fs/cgroup"))])


def _left_in_container(root: Path) -> Iterator[int]:
    """Yield what the control group at `root` leaves, of version 2 or 1, if it sets a limit. Its file cache is free."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            top, now = ((root / name).read_text() for name in (limit, used))
            stat = dict(line.split() for line in (root / limit).with_name("memory.stat").read_text().splitlines())
            yield max(0, int(top) - int(now) + int(stat.get(cache, 0)))
        except (OSError, ValueError):  # no such version here, or the limit is `max`
            continue


class Need(NamedTuple):
    """Bytes of host memory that a forward pass takes beside the network: at most `fixed + per_pixel * pixels`."""

    fixed: int
    per_pixel: float


def measure(peak: Callable[[int], int]) -> Need:
    """Return what it takes to predict, measured on two small tiles.

    A bound for larger tiles and batches if no block grows faster than the pixels do, which convolutions keep to; global
    attention does not.

    Args:
        peak: makes a batch of one tile of the side that it is given, in pixels, predicts it as later ones will be, in
            the thread that calls it, and returns the bytes of host memory that this took (`Member.peak`).
    """
    # Each block is constant (weights in another layout: at most what a tiny tile takes) or goes with the pixels.
    fixed, large = peak(SMALL), peak(LARGE)
    return Need(math.ceil(MARGIN * fixed) + SPARE, MARGIN * large / LARGE**2)


def peak_of_process(work: Callable[[], object]) -> int:
    """Return the bytes that this process held at most during some work, above what it held before.

    Where the system cannot count anew (no /proc), what the work added to the most that was ever held.
    """
    before = resident()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    except OSError:
        work()
        return max(0, _most_ever() - before)
    work()
    status = Path("/proc/self/status").read_text()
    return max(0, int(status.split("VmHWM:")[1].split()[0]) * 1024 - before)


class Choice(NamedTuple):
    """Side of a tile in pixels, tiles in a batch, and the bytes that the process then holds at most."""

    tile: int
    batch: int
    estimate: int

    def __str__(self) -> str:
        return f"tiles of {self.tile} pixels, {self.batch} at once, at most about {format_size(self.estimate)}"


def choose(
    limit: int,
    base: int,
    bytes_per_pixel: float,
    accumulators: Callable[[int], int],
    wanted_tile: int,
    wanted_batch: int,
    least_tile: int = 128,
) -> Choice:
    """Return the largest tile, and then the largest batch, not above the wanted ones, with which `limit` holds.

    Args:
        limit: bytes that the process may hold.
        base: bytes that it holds whatever is chosen: `resident()` with the network loaded, and `Need.fixed`.
        bytes_per_pixel: `Need.per_pixel`.
        accumulators: from the side of a tile to the bytes beside the network: rows of tiles in flight, read-ahead.
        wanted_tile: side in pixels, taken as it is if it fits; smaller ones are multiples of 32.
        wanted_batch: tiles.
        least_tile: side in pixels below which predictions have too little around them; a smaller wanted one is allowed.

    Raises: ConfigError where not even one small tile fits; it says what would be needed.
    """

    def estimate(tile: int, batch: int) -> int:
        padded = -(-tile // STEP) * STEP
        return math.ceil(base + accumulators(tile) + bytes_per_pixel * batch * padded**2)

    tiles = [wanted_tile, *(side for side in range(wanted_tile // STEP * STEP, 0, -STEP) if least_tile <= side)]
    for tile in tiles:
        for batch in range(wanted_batch, 0, -1):
            if estimate(tile, batch) <= limit:
                return Choice(tile, batch, estimate(tile, batch))
    needed, tile = min((estimate(tile, 1), tile) for tile in tiles)
    raise ConfigError(
        f"--max_ram {format_size(limit)} is too little for this network: at least {format_size(needed)} is needed with "
        f"tiles of {tile} pixels; {format_size(base)} of it are the program and the network, so give that much or "
        "take a smaller network"
    )
