"""A registry is a plain dict from a config word to a class; this is the one look-up in it, with "did you mean".

MODEL_REGISTRY and LOSS_REGISTRY are such dicts; adding an entry is `REGISTRY['word'] = Class`.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

from ml_src.core.errors import ConfigError

T = TypeVar("T")


def suggest(word: str, known: Iterable[str]) -> str:
    """Return "did you mean X?" for the nearest known word, else the list of all known words."""
    words = sorted(known)
    near = get_close_matches(word.lower().replace("-", "_"), words, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(words)}"


def lookup(registry: Mapping[str, T], word: str, key: str) -> T:
    """Return `registry[word]`.

    Args:
        registry: the words and what they stand for.
        word: what the configuration says.
        key: the configuration key that says it, for the message.

    Raises: ConfigError with a suggestion where the word is unknown.
    """
    if word not in registry:
        raise ConfigError(f"{key}: unknown name {word!r}; {suggest(word, registry)}")
    return registry[word]
