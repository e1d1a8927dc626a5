"""The findings as one page for a browser: no scripts, nothing from elsewhere, pictures inside it."""

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ml_src.core.checking.grouping import (
    Group,
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
from ml_src.core.checking.kinds import Finding
from ml_src.core.data.files import read_class_names, read_image, read_mask
from ml_src.core.data.headers import Header
from ml_src.core.errors import DataError
from ml_src.core.pictures import Image, as_rgb, colorize, overlay, palette
from ml_src.core.transforms.source import Window

# What keeps the page small, however large the data set is.
NUM_THUMBNAILS, THUMBNAIL_SIDE, JPEG_QUALITY = 24, 160, 85
NUM_LISTED = 50  # findings of one kind
NUM_ROWS = 20  # sizes, number types, values
# A thumbnail decodes at most so many pixels; of what is larger a square of the middle, where that can be read alone.
MOST_PIXELS, MIDDLE_SIDE = 1 << 26, 2048

CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --faint: #5f6368; --paper: #fff; --line: #d5d8dc; --panel: #f4f5f7;
  --error: #b3261e; --warning: #8a5a00; --note: #5f6368; --good: #1e6b34; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --faint: #a8adb3; --paper: #17181a;
  --line: #3c4043; --panel: #222427; --error: #ff8a80; --warning: #f2c063; --note: #a8adb3; --good: #7fd698; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 70rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
p { margin: .3rem 0; } .faint { color: var(--faint); }
.error { color: var(--error); } .warning { color: var(--warning); } .note { color: var(--note); }
.good { color: var(--good); }
.verdict { margin: 1rem 0; padding: .7rem 1rem; background: var(--panel); border-left: .35rem solid;
  font-size: 1.1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); }
th, td { overflow-wrap: normal; } td.long { overflow-wrap: anywhere; }
th { font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap; }
td.word { white-space: nowrap; font-weight: 600; }
.facts table { width: auto; min-width: 20rem; } .bar { width: 45%; }
.bar span { display: block; height: .9rem; min-width: 2px; outline: 1px solid var(--faint);
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
pre { margin: .5rem 0; padding: .5rem .8rem; background: var(--panel); white-space: pre-wrap; }
ul { margin: .3rem 0; padding-left: 1.2rem; } li { margin: .2rem 0; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 1rem; }
figure { margin: 0; break-inside: avoid; } figure img { display: block; max-width: 160px; }
figcaption { font-size: .85rem; }
tr, li { break-inside: avoid; } h2, h3 { break-after: avoid; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } }
"""
# The browser itself sees to it that nothing is loaded or run, whatever the data holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_page(findings: Sequence[Finding], looks: Sequence[Look], data_dir: Path) -> str:
    """Return one page that needs nothing beside itself: verdict, summary, thumbnails, findings, facts of the data set.

    It stays small: at most 24 thumbnails, 50 findings of a kind, 20 rows a table.
    """
    name = _text(data_dir.resolve().name)
    parts = [
        f"<h1>Data check: {name}</h1>",
        f'<p class="faint">{_text(data_dir)}: {_text(_size_of_set(looks))}</p>',
        _verdict(findings),
    ]
    groups = groups_of(findings)
    if groups:
        parts += ["<h2>Summary</h2>", _summary_table(groups)]
        figures = _figures(findings, looks, data_dir)
        if figures:
            parts += ["<h2>Files with findings, worst first</h2>", f'<div class="sheet">{"".join(figures)}</div>']
        parts += ["<h2>Findings</h2>", *(_group_section(group) for group in groups)]
    parts += ['<h2>The data set</h2><div class="facts">', *_facts(looks, data_dir), "</div>"]
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>Data check: {name}</title><style>{CSS}</style>'
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def _text(value: object) -> str:
    return escape(printable(value))


def _size_of_set(looks: Sequence[Look]) -> str:
    images = sum(look.image is not None for look in looks)
    masks = sum(len(look.masks) for look in looks)
    return f"{plural(images, 'image')}, {plural(masks, 'mask')}"


def _verdict(findings: Sequence[Finding]) -> str:
    errors, warnings, _ = by_severity(findings)
    if errors:
        colour, sentence = "error", "Training would fail on this data."
    elif warnings:
        colour, sentence = "warning", "Training can start, but look at the warnings first."
    else:
        colour, sentence = "good", "Nothing stands in the way of training."
    return f'<p class="verdict {colour}"><strong>{sentence}</strong> {counted(findings).capitalize()}.</p>'


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], classes: Sequence[str]) -> str:
    """An HTML table of cells that are HTML already; `classes` of its columns."""
    head = "".join(f'<th class="{of}">{title}</th>' for title, of in zip(titles, classes, strict=True))
    lines = ("".join(f'<td class="{of}">{cell}</td>' for cell, of in zip(row, classes, strict=True)) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def _summary_table(groups: Sequence[Group]) -> str:
    rows = [
        (
            f'<span class="{group.severity}">{group.severity}</span>',
            _text(group.title),
            str(group.num_files or "-"),
            _text(group.remedy),
        )
        for group in groups
    ]
    return _table(["Severity", "Finding", "Files", "What to do"], rows, ["word", "", "number", "long"])


def _group_section(group: Group) -> str:
    shown = group.findings[:NUM_LISTED]
    items = [f"<li>{_text(finding.message)}{_own_fix(finding, group)}</li>" for finding in shown]
    more = len(group.findings) - len(shown)
    if more:
        items.append(f'<li class="faint">and {more} more, which a report that ends in .json lists</li>')
    title = f'<h3><span class="{group.severity}">{group.severity}</span>: {_text(group.title)}</h3>'
    remedy = f"<p>What to do: {_text(group.remedy)}</p>"
    details = f"<pre>{'<br>'.join(map(_text, group.details))}</pre>" if group.details else ""
    lines = "\n".join(items)
    return f"<section>{title}{remedy}<ul>\n{lines}\n</ul>{details}</section>"


def _own_fix(finding: Finding, group: Group) -> str:
    """What to do about one file, where it is neither what the whole group is told nor in the sentence."""
    known = finding.fix is None or finding.fix == group.remedy or finding.fix in finding.message
    return "" if known else f' <span class="faint">{_text(finding.fix)}</span>'


# Pictures of the files with findings.


def _figures(findings: Sequence[Finding], looks: Sequence[Look], data_dir: Path) -> list[str]:
    by_path = {one.path: look for look in looks for one in (look.image, *look.masks) if one is not None}
    figures = []
    for path, found in worst_files(findings)[:NUM_THUMBNAILS]:
        picture = _thumbnail(path, by_path.get(path))
        name = _text(relative(path, data_dir))
        image = '<p class="faint">no picture can be shown</p>' if picture is None else _embedded(picture, name)
        kinds = dict.fromkeys((finding.severity, finding.kind.replace("_", " ")) for finding in found)
        words = "<br>".join(f'<span class="{severity}">{_text(kind)}</span>' for severity, kind in kinds)
        figures.append(f"<figure>{image}<figcaption>{name}<br>{words}</figcaption></figure>\n")
    return figures


def _embedded(picture: Image, name: str) -> str:
    pixels = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]  # keeps thin coloured lines
    data = cv2.imencode(".jpg", pixels, options)[1].tobytes()
    source = f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"
    return f'<img alt="{name}" width="{picture.shape[1]}" height="{picture.shape[0]}" src="{source}">'


def _thumbnail(path: Path, look: Look | None) -> Image | None:
    """The image with its mask drawn over, where they go together; else the file itself; None where it has no pixels."""
    if look is None:
        return None
    if look.image is not None and len(look.masks) == 1:
        image, mask = look.image, look.masks[0]
        if image.header and mask.header and _size(image.header) == _size(mask.header):
            with suppress(DataError):
                labels = _small(_read_labels(mask), cv2.INTER_NEAREST)
                return overlay(_small(_read_colours(image), cv2.INTER_AREA), labels)
    for one in look.masks:
        if one.path == path:
            with suppress(DataError):
                return colorize(_small(_read_labels(one), cv2.INTER_NEAREST))
            with suppress(DataError):
                return _small(_read_colours(one), cv2.INTER_NEAREST)
    if look.image is not None:
        with suppress(DataError):
            return _small(_read_colours(look.image), cv2.INTER_AREA)
    return None


def _size(header: Header) -> tuple[int, int]:
    return header.height, header.width


def _read_labels(look: MaskLook) -> NDArray[Any]:
    return read_mask(look.path, _middle(look))


def _read_colours(look: ImageLook | MaskLook) -> Image:
    pixels, missing = read_image(look.path, window=_middle(look))
    if missing is not None:  # as dark as the darkest: a value such as -9999 would take all contrast
        there = pixels[~np.broadcast_to(missing, pixels.shape)]
        pixels = np.where(missing, there.min() if there.size else 0, pixels).astype(pixels.dtype)
    return as_rgb(pixels)


def _middle(look: ImageLook | MaskLook) -> Window | None:
    """The part of a file that is shown: None is all of it.

    Raises: DataError for a large file that can only be decoded whole.
    """
    header = look.header
    if header is None or header.height * header.width <= MOST_PIXELS:
        return None
    if not header.windowed:
        raise DataError(f"{look.path} is too large for a thumbnail")
    height, width = min(header.height, MIDDLE_SIDE), min(header.width, MIDDLE_SIDE)
    return Window((header.height - height) // 2, (header.width - width) // 2, height, width)


def _small(pixels: NDArray[Any], interpolation: int) -> NDArray[Any]:
    """Shrink (H, W) or (H, W, 3) to at most the side of a thumbnail; small ones stay as they are."""
    scale = THUMBNAIL_SIDE / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    height, width = (max(1, round(scale * side)) for side in pixels.shape[:2])
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=interpolation))


# What the data set is like.


def _facts(looks: Sequence[Look], data_dir: Path) -> list[str]:
    images = [look.image.header for look in looks if look.image is not None and look.image.header is not None]
    masks = [mask for look in looks for mask in look.masks]
    headers = [mask.header for mask in masks if mask.header is not None]
    values: Counter[float] = Counter()
    colours: Counter[tuple[int, ...]] = Counter()
    for mask in masks:
        values.update(mask.values)
        colours.update(mask.colours)
    names: list[str] | None = None
    with suppress(DataError):
        names = read_class_names(data_dir)
    return [
        *_count_table("Sizes of the images (width x height)", (f"{one.width} x {one.height}" for one in images)),
        *_count_table("Pixels of the images", (f"{one.format}, {one.described}" for one in images)),
        *_count_table("Pixels of the masks", (f"{one.format}, {one.described}" for one in headers)),
        *_share_table(
            "Values of the masks, by their share of the pixels",
            [(_named(value, names), pixels, _value_colour(value)) for value, pixels in sorted(values.items())],
        ),
        *_share_table(
            "Colours of the masks, by their share of the pixels",
            [(",".join(map(str, colour)), pixels, _css_colour(colour)) for colour, pixels in colours.most_common()],
        ),
    ]


def _named(value: float, names: Sequence[str] | None) -> str:
    known = names is not None and value == int(value) and 0 <= value < len(names)
    return f"{plain_number(value)} ({names[int(value)]})" if names is not None and known else plain_number(value)


def _value_colour(value: float) -> str:
    return _css_colour(palette()[int(value) % 256].tolist()) if value == int(value) else "gray"


def _css_colour(colour: Sequence[int]) -> str:
    """CSS of a colour of 1 to 4 channels."""
    red, green, blue = list(colour[:3]) if len(colour) >= 3 else [colour[0]] * 3
    return f"rgb({red} {green} {blue})"


def _count_table(title: str, words: Iterable[str]) -> list[str]:
    counts = Counter(words).most_common()
    rows = [(_text(word), str(number)) for word, number in counts[:NUM_ROWS]]
    table = _table([title, "Files"], rows, ["long", "number"])
    return [table, _rest(len(counts) - len(rows)), "<br>"] if rows else []


def _share_table(title: str, rows: Sequence[tuple[str, int, str]]) -> list[str]:
    """Rows of (label, pixels, CSS colour) as horizontal bars; where there are too many, only the commonest."""
    total = sum(pixels for _, pixels, _ in rows)
    least = sorted((pixels for _, pixels, _ in rows), reverse=True)[:NUM_ROWS]
    kept = [row for row in rows if row[1] >= least[-1]][:NUM_ROWS] if rows else []
    cells = [
        (
            _text(label),
            f"{100 * pixels / total:.2f} %" if pixels / total >= 0.0001 else "&lt; 0.01 %",
            f'<span style="width:{100 * pixels / total:.2f}%;background:{colour}"></span>',
        )
        for label, pixels, colour in kept
    ]
    table = _table([title, "Share", ""], cells, ["long", "number", "bar"])
    return [table, _rest(len(rows) - len(kept)), "<br>"] if cells else []


def _rest(number: int) -> str:
    return f'<p class="faint">and {number} more</p>' if number else ""
