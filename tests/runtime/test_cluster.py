"""Joining or starting Ray, and what keeps it from that: each a line, in seconds."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import ray

from lemon.errors import ConfigError
from lemon.runtime import cluster
from lemon.runtime.cluster import check_address, explain, folder_fault, ray_address, start_ray, temporary_folder

pytestmark = pytest.mark.usefixtures("console")

ROOT = Path(__file__).resolve().parents[2]


def test_starting_ray_quiets_the_console_of_ray_data_and_no_handler_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.data

    logger, other = logging.getLogger("ray.data"), logging.StreamHandler()
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, other])
    monkeypatch.setattr(ray, "is_initialized", lambda: True)  # so that none is started
    start_ray()
    assert other.level == logging.NOTSET
    assert [each.level for each in logger.handlers if each.name == "console"] == [logging.ERROR]


@pytest.mark.parametrize(
    ("given", "expected"), [(None, None), ("", None), (" ", None), ("local", None), ("auto", "auto"), ("h:1", "h:1")]
)
def test_an_empty_variable_names_no_cluster(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if given is not None:
        monkeypatch.setenv("RAY_ADDRESS", given)
    assert ray_address() == expected


class Head(grpc.GenericRpcHandler):
    """Answers as the head of a cluster does: to a token, with a version."""

    def __init__(self, *, version: str, token: str | None) -> None:
        self.version, self.token = version, token

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        from ray.core.generated import gcs_service_pb2

        if details.method != "/ray.rpc.NodeInfoGcsService/CheckAlive":
            return None  # type: ignore[return-value]
        shown = dict(details.invocation_metadata).get("authorization")

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if self.token is not None and shown != f"Bearer {self.token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return gcs_service_pb2.CheckAliveReply(ray_version=self.version).SerializeToString()  # type: ignore[attr-defined]

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def head(request: pytest.FixtureRequest) -> Iterator[str]:
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads, handlers=[Head(**request.param)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(0).wait()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


PLAIN = {"version": ray.__version__, "token": None}
LOCKED = {"version": ray.__version__, "token": "s3cr3t"}


@pytest.mark.parametrize("head", [PLAIN, LOCKED], indirect=True)
@pytest.mark.parametrize("by", ["variable", "file", "home"])
def test_a_head_that_lets_us_in_is_joined(head: str, by: str, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / ".ray" / "auth_token" if by == "home" else tmp_path / "token"
    if by == "variable":
        environment.setenv("RAY_AUTH_TOKEN", "s3cr3t")
    else:
        file.parent.mkdir(exist_ok=True)
        file.write_text("s3cr3t\n")
    if by == "file":
        environment.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    check_address(head)


@pytest.mark.parametrize("head", [LOCKED], indirect=True)
@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({}, "wants its token and there is none here: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "wr0ng"}, "wants its token and the token here is another one"),
        (
            {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "s3cr3t"},
            "and RAY_AUTH_MODE=disabled: set RAY_AUTH",
        ),
    ],
)
def test_a_head_that_wants_another_token_says_so_and_no_token_is_told(
    head: str, environment: pytest.MonkeyPatch, variables: dict[str, str], part: str
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        check_address(head)
    assert part in str(caught.value)
    assert not any(token in str(caught.value) for token in ("s3cr3t", "wr0ng"))


@pytest.mark.parametrize("head", [{"version": "1.0.0", "token": None}], indirect=True)
def test_a_head_of_another_version_is_told_with_both(head: str) -> None:
    with pytest.raises(ConfigError, match=rf"is 1\.0\.0, here it is {ray.__version__}: install the same"):
        check_address(head)


@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("127.0.0.1:9", "nothing answers there (Connection refused)"),
        ("ray://127.0.0.1:9", "nothing answers there (Connection refused)"),
        ("[::1]:9", "nothing answers there"),
        ("no.such.host.invalid:6379", "nothing answers there"),
        ("127.0.0.1:99999999", "nothing answers there"),
        ("foo", "expected HOST:6379"),
        ("127.0.0.1", "expected HOST:6379"),
        ("http://127.0.0.1:6379", "expected HOST:6379"),
    ],
)
def test_an_address_where_nothing_is_is_a_line(address: str, part: str) -> None:
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS: ") as caught:
        check_address(address)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_answers_and_is_no_ray_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ASK_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and says nothing
        with pytest.raises(ConfigError, match="what answers there is no Ray head"):
            check_address(f"127.0.0.1:{server.getsockname()[1]}")


def test_a_folder_too_long_for_sockets_or_not_writable_gives_way_to_a_short_one(
    environment: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert temporary_folder() is None
    long = tmp_path / ("x" * 90)
    long.mkdir()
    for name, value, part in (("TMPDIR", long, "too long"), ("RAY_TMPDIR", "/proc/1", "cannot be written")):
        environment.setenv(name, str(value))
        assert temporary_folder() == "/tmp/ray"
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{name}: {value}" in line
        assert part in line
    environment.setattr(cluster, "_LAST_RESORTS", (str(long),))
    with pytest.raises(ConfigError, match="nor will"):
        temporary_folder()
    assert folder_fault(Path("/proc/1")) is not None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConnectionError("Could not find any running Ray instance. Please"), "no Ray runs on this machine: "),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n  Ray: 2.0\n"),
            "Version mismatch: The",
        ),
        (ray.exceptions.AuthenticationError("x"), "RAY_AUTH_MODE wants a token and there is none: "),
        (OSError(28, "No space\nleft"), "OSError: [Errno 28] No space left"),
    ],
)
def test_errors_of_rays_start_are_one_line(error: Exception, line: str) -> None:
    assert explain(error).startswith(line)
    assert "\n" not in explain(error)


def test_a_start_that_hangs_ends_in_time_and_one_that_fails_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def hangs(**options: object) -> None:
        os.write(2, b"rpc_client.h:153: Failed to connect to GCS\n")
        threading.Event().wait()

    monkeypatch.setattr(ray, "init", hangs)
    with pytest.raises(ConfigError, match=r"Ray at 'h:1' does not answer in 0\.2 s"):
        cluster._init(address="h:1", limit_s=0.2)
    monkeypatch.setattr(ray, "init", lambda **options: 1 / 0)
    with pytest.raises(ConfigError, match="Ray here: ZeroDivisionError: division by zero"):
        cluster._init(address="local", limit_s=10)
    assert capfd.readouterr().err == ""


HANGS = """
import sys, threading
import ray
from lemon.curate.config import CurateConfig
from lemon.runtime.job import run_job
from lemon.runtime.cluster import start_ray

def hang(**options):
    print("hangs", flush=True)
    threading.Event().wait()

ray.init = hang
sys.exit(run_job("curate", CurateConfig, lambda config: start_ray() or 0, ["slides=s", "output=o"]))
"""


def test_sigterm_ends_a_job_while_ray_hangs_in_one_line() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)},
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "hangs\n"
        time.sleep(0.5)
        job.send_signal(signal.SIGTERM)
        _, told = job.communicate(timeout=60)
    assert job.returncode == 143
    assert told.splitlines() == ["curate: ended by SIGTERM; the same command again goes on where it stopped"]


@pytest.mark.parametrize("given", [None, "1"])
def test_telemetry_is_off_unless_it_was_switched_on(given: str | None) -> None:
    """In whatever imports the room that imports Ray and MLflow."""
    names = ("RAY_USAGE_STATS_ENABLED", "MLFLOW_DISABLE_TELEMETRY")
    environment = {key: value for key, value in os.environ.items() if key not in names} | {"PYTHONPATH": str(ROOT)}
    if given:
        environment |= {"RAY_USAGE_STATS_ENABLED": "1", "MLFLOW_DISABLE_TELEMETRY": "false"}
    code = f"import os, lemon.runtime.pool, lemon.runtime.tracking; print(*(os.environ[name] for name in {names}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    assert done.stdout.split() == (["1", "false"] if given else ["0", "true"])
