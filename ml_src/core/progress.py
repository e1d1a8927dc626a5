"""A progress bar on stderr, for what may take long; only where someone is watching."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MANY = 100  # from so many files on, reading them takes long enough


@contextmanager
def progress_bar(text: str, total: int, least: int = MANY) -> Iterator[Callable[[float], None]]:
    """Show a bar as long as the block runs; what is yielded is called with the number of things done so far.

    Of fewer than `least` things none is shown.
    """
    if total < least or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)
