"""Joining a Ray cluster, or starting Ray on this machine. What keeps it from that is one line, in seconds."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from lemon.errors import ConfigError

JOIN_S = 60.0
"""Ray that is joined answers by then; with a dead address or a wrong token ``ray.init`` never returns (2.60)."""

START_S = 120.0
"""Ray on this machine runs by then: 4 to 10 s, and longer on a machine that is busy."""

STORE_BYTES = 512 << 20
"""Ray's objects on this machine: rows of tables, as actors write what is large themselves."""

_SOCKET_BYTES = 107  # of a Unix socket's path
# Below Ray's temporary folder: session_<date>_<time>_<microseconds>_<process>/sockets/plasma_store and a suffix.
_OWN_BYTES = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_LAST_RESORTS = ("/tmp", "/var/tmp", "/dev/shm")
_MIN_BYTES = 16 << 20  # that its folder must take: Ray's logs of a short job
_ADDRESS = re.compile(r"(?P<client>ray://)?(?P<host>\[[0-9a-fA-F:]+\]|[^\s/:]+):(?P<port>\d+)")
_ASK_S = 5.0
_UNLIMITED_NODES = 1000  # nodes of a group without a limit
_AUTOSCALING_STATUS = b"__autoscaling_status"
_REMEDY = "is the cluster up, and RAY_ADDRESS (HOST:6379) right? unset it to run here"


logger = logging.getLogger(__name__)


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
    _set_token()
    folder = temporary_folder()
    options: dict[str, Any] = {"include_dashboard": dashboard, "object_store_memory": STORE_BYTES}
    # "local", because Ray by itself joins what the last ``ray start`` of this machine left a note of.
    _init(address="local", limit_s=START_S, **options | ({"_temp_dir": folder} if folder else {}))


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
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"RAY_ADDRESS: got {address!r}; expected HOST:6379, ray://HOST:10001 or auto")
    host, port = match["host"].strip("[]"), int(match["port"])
    try:
        socket.create_connection((host, port), timeout=_ASK_S).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"RAY_ADDRESS: got {address!r}; nothing answers there ({why}): {_REMEDY}") from None
    if not match["client"]:
        _check_gcs(address, place=f"{match['host']}:{port}")


def _check_gcs(address: str, *, place: str) -> None:
    """Ask whether Ray is alive there, as ``ray health-check`` does. Raises ConfigError."""
    import grpc
    import ray
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    question = gcs_service_pb2.CheckAliveRequest()  # type: ignore[attr-defined]
    with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            check_alive = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive
            reply = check_alive(question, timeout=2 * _ASK_S, metadata=_credentials())
        except grpc.RpcError as error:
            code = error.code()
            if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise ConfigError(_refusal_line(address)) from None
            raise ConfigError(
                f"RAY_ADDRESS: got {address!r}; what answers there is no Ray head ({code.name.lower()}): {_REMEDY}"
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


def _refusal_line(address: str) -> str:
    """What to say of a cluster that wants another token; never the token itself."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        got, remedy = f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}", "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    else:
        got = "the token here is another one" if _token() else "there is none here"
        remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's"
    return f"RAY_ADDRESS: Ray at {address} wants its token and {got}: {remedy}"


def temporary_folder() -> str | None:
    """The folder for Ray's files on this machine where its own choice would not do; None: leave it to Ray.

    Raises ConfigError where there is none to write to.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), None)
    chosen = Path(os.environ[name] if name else _LAST_RESORTS[0]).absolute()  # as Ray chooses
    fault = folder_fault(chosen)
    if fault is None:
        return None
    for short in map(Path, _LAST_RESORTS):
        if folder_fault(short) is None:
            logger.warning(f"ray: {name or 'temporary files'}: {chosen} {fault}; Ray's files go to {short}/ray")
            return f"{short}/ray"
    raise ConfigError(
        f"{name or 'TMPDIR'}: {chosen} {fault}, nor will {' or '.join(_LAST_RESORTS)} do; expected RAY_TMPDIR=FOLDER, "
        "short and with space for Ray's files"
    )


def folder_fault(folder: Path) -> str | None:
    """Why Ray cannot have its files in a folder; None where it can."""
    if len(os.fsencode(folder)) + _OWN_BYTES > _SOCKET_BYTES:
        return "is too long a path for a Unix socket"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_MIN_BYTES))
            file.flush()
    except OSError as error:
        return f"cannot be written ({error.strerror or error})"
    return None


def _set_token() -> None:
    """A token of this job's own for the Ray that it starts, where Ray's default, a file in the home, cannot be made."""
    if "RAY_AUTH_MODE" in os.environ or _token() is not None:
        return
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


# --- ray.init, which may hang -----------------------------------------------------------------------------------------


def _init(*, limit_s: float, **options: Any) -> None:
    """``ray.init`` in a thread of its own: where it hangs, it keeps to no limit and lets no signal end its thread.

    That thread stays, because Linux kills what Ray has started together with the thread that started it. Raises
    ConfigError.
    """
    import ray

    raised: list[Exception] = []
    done, never = threading.Event(), threading.Event()

    def initialise() -> None:
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:  # handed over, to be reported in a line  # noqa: BLE001
            raised.append(error)
        done.set()
        never.wait()

    place = "Ray here" if options["address"] == "local" else f"RAY_ADDRESS: Ray at {options['address']!r}"
    before = _children()
    try:
        with _silenced():
            threading.Thread(target=initialise, name="ray.init", daemon=True).start()
            done.wait(limit_s)
        if not done.is_set():
            left = ", or what the last ray start of this machine left a note of" if options["address"] == "auto" else ""
            raise ConfigError(
                f"{place} does not answer in {limit_s:g} s: is it dead{left}? python -m lemon.doctor --ray"
            )
        if raised:
            raise ConfigError(f"{place}: {explain(raised[0])}") from raised[0]
    except BaseException:
        for child in _children() - before:  # what Ray had started by now
            with contextlib.suppress(psutil.Error):
                child.kill()
        raise
    if threading.current_thread() is threading.main_thread() and (handler := signal.getsignal(signal.SIGTERM)):
        signal.signal(signal.SIGTERM, handler)  # again: Ray's C++ has put one that prints its stack in its place


def explain(error: Exception) -> str:
    """An error of ``ray.init`` in one line, with how to repair it where that is known."""
    message = " ".join(str(error).split())
    if type(error).__name__ == "AuthenticationError":
        return "RAY_AUTH_MODE wants a token and there is none: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    if isinstance(error, ConnectionError) and "any running Ray" in message:
        return "no Ray runs on this machine: ray start --head, or unset RAY_ADDRESS to have one for this job"
    if message.startswith("Version mismatch"):
        return f"{message[:300]}: install the cluster's versions"
    return f"{type(error).__name__}: {message[:300]}"


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Standard error goes nowhere: Ray's C++ writes there, whatever its level of logging is, while it connects."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


# --- what a cluster has -----------------------------------------------------------------------------------------------


def nodes() -> list[dict[str, float]]:
    """Resources of each node that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def describe_nodes() -> str:
    """What the cluster has, in words."""
    alive = nodes()
    total = {name: sum(node.get(name, 0) for node in alive) for name in ("CPU", "GPU")}
    return f"{len(alive)} nodes with {total['CPU']:g} CPUs and {total['GPU']:g} GPUs"


def autoscaler_nodes() -> list[dict[str, float]] | None:
    """Nodes that an autoscaler may add: none where there is none, None where it does not report which."""
    from ray._private.state import state  # as Ray Data: there is no public way to it (2.60)

    groups = getattr(state.get_cluster_config(), "node_group_configs", ())
    if groups:
        return [dict(group.resources) for group in groups for _ in range(_most(group.max_count))]
    return None if _is_scaled() else []


def _most(count: int) -> int:
    return _UNLIMITED_NODES if count < 0 else min(count, _UNLIMITED_NODES)


def _is_scaled() -> bool:
    """Whether an autoscaler adds nodes. Where none does, each node is to Ray a type of its own, ``node_<id>``."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    noted = json.loads(_internal_kv_get(_AUTOSCALING_STATUS) or b"{}").get("autoscaler_report")
    if noted is not None:  # by version 1
        types = {*(noted.get("active_nodes") or ()), *(noted.get("idle_nodes") or ())}
        return any(not name.startswith("node_") for name in types)
    status = get_cluster_status(ray.get_runtime_context().gcs_address)  # of version 2, which names its instances
    return any(
        node.instance_id or not node.ray_node_type_name.startswith("node_")
        for node in (*status.active_nodes, *status.idle_nodes)
    )
