"""What a job tells on the console. Library code logs; without ``installed`` nothing of it is printed by LEMON.

Information goes to standard output, warnings and worse to standard error. A line of a stage begins with the stage's
name, whichever job it is a part of; its rows and tables, and the lines of libraries, are printed as they are.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from tqdm import tqdm

from lemon.runtime.secrets import redacted

_LEMON = logging.getLogger("lemon")


def stage_logger(name: str, stage: str) -> logging.LoggerAdapter[logging.Logger]:
    """The logger of a module whose lines are a stage's, as ``curate: 3 slides``."""
    return logging.LoggerAdapter(logging.getLogger(name), {"stage": stage})


class Console(logging.Handler):
    """Writes lines to the standard streams of the moment, above the bars that are under way."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; an error of the stream is raised, as ``print`` would."""
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)
        stream.flush()

    def format(self, record: logging.LogRecord) -> str:
        """A record's text without secrets."""
        text, stage = super().format(record), getattr(record, "stage", None)
        is_line = not text.startswith(" ") and "\n" not in text
        return redacted(f"{stage}: {text}" if stage and is_line else text)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """While the block runs, what LEMON logs is printed on the console; other handlers get it too."""
    level, console = _LEMON.level, _install()
    try:
        yield
    finally:
        if console is not None:
            _LEMON.removeHandler(console)
            _LEMON.setLevel(level)


def install_in_worker() -> None:
    """The same for the rest of a process of Ray's, whose streams are Ray's log of it.

    Nothing is propagated: Ray Train's own handler would print every line again.
    """
    _install()
    _LEMON.propagate = False


def _install() -> Console | None:
    """The console that was added; None where there is one."""
    if any(isinstance(each, Console) for each in _LEMON.handlers):
        return None
    console = Console()
    _LEMON.addHandler(console)
    if _LEMON.getEffectiveLevel() > logging.INFO:
        _LEMON.setLevel(logging.INFO)
    return console
