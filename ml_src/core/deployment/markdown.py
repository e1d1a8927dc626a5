"""Words, numbers and tables for a page of Markdown."""

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from ml_src.core.checking.grouping import printable


def text(words: Any) -> str:
    """Words as they are, whatever they hold: no markup, no HTML, no end of a line or a cell."""
    escaped = re.sub(
        r"([`*\[\]<>#&~!$])|(?<![^\W_])(_)|(_)(?![^\W_])", r"\\\1\2\3", printable(words).replace("\\", "\0")
    )
    return escaped.replace("\0", "&#92;").replace("|", "&#124;")


def shell(word: str) -> str:
    """A word for a shell, on one line."""
    return printable(shlex.quote(word))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; its cells are Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def interval(ends: Sequence[float] | None) -> str:
    """Two ends to four digits; nothing where they are not known."""
    return "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def figure(value: float | None, how: str) -> str:
    """A number in a format, or a dash."""
    return "-" if value is None else f"{value:{how}}"


def numbers(values: Sequence[float]) -> str:
    """Numbers to six digits, with commas."""
    return ", ".join(f"{value:.6g}" for value in values)


def size_text(size: Sequence[int]) -> str:
    """Height and width of an image."""
    return f"{size[0]}x{size[1]}"
