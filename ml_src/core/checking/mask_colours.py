"""From the colours of masks to classes, by a table that the user writes. Next to read: `repair.py`."""

import csv
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_src.core.checking.mask_values import class_dtype
from ml_src.core.data.headers import read_header
from ml_src.core.errors import DataError

Colour = tuple[int, int, int]

EXPORT_AGAIN = "export the masks again as PNG, from the source"
MOST_PROPOSED = 32
HIGHEST_CLASS = 65535
# Of more colours than can be proposed, those that so large a share of the pixels has are classes, if they differ from
# each commoner one by so much in red, green or blue; the others are blends, or traces of compression.
COMMON_COLOUR, LEAST_APART = 0.005, 32


@dataclass(frozen=True)
class ColourMap:
    """Which class each colour becomes."""

    classes: Mapping[Colour, int]
    table: Path  # where that is written

    def classes_of(self, pixels: NDArray[Any], path: Path) -> NDArray[np.uint8 | np.uint16]:
        """Return the classes, (H, W), of colours (H, W, 3) or of gray (H, W, 1).

        A colour that the table has not is never given the class of the nearest: where JPEG blends two colours, the
        nearest may be a third.
        Raises: DataError that names the commonest colour which the table has not.
        """
        keys = np.array(sorted(_packed(np.array(list(self.classes)))), np.uint64)
        table = np.array([self.classes[_unpacked(key)] for key in keys], class_dtype(max(self.classes.values())))
        packed = _packed(pixels)
        places = np.searchsorted(keys, packed).clip(max=len(keys) - 1)
        unknown = packed[keys[places] != packed]
        if unknown.size:
            if path.exists() and read_header(path).lossy:
                raise DataError(
                    f"{path} has {unknown.size} pixels of colours that {self.table} does not list, for compression has "
                    f"changed them: {EXPORT_AGAIN}"
                )
            found, counts = np.unique(unknown, return_counts=True)
            colour = ",".join(map(str, _unpacked(found[counts.argmax()])))
            others = f" and of others, {unknown.size} in all" if len(found) > 1 else ""
            raise DataError(
                f"{path} has {counts.max()} pixels of colour {colour}{others}, which {self.table} does not list: "
                "which class is it? Add it to the table"
            )
        classes: NDArray[np.uint8 | np.uint16] = table[places]
        return classes


def colours_of(pixels: NDArray[Any]) -> Counter[Colour]:
    """Count the pixels of each colour of (H, W, 3) unsigned integers, or of gray (H, W, 1)."""
    found, counts = np.unique(_packed(pixels), return_counts=True)
    return Counter({_unpacked(key): int(count) for key, count in zip(found, counts, strict=True)})


def _packed(pixels: NDArray[Any]) -> NDArray[np.uint64]:
    """One number a colour, in the order of red, green, blue: (..., 3) or, for gray, (..., 1) becomes (...)."""
    wide = pixels.astype(np.uint64)
    return wide[..., 0] << np.uint64(32) | wide[..., pixels.shape[-1] // 2] << np.uint64(16) | wide[..., -1]


def _unpacked(key: int | np.uint64) -> Colour:
    return int(key) >> 32, int(key) >> 16 & 0xFFFF, int(key) & 0xFFFF


def proposed_table(colours: Counter[Colour]) -> list[str]:
    """Return the lines of a table that a user can save and edit: black is class 0, then the commonest first.

    Of very many colours only those are proposed that can be classes: the common ones that are well apart.
    """
    order = [colour for colour, _ in colours.most_common()] if len(colours) <= MOST_PROPOSED else _apart(colours)
    if (0, 0, 0) in colours:
        order = [(0, 0, 0), *(colour for colour in order if colour != (0, 0, 0))]
    return ["r,g,b,class", *(f"{r},{g},{b},{index}" for index, (r, g, b) in enumerate(order[:MOST_PROPOSED]))]


def _apart(colours: Counter[Colour]) -> list[Colour]:
    """Return the common colours, the commonest first, that are no shades of a commoner one."""
    least, depth = COMMON_COLOUR * colours.total(), 257 if max(map(max, colours)) > 255 else 1
    chosen: list[Colour] = []
    for colour, pixels in colours.most_common(round(1 / COMMON_COLOUR)):  # no more can be common
        apart = (max(abs(one - other) for one, other in zip(colour, known, strict=True)) for known in chosen)
        if pixels >= least and all(distance >= LEAST_APART * depth for distance in apart):
            chosen.append(colour)
    return chosen


def read_colours(path: Path) -> ColourMap:
    """Read a table with the columns r, g, b, class, or color (as #ff0000) and class; other columns are passed over.

    Raises: DataError that names the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            names = [name.strip().lower() for name in rows.fieldnames or []]
            rows.fieldnames = names
            if "class" not in names or not ("color" in names or {"r", "g", "b"} <= set(names)):
                raise DataError(f"{path} must begin with the line r,g,b,class or color,class")
            classes: dict[Colour, int] = {}
            for row in rows:
                colour, index = _entry(row, f"{path} line {rows.line_num}")
                if classes.setdefault(colour, index) != index:
                    raise DataError(f"{path} line {rows.line_num} gives a colour a second class")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({reason}): give a CSV file with the columns r,g,b,class") from error
    if not classes:
        raise DataError(f"{path} lists no colour: write one a line, as r,g,b,class")
    return ColourMap(classes, path)


def _entry(row: Mapping[str, str | None], where: str) -> tuple[Colour, int]:
    index = _number(row.get("class"), HIGHEST_CLASS)
    if row.get("color"):
        match = re.fullmatch(r"#?([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})", (row["color"] or "").strip().lower())
        red, green, blue = (int(part, 16) for part in match.groups()) if match else (None, None, None)
    else:
        red, green, blue = (_number(row.get(name), 65535) for name in ("r", "g", "b"))
    if red is None or green is None or blue is None or index is None:
        raise DataError(f"{where} needs a colour (three numbers from 0 up, or #ff0000) and a class from 0 up")
    return (red, green, blue), index


def _number(text: str | None, most: int) -> int | None:
    stripped = (text or "").strip()
    return int(stripped) if re.fullmatch(r"[0-9]{1,6}", stripped) and int(stripped) <= most else None
