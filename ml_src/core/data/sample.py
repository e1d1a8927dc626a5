"""The generated sample data set, so that the demo, tests and benchmarks need no download. Next to read: `files.py`.

Made-up stained tissue: granular cells and striped fibres among smooth look-alikes that belong to the background. Dyes,
light and focus differ from image to image, so colour alone says little: texture and shape tell the classes apart.
"""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ml_src.core.errors import DataError

Field = NDArray[np.float32]
Points = NDArray[np.float64]

CLASS_NAMES: tuple[str, ...] = ("background", "cell", "fibre")

CLASS_LIST = "".join(f"{name}\n" for name in CLASS_NAMES).encode()  # what classes.txt holds, and known by it

# How many of each thing lie on 128 x 128 pixels; the last three are background.
NUM_THINGS = {"cell": 13, "fibre": 7, "blob": 3, "rod": 2, "ring": 2}
NUM_TRIES = 5  # places tried for each thing: with more, fewer overlap
# How much of the two dyes a thing takes up on average: the kinds differ by less than things of one kind do.
UPTAKE = {"cell": np.array([0.7, 0.5]), "fibre": np.array([0.5, 0.7])}
# Absorbance of red, green and blue by the two dyes (Ruifrok and Johnston 2001: haematoxylin, eosin).
DYES = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])


def draw_sample(seed: int, index: int, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one image and its mask: a pure function of the arguments.

    Things have the same size in pixels in every image, so a larger image shows more of them, not larger ones.

    Args:
        seed: names the data set, 0 or more.
        index: names the image in it, 0 or more.
        height: pixels; 16 or more.
        width: pixels; 16 or more.

    Returns: image (H, W, 3), RGB; mask (H, W), 0 background, 1 cell, 2 fibre.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
    tissue = 0.15 * _noise(rng, height, width, 20) + 0.08 * _noise(rng, height, width, 7)
    tissue += 0.07 * _noise(rng, height, width, 3)
    other = 0.15 * _noise(rng, height, width, 14) + 0.5 * tissue
    dyes = np.stack([0.45 + tissue, 0.45 + other], dtype=np.float32)  # (2, H, W)
    mask = np.zeros((height, width), dtype=np.uint8)
    granules = _noise(rng, height, width, 2)
    crowding = rng.uniform(0.6, 1.4, len(NUM_THINGS)) * height * width / 128**2
    counts = [max(1, round(count)) for count in crowding * list(NUM_THINGS.values())]
    kinds = rng.permutation(np.repeat(list(NUM_THINGS), counts))
    for kind, centre in zip(kinds, _scatter(rng, len(kinds), height, width), strict=True):
        _paint(rng, str(kind), centre, dyes, mask, granules)
    return _photograph(rng, dyes), mask


def _scatter(rng: np.random.Generator, num_points: int, height: int, width: int) -> Points:
    """Return points (N, 2) as y, x that keep apart a little: things may touch, but seldom hide each other."""
    points = rng.uniform(0, (height, width), (num_points, NUM_TRIES, 2))
    for i in range(1, num_points):  # best-candidate sampling (Mitchell 1991)
        gaps = np.square(points[i][:, None] - points[:i, 0]).sum(axis=2).min(axis=1)  # (NUM_TRIES,)
        points[i, 0] = points[i, np.argmax(gaps)]
    return points[:, 0]


def _noise(rng: np.random.Generator, height: int, width: int, grain: float) -> Field:
    """Return smooth noise (H, W) around 0 with spots of `grain` pixels."""
    coarse = rng.standard_normal((int(height / grain) + 3, int(width / grain) + 3), dtype=np.float32)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.float32)


def _paint(
    rng: np.random.Generator, kind: str, centre: Points, dyes: Field, mask: NDArray[np.uint8], granules: Field
) -> None:
    """Lay one thing of `kind` around centre (y, x) over the dyes (2, H, W) and the mask (H, W), in place."""
    (height, width), (y0, x0) = mask.shape, centre
    angle, strength, bend = rng.uniform(0, np.pi), rng.uniform(0.18, 0.36), rng.uniform(-0.012, 0.012)
    long = kind in ("fibre", "rod")
    # Half the length and half the breadth; half an image is the most that leaves the others in sight.
    a, b = (rng.uniform(14, 26), rng.uniform(3.5, 5)) if long else rng.uniform(7, 12) * rng.uniform(0.85, 1.15, 2)
    a, b = np.minimum((a, b), min(height, width) / 4)

    reach = int(1.3 * max(a, b)) + 3
    top, left = max(0, int(y0) - reach), max(0, int(x0) - reach)
    window = np.s_[top : int(y0) + reach, left : int(x0) + reach]
    rows, columns = np.indices(mask[window].shape, dtype=np.float32)
    dy, dx = rows + np.float32(top - y0), columns + np.float32(left - x0)
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    if long:
        across = across + bend * along**2
        depth = b - np.hypot(np.maximum(np.abs(along) - a + b, 0), across)  # pixels inward from the outline
    else:
        wobble = 1 + 0.06 * np.sin(rng.integers(2, 6) * np.arctan2(across, along) + rng.uniform(0, 6))
        depth = (1 - np.hypot(along / a, across / b) * wobble) * min(a, b)
    if kind == "ring":
        depth = np.minimum(depth, rng.uniform(2, 3.5) - depth)

    texture = rng.uniform(0, 0.25) * np.exp(-((depth - 1) ** 2) / 2)  # a rim, on things of all kinds
    if kind == "cell":
        texture += strength * granules[window]
    elif kind == "fibre":
        texture += strength * np.sin(along * (2 * np.pi / rng.uniform(3.5, 5.5)) + rng.uniform(0, 6))
    shown = np.clip(depth + 0.5, 0, 1)
    for dye, tone in zip(dyes, rng.normal(UPTAKE.get(kind, np.full(2, 0.6)), 0.15), strict=True):
        below = dye[window]
        below += shown * (tone + texture + 0.2 * (below - 0.45) - below)  # some of the tissue shines through
    mask[window][depth > 0] = CLASS_NAMES.index(kind) if kind in CLASS_NAMES else 0


def _photograph(rng: np.random.Generator, dyes: Field) -> NDArray[np.uint8]:
    """Return what a camera makes of the dyes (2, H, W): absorption, uneven light, focus, noise; (H, W, 3) RGB."""
    height, width = dyes.shape[1:]
    absorbance = (DYES * rng.uniform(0.8, 1.2, (2, 3)) + rng.uniform(0, 0.25, (2, 3))) * rng.uniform(0.6, 1.3, (2, 1))
    image = np.exp(-np.einsum("dhw,dc->hwc", np.maximum(dyes, 0), absorbance.astype(np.float32)))

    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)
    far = (y - rng.uniform(-0.4, 0.4)) ** 2 + (x - rng.uniform(-0.4, 0.4)) ** 2  # from the optical axis, squared
    soft = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.9, 1.5))
    sharp = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.8))
    image = sharp + (soft - sharp) * np.clip(far / 2, 0, 1)[..., None]

    light = 1 - rng.uniform(0.05, 0.2) * far + rng.uniform(-0.15, 0.15) * y + rng.uniform(-0.15, 0.15) * x
    image *= (rng.uniform(0.75, 1.1) * light)[..., None]
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image += noise * rng.uniform(0.01, 0.03) * np.sqrt(np.maximum(image, 0))  # photons: variance as brightness
    return np.asarray(np.clip(np.round(image * 255), 0, 255), dtype=np.uint8)


def write_sample(data_dir: Path, num_images: int = 60, height: int = 128, width: int = 128, seed: int = 0) -> None:
    """Write `images/NNN.png`, `masks/NNN.png` and `classes.txt` (one name a line) into data_dir.

    An older sample of at most as many images is overwritten. For the other arguments see `draw_sample`.

    Raises: DataError if data_dir holds images or masks that are not such a sample; nothing is written then.
    """
    names = [f"{index:03d}.png" for index in range(num_images)]
    _refuse_foreign(data_dir, set(names))
    images_dir, masks_dir = data_dir / "images", data_dir / "masks"
    for folder in (images_dir, masks_dir):
        folder.mkdir(parents=True, exist_ok=True)
    # Before the images, so that a sample that was cut short is known as one.
    (data_dir / "classes.txt").write_bytes(CLASS_LIST)
    for index, name in enumerate(names):
        image, mask = draw_sample(seed, index, height, width)
        Image.fromarray(image).save(images_dir / name)
        Image.fromarray(mask).save(masks_dir / name)


def _refuse_foreign(data_dir: Path, names: set[str]) -> None:
    """Raise DataError if data_dir has files that a sample of the file `names` would mix with or overwrite."""
    classes_path = data_dir / "classes.txt"
    present = [path for folder in ("images", "masks") for path in sorted((data_dir / folder).glob("[!.]*"))]
    present += [classes_path] * classes_path.is_file()
    is_sample = classes_path.is_file() and classes_path.read_bytes() == CLASS_LIST
    foreign = [path for path in present if not is_sample or path.name not in {*names, classes_path.name}]
    if foreign:
        raise DataError(
            f"{data_dir} holds {len(foreign)} files that are not of this sample data set (the first is {foreign[0]}): "
            "name a new or empty folder"
        )
