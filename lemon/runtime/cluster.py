"""Joining a Ray cluster, or starting Ray on this machine. What keeps it from that is one line, in seconds."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from lemon.config import EXIT_BAD_CONFIG, ConfigError

JOIN_S = 60.0
"""Ray that is joined answers by then; with a dead address or a wrong token ``ray.init`` never returns (2.60)."""

START_S = 120.0
"""Ray on this machine runs by then: 4 to 10 s, and longer on a machine that is busy."""

STORE_BYTES = 512 << 20
"""Ray's objects on this machine: rows of tables, as actors write what is large themselves."""

_SOCKET_BYTES = 107  # of a Unix socket's path
# Below Ray's temporary folder: session_<date>_<time>_<microseconds>_<process>/sockets/plasma_store and a suffix.
_OWN_BYTES = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
_ADDRESS = re.compile(r"(?P<client>ray://)?(?P<host>\[[0-9a-fA-F:]+\]|[^\s/:]+):(?P<port>\d+)")
_ASK_S = 5.0
_MEND = "is the cluster up, and RAY_ADDRESS (HOST:6379) right? unset it to run here"


def ray_address() -> str | None:
    """The cluster that RAY_ADDRESS names; None where Ray is to run on this machine. An empty variable names none."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def start_ray(*, dashboard: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS names, else start Ray on this machine, quietly.

    Args:
        dashboard: with Ray's dashboard, where it is started here.

    Raises:
        ConfigError: one line that says what keeps Ray from it.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # Ray Data's own; others may have added theirs
            handler.setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = ray_address()
    if address is not None:
        check_address(address)
        _init(address=address, limit_s=JOIN_S)
        return
    options: dict[str, Any] = {"include_dashboard": dashboard, "object_store_memory": _store_bytes()}
    # "local", because Ray by itself joins what the last ``ray start`` of this machine left a note of.
    _init(address="local", limit_s=START_S, _temp_dir=temporary_folder(), **options)


def quiet_ray_data() -> None:
    """Settings of Ray Data for jobs whose rows are slides: no bars but the job's, no limit of time, no lost rows."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the jobs' own bars count slides and cells
    context.execution_options.preserve_order = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = -1  # a large slide may take hours
    context.max_errored_blocks = 0


def ray_version() -> str:
    """The version of Ray that is installed."""
    import ray

    return f"ray {ray.__version__}"


def try_ray() -> str:
    """Join or start Ray, run a task, and leave it; returns what the cluster has, in words. Raises ConfigError."""
    import ray

    start_ray()
    try:
        ray.get(ray.remote(num_cpus=0)(ray_version).remote(), timeout=100)
        nodes, has = sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources()
    finally:
        ray.shutdown()
    return f"ran a task; {nodes} nodes with {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"


# --- what can be known before Ray is asked ----------------------------------------------------------------------------


def check_address(address: str) -> None:
    """Raise ConfigError unless a Ray of this version, that lets us in, answers at ``HOST:PORT`` or ``ray://HOST:PORT``.

    ``auto`` is Ray's to find.
    """
    if address == "auto":
        return
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ConfigError(f"RAY_ADDRESS: got {address!r}; expected HOST:6379, ray://HOST:10001 or auto")
    host, port = found["host"].strip("[]"), int(found["port"])
    try:
        socket.create_connection((host, port), timeout=_ASK_S).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"RAY_ADDRESS: got {address!r}; nothing answers there ({why}): {_MEND}") from None
    if not found["client"]:
        _check_gcs(address, place=f"{found['host']}:{port}")


def _check_gcs(address: str, *, place: str) -> None:
    """Ask whether Ray is alive there, as ``ray health-check`` does. Raises ConfigError."""
    import grpc
    import ray
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            reply = NodeInfoGcsServiceStub(channel).CheckAlive(
                CheckAliveRequest(), timeout=2 * _ASK_S, metadata=_credentials()
            )
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
            if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise ConfigError(_refused(address)) from None
            raise ConfigError(
                f"RAY_ADDRESS: got {address!r}; what answers there is no Ray head ({code.name.lower()}): {_MEND}"
            ) from None
    if reply.ray_version and reply.ray_version != ray.__version__:
        raise ConfigError(
            f"RAY_ADDRESS: Ray at {address} is {reply.ray_version}, here it is {ray.__version__}: install the same"
        )


def _credentials() -> list[tuple[str, str]]:
    token = _token()
    return [("authorization", f"Bearer {token}")] if token else []


def _token() -> str | None:
    """The token that Ray would show: of RAY_AUTH_TOKEN, of the file RAY_AUTH_TOKEN_PATH, of ~/.ray/auth_token."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    with contextlib.suppress(OSError, RuntimeError, UnicodeDecodeError):
        return (
            Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token").read_text().strip() or None
        )
    return None


def _refused(address: str) -> str:
    """What to say of a cluster that wants another token; never the token itself."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        got, mend = f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}", "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    else:
        got = "the token here is another one" if _token() else "there is none here"
        mend = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's"
    return f"RAY_ADDRESS: Ray at {address} wants its token and {got}: {mend}"


def temporary_folder() -> str | None:
    """A folder for Ray's files on this machine, where its own choice would not do; None: leave it to Ray.

    Raises ConfigError where Ray could not write.
    """
    given = os.environ.get("RAY_TMPDIR")
    chosen = Path(given or tempfile.gettempdir())
    fault = _unusable(chosen)
    if fault is not None and given:
        raise ConfigError(f"RAY_TMPDIR: got {given!r}, {fault}; expected a folder for Ray's files: another one, or unset it")
    if fault is None and len(os.fsencode(chosen.absolute())) + _OWN_BYTES <= _SOCKET_BYTES:
        return str(chosen.absolute() / "ray") if given else None
    fault = fault or "is too long for a Unix socket"
    for short in map(Path, ("/tmp", "/var/tmp", "/dev/shm")):  # noqa: S108  (the last resort where TMPDIR will not do)
        if _unusable(short) is None:
            print(f"ray: {chosen} {fault}; its files go to {short}/ray", file=sys.stderr)
            return f"{short}/ray"
    raise ConfigError(f"TMPDIR: got {chosen}, which {fault}; set RAY_TMPDIR to a short path of a disk with space")


def _unusable(folder: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
    except OSError as error:
        return f"cannot be written ({error.strerror or error})"
    return None


def _store_bytes() -> int:
    """Bytes for Ray's objects on this machine, within its shared memory. Raises ConfigError where that is too small."""
    shared = Path("/dev/shm")  # noqa: S108
    if not shared.is_dir():
        return STORE_BYTES
    free = shutil.disk_usage(shared).free
    if free * _SHARED < _LEAST_STORE_BYTES:
        return STORE_BYTES  # Ray takes a file of its temporary folder, which is slow, and there is enough of it
    return min(STORE_BYTES, int(free * _SHARED))


# --- ray.init, which may hang -----------------------------------------------------------------------------------------


def _init(*, limit_s: float, **options: Any) -> None:
    """``ray.init`` in a thread of its own: hanging there, it lets no signal end the process, and keeps to no limit.

    Raises ConfigError.
    """
    import ray

    raised: list[Exception] = []

    def initialise() -> None:
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:  # handed over, to be told in a line  # noqa: BLE001
            raised.append(error)

    before = set(psutil.Process().children(recursive=True))
    thread = threading.Thread(target=initialise, name="ray.init", daemon=True)
    with _silenced() as noise:
        thread.start()
        try:
            _join(thread, limit_s=limit_s)
        except BaseException:
            _abandon(before)
            raise
    if thread.is_alive():
        _abandon(before)
        raise ConfigError(f"{_what(options)}: no answer in {limit_s:g} s{noise()}: {_mend(options)}")
    if raised:
        _abandon(before)
        raise ConfigError(f"{_what(options)}: {explain(raised[0])}: {_mend(options)}") from raised[0]
