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

import numpy as np
import psutil
import pytest
import requests

from benchmarks.processes import family, free_ports, kill
from lemon.errors import ConfigError
from lemon.pretrain import job as pretraining
from lemon.pretrain.config import PretrainConfig
from lemon.runtime import ui
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.runtime.ui import UiConfig
from lemon.schema import MORPHOMETRICS
from tests.cells_table import synthetic_crops, write_slide
from tests.jobs.warm import JOBS
from tests.sweep.studies import TINY


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
    """Of two runs of pretraining by different views."""
    home = tmp_path_factory.mktemp("ui")
    for number in range(6):
        random = np.random.default_rng(number)
        arrays = {name: random.random(40) for name in MORPHOMETRICS}
        write_slide(Store(home / "cells"), f"s{number}", synthetic_crops(40, seed=number), arrays=arrays)
    words = [f"cells={home / 'cells'}", f"cache={home / 'cache'}", "epochs=4"]
    words += [word.removeprefix("pretrain.") for word in TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
        for views in ("a0", "a1_gray"):
            pretraining.main(load("pretrain", [*words, f"views={views}", f"output={home / views}"], PretrainConfig))
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


@pytest.mark.slow
def test_two_runs_stand_beside_each_other_with_their_probe_metrics_curves_and_what_differs(
    served: tuple[subprocess.Popen[str], str], browser: Any, tmp_path: Path
) -> None:
    def shown(words: list[str], charts: str) -> Callable[[], bool]:
        def condition() -> bool:
            drawn = browser.find_elements("css selector", charts)
            return bool(drawn) and all(word in browser.page_source for word in words)

        return condition

    browser.set_window_size(1700, 1500)
    browser.get(served[1])
    curves = ["vit_tiny8-mocov3-a0", "vit_tiny8-mocov3-a1_gray", "online/morphometry", "online/restained", "probe/"]
    wait(shown(curves, ".js-plotly-plot .scatterlayer .trace"), "the curves are drawn", seconds=300)
    lines = browser.find_elements("css selector", ".js-plotly-plot .scatterlayer .trace")
    assert len(lines) >= 4, "two runs by two scores"
    browser.save_screenshot(str(tmp_path / "runs.png"))
    for box in browser.find_elements("css selector", "[role=row] input[type=checkbox], .is-select-all input"):
        browser.execute_script("if (!arguments[0].checked) arguments[0].click()", box)
    compare = wait(
        lambda: next((b for b in browser.find_elements("css selector", "button, a") if b.text == "Compare"), None),
        "the runs can be compared",
    )
    compare.click()
    wait(lambda: "compare-runs" in browser.current_url, "the comparison opens")
    differ = ["views.name", "a1_gray", "probe/morphometry", "online/restained/recall_at_1"]
    wait(shown(differ, ".js-plotly-plot canvas, .js-plotly-plot svg"), "the comparison is drawn", seconds=120)
    browser.save_screenshot(str(tmp_path / "comparison.png"))
    assert "Something went wrong" not in browser.find_element("css selector", "body").text
