"""A Ray cluster on this machine whose nodes can be killed one by one, and nothing else with them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import family, free_ports, kill

START_S = 120.0
NODE_TRIES = 8
N_NODES = 3  # two work, so that one can be lost and replaced
ROOT = Path(__file__).resolve().parents[2]
OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes is 75 MiB
MARK = "LEMON_DRILLS"
"""In the environment of all that the drills start, so that nothing of anybody else is ever killed."""


@dataclass
class Node:
    """One node: ``ray start --block`` and all below it."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def alive(self) -> bool:
        """Whether its raylet runs."""
        return self.process.poll() is None and self.raylet is not None

    @property
    def raylet(self) -> psutil.Process | None:
        """The process that starts workers and holds the object store."""
        found = (process for process in self.processes() if _name_of(process) == "raylet")
        return next(found, None)

    def is_up(self) -> bool:
        """Whether the node is part of the cluster, once that is known: Ray gives a node up after 30 s."""
        for _ in waiting(START_S):
            if "Ray runtime started" in self.log.read_text():
                return True
            if self.process.poll() is not None:
                break
        return False

    def processes(self) -> list[psutil.Process]:
        """All processes of the node that run now."""
        return family(self.process.pid)

    def kill(self) -> int:
        """SIGKILL to all of them at once, as when power fails; returns how many there were."""
        victims = self.processes()
        for victim in victims:  # first stopped, so that none starts or mourns another
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.suspend()
        victims = list({victim.pid: victim for victim in [*victims, *self.processes()]}.values())
        kill(victims)
        self.process.wait()
        return len(victims)


@dataclass
class Cluster:
    """A head without CPUs and ``size`` nodes of one CPU each; ``whole`` replaces those that were lost."""

    size: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    nodes: list[Node] = field(default_factory=list)
    tenants: list[subprocess.Popen[str]] = field(default_factory=list)
    """Jobs of others, as it were."""
    extra: dict[str, str] = field(default_factory=dict)
    """Variables of nodes and jobs."""

    def __post_init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="drills-", dir="/tmp"))  # short: paths of sockets have 107 bytes
        self._count = 0
        self._start_head()

    def _start_head(self) -> None:
        self.port = free_ports(1)[0]
        words = ["--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false"]
        words += [f"--temp-dir={self.folder}", f"--ray-client-server-port={free_ports(1)[0]}"]
        self.head = self._start(*words)
        if not self.head.is_up():
            raise RuntimeError(f"Ray does not start: {self.head.log.read_text()[-400:]}")

    @property
    def environment(self) -> dict[str, str]:
        """Of jobs that are to join it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        return kept | {
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # Ray's 15 starves workers wherever the machine has anything else to do
            "PYTHONPATH": str(ROOT),
            MARK: self.token,
            **self.extra,
        }

    def whole(self) -> None:
        """Take away what is left of nodes that were struck, and start what is missing."""
        for attempt in range(NODE_TRIES):
            for node in [node for node in self.nodes if not node.alive]:
                self.drop(node)
            missing = self.size - len(self.nodes)
            new = [self.add() for _ in range(min(missing, 1) if attempt else missing)]  # where all is slow, one by one
            up = [node.is_up() for node in new]
            if all(up) and len(self.nodes) == self.size:
                return
        raise RuntimeError(f"Ray nodes do not start: {self.nodes[-1].log.read_text()[-400:]}")

    def renew(self, extra: dict[str, str]) -> None:
        """The cluster anew, with these variables in the environment of all nodes and of jobs."""
        self.extra = extra
        for node in list(self.nodes):
            self.drop(node)
        self.head.kill()
        self._start_head()  # it too: Ray Train's controller runs where the job does
        self.whole()

    def add(self, *, wrapper: Sequence[str] = ()) -> Node:
        """One more node, its processes started by ``wrapper``; it may not be up yet."""
        address = f"--address=127.0.0.1:{self.port}"
        node = self._start(address, "--num-cpus=1", wrapper=wrapper)
        self.nodes.append(node)
        return node

    def drop(self, node: Node) -> None:
        """Take a node away."""
        node.kill()
        self.nodes.remove(node)

    def workers(self, word: str) -> list[psutil.Process]:
        """Ray's workers on any node whose command names ``word``, oldest first."""
        found = [process for node in self.nodes for process in node.processes() if word in _command(process)]
        return sorted(found, key=_born)

    def node_of(self, process: psutil.Process) -> Node:
        """The node that a worker runs on."""
        return next(node for node in self.nodes if process in node.processes())

    def marked(self) -> list[psutil.Process]:
        """Everything that the drills started and that still runs, wherever it now hangs."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def orphans(self) -> list[psutil.Process]:
        """What runs on though nobody waits for it: below no node, or begun by a worker that is gone."""
        owners = [*(node.process.pid for node in [self.head, *self.nodes]), *(tenant.pid for tenant in self.tenants)]
        owned = {process.pid for owner in owners for process in family(owner)}
        return [process for process in self.marked() if process.pid not in owned]

    def close(self) -> None:
        """End every process that the drills started."""
        for node in [*self.nodes, self.head]:
            node.kill()
        kill(self.marked())
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *words: str, wrapper: Sequence[str] = ()) -> Node:
        self._count += 1
        log = self.folder / f"node-{self._count}.log"
        command = [*wrapper, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--include-log-monitor=false"]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_ports(1)[0]}"]
        own = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=own, start_new_session=True
            )
        return Node(process, log)


def waiting(seconds: float, *, pause_s: float = 0.1) -> Iterator[Any]:
    """Ticks until the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(pause_s)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _name_of(process: psutil.Process) -> str:
    try:
        return process.name() if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.Error:
        return ""


def _born(process: psutil.Process) -> float:
    try:
        return process.create_time()
    except psutil.Error:
        return 0.0
