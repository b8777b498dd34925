"""MLflow's page as ``lemon ui`` serves it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from benchmarks.processes import family, free_ports, kill
from lemon.errors import ConfigError
from lemon.runtime import ui
from lemon.runtime.store import Store
from lemon.runtime.tracking import start_run
from lemon.runtime.ui import UiConfig
from tests.jobs.warm import JOBS


def wait(condition: Callable[[], Any], what: str, *, seconds: float = 60) -> Any:
    """What a condition gives once it holds."""
    end = time.monotonic() + seconds
    while not (held := condition()):
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.2)
    return held


def answers(page: str) -> bool:
    try:
        return requests.get(f"{page}/health", timeout=5).ok
    except requests.RequestException:
        return False


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of pretraining."""
    home = tmp_path_factory.mktemp("ui")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
        start_run("pretrain", "vit_tiny8-mocov3-a0", store=Store(home / "run"), params={}).close()
    return home / "mlflow.db"


@pytest.fixture(scope="module")
def served(database: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process that serves the page, and the link to the runs of pretraining that it printed."""
    (port,) = free_ports(1)
    words = [sys.executable, str(JOBS / "ui.py"), f"database={database}", f"port={port}"]
    environment = os.environ | {"PYTHONPATH": str(JOBS.parent)}
    job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        assert job.stdout is not None
        line = next(line for line in job.stdout if line.startswith("ui: pretrain: "))
        wait(lambda: answers(f"http://127.0.0.1:{port}"), "the page answers", seconds=120)
        yield job, line.split()[-1]
    finally:
        kill(family(job.pid))
        job.wait()


def test_without_runs_or_on_a_port_that_is_taken_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^database: sqlite:///.*holds no runs yet; lemon pretrain"):
        ui.main(UiConfig(database=str(tmp_path / "mlflow.db")))
    assert not list(tmp_path.iterdir()), "no database is made"
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^port: {port} on 127.0.0.1: .*; choose another, port={port + 1}$"):
            ui.check_port(port)


@pytest.mark.slow
def test_the_page_is_for_this_machine_alone_and_no_workers_of_mlflows_jobs_are_started(
    served: tuple[subprocess.Popen[str], str],
) -> None:
    processes = family(served[0].pid)
    assert len(processes) <= 3, [process.cmdline() for process in processes]
    places = {
        connection.laddr.ip
        for process in processes
        for connection in psutil.Process(process.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert places == {"127.0.0.1"}
