"""One job at a time writes an output: a claim in it, kept fresh by a heartbeat, and free again once its job is dead.

A claim is a file ``.lemon/lease/<time>-<random>.json`` of the output. A job writes its own and then lists: it holds the
output when it sees no other live claim. Of two that start at once at least one sees the other, because each writes
before it lists, and S3 lists what was written; the later name withdraws. No clocks of two machines are compared: a
claim lives while its file changes, or, on the same machine, while its process is there. So a job that was killed is
succeeded at once on its own machine, and after ``STALE_S`` from another.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import logging
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from typing_extensions import TypedDict

from lemon.errors import ConfigError, DamagedError
from lemon.runtime.records import INTERNAL_FOLDER
from lemon.runtime.secrets import redacted
from lemon.runtime.store import Store, open_output, parse_json

logger = logging.getLogger(__name__)

LEASE_FOLDER = f"{INTERNAL_FOLDER}/lease"
CLAIM_BYTES = 1024
BEAT_S = 5.0
STALE_S = 30.0
"""A claim of another machine whose file stood still so long is that of a dead job."""

_DYING_S = 2.0  # a process that was killed may be there for so long

_POLL_S = 0.5


class _ClaimContent(TypedDict):
    """What a claim says."""

    stage: str
    job: str | None
    host: str
    machine: str
    pid: int
    started: float
    since: str
    holds: bool
    beat: int


@contextlib.contextmanager
def hold(output: str, *, stage: str, names: Sequence[str] = ()) -> Iterator[Store]:
    """Hold an output while the block runs: its store, rid of what killed jobs left half written.

    Raises ConfigError, one line that names the other job, where it is being written, and as ``open_output`` does.
    A job that finds its claim taken over, as after a long sleep of its machine, is ended by SIGTERM.
    """
    claim = _Claim(open_output(output, names=names), stage)
    claim.write()
    with claim.beating():
        claim.acquire()
        claim.store.remove_temporaries()
        yield claim.store


class _Claim:
    """This job's claim to an output."""

    def __init__(self, store: Store, stage: str) -> None:
        self.store = store
        self.name = f"{LEASE_FOLDER}/{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
        self.content: dict[str, Any] = {
            "stage": stage,
            "job": _ray_job(),
            "host": platform.node(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "holds": False,
            "beat": 0,
        }

    def write(self) -> None:
        # Of one length: a reader at S3 asks for the length and then for so many bytes, of what may be a newer beat.
        self.store.write_internal(self.name, json.dumps(self.content).encode().ljust(CLAIM_BYTES))

    def acquire(self) -> None:
        """Return when no other job writes the output; raises ConfigError when one does."""
        first: dict[str, tuple[dict[str, Any], float]] = {}
        while others := self._others():
            for name, content in others.items():
                here = _process_is_there(content)
                if here is None and name not in first:
                    self._warn(f"is {_describe_holder(content)} alive? watching for {STALE_S:g} s")
                seen, since = first.setdefault(name, (content, time.monotonic()))
                watched = time.monotonic() - since
                if here is False or (here is None and content == seen and watched > STALE_S):
                    self.store.remove_internal(name)
                    continue
                lives = content != seen or (here and watched > _DYING_S)
                if lives and (content["holds"] or name < self.name):
                    raise ConfigError(
                        f"output: {self.store.uri} is being written by {_describe_holder(content)}; "
                        "wait for it, stop it, or choose another output"
                    )
            time.sleep(_POLL_S)
        self.content["holds"] = True
        self.write()

    def _warn(self, line: str) -> None:
        logger.warning(line, extra={"stage": self.content["stage"]})

    def _others(self) -> dict[str, dict[str, Any]]:
        claims = {}
        for name in self.store.list(LEASE_FOLDER, suffix=".json"):
            if name != self.name:
                with contextlib.suppress(FileNotFoundError):  # withdrawn since it was listed
                    claims[name] = _read(self.store.read_bytes(name))
        return claims

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Keep the claim fresh while the block runs, then remove it."""
        ended = threading.Event()
        thread = threading.Thread(target=self._beat, args=(ended,), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError):  # then it goes stale
                self.store.remove_internal(self.name)
                self.store.remove_empty(INTERNAL_FOLDER)  # of an output that was refused nothing is left

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_S):
            try:
                if not self.store.exists(self.name):
                    break
                self.content["beat"] += 1
                self.write()
            except OSError:
                continue  # the output is out of reach for now; the job that writes there will report it
        else:
            return
        self._warn(f"{self.store.uri} was taken over by another job")
        # Not SIGINT: Ray blocks it in the drivers of its jobs.
        if main := threading.main_thread().ident:
            signal.pthread_kill(main, signal.SIGTERM)


def _read(content: bytes) -> dict[str, Any]:
    """A claim. One that cannot be read is a claim of another machine: it lives while its bytes change."""
    try:
        return dict(parse_json(content, _ClaimContent, label="claim"))
    except DamagedError:
        unknown = {"stage": "a job whose claim is damaged", "job": None, "host": "unknown", "machine": "", "pid": 0}
        digest = hashlib.sha256(content).hexdigest()
        return unknown | {"since": "unknown", "started": 0.0, "holds": True, "beat": digest}


def _describe_holder(content: dict[str, Any]) -> str:
    job = f"job {content['job']}, " if content["job"] else ""
    return f"{content['stage']} ({job}host {content['host']}, process {content['pid']}, since {content['since']})"


def _ray_job() -> str | None:
    """The submission id of the Ray job that this process is the driver of."""
    job_config = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}"
    with contextlib.suppress(DamagedError):
        metadata = parse_json(job_config.encode(errors="replace"), dict[str, Any], label="Ray's settings").get(
            "metadata"
        )
        if isinstance(metadata, dict) and metadata.get("job_submission_id"):
            return redacted(str(metadata["job_submission_id"]))
    return None


def _process_is_there(content: dict[str, Any]) -> bool | None:
    """Whether the process of a claim runs; None where it belongs to another machine."""
    if content["machine"] != _machine():
        return None
    try:
        process = psutil.Process(content["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - content["started"]) < 1
    except psutil.NoSuchProcess:
        return False


@functools.cache
def _machine() -> str:
    """Names the space in which a process id means a process: this boot of the machine, and the container."""
    marks = [platform.node(), str(psutil.boot_time())]
    with contextlib.suppress(OSError):
        marks = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    return " ".join(marks)
