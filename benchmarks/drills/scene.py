"""One drill: a job that is started, struck, watched to its end, and given again where it ended without being done."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.drills.cluster import Cluster, waiting
from benchmarks.drills.stages import Output, Stage
from benchmarks.processes import family, kill
from lemon.runtime.store import Store

ORPHANS_END_S = 10.0
"""What is left of a job may take so long to notice its end."""


class DrillError(Exception):
    """A drill could not be carried out, or its job hung."""


@dataclass
class Scene:
    """A stage, a cluster and a folder, in which one fault happens.

    ``start``, ``until_begun``, ``strike``, ``finish`` and, where need be, ``again``: each fills in its part.
    """

    stage: Stage
    cluster: Cluster
    folder: Path
    limit_s: float
    """A job that takes longer is taken to hang."""
    output_uri: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    """Of the job, beyond the cluster's."""

    done: str = field(default="", init=False)
    """What was done to the job, in words."""
    exit_codes: list[int] = field(default_factory=list, init=False)
    """Of each time that the command was given; negative: the signal that ended it."""
    seconds: list[float] = field(default_factory=list, init=False)
    told: str = field(default="", init=False)
    """The job's own last line, of the time that it was struck."""
    traceback: bool = field(default=False, init=False)
    workers_begun: int = field(default=0, init=False)
    """Worker processes that came after the fault, in the same job."""
    recovered_s: float | None = field(default=None, init=False)
    """From the fault until all that was in hand then is done."""
    orphans: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.output_uri = self.output_uri or str(self.folder / "out")
        self._job: subprocess.Popen[bytes] | None = None
        self._struck: float | None = None
        self._in_hand: set[str] = set()
        self._known: set[int] = set()

    @property
    def output(self) -> Output:
        """What the job leaves."""
        return Output(Store(self.output_uri), f"sqlite:///{self.folder / 'mlflow.db'}")

    @property
    def log(self) -> Path:
        """What the job printed, of the last time that the command was given."""
        return self.folder / f"log-{len(self.seconds)}.txt"

    @property
    def job(self) -> subprocess.Popen[bytes]:
        """The job that was started last."""
        assert self._job is not None
        return self._job

    def start(self, *, wrapper: Sequence[str] = ()) -> None:
        """Give the command."""
        environment = self.cluster.environment | self.environment | {"MLFLOW_TRACKING_URI": self.output.mlflow_uri}
        command = [*wrapper, *self.stage.command(self.output_uri)]
        self._begin = time.monotonic()
        with self.log.open("wb") as stream:
            self._job = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=stream, stderr=subprocess.STDOUT
            )

    def until_begun(self) -> psutil.Process:
        """Wait until something is done, something is in hand, and a worker is there to be struck; returns that one."""
        victims = []

        def begun() -> bool:
            victim = self.stage.victim(self.cluster, self.output.store) if self.committed() else None
            victims.extend([victim] if victim is not None else [])
            return bool(victims)

        self.until(begun)
        return victims[0]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition while the job runs; raises DrillError when the job ends before."""
        for _ in waiting(self.limit_s, pause_s=0.05):
            if condition():
                return
            if self.job.poll() is not None:
                raise DrillError(f"the job ended with {self.job.returncode} before the fault: {self.last_line()}")
        self.stop()
        raise DrillError(f"the job did not come so far in {self.limit_s:.0f} s: {self.last_line()}")

    def committed(self) -> set[str]:
        """Pieces of work that are done."""
        return self.stage.committed(self.output.store)

    def strike(self, action: Callable[[], object], *, done: str) -> None:
        """The fault."""
        self._known = {worker.pid for worker in self.stage.workers(self.cluster)}
        self._in_hand = self.stage.in_hand(self.output.store)
        self._struck = time.monotonic()
        action()
        self.done = done

    def finish(self) -> int:
        """Watch the job to its end; returns its exit code. Raises DrillError where it hangs."""
        for _ in waiting(self.limit_s):
            ended = self.job.poll() is not None
            self._watch()
            if ended:
                break
        else:
            self.stop()
            raise DrillError(
                f"the job still ran {self.limit_s:.0f} s after the fault ({self.done}): {self.last_line()}"
            )
        code = self.job.returncode
        self.exit_codes.append(code)
        if len(self.exit_codes) == 1:
            self.told = self.last_line()
        self.traceback |= "Traceback (most recent call last)" in self.log.read_text(errors="replace")
        self.seconds.append(time.monotonic() - self._begin)
        self._find_orphans()
        return code

    def again(self, *, wrapper: Sequence[str] = ()) -> None:
        """Give the same command again and see it through; raises DrillError where it is not done then."""
        self.start(wrapper=wrapper)
        if code := self.finish():
            raise DrillError(f"the same command again ended with {code}: {self.last_line()}")

    def finish_or_again(self) -> None:
        """Watch to the end; where the job did not end well, give the command again."""
        if self.finish():
            self.again()

    def last_line(self) -> str:
        """The last line of the job's own, which name the stage."""
        lines = self.log.read_text(errors="replace").replace("\r", "\n").splitlines() if self.log.exists() else []
        own = [line for line in lines if line.startswith((f"{self.stage.name}: ", f"{self.stage.job}: "))]
        return own[-1].strip().replace(f"{self.folder}/", "") if own else "(no line)"

    def stop(self) -> None:
        """End the job and all below it."""
        if self._job is not None and self._job.poll() is None:
            kill(family(self._job.pid))
            self._job.wait()

    def _watch(self) -> None:
        if self._struck is None:
            return
        if not self.exit_codes:
            seen = {worker.pid for worker in self.stage.workers(self.cluster)}
            self.workers_begun += len(seen - self._known)
            self._known |= seen
        if self.recovered_s is None:
            with contextlib.suppress(OSError):
                if self._in_hand <= self.committed():
                    self.recovered_s = time.monotonic() - self._struck

    def _find_orphans(self) -> None:
        """Processes that outlive the job below no node of Ray."""
        for _ in waiting(ORPHANS_END_S, pause_s=0.5):
            left = self.cluster.orphans()
            if not left:
                return
        self.orphans += [" ".join(process.cmdline())[-80:] for process in left]
        kill(left)
