"""The generated sample data set is repeatable, balanced enough, and cannot be solved by colour."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import jaccard_score

from ml_src.core.data.sample import CLASS_NAMES, draw_sample, write_sample
from ml_src.core.errors import DataError


@pytest.fixture(scope="module")
def samples():
    """The images and masks of the default data set."""
    images, masks = zip(*(draw_sample(0, index, 128, 128) for index in range(60)), strict=True)
    return np.stack(images), np.stack(masks)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sample_is_a_function_of_its_arguments():
    """Other draws in between change nothing; another seed or index gives another image."""
    image, mask = draw_sample(3, 7, 48, 64)
    others = [draw_sample(3, 8, 48, 64), draw_sample(4, 7, 48, 64), draw_sample(7, 3, 48, 64)]
    again, mask_again = draw_sample(3, 7, 48, 64)
    assert np.array_equal(image, again) and np.array_equal(mask, mask_again)
    assert all((image != other).mean() > 0.5 and (mask != other_mask).any() for other, other_mask in others)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (33, 80), (128, 128)])
def test_image_and_mask_have_the_size_asked_for(height, width):
    image, mask = draw_sample(0, 0, height, width)
    assert (image.shape, image.dtype) == ((height, width, 3), np.uint8)
    assert (mask.shape, mask.dtype) == ((height, width), np.uint8)
    assert mask.max() < len(CLASS_NAMES)


def test_every_class_is_in_nearly_every_image(samples):
    """Present means 1 % of the pixels, which is about one cell or fibre."""
    _, masks = samples
    shares = np.stack([(masks == label).mean(axis=(1, 2)) for label in range(3)])  # (3, 60)
    assert ((shares > 0.01).mean(axis=1) >= 0.9).all()


def test_pixel_shares_are_about_70_20_and_10_percent(samples):
    _, masks = samples
    assert np.bincount(masks.ravel()) / masks.size == pytest.approx([0.70, 0.20, 0.10], abs=0.05)


def test_colour_alone_does_not_tell_the_classes_apart(samples):
    """A forest on the colour of single pixels stays far below what a network that sees texture reaches."""
    images, masks = samples
    train, test = np.s_[:45, ::8, ::8], np.s_[45:, ::4, ::4]
    forest = RandomForestClassifier(30, max_depth=10, class_weight="balanced", random_state=0)
    labels = forest.fit(images[train].reshape(-1, 3), masks[train].ravel()).predict(images[test].reshape(-1, 3))
    scores = jaccard_score(masks[test].ravel(), labels, average=None)
    assert scores.mean() < 0.45 and scores[1:].max() < 0.45


def test_images_are_neither_flat_nor_clipped(samples):
    images, _ = samples
    assert (images.std(axis=(1, 2)).mean(axis=1) > 10).all()
    assert np.isin(images, [0, 255]).mean() < 0.02


def test_written_files_pair_by_stem_and_hold_what_was_drawn(tmp_path):
    write_sample(tmp_path / "new" / "data", num_images=3, height=32, width=48, seed=5)
    folder = tmp_path / "new" / "data"
    expected = {f"{kind}/{index:03d}.png" for kind in ("images", "masks") for index in range(3)} | {"classes.txt"}
    assert set(contents(folder)) == expected
    assert (folder / "classes.txt").read_text().splitlines() == list(CLASS_NAMES)
    image, mask = draw_sample(5, 2, 32, 48)
    assert np.array_equal(np.asarray(Image.open(folder / "images/002.png")), image)
    assert np.array_equal(np.asarray(Image.open(folder / "masks/002.png")), mask)


def test_writing_twice_gives_the_same_bytes_and_fills_a_sample_that_was_cut_short(tmp_path):
    write_sample(tmp_path, num_images=3, height=32, width=32)
    before = contents(tmp_path)
    (tmp_path / "masks/001.png").unlink()
    (tmp_path / "images/002.png").write_bytes(b"half a file")
    write_sample(tmp_path, num_images=3, height=32, width=32)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["images/img7.jpg", "images/000.png", "masks/000.png", "classes.txt"])
def test_a_folder_with_data_of_another_kind_is_refused_and_left_as_it_is(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(DataError, match=r"not of this sample data set .*name a new or empty folder"):
        write_sample(tmp_path, num_images=2, height=32, width=32)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_larger_sample_is_not_mixed_with_a_smaller_one(tmp_path):
    """Images of the larger one would stay behind and be trained on."""
    write_sample(tmp_path, num_images=3, height=32, width=32)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"holds 2 files .*002\.png"):
        write_sample(tmp_path, num_images=2, height=32, width=32, seed=1)
    assert contents(tmp_path) == before
