"""Paths as one piece of text."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_src.core.data.files import Pair
from ml_src.core.data.pairs import Pairs, Paths

NAMES = st.lists(
    st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=12).filter(lambda n: n.strip("."))
)


@given(NAMES)
def test_every_name_comes_back(names):
    paths = Paths(names)
    assert list(paths) == [Path(name) for name in names]
    assert len(paths) == len(names)


def test_they_are_indexed_as_a_list_is():
    paths, plain = Paths(["a", "bb", "", "ccc"]), [Path("a"), Path("bb"), Path(), Path("ccc")]
    for index in range(-4, 4):
        assert paths[index] == plain[index]
    for index in (-5, 4):
        with pytest.raises(IndexError):
            paths[index]
    assert paths[1:] == plain[1:] and paths[::-1] == plain[::-1]


def test_a_name_that_is_no_utf_8_comes_back():
    name = b"caf\xe9.png".decode(errors="surrogateescape")
    assert Paths([name])[0] == Path(name)


def test_pairs_hold_images_with_their_masks():
    pairs = Pairs(["i/a.jpg", "i/b.jpg"], ["m/a.png", "m/b.png"])
    assert pairs[1] == Pair(Path("i/b.jpg"), Path("m/b.png"))
    assert list(pairs) == list(pairs[:]) and len(pairs) == 2


def test_a_hundred_thousand_names_are_a_handful_of_objects():
    """What a worker would copy by touching it: objects have counts of references, bytes do not."""
    import gc

    names = [f"images/{index:06d}.png" for index in range(100_000)]
    before = len(gc.get_objects())
    paths = Paths(names)
    assert len(gc.get_objects()) - before < 100
    assert sys.getsizeof(paths._text) + paths._ends.nbytes < 3_000_000
