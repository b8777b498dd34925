"""What every test may use: the reference data (skipped where absent) and a scratch home for Ray."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from lemon.runtime import s3 as s3_client
from lemon.runtime.console import installed
from tests import s3
from tests.browser import browser as browser  # a fixture

# Before Ray is imported anywhere: no token file in the home folder, no call home.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Before torch is: the tests' tensors are small, and threads that wait for each other beside the processes of a job take
# five times as long on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(os.environ.get("LEMON_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared(path: str) -> Path:
    """A file or folder of the reference data; skips the test where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"reference data {path} is absent (set LEMON_SHARED to the folder that holds it)")
    return found


@pytest.fixture
def console() -> Iterator[None]:
    """What is logged is told as in a job, for tests that look at lines without starting one."""
    with installed():
        yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.S3]:
    """An S3 server with an empty bucket, for the whole session."""
    process, port = s3.start_server(tmp_path_factory.mktemp("s3"))
    try:
        s3.make_bucket(process, port)
        proxy, server = s3.start_proxy(port)
        yield server
        server.released.set()
        proxy.shutdown()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def bucket(s3_server: s3.S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Bucket]:
    """An empty prefix of the server's bucket, with the environment that leads there."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3_server.faults.clear()
    s3_client.client.cache_clear()  # what a test sets is for the clients that it makes
    yield s3.Bucket(s3_server, f"s3://{s3.BUCKET}/{uuid.uuid4().hex[:8]}")
    s3_server.faults.clear()
    s3_client.client.cache_clear()
