"""The frame of every job: its config is read, its ``main`` called, and what stops it reported in a line."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from lemon.errors import (
    EXIT_BAD_CONFIG,
    EXIT_FAILURES,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TERMINATED,
    FULL_OR_GONE,
    NO_SUCH_FILE,
    ConfigError,
    FatalError,
    StorageError,
    TerminatedError,
)
from lemon.extras import missing_package_line
from lemon.runtime.config import Frozen, describe, load
from lemon.runtime.console import installed
from lemon.runtime.secrets import guarded

C = TypeVar("C", bound=Frozen)

_MAX_PATH_CHARACTERS = 800  # of a path


def run_job(
    stage: str,
    model: type[C],
    main: Callable[[C], int],
    argv: Sequence[str] | None = None,
    *,
    command: str | None = None,
) -> int:
    """Read the config, call ``main(config)``, report what stops it in a line; returns the exit code.

    ``command`` is what the stage is called in ``lemon COMMAND``. Nothing that is printed meanwhile holds a secret. What
    is no fault of the user's, disk's or network's is raised.
    """
    argv = list(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        if any(word in ("-h", "--help") for word in argv):
            print(describe(stage, model, command=command))
            return EXIT_OK
        config = load(stage, argv, model)
        config.check_inputs()  # before the libraries that work on them are imported
        return main(config)

    return framed(stage, work)


def framed(stage: str, work: Callable[[], int]) -> int:
    """Call ``work`` with its log on the console; what stops it is reported in a line; returns the exit code."""
    with guarded(), installed(), _ended_by_sigterm():
        try:
            return work()
        except ConfigError as error:
            return _stopped(stage, str(error), EXIT_BAD_CONFIG)
        except FatalError as error:
            return _stopped(stage, "; ".join(["stopped: " + str(error), *filter(None, [error.remedy])]), EXIT_FAILURES)
        except ModuleNotFoundError as error:
            if (line := missing_package_line(error)) is None:
                raise
            return _stopped(stage, line, EXIT_BAD_CONFIG)
        except OSError as error:
            if isinstance(error, StorageError) or error.errno in FULL_OR_GONE:
                return _stopped(stage, f"stopped: {error}; {FatalError.remedy}", EXIT_FAILURES)
            if error.errno not in NO_SUCH_FILE:
                raise
            return _stopped(stage, f"stopped: {_file_and_reason(error)}", EXIT_BAD_CONFIG)
        except TerminatedError:
            return _stopped(stage, f"ended by SIGTERM; {_GOES_ON}", EXIT_TERMINATED)
        except KeyboardInterrupt:
            return _stopped(stage, f"interrupted; {_GOES_ON}", EXIT_INTERRUPTED)


_GOES_ON = "the same command again goes on where it stopped"


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises TerminatedError in the block; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return

    def end(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopped(stage: str, reason: str, code: int) -> int:
    for line in reason.splitlines():
        print(f"{stage}: {line}", file=sys.stderr)
    return code


def _file_and_reason(error: OSError) -> str:
    """The file and the reason, in one line."""
    if error.filename is None or error.strerror is None:
        return " ".join(str(error).split())
    return f"{str(error.filename)[:_MAX_PATH_CHARACTERS]}: {error.strerror}"
