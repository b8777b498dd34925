"""Jobs in processes of their own that need not import torch and Ray again: forked from a server that has them.

A job so started is what ``python jobs/X.py words`` is: its own memory, environment, folder, signals and exit code. What
a test says of imports or of the interpreter itself has to start one with ``subprocess``.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import IO

JOBS = Path(__file__).resolve().parents[2] / "jobs"

_SERVER = mp.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.jobs.preloaded"])


class Job:
    """``jobs/NAME.py`` with words of the command line, as ``subprocess.Popen`` with ``text=True`` would start it."""

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdout: IO[str] | int = DEVNULL,
        stderr: IO[str] | int = DEVNULL,
    ) -> None:
        environment = dict(os.environ if env is None else env)
        self.stdout, out = _opened(stdout)
        self.stderr, err = (None, out) if stderr == STDOUT else _opened(stderr)
        job = str(JOBS / f"{name}.py")
        self.args = [job, *words]
        self._process = _SERVER.Process(
            target=_work, args=(self.args, environment, str(cwd or Path.cwd()), _Inherited(out), _Inherited(err))
        )
        self._process.start()
        for number in {out, err}:
            os.close(number)
        self.pid = int(self._process.pid or 0)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed to its pipes, once it has ended."""
        told = ["", ""]

        def read(number: int, pipe: IO[str]) -> None:
            told[number] = pipe.read()

        pipes = [(number, pipe) for number, pipe in enumerate((self.stdout, self.stderr)) if pipe is not None]
        readers = [threading.Thread(target=read, args=pair, daemon=True) for pair in pipes]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return told[0], told[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run_job(
    name: str,
    words: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 500,
) -> subprocess.CompletedProcess[str]:
    """A job until its end, as ``subprocess.run`` with ``capture_output=True, text=True``."""
    job = Job(name, words, env=env, cwd=cwd, stdout=PIPE, stderr=PIPE)
    try:
        out, err = job.communicate(timeout)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
    assert job.returncode is not None
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


class _Inherited:
    """A file descriptor that reaches the process that is started; an int there."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[object, ...]:
        return _detach, (reduction.DupFd(self.number),)


def _detach(duplicate: object) -> int:
    return duplicate.detach()  # type: ignore[attr-defined]


def _opened(where: IO[str] | int) -> tuple[IO[str] | None, int]:
    """Our end of a pipe, where one is asked for, and the descriptor of the job's end."""
    if where == PIPE:
        ours, theirs = os.pipe()
        return os.fdopen(ours), theirs
    if where == DEVNULL:
        return None, os.open(os.devnull, os.O_WRONLY)
    return None, os.dup(where if isinstance(where, int) else where.fileno())


def _work(argv: list[str], environment: dict[str, str], folder: str, out: int, err: int) -> None:
    """In the forked process: become the job."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    for number in {out, err} - {1, 2}:
        os.close(number)
    os.environ.clear()
    os.environ.update(environment | {"LOKY_MAX_CPU_COUNT": "1"})  # joblib's pool of processes hangs in a forked one
    os.chdir(folder)
    sys.argv = argv
    sys.path.insert(0, str(JOBS))
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:  # multiprocessing ends a process without these
        atexit._run_exitfuncs()
