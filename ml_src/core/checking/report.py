"""What ml-check says of a data set, on the terminal and as JSON. Next to read: `page.py`, the same as HTML."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from ml_src.core.atomic import write_json, write_text
from ml_src.core.checking.grouping import (
    by_severity,
    counted,
    groups_of,
    plain_number,
    plural,
    printable,
    relative,
    worst_files,
)
from ml_src.core.checking.inspection import ImageLook, Look, MaskLook
from ml_src.core.checking.kinds import SEVERITIES, Finding
from ml_src.core.checking.page import html_page
from ml_src.core.data.headers import Header
from ml_src.core.errors import ConfigError

SCHEMA_VERSION = 1
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
NUM_WORST = 10
WIDE = 100  # columns of a terminal from which on there is room for four columns of text


# The terminal.


def print_report(findings: Sequence[Finding], num_pairs: int) -> None:
    """Print a line a kind of finding with what to do, and the ten files that have most of them, each with the worst.

    Fits itself into a terminal of any width; a pipe gets every sentence on one line.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width
        console.width = 10_000
    if findings:
        beside = console.width >= WIDE
        table = Table(box=SIMPLE if console.is_terminal else None, pad_edge=False)
        table.add_column("severity", no_wrap=True)
        table.add_column("files", justify="right", no_wrap=True)
        for title in ("finding", "what to do") if beside else ("finding, and what to do",):
            table.add_column(title, overflow="fold")
        for group in groups_of(findings):
            words = [printable(group.title), printable(group.remedy)]
            cells = words if beside else ["\n".join(words)]
            severity = Text(group.severity, STYLES[group.severity])
            table.add_row(severity, Text(str(group.num_files or "-")), *map(Text, cells))
        console.print(table)
        for group in groups_of(findings):
            if group.details:
                print(f"\n{printable(group.title)}:", *map(printable, group.details), sep="\n  ")
    worst = [(path, found) for path, found in worst_files(findings) if found[0].severity != "note"]
    if worst:
        print(f"\nthe worst {NUM_WORST} of {len(worst)} files:" if len(worst) > NUM_WORST else "\nfiles, worst first:")
        for path, found in worst[:NUM_WORST]:
            sentence = found[0].message if str(path) in found[0].message else f"{path}: {found[0].message}"
            others = f" (and {counted(found[1:])})" if len(found) > 1 else ""
            print(fill(printable(sentence) + others, console.width, initial_indent="- ", subsequent_indent="  "))
        print()
    print(fill(f"{plural(num_pairs, 'pair')}: {counted(findings)}", console.width))


# The report as a file.


def require_ending(path: Path) -> None:
    """Raise a ConfigError where a report is to have another ending than .html or .json."""
    if path.suffix.lower() not in (".html", ".json"):
        raise ConfigError(f"--report {path}: a report is HTML or JSON: give a name that ends in .html or .json")


def write_report(path: Path, findings: Sequence[Finding], looks: Sequence[Look], data_dir: Path) -> None:
    """Write all that was found: for programs as .json, see `report_data`; for people as .html, see `html_page`.

    Raises: ConfigError for another ending.
    """
    require_ending(path)
    if path.suffix.lower() == ".json":
        write_json(path, report_data(findings, looks, data_dir))
    else:
        write_text(path, html_page(findings, looks, data_dir))


def report_data(findings: Sequence[Finding], looks: Sequence[Look], data_dir: Path) -> dict[str, Any]:
    """Return the report as plain data.

    version: 1; another number says that a key has changed its meaning.
    data_dir: the folder that was checked.
    counts: pairs, images, masks, errors, warnings, notes.
    findings: a list of
        kind, severity ("error", "warning" or "note"), message;
        path: relative to data_dir, with "/"; null where the finding is about the data set;
        fix: what to do, or null;
        details: further lines, such as a proposed table of colours.
    pairs: a list of
        image: null, or path, problem (why it cannot be read, or null), size ([height, width] in pixels, upright),
            channels, dtype (as stored: uint8, int16, float32, ...); the last three are null where there is no header;
        masks: a list of the same, and of
            values: pixels per stored value, {"0": 900, "1": 100}, of a mask with one channel;
            colours: pixels per colour, {"255,0,0": 12}, of a mask with several;
            num_distinct: how many values or colours there are; where there are very many only the commonest are
                listed;
            num_not_finite: pixels that are NaN or infinite.
    """
    images = [look.image for look in looks if look.image is not None]
    numbers = zip(SEVERITIES, by_severity(findings), strict=True)
    return {
        "version": SCHEMA_VERSION,
        "data_dir": str(data_dir),
        "counts": {
            "pairs": sum(look.image is not None and len(look.masks) > 0 for look in looks),
            "images": len(images),
            "masks": sum(len(look.masks) for look in looks),
            **{f"{severity}s": number for severity, number in numbers},
        },
        "findings": [
            {
                "kind": finding.kind,
                "severity": finding.severity,
                "path": None if finding.path is None else relative(finding.path, data_dir),
                "message": finding.message,
                "fix": finding.fix,
                "details": list(finding.details),
            }
            for finding in findings
        ],
        "pairs": [
            {
                "image": None if look.image is None else _file_data(look.image, data_dir),
                "masks": [_mask_data(mask, data_dir) for mask in look.masks],
            }
            for look in looks
        ],
    }


def _file_data(look: ImageLook | MaskLook, data_dir: Path) -> dict[str, Any]:
    header = look.header
    return {
        "path": relative(look.path, data_dir),
        "problem": look.problem,
        "size": None if header is None else [header.height, header.width],
        "channels": None if header is None else header.samples,
        "dtype": None if header is None else _stored_type(header),
    }


def _stored_type(header: Header) -> str:
    return f"{'int' if header.number == 'signed' else header.number}{header.bits}"


def _mask_data(look: MaskLook, data_dir: Path) -> dict[str, Any]:
    return _file_data(look, data_dir) | {
        "values": {plain_number(value): pixels for value, pixels in sorted(look.values.items())},
        "colours": {",".join(map(str, colour)): pixels for colour, pixels in sorted(look.colours.items())},
        "num_distinct": look.num_distinct,
        "num_not_finite": look.num_not_finite,
    }
