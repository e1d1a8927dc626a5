"""Which images show the same picture, also turned, mirrored, re-encoded or resized. Next to read: `overlaps.py`.

Every image is reduced once to a `Fingerprint`; all comparing is arithmetic on these, and no image is kept in memory.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Side in pixels of the small gray picture, and how many frequencies of each of its axes are kept.
THUMBNAIL, NUM_FREQUENCIES = 32, 16
# Radius of the neighbourhood that local contrast is taken over, in pixels of the small picture.
NEIGHBOURHOOD = 2.0
# Contrast below this share of the whole picture's is not raised to the full: in flat places it is noise.
CONTRAST_FLOOR = 0.2
# Contrast of the small picture, relative to its mean, at or below which there is nothing to compare.
FAINT = 1e-3
# Largest coefficient below which the small picture has no low frequencies; those of white noise are about 1.
TOO_FINE = 0.1
# Cosine of the angle between two sketches. Re-encoded, resized or brightened copies of real pictures stay above 0.98,
# different pictures of one set (cells, roads, slices of a volume) below 0.8, different pictures behind one and the
# same frame (a round field of view) below 0.92.
SAME_PICTURE = 0.95
# Dimensions in which candidates are sought, and how many images are compared with as many others at once.
SEARCH_DIMENSIONS, BLOCK = 64, 512
# Most channels that OpenCV resizes, and the side from which a picture is made smaller before it turns to floats.
OPENCV_CHANNELS, WORKING_SIDE = 4, 256


class Symmetry(NamedTuple):
    """One of the eight symmetries of the square: swap the axes or not, then reverse rows, columns, both or none."""

    words: str
    transposed: bool
    rows_reversed: bool
    columns_reversed: bool


SYMMETRIES = (
    Symmetry("the same way up", False, False, False),
    Symmetry("mirrored left to right", False, False, True),
    Symmetry("mirrored top to bottom", False, True, False),
    Symmetry("turned by 180 degrees", False, True, True),
    Symmetry("mirrored at the main diagonal", True, False, False),
    Symmetry("turned right by 90 degrees", True, False, True),
    Symmetry("turned left by 90 degrees", True, True, False),
    Symmetry("mirrored at the other diagonal", True, True, True),
)


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of an image.

    Attributes:
        digest: 32 hexadecimal digits; equal for equal pixels, also turned and mirrored ones.
        sketch: 256 bytes, the low frequencies of the gray picture as int8; None where it is constant or nearly so,
            because all such pictures look the same.
    """

    digest: str
    sketch: bytes | None


@dataclass(frozen=True)
class Duplicate:
    """Two images that show the same picture.

    Attributes:
        first: index of an image.
        second: index of a later image.
        kind: "exact" for the same pixels, "near" for pictures that a person would call the same.
        symmetry: what has been done to the first to get the second, in words; None where it cannot be told.
    """

    first: int
    second: int
    kind: Literal["exact", "near"]
    symmetry: str | None


def fingerprint(image: NDArray[Any]) -> Fingerprint:
    """Reduce an image to what tells it from others.

    Args:
        image: (H, W, C), uint8, uint16, int16 or float32, any number of channels. What holds no data should be NaN;
            it is taken for the mean.
    """
    native = np.asarray(image, image.dtype.newbyteorder("="))
    return Fingerprint(_digest(native), _sketch(native))


def _digest(image: NDArray[Any]) -> str:
    """Hash the pixels of that one of the eight orientations which comes first in the order of their bytes."""
    pixels = np.ascontiguousarray(image).view(f"V{image.itemsize * image.shape[2]}")[..., 0]  # (H, W): fast to turn
    upright = _first_orientation([_oriented(pixels, symmetry) for symmetry in SYMMETRIES])
    header = f"{image.dtype.name} {upright.shape} {image.shape[2]}"
    return hashlib.blake2b(header.encode() + upright.tobytes(), digest_size=16).hexdigest()


def _oriented(image: NDArray[Any], symmetry: Symmetry) -> NDArray[Any]:
    turned = image.swapaxes(0, 1) if symmetry.transposed else image
    return turned[:: -1 if symmetry.rows_reversed else 1, :: -1 if symmetry.columns_reversed else 1]


def _first_orientation(variants: list[NDArray[Any]]) -> NDArray[Any]:
    """Compare row by row, so that unless the picture is itself symmetric a row or two decide."""
    height = min(len(variant) for variant in variants)
    left = [variant for variant in variants if len(variant) == height]
    for row in range(height):
        contents = [variant[row].tobytes() for variant in left]
        least = min(contents)
        left = [variant for variant, content in zip(left, contents, strict=True) if content == least]
        if len(left) == 1:
            break
    return left[0]


def _sketch(image: NDArray[Any]) -> bytes | None:
    """Return the low frequencies of the small gray picture, after its local contrast has been made even.

    The cosine transform of a small picture is the idea of pHash (Zauner 2010, "Implementation and benchmarking of
    perceptual image hash functions"), but the coefficients are kept instead of their signs alone, for a sign flips
    with the least noise where the coefficient is near zero. Local contrast normalisation is that of Jarrett et al.
    2009 ("What is the best multi-stage architecture for object recognition?"). Without it the frame of a picture, such
    as a round field of view or a corner without data, outweighs what the picture shows.
    """
    thumbnail = _gray_thumbnail(image)
    detail = thumbnail - _blurred(thumbnail)
    contrast = np.sqrt(np.mean(detail**2))
    if contrast <= FAINT * np.mean(np.abs(thumbnail)):
        return None
    even = detail / (np.sqrt(_blurred(detail**2)) + CONTRAST_FLOOR * contrast)
    coefficients = COSINES @ even @ COSINES.T  # (NUM_FREQUENCIES, NUM_FREQUENCIES)
    coefficients[0, 0] = 0  # the mean
    largest = np.abs(coefficients).max()
    if largest < TOO_FINE:
        return None
    values: NDArray[np.int8] = np.rint(coefficients * (127 / largest)).astype(np.int8)
    return values.tobytes()


def _gray_thumbnail(image: NDArray[Any]) -> Floats:
    """Average channels and pixels: (THUMBNAIL, THUMBNAIL)."""
    height, width, channels = image.shape
    if channels > OPENCV_CHANNELS or image.dtype.kind == "f":
        gray = image.mean(axis=2, dtype=np.float32)
        known = np.isfinite(gray)
        if not known.all():
            gray = np.where(known, gray, gray[known].mean() if known.any() else np.float32(0))
    else:  # four times less memory than making floats of a large picture
        gray = _resized(image, min(height, WORKING_SIDE), min(width, WORKING_SIDE)).astype(np.float32)
    thumbnail: Floats = _resized(gray, THUMBNAIL, THUMBNAIL).reshape(THUMBNAIL, THUMBNAIL, -1).mean(axis=2)
    return thumbnail


def _resized(image: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    resized: NDArray[Any] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return resized


def _blurred(picture: Floats) -> Floats:
    blurred: Floats = cv2.GaussianBlur(picture, (0, 0), NEIGHBOURHOOD, borderType=cv2.BORDER_REFLECT)
    return blurred


def _cosines() -> Floats:
    """Return the first rows of the orthonormal cosine transform (DCT-II), (NUM_FREQUENCIES, THUMBNAIL)."""
    positions = (np.arange(THUMBNAIL) + 0.5) / THUMBNAIL
    rows = np.cos(np.pi * np.outer(np.arange(NUM_FREQUENCIES), positions)) * np.sqrt(2 / THUMBNAIL)
    rows[0] /= np.sqrt(2)
    single: Floats = rows.astype(np.float32)
    return single


COSINES = _cosines()


def near_duplicates(fingerprints: Sequence[Fingerprint]) -> list[Duplicate]:
    """Find the images that show the same picture; sorted by index.

    n images of one picture are joined by n - 1 links, not by all their pairs: links join what belongs together, and
    whenever such images lie in two splits, some link goes from one split to the other. What is equal is linked to the
    first of its kind. Images without a sketch can only be exact duplicates.

    No pair above the threshold is missed. Time grows with the square of the number of distinct pictures, but a pair
    costs some 64 multiplications of a matrix product: 10 000 images take less than a second, 100 000 some ten to
    twenty. Memory: about 7 KB an image.
    """
    firsts: dict[str, int] = {}
    found = []
    for index, each in enumerate(fingerprints):
        first = firsts.setdefault(each.digest, index)
        if first != index:
            found.append(Duplicate(first, index, "exact", _symmetry(fingerprints[first], each)))
    sketched = [index for index in firsts.values() if fingerprints[index].sketch is not None]
    for i, j in _linked(_unit_vectors([fingerprints[index] for index in sketched])):
        first, second = sketched[i], sketched[j]
        found.append(Duplicate(first, second, "near", _symmetry(fingerprints[first], fingerprints[second])))
    return sorted(found, key=lambda each: (each.first, each.second))


def _unit_vectors(fingerprints: Sequence[Fingerprint]) -> Floats:
    """Return the sketches as unit vectors, (N, 256)."""
    content = b"".join(each.sketch or b"" for each in fingerprints)
    values = np.frombuffer(content, np.int8).reshape(len(fingerprints), NUM_FREQUENCIES**2).astype(np.float32)
    lengths: Floats = np.linalg.norm(values, axis=1, keepdims=True)
    return values / lengths


def _symmetry(first: Fingerprint, second: Fingerprint) -> str | None:
    if first.sketch is None or second.sketch is None:
        return None
    one, other = _unit_vectors([first, second])
    return SYMMETRIES[int(np.argmax(_orientations(one[None]) @ other))].words


def _orientations(vectors: Floats) -> Floats:
    """Return the sketches of the eight symmetries of each picture: (8, N, 256)."""
    planes = vectors.reshape(-1, NUM_FREQUENCIES, NUM_FREQUENCIES)
    signs = (-1.0) ** np.arange(NUM_FREQUENCIES, dtype=np.float32)  # reversing an axis negates its odd frequencies
    turned = np.empty((len(SYMMETRIES), *planes.shape), np.float32)
    for number, symmetry in enumerate(SYMMETRIES):
        turned[number] = planes.swapaxes(1, 2) if symmetry.transposed else planes
        turned[number] *= signs[:, None] if symmetry.rows_reversed else 1
        turned[number] *= signs if symmetry.columns_reversed else 1
    return turned.reshape(len(SYMMETRIES), *vectors.shape)


def _linked(vectors: Floats) -> list[tuple[int, int]]:
    """Join the rows that are similar in some orientation by as few links (earlier, later) as do.

    The candidates come from coordinates in which a distance is never larger than between the sketches themselves.
    """
    points = _search_coordinates(_invariants(vectors))
    limit = 2 - 2 * SAME_PICTURE + 1e-4  # squared distance of unit vectors; the rest is for rounding
    squares, ones = np.sum(points**2, axis=1, keepdims=True), np.ones((len(points), 1), np.float32)
    left, right = np.hstack([2 * points, -squares, -ones]), np.hstack([points, ones, squares])
    group = np.arange(len(vectors))
    links: list[tuple[int, int]] = []
    for later in _blocks(len(vectors)):
        for earlier in _blocks(later.stop):
            candidates = left[earlier] @ right[later].T >= -limit  # the product is minus the squared distance
            candidates &= group[earlier, None] != group[later]
            rows, columns = (np.flatnonzero(candidates.any(axis=axis)) for axis in (1, 0))
            if len(rows):
                links += _joined(vectors, rows + earlier.start, columns + later.start, group)
    return links


def _blocks(stop: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, stop)) for start in range(0, stop, BLOCK)]


def _joined(
    vectors: Floats, rows: NDArray[np.int64], columns: NDArray[np.int64], group: NDArray[np.int64]
) -> list[tuple[int, int]]:
    """Compare these images in all orientations and join the groups of those that are similar; `group` changes.

    In each round every column takes its first row of another group, so even where all are similar a few rounds do.
    """
    orientations = _orientations(vectors[rows])
    similar = np.max([turned @ vectors[columns].T for turned in orientations], axis=0) >= SAME_PICTURE
    similar &= rows[:, None] < columns
    links = []
    while (similar := similar & (group[rows][:, None] != group[columns])).any():
        second = np.flatnonzero(similar.any(axis=0))
        for i, j in zip(rows[similar[:, second].argmax(axis=0)].tolist(), columns[second].tolist(), strict=True):
            if group[i] != group[j]:
                group[group == group[j]] = group[i]
                links.append((i, j))
    return links


def _invariants(vectors: Floats) -> Floats:
    """Return coordinates that are equal for all eight orientations of a sketch: (N, 256).

    A coefficient of an odd frequency changes its sign when its axis is reversed, and transposing swaps (u, v) with
    (v, u). Of two coefficients that may be swapped and negated, sum and difference or the larger and the smaller stay,
    up to signs. None of these steps lengthens a distance, so what is far apart here is far apart in every orientation.
    """
    planes = vectors.reshape(-1, NUM_FREQUENCIES, NUM_FREQUENCIES)
    u, v = np.triu_indices(NUM_FREQUENCIES, 1)
    one, other = planes[:, u, v], planes[:, v, u]
    total, difference = (one + other) / np.sqrt(2, dtype=np.float32), (one - other) / np.sqrt(2, dtype=np.float32)
    total = np.where((u % 2 == 0) & (v % 2 == 0), total, np.abs(total))
    larger, smaller = np.maximum(np.abs(one), np.abs(other)), np.minimum(np.abs(one), np.abs(other))
    mixed = (u + v) % 2 == 1  # each of the two changes its sign without the other
    diagonal = np.diagonal(planes, axis1=1, axis2=2)
    return np.concatenate(
        [
            np.where(mixed, larger, total),
            np.where(mixed, smaller, np.abs(difference)),
            np.where(np.arange(NUM_FREQUENCIES) % 2 == 0, diagonal, np.abs(diagonal)),
        ],
        axis=1,
    )


def _search_coordinates(points: Floats) -> Floats:
    """Project on the directions in which these points differ most (principal components): (N, SEARCH_DIMENSIONS)."""
    centred = points - points.mean(axis=0) if len(points) else points
    _, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    return np.ascontiguousarray(centred @ directions[:, -SEARCH_DIMENSIONS:])
