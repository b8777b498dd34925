"""The sweep's job as a user starts it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from benchmarks.processes import family, kill
from lemon.runtime.store import Store
from lemon.runtime.tracking import RUN
from lemon.sweep import table
from tests.jobs.warm import Job, run_job
from tests.probe.tasks.test_folder import write_crops
from tests.sweep.studies import sweep_words, write_cells

pytestmark = pytest.mark.slow


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_cells(tmp_path / "cells")
    write_crops(tmp_path / "data")
    return tmp_path


def command(home: Path, *more: str) -> list[str]:
    return sweep_words(home, "tasks=folder:mine", *more)


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}"}


def run(words: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    return run_job("scaling_sweep", words, env=environment(home))


def results(home: Path) -> dict[str, float]:
    """When each finished trial was finished."""
    return {path.parent.name: path.stat().st_mtime for path in (home / "out").glob("trials/*/result.json")}


def kill_after_first_result(words: list[str], home: Path) -> dict[str, float]:
    """Start a sweep, kill it and all its processes once a trial is done; returns the trials that were done."""
    job = Job("scaling_sweep", words, env=environment(home))
    while not results(home):
        assert job.poll() is None
        time.sleep(0.05)
    kill(family(job.pid))
    job.wait()
    return results(home)


def end_times(home: Path) -> dict[str, int]:
    """When MLflow was told that each finished trial's run has ended, by its id."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    found = [Store(path.parent).read_json(path.name) for path in (home / "out").glob("trials/*/result.json")]
    return {result["run_id"]: client.get_run(result["run_id"]).info.end_time for result in found}


def trial_at_work(home: Path, pid: int) -> psutil.Process | None:
    """A process of Tune's whose trial has a checkpoint and no result."""
    begun = {path.parts[-3] for path in (home / "out").glob("trials/*/checkpoints/step-*.pt")} - results(home).keys()
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).name in begun:  # Tune runs a trial in a folder of its name
                return process
    return None


def table_of(home: Path) -> list[dict]:
    return pq.read_table(home / "out" / table.PARQUET, schema=table.SweepRow.schema).to_pylist()


def last_told_to_tune(home: Path) -> dict[str, dict[str, Any]]:
    """The last result of each trial in Tune's own files."""
    files = (home / "out" / ".lemon" / "ray").glob("sweep-*/*/result.json")
    results = {path.parent.name: path.read_text().splitlines() for path in files}
    return {name: json.loads(lines[-1]) for name, lines in results.items() if lines}


def statuses(home: Path) -> dict[str, str]:
    """Status of every child of the sweep in MLflow, by name; a trial has one run only."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    parent = client.get_run(Store(home / "out").read_json(RUN)["run_id"])
    found = client.search_runs(
        [parent.info.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    names = {each.info.run_name: each.info.status for each in found}
    assert len(names) == len(found)
    assert parent.info.status == "FINISHED"
    return names


@pytest.mark.parametrize(
    "launcher",
    [["launcher=process"], pytest.param(["launcher=ray", "max_concurrent=2"], marks=pytest.mark.ray)],
    ids=["process", "ray"],
)
def test_a_sweep_killed_half_way_goes_on_and_runs_no_finished_trial_again(home: Path, launcher: list[str]) -> None:
    words = command(home, "seeds=[0,1]", *launcher)
    done = kill_after_first_result(words, home)
    assert 1 <= len(done) < 4
    ended = end_times(home)
    assert len(ended) == len(done)
    again = run(words, home)
    assert again.returncode == 0, again.stderr
    assert f"{len(done)} trials are done" in again.stdout
    now = results(home)
    assert {name: now[name] for name in done} == done
    assert ended.items() <= end_times(home).items()
    assert len(now) == 4
    rows = table_of(home)
    assert {(row["point"], row["seed"]) for row in rows} == {(point, seed) for point in ("a0", "a1") for seed in (0, 1)}
    assert all(row["status"] == "done" for row in rows)
    assert set(statuses(home).values()) == {"FINISHED"}


def test_faults_are_lines_and_exit_code_2_and_leave_no_trial(home: Path) -> None:
    done = run(command(home, "sweep=size", "sweep.points=[50,500,5000]"), home)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("scaling_sweep: point ") for line in lines)
    assert not (home / "out" / "trials").exists()


@pytest.mark.ray
def test_ray_runs_trials_side_by_side_and_one_that_fails_stops_no_other(home: Path) -> None:
    points = "sweep.points=[{name: calm},{name: wild, overrides: {ssl.base_lr: 1e30}},{name: tame}]"
    more = ["launcher=ray", "max_concurrent=2", "pretrain.epochs=4", "pretrain.checkpoint_every=100"]
    done = run(command(home, points, *more), home)
    assert done.returncode == 3, done.stdout + done.stderr
    rows = table_of(home)
    assert {row["point"]: row["status"] for row in rows} == {"calm": "done", "wild": "failed", "tame": "done"}
    (failed,) = [row for row in rows if row["status"] == "failed"]
    assert failed["error"].startswith("TrainingStoppedError: the loss became")
    assert last_told_to_tune(home).keys() == {"augmentation-calm-s0", "augmentation-tame-s0"}
    for result in last_told_to_tune(home).values():
        assert result["probe/folder_mine/balanced_accuracy"] > 0
    names = ("calm", "wild", "tame")
    assert statuses(home) == {f"augmentation-{name}-s0": "FAILED" if name == "wild" else "FINISHED" for name in names}


@pytest.mark.ray
def test_a_trial_of_several_workers_on_ray_is_a_row_of_the_table(home: Path) -> None:
    more = ["sweep.points=a0", "launcher=ray", "pretrain.workers.count=2", "pretrain.register_as=lemon"]
    done = run(command(home, *more), home)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table_of(home)
    assert {(row["point"], row["status"]) for row in rows} == {("a0", "done")}
    assert statuses(home) == {"augmentation-a0-s0": "FINISHED"}
    import mlflow

    versions = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}").search_model_versions("name='lemon'")
    assert [version.run_id for version in versions] == [rows[0]["run_id"]]


@pytest.mark.ray
def test_a_trial_whose_process_was_lost_is_begun_again_at_once(home: Path) -> None:
    words = command(home, "launcher=ray", "pretrain.epochs=20")
    job = Job("scaling_sweep", words, env=environment(home), stdout=PIPE, stderr=STDOUT)
    while not (worker := trial_at_work(home, job.pid)):
        assert job.poll() is None
        time.sleep(0.05)
    worker.kill()
    told, _ = job.communicate(timeout=500)
    assert job.returncode == 0, told
    assert ": begun again: The actor" in told
    assert {row["status"] for row in table_of(home)} == {"done"}
    assert set(statuses(home).values()) == {"FINISHED"}


@pytest.mark.ray
@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
def test_a_sweep_on_ray_with_early_stops_goes_on_after_a_kill(home: Path, torn: bool) -> None:
    """ASHA ends what falls behind; after a kill Tune goes on where it was, and all runs end.

    Tune writes its own files in place: a full disk leaves them torn, and then all but ASHA's memory goes on.
    """
    cells = [
        cell for path in (home / "cells" / "cells").iterdir() for cell in pq.read_table(path)["cell_id"].to_pylist()
    ]
    labels = home / "labels.csv"
    labels.write_text("cell_id,label\n" + "".join(f"{cell},{'ab'[i % 2]}\n" for i, cell in enumerate(cells)))
    probe = [f"pretrain.probe.cells={home / 'cells'}", f"pretrain.probe.labels={labels}"]
    more = ["launcher=ray", "asha=true", "max_concurrent=2", "pretrain.epochs=20", "sweep.points=a0,a1,a1_gray"]
    words = command(home, *more, *probe)
    done = kill_after_first_result(words, home)
    for state in (home / "out" / ".lemon" / "ray").glob("sweep-*/*-*.json") if torn else ():
        os.truncate(state, state.stat().st_size // 2)
    again = run(words, home)
    assert again.returncode == 0, again.stdout + again.stderr
    assert ("ASHA begins anew" in again.stdout) == torn
    now = results(home)
    assert {name: now[name] for name in done} == done
    found = {row["trial"]: row["status"] for row in table_of(home)}
    assert len(found) == 3
    assert set(found.values()) <= {"done", "stopped"}
    assert not (home / "out" / ".lemon" / "ray" / "current.json").exists()
    runs = statuses(home)
    assert all(runs[trial] == ("FINISHED" if status == "done" else "KILLED") for trial, status in found.items())
    nothing = run(words, home)
    assert nothing.returncode == 0
    assert "3 trials are done, 0 to do" in nothing.stdout
