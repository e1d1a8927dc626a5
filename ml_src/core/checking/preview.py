"""A sheet of training samples as the network will see them, with their masks drawn over. Next: `segmentation.py`."""

import io
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from ml_src.core.atomic import replacing
from ml_src.core.config import Config
from ml_src.core.config_file import load_config
from ml_src.core.data.files import Pair, find_pairs
from ml_src.core.data.segmentation import Sample, SampleKey, SegmentationDataset
from ml_src.core.data.split_files import existing_files, read_split
from ml_src.core.data.statistics import channel_moments, normalisation
from ml_src.core.errors import ConfigError
from ml_src.core.pictures import Image, as_rgb, overlay, palette
from ml_src.core.progress import progress_bar
from ml_src.core.transforms import build_transforms
from ml_src.core.transforms.geometry import by_channels

NUM_ROWS, NUM_EPOCHS = 6, 5
SIDES = (256, 208, 176)  # of a cell in pixels; the next smaller one is taken where the file would become too large
MOST_BYTES = 4_000_000
MARGIN, GAP, SWATCH = 20, 8, 16  # pixels
TITLE, TEXT, SMALL = 24, 15, 13  # heights of the letters in pixels
# Found by name where the system has them; Pillow's own font knows only English letters.
FONTS = ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf")
INK, FAINT = (20, 20, 20), (95, 95, 95)
GRAY, STRIPE, EVERY = 187, 2, 8  # ignored pixels: gray lines, their width and distance in pixels


class Cell(NamedTuple):
    """One sample, ready to be shown: RGB (h, w, 3) uint8 and mask (h, w), at most the side of a cell."""

    picture: Image
    mask: NDArray[Any]


class Row(NamedTuple):
    """One image: what stands above it, and its cells, the first without augmentation."""

    caption: str
    cells: list[Cell]


def write_preview(config_path: Path, data_dir: Path | None, output: Path) -> Path:
    """Write a PNG sheet: up to six training images, a row each; first as they are, then as five epochs augment them.

    Args:
        config_path: the YAML file whose transforms, seed, fold and classes count.
        data_dir: takes the place of `data.data_dir` where given. Where it has not been split yet, all of its pairs
            are taken for training images.
        output: of the PNG, at most 4 MB; it replaces an older sheet, but never lies among the images or masks.

    Every sample is drawn as training draws it, with the same seed; a size that `random_resize_crop` draws for a whole
    step is that of the epoch's first step. Pixels are shown before the normalisation.

    Returns: `output`.
    Raises: ConfigError, DataError.
    """
    config = load_config(config_path, {} if data_dir is None else {"data.data_dir": str(data_dir)})
    pairs, source = _training_pairs(config)
    _require_apart(output, Path(config.data.data_dir), pairs)
    if config.needs_statistics:
        with progress_bar("reading images for their statistics", len(pairs)) as advance:
            moments, dtype = channel_moments([pair.image for pair in pairs], config.model.in_channels, advance)
        config = config.with_statistics(*normalisation(moments, dtype))
    rows = _rows(config, pairs)
    title = f"What the network sees: {config.dataset_name}"
    explanation = (
        f"{len(rows)} of {source}, with the transforms of {config_path.name}. "
        f"Shown before the normalisation{', three of the channels in false colours' * (config.model.in_channels > 4)}."
    )
    for side in SIDES:
        sheet = _sheet(rows, title, explanation, config.class_names, config.ignore_index, side)
        file = io.BytesIO()
        PILImage.fromarray(sheet).save(file, format="PNG", optimize=True)
        if file.tell() < MOST_BYTES:
            break
    with replacing(output) as target:
        target.write(file.getvalue())
    return output


def _require_apart(output: Path, data_dir: Path, pairs: Sequence[Pair]) -> None:
    """Raise a ConfigError where the sheet would have another ending than .png, or lie among the data."""
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output {output}: the sheet of --preview is a PNG: give a name that ends in .png")
    folders = {data_dir / "images", data_dir / "masks"}
    folders |= {path.parent for pair in pairs for path in (pair.image, pair.mask)}
    inside = output.resolve().parents
    if among := next((folder for folder in sorted(folders) if folder.resolve() in inside), None):
        raise ConfigError(f"--output {output} lies in {among}, among the data: give a name elsewhere")


def _training_pairs(config: Config) -> tuple[Sequence[Pair], str]:
    """The training images of the fold, or of a data set that is not split all, and what they are in words."""
    data_dir, name = Path(config.data.data_dir), f"fold_{config.data.fold}_train"
    if existing_files(config.splits_dir):
        pairs: Sequence[Pair] = read_split(config.splits_dir, data_dir, name)
        return pairs, f"the {len(pairs)} training images of fold {config.data.fold}"
    pairs = find_pairs(data_dir / "images", data_dir / "masks")
    return pairs, f"all {len(pairs)} images (not split yet)"


# Samples.


def _rows(config: Config, pairs: Sequence[Pair]) -> list[Row]:
    plain, augmented = (
        SegmentationDataset(pairs, build_transforms(specs, config.ignore_index), config.model.in_channels, config.seed)
        for specs in (config.val_transforms, config.train_transforms)
    )
    rows = []
    for index in np.unique(np.linspace(0, len(pairs) - 1, NUM_ROWS).astype(int)).tolist():
        samples = [plain[SampleKey(index)]]
        samples += [augmented[SampleKey(index, epoch)] for epoch in range(NUM_EPOCHS)]
        height, width = samples[0].size
        sizes = dict.fromkeys(f"{sample.image.shape[1]} x {sample.image.shape[0]}" for sample in samples[1:])
        caption = f"{pairs[index].image.name}: {width} x {height} pixels; in training {' or '.join(sizes)}"
        rows.append(Row(caption, _cells([_shrunk(sample, SIDES[0]) for sample in samples])))
    return rows


def _shrunk(sample: Sample, side: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Image (h, w, C) and mask (h, w) of a sample, at most `side` high and wide; smaller ones stay as they are."""
    assert sample.mask is not None
    scale = side / max(sample.mask.shape)
    if scale >= 1:
        return sample.image, sample.mask
    height, width = (max(1, round(scale * length)) for length in sample.mask.shape)

    def average(channels: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(cv2.resize(channels, (width, height), interpolation=cv2.INTER_AREA))

    mask = cv2.resize(sample.mask, (width, height), interpolation=cv2.INTER_NEAREST)
    return by_channels(average, sample.image), mask


def _cells(samples: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> list[Cell]:
    """Make samples visible, all with the same black and white: else a change of brightness would not be seen."""
    pixels = np.concatenate([image.reshape(-1, 1, image.shape[2]) for image, _ in samples])
    ends = np.cumsum([mask.size for _, mask in samples])[:-1]
    pictures = np.split(as_rgb(pixels), ends)
    return [Cell(part.reshape(*mask.shape, 3), mask) for part, (_, mask) in zip(pictures, samples, strict=True)]


def _drawn(cell: Cell, ignore_index: int, side: int) -> Image:
    """The picture with its mask drawn over, fitted into a square: shrunk, or enlarged by a whole number."""
    picture, mask = cell
    factor = side / max(mask.shape)
    factor = int(factor) if factor >= 1 else factor
    size = tuple(max(1, round(factor * length)) for length in mask.shape[::-1])
    method = cv2.INTER_NEAREST if factor >= 1 else cv2.INTER_AREA
    picture = cv2.resize(picture, size, interpolation=method)
    mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
    ignored = mask == ignore_index
    drawn = overlay(picture, np.where(ignored, 0, mask))
    return _hatched(drawn, ignored)


def _hatched(picture: Image, ignored: NDArray[np.bool_]) -> Image:
    """Darken what is ignored (H, W) and draw gray lines over it."""
    lines = np.add.outer(np.arange(ignored.shape[0]), np.arange(ignored.shape[1])) % EVERY < STRIPE
    picture = np.where(ignored[:, :, None], picture // 2, picture)
    picture[ignored & lines] = GRAY
    return picture


# The sheet, as strips (h, width, 3) of one width that are laid below each other.


def _sheet(
    rows: Sequence[Row], title: str, explanation: str, class_names: Sequence[str], ignore_index: int, side: int
) -> Image:
    width = 2 * MARGIN + (1 + NUM_EPOCHS) * (side + GAP) - GAP
    columns = ["without augmentation", *(f"epoch {number}" for number in range(1, NUM_EPOCHS + 1))]
    values = {int(value) for row in rows for cell in row.cells for value in np.unique(cell.mask)}
    absent = [name for value, name in enumerate(class_names) if value not in values | {ignore_index}]
    strips = [
        _blank(MARGIN, width),
        _text([(0, title)], width, TITLE, INK),
        *(_text([(0, line)], width, TEXT, FAINT) for line in _lines(explanation, width)),
        _blank(GAP, width),
        *_legend(sorted(values), class_names, ignore_index, width),
    ]
    if absent:
        sentence = f"Not to be seen in these samples: {', '.join(absent)}."
        strips += [_text([(0, line)], width, TEXT, FAINT) for line in _lines(sentence, width)]
    strips += [
        _blank(GAP, width),
        _text([(column * (side + GAP), name) for column, name in enumerate(columns)], width, TEXT, INK),
    ]
    for row in rows:
        strips.append(_text([(0, row.caption)], width, SMALL, FAINT))
        strips.append(_beside([_drawn(cell, ignore_index, side) for cell in row.cells], side, width))
    return np.concatenate(strips)


def _blank(height: int, width: int) -> Image:
    return np.full((height, width, 3), 255, np.uint8)


def _text(words: Sequence[tuple[int, str]], width: int, size: int, colour: tuple[int, int, int]) -> Image:
    """One line of texts, each with its distance in pixels from the margin."""
    strip = PILImage.fromarray(_blank(size + 8, width))
    for left, text in words:
        ImageDraw.Draw(strip).text((MARGIN + left, 2), text, colour, _font(size))
    return np.array(strip)


def _beside(pictures: Sequence[Image], side: int, width: int) -> Image:
    """Pictures in columns of `side` pixels, with a gap below."""
    strip = _blank(max(len(picture) for picture in pictures) + 2 * GAP, width)
    for column, picture in enumerate(pictures):
        left = MARGIN + column * (side + GAP)
        strip[: picture.shape[0], left : left + picture.shape[1]] = picture
    return strip


def _legend(values: Sequence[int], class_names: Sequence[str], ignore_index: int, width: int) -> list[Image]:
    """A swatch and a name for every value of the masks, the ignored one last; as many lines as they need."""
    colours = palette(max(256, *values) + 1)
    strips, left = [_blank(SWATCH + GAP, width)], 0
    for value in sorted(values, key=lambda value: (value == ignore_index, value)):
        swatch = np.full((SWATCH, SWATCH, 3), colours[value], np.uint8)
        text = f"{value} {class_names[value]}" if value < len(class_names) else f"{value} (no such class)"
        if value == ignore_index:
            swatch = _hatched(np.full((SWATCH, SWATCH, 3), GRAY, np.uint8), np.ones((SWATCH, SWATCH), bool))
            text = "ignored: unlabelled, or from outside of the image"
        elif value == 0:
            swatch[1:-1, 1:-1] = 255
            text += " (not coloured)"
        needed = SWATCH + 6 + round(_font(TEXT).getlength(text))
        if left and left + needed > width - 2 * MARGIN:
            strips.append(_blank(SWATCH + GAP, width))
            left = 0
        start = MARGIN + left
        strips[-1][2 : 2 + SWATCH, start : start + SWATCH] = swatch
        words = _text([(left + SWATCH + 6, text)], width, TEXT, INK)
        strips[-1][: len(words)] = np.minimum(strips[-1][: len(words)], words[: SWATCH + GAP])
        left += needed + 24
    return strips


def _lines(text: str, width: int) -> list[str]:
    """Break a text into lines that fit between the margins."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font(TEXT).getlength(longer) <= width - 2 * MARGIN or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@cache
def _font(size: int) -> Any:
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)
