"""The report's job as a user starts it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.jobs.warm import run_job


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    return run_job("report", words, env=environment, cwd=folder, timeout=300)


def test_help_lists_every_key(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert all(key in done.stdout for key in ("experiment", "sweeps", "probes", "atlas", "views", "paper", "output"))
    assert "NAME" not in done.stdout.replace("variant=NAME", "")  # no key is a choice of configs


@pytest.mark.slow
def test_where_nothing_is_found_one_line_says_what_to_do_and_no_database_is_made(tmp_path: Path) -> None:
    done = run(tmp_path, "output=report")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("report: experiment: no outputs of runs in scaling_sweep, probe; run lemon sweep")
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "report" / "index.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("paper=nowhere.csv", "report: paper: nowhere.csv: no such file"),
        ("sweep=x", "report: sweep: unknown key; did you mean sweeps?"),
        ("output=mlflow.db/x", "report: output: cannot write to 'mlflow.db/x'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, word: str, part: str) -> None:
    (tmp_path / "mlflow.db").write_text("no database")
    done = run(tmp_path, word)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(part)


@pytest.mark.slow
def test_a_database_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database" * 1000)
    done = run(tmp_path)
    assert done.returncode == 2
    assert f"report: experiment: MLflow at sqlite:///{tmp_path}/mlflow.db cannot be used" in done.stderr
    assert "Traceback" not in done.stderr
