"""What crosses between server and site: plain numbers in Flower's records, checked on both sides before they are used.

Nothing is pickled: arrays are NumPy's own format, opened without objects, and only after name, number type, shape and
size were found to be the expected ones.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

import ml_src.core.federated.flower  # noqa: F401  # before flwr
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from ml_src.core.errors import TrainingError

HEADER = 1024  # bytes that NumPy's format may put before the values
MOST_TEXT = 1 << 20  # characters of the plain values of a letter, and bytes of its sealed parts
ENVELOPE, ARRAYS, SEALED = "letter", "arrays", "sealed"
PROGRAM = "program"  # among the values of an answer: a number that a site's program draws when it starts
REFUSED = 1000  # of Flower's error codes, beyond its own: a refusal has this one plus the number of the program


class WireError(TrainingError):
    """A message that is not what was expected; it is not used."""


@dataclass(frozen=True)
class Expected:
    """What an array must be."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Letter:
    """A message of either direction; an answer has kind, session and round of what it answers."""

    kind: str
    session: str  # of one start of the server
    round: int
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)  # plain data, as in JSON
    sealed: dict[str, bytes] = field(default_factory=dict)  # of secure aggregation, by the name of a site

    @property
    def num_bytes(self) -> int:
        """Bytes of its arrays and sealed parts."""
        return sum(array.nbytes for array in self.arrays.values()) + sum(len(part) for part in self.sealed.values())

    def answer(
        self,
        arrays: dict[str, NDArray[Any]] | None = None,
        values: dict[str, Any] | None = None,
        sealed: dict[str, bytes] | None = None,
    ) -> "Letter":
        """Return an answer to it."""
        return Letter(self.kind, self.session, self.round, arrays or {}, values or {}, sealed or {})


def to_record(letter: Letter) -> RecordDict:
    """Put a letter into Flower's records."""
    envelope = ConfigRecord(
        {
            "kind": letter.kind,
            "session": letter.session,
            "round": letter.round,
            "values": json.dumps(_without_nan(letter.values), allow_nan=False),
        }
    )
    arrays = ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in letter.arrays.items()})
    return RecordDict({ENVELOPE: envelope, ARRAYS: arrays, SEALED: ConfigRecord(dict(letter.sealed))})


def _without_nan(value: Any) -> Any:
    """Plain data with None in the place of what JSON has no number for, such as the loss of weights that diverged."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _without_nan(one) for key, one in value.items()}
        case list():
            return [_without_nan(one) for one in value]
    return value


def from_record(record: RecordDict, expected: Mapping[str, Mapping[str, Expected]]) -> Letter:
    """Take a letter out of Flower's records.

    Args:
        record: what came.
        expected: the arrays that each kind of letter has; other kinds are refused.

    Raises: WireError, which says what is wrong with it.
    """
    envelope, arrays, sealed = (record.get(key) for key in (ENVELOPE, ARRAYS, SEALED))
    if set(record) != {ENVELOPE, ARRAYS, SEALED} or not (
        isinstance(envelope, ConfigRecord) and isinstance(arrays, ArrayRecord) and isinstance(sealed, ConfigRecord)
    ):
        raise WireError("the message is not one of this program")
    kind, session, number = (envelope.get(key) for key in ("kind", "session", "round"))
    if not (isinstance(kind, str) and isinstance(session, str) and isinstance(number, int) and kind in expected):
        raise WireError(f"a message of kind {str(kind)[:40]!r} is not expected here")
    if set(arrays) != set(expected[kind]):
        raise WireError(f"the message has the arrays {_names(arrays)}, expected were {_names(expected[kind])}")
    if not all(isinstance(part, bytes) for part in sealed.values()):
        raise WireError("a sealed part of the message is not bytes")
    if sum(len(part) for part in sealed.values() if isinstance(part, bytes)) > MOST_TEXT:
        raise WireError(f"the sealed parts of the message have more than {MOST_TEXT} bytes")
    return Letter(
        kind,
        session,
        number,
        {name: _opened(name, arrays[name], expected[kind][name]) for name in expected[kind]},
        _plain(envelope.get("values")),
        {name: part for name, part in sealed.items() if isinstance(part, bytes)},
    )


def _names(names: Any) -> str:
    return ", ".join(sorted(str(name)[:40] for name in list(names)[:10])) or "none"


def _plain(text: Any) -> dict[str, Any]:
    if not isinstance(text, str) or len(text) > MOST_TEXT:
        raise WireError("the plain values of the message are missing or too many")
    try:
        values = json.loads(text, parse_constant=_refused, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise WireError("the plain values of the message cannot be read") from error
    if not isinstance(values, dict):
        raise WireError("the plain values of the message are no mapping")
    return values


def _refused(word: str) -> NoReturn:
    raise ValueError(word)


def _finite(word: str) -> float:
    """1e999 is a number in JSON, and infinity in Python."""
    number = float(word)
    if not math.isfinite(number):
        _refused(word)
    return number


def _opened(name: str, array: Array, expected: Expected) -> NDArray[Any]:
    """Return the values of an array; its size is known before anything is decoded."""
    if (array.dtype, tuple(array.shape)) != (expected.dtype, expected.shape):
        raise WireError(
            f"{name} is {str(array.dtype)[:20]} {tuple(array.shape)[:4]}, "
            f"expected was {expected.dtype} {expected.shape}"
        )
    most = math.prod(expected.shape) * np.dtype(expected.dtype).itemsize + HEADER
    if len(array.data) > most:
        raise WireError(f"{name} has {len(array.data)} bytes, expected were {most} at most")
    try:
        values: NDArray[Any] = array.numpy()
    except Exception as error:  # whatever NumPy says of bytes from elsewhere
        raise WireError(f"{name} cannot be read as an array") from error
    if not isinstance(values, np.ndarray):  # NumPy opens archives too
        raise WireError(f"{name} cannot be read as an array")
    if (str(values.dtype), values.shape) != (expected.dtype, expected.shape):
        raise WireError(f"{name} holds {values.dtype} {values.shape}, not what it says")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise WireError(f"{name} has values that are no finite number")
    return values
