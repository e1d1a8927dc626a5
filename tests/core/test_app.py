"""What all commands share: flags, errors on one line, exit codes."""

from collections.abc import Callable, Sequence

import pytest

from ml_src.cli._app import Parser, run
from ml_src.core.errors import ConfigError, DataError


def raising(error: BaseException) -> Callable[[Sequence[str]], int]:
    def command(_: Sequence[str]) -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError("a.png is empty: replace it"), 2, "error: a.png is empty: replace it\n"),
        (
            OSError(28, "No space left on device", "runs/a"),
            2,
            "error: runs/a: No space left on device: free some space, then give the command again\n",
        ),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (ValueError("odd"), 1, "unexpected error: ValueError: odd (--debug shows where)\n"),
    ],
)
def test_every_error_is_one_line_and_has_its_exit_code(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error), []) == code
    assert capsys.readouterr().err == text


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(DataError):
        run(raising(DataError("x")), ["--debug"])


def parser() -> Parser:
    made = Parser("ml-test", "A command.")
    made.add_argument("--raw_data", required=True)
    made.add_argument("--lr", type=float)
    return made


def test_dashes_and_underscores_are_the_same_in_flags_but_not_in_values() -> None:
    assert parser().parse(["--raw-data", "a-b_c"]).raw_data == "a-b_c"
    assert parser().parse(["--raw-data=--a-b"]).raw_data == "--a-b"
    assert parser().parse(["--raw_data", "x", "--lr", "-1"]).lr == -1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--raw_dat", "x"], "unknown argument '--raw_dat'; did you mean '--raw_data'?"),
        ([], "the following arguments are required: --raw_data"),
        (["--raw_data", "x", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--raw_data", "x", "more"], "unrecognized arguments: more"),
    ],
)
def test_a_wrong_flag_is_named(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parser().parse(words)
    assert str(caught.value).startswith(text)
