"""What all commands share: flags with `-` or `_`, one-line errors, exit codes. Each command is a file beside this one.

Exit codes: 0 done, 1 an error of ours, 2 something the user can mend, 130 stopped by Ctrl-C.
"""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from ml_src.core.errors import ERROR_FILE, ConfigError, MLError
from ml_src.core.registry import suggest

REMEDIES = {
    errno.ENOSPC: "free some space, then give the command again",
    errno.EDQUOT: "free some space, then give the command again",
    errno.EACCES: "allow it, or choose another folder",
    errno.EROFS: "choose another folder",
    errno.ENOTDIR: "a file is where a folder should be: choose another folder",
    errno.EEXIST: "move it away, or choose another folder",
}

OF_TRAINING = ("accelerate", "tensorboard", "torch")  # what the extra `train` installs


class Parser(argparse.ArgumentParser):
    """An argparse parser whose long flags accept `-` and `_` alike and whose errors fit on one line."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the words after the command's name; names the nearest flag for an unknown one."""
        words = [_underscored(word) for word in argv]
        flags = {flag for action in self._actions for flag in action.option_strings}
        for word in words:  # before argparse, which would first ask for what is missing because of the typo
            flag = word.partition("=")[0]
            if word.startswith("--") and flag not in flags:
                self.error(f"unknown argument {flag!r}; {suggest(flag, flags)}")
        return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, so that every error leaves by one door."""
        raise ConfigError(f"{message} ({self.prog} --help shows the usage)")


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at that moment: a progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def run(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's body and turn what it raises into one line on stderr and an exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Stderr()])
    logging.getLogger("ml_src").setLevel(logging.INFO)
    try:
        return command(words)
    except MLError as error:
        if debug:
            raise
        _show(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe (`| head`) has gone
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a folder without permission: the user's to mend
        if debug or error.strerror is None:
            raise
        remedy = f": {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
        _show(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}{remedy}")
        return 2
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError) and error.name in OF_TRAINING:
            _show(f"error: this needs {error.name}, which is not installed: run pip install 'ml-src[train]'")
            return 2
        _show(f"unexpected error: {type(error).__name__}: {error} (--debug shows where)")
        return 1


def _show(line: str) -> None:
    """Print on stderr; one of several processes leaves it to the one that started them, which shows it once."""
    path = os.environ.get(ERROR_FILE)
    if path is None:
        print(line, file=sys.stderr)
    else:
        Path(path).write_text(f"{line}\n", encoding="utf-8")
