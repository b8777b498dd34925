"""The demo as a user starts it, on the made-up slide; pretraining is shorter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.processes import family, kill
from lemon.runtime.store import Store

SHORT = """
import sys
from pathlib import Path
from lemon.demo import job as demo
demo.PRETRAIN = demo.PRETRAIN.replace("images_per_epoch=2560 epochs=8", "images_per_epoch=640 epochs=2")
demo.run(Path(sys.argv[1]), synthetic=True)
"""

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]


def environment(output: Path) -> dict[str, str]:
    return os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{output / 'mlflow.db'}"}


def trials(output: Path) -> dict[str, int]:
    """When each trial of the sweep was finished."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (output / "sweep").glob("trials/*/result.json")}


def assert_every_run_has_its_scores(uri: str) -> None:
    """Finished runs of pretraining and trials carry ``probe/`` metrics, and the registry holds no trial."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    runs = {
        name: client.search_runs([client.get_experiment_by_name(name).experiment_id], "status = 'FINISHED'")
        for name in ("pretrain", "scaling_sweep")
    }
    children = [run for run in runs["scaling_sweep"] if "mlflow.parentRunId" in run.data.tags]
    (parent,) = [run for run in runs["scaling_sweep"] if "mlflow.parentRunId" not in run.data.tags]
    assert (len(runs["pretrain"]), len(children)) == (1, 6)
    for run in (*runs["pretrain"], *children):
        assert any(name.startswith("probe/morphometry") for name in run.data.metrics), run.info.run_name
    assert any(name.startswith("best/morphometry") for name in parent.data.metrics)
    registered = {version.run_id for version in client.search_model_versions("")}
    assert registered == {run.info.run_id for run in runs["pretrain"]}


def test_the_demo_killed_in_its_sweep_goes_on_and_ends_with_every_stage(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    output.mkdir()
    words = [sys.executable, "-c", SHORT, str(output)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    job = subprocess.Popen(words, env=environment(output), **quiet)
    while not trials(output):
        assert job.poll() is None
        time.sleep(0.05)
    kill(family(job.pid))
    job.wait()
    before = trials(output)

    done = subprocess.run(words, env=environment(output), capture_output=True, text=True, check=False, timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    after = trials(output)
    assert {name: after[name] for name in before} == before, "no finished trial runs twice"
    assert len(after) == 6
    rows = pq.read_table(output / "sweep" / "sweep.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"done"}
    (n_cells,) = {row["n_cells"] for row in Store(output / "cells").read_table("slides/synthetic.parquet").to_pylist()}
    assert {row["n_cells"] for row in rows} == {n_cells // 16, n_cells // 4, n_cells}
    for name in (
        "nuclei.png",
        "views.png",
        "atlas/atlas.html",
        "atlas/atlas.png",
        "probe/table1.csv",
        "probe/index.html",
        "report/index.html",
    ):
        assert (output / name).stat().st_size > 0, name
    assert_every_run_has_its_scores(f"sqlite:///{output / 'mlflow.db'}")
    assert json.loads((output / "encoder" / "encoder" / "config.json").read_text())["lemon"]["name"] == "vit_demo"
