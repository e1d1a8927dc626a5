"""What crosses between server and site is checked before it is used; what is not as expected is named and refused."""

import io
import json
import pickle

import numpy as np
import pytest

import ml_src.core.federated.flower  # noqa: F401  # before flwr
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from ml_src.core.federated.wire import MOST_TEXT, Expected, Letter, WireError, from_record, to_record

EXPECTED = {"train": {"parameters": Expected("float32", (6,))}, "facts": {}}
VALUES = np.arange(6, dtype=np.float32)


def record(values: np.ndarray = VALUES) -> RecordDict:
    return to_record(Letter("train", "a session", 3, {"parameters": values}, {"num_steps": 5}, {"site": b"sealed"}))


def array(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (6,), stype: str = "numpy.ndarray") -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def saved(values: np.ndarray, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def archive(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, values)
    return file.getvalue()


def test_a_letter_arrives_as_it_was_sent() -> None:
    letter = from_record(record(), EXPECTED)
    assert (letter.kind, letter.session, letter.round) == ("train", "a session", 3)
    assert letter.arrays["parameters"].tobytes() == VALUES.tobytes()
    assert (letter.values, letter.sealed) == ({"num_steps": 5}, {"site": b"sealed"})
    assert letter.num_bytes == 4 * 6 + len(b"sealed")


def test_nothing_that_was_pickled_is_opened() -> None:
    """An array of objects would run code when it is read."""

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("code of the sender was run",))

    message = record()
    for data in (saved(np.array([Bomb()] * 6), allow_pickle=True), pickle.dumps(Bomb())):
        message["arrays"] = ArrayRecord({"parameters": array(data)})
        with pytest.raises(WireError, match="parameters cannot be read as an array"):
            from_record(message, EXPECTED)


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        (array(saved(VALUES), "float64"), "parameters is float64 .*, expected was float32"),
        (array(saved(VALUES), shape=(7,)), r"is float32 \(7,\), expected was float32 \(6,\)"),
        (array(saved(VALUES), shape=(2, 3)), r"is float32 \(2, 3\), expected was"),
        (array(saved(VALUES.astype(np.float64))), r"holds float64 \(6,\), not what it says"),
        (array(saved(VALUES.astype(">f4"))), "holds >f4"),
        (array(saved(VALUES.reshape(2, 3))), r"holds float32 \(2, 3\), not what it says"),
        (array(saved(np.zeros(10_000, np.float32))), "has 40128 bytes, expected were 1048 at most"),
        (array(saved(VALUES)[:-1]), "cannot be read as an array"),
        (array(b""), "cannot be read as an array"),
        (array(archive(VALUES)), "cannot be read as an array"),
        (array(saved(VALUES), stype="torch.Tensor"), "cannot be read as an array"),
        (array(saved(VALUES * np.float32(np.nan))), "values that are no finite number"),
        (array(saved(VALUES + np.float32(np.inf))), "values that are no finite number"),
    ],
)
def test_an_array_that_is_not_the_expected_one_is_refused(sent: Array, sentence: str) -> None:
    message = record()
    message["arrays"] = ArrayRecord({"parameters": sent})
    with pytest.raises(WireError, match=sentence):
        from_record(message, EXPECTED)


def test_a_header_that_promises_more_than_there_is_takes_no_memory() -> None:
    header = saved(np.zeros(0, np.float32)).replace(b"(0,), }" + b" " * 18, b"(1000000000000000000,), }")
    message = record()
    message["arrays"] = ArrayRecord({"parameters": array(header)})
    with pytest.raises(WireError, match="cannot be read as an array"):
        from_record(message, EXPECTED)


def test_arrays_that_nobody_asked_for_are_named() -> None:
    message = record()
    message["arrays"] = ArrayRecord({"parameters": array(saved(VALUES)), "pixels": array(saved(VALUES))})
    with pytest.raises(WireError, match="has the arrays parameters, pixels, expected were parameters"):
        from_record(message, EXPECTED)
    message["arrays"] = ArrayRecord({})
    with pytest.raises(WireError, match="has the arrays none, expected were parameters"):
        from_record(message, EXPECTED)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ("{", "cannot be read"),
        ("[1]", "no mapping"),
        ('{"loss": NaN}', "cannot be read"),
        ('{"loss": Infinity}', "cannot be read"),
        ('{"loss": 1e999}', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"count": ' + "9" * 5000 + "}", "cannot be read"),
        (" " * (MOST_TEXT + 1), "too many"),
        (7, "missing"),
    ],
)
def test_plain_values_that_are_no_finite_json_are_refused(values: object, sentence: str) -> None:
    message = record()
    message["letter"] = ConfigRecord({**message["letter"], "values": values})
    with pytest.raises(WireError, match=sentence):
        from_record(message, EXPECTED)


@pytest.mark.parametrize(
    "change", [{"kind": "run"}, {"kind": 3}, {"session": 3}, {"round": "3"}, {"round": 3.0}, {"kind": "x" * 10_000}]
)
def test_an_envelope_that_is_not_the_expected_one_is_refused(change: dict[str, object]) -> None:
    message = record()
    message["letter"] = ConfigRecord({**message["letter"], **change})
    with pytest.raises(WireError, match="is not expected here") as refusal:
        from_record(message, EXPECTED)
    assert len(str(refusal.value)) < 200


def test_messages_of_other_programs_are_refused() -> None:
    foreign = [RecordDict({"metrics": MetricRecord({"loss": 1.0})}), RecordDict({})]
    foreign += [RecordDict({**record(), name: ConfigRecord({})}) for name in ("more", "arrays")]
    for message in foreign:
        with pytest.raises(WireError, match="not one of this program"):
            from_record(message, EXPECTED)


def test_sealed_parts_are_bytes_and_not_too_many() -> None:
    message = record()
    message["sealed"] = ConfigRecord({"site": "text"})
    with pytest.raises(WireError, match="not bytes"):
        from_record(message, EXPECTED)
    message["sealed"] = ConfigRecord({"site": bytes(MOST_TEXT), "other": b"1"})
    with pytest.raises(WireError, match="more than 1048576 bytes"):
        from_record(message, EXPECTED)


def test_what_is_no_number_is_sent_as_nothing() -> None:
    record = to_record(Letter("facts", "s", 0, values={"loss": float("nan"), "all": [float("inf"), {"one": 1.5}]}))
    assert json.loads(str(record["letter"]["values"])) == {"loss": None, "all": [None, {"one": 1.5}]}
    assert json.loads(str(to_record(Letter("facts", "s", 0, values={"a": [1]}))["letter"]["values"])) == {"a": [1]}
