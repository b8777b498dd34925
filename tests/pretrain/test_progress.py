"""What a person reads of a run that has no terminal."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lemon.pretrain.progress import Progress, duration, following
from lemon.runtime.store import Store
from lemon.runtime.tracking import start_run

pytestmark = pytest.mark.usefixtures("console")


def run(seconds_a_report: float, *, total: int = 100, images_per_s: float = 100.0) -> None:
    now = [0.0]
    progress = Progress(total, batch=10, clock=lambda: now[0])
    for step in range(10, total + 1, 10):
        now[0] += seconds_a_report
        progress({"loss": 5 - step / 100, "images_per_s": images_per_s}, step)
        progress({"effective_rank": 9.0}, step)


def test_a_run_without_a_terminal_tells_step_loss_speed_and_time_left_once_a_minute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(25)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pretrain: step 10 of 100 (10 %), loss 4.900, 100 images/s, 9 s left"
    assert [line.split(" of ")[0] for line in lines] == [f"pretrain: step {step}" for step in (10, 40, 70, 100)]
    assert lines[-1] == "pretrain: step 100 of 100 (100 %), loss 4.000, 100 images/s"


def test_a_run_of_more_than_a_day_is_told_once_with_its_hours(capsys: pytest.CaptureFixture[str]) -> None:
    run(70, total=200, images_per_s=0.01)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "hours" in line]
    assert line == "pretrain: at 0.01 images/s the 180 steps to come take 50 hours"


@pytest.mark.parametrize(("seconds", "told"), [(45, "45 s"), (89.6, "90 s"), (720, "12 min"), (12_000, "3 h 20 min")])
def test_a_duration_is_told_in_fitting_units(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_a_training_in_other_processes_is_followed_by_what_it_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = start_run("pretrain", "elsewhere", store=Store(tmp_path / "out"), params={})
    with following(run, Progress(20, batch=10), every_s=0.05):
        run.log({"loss": 3.0, "images_per_s": 50.0}, step=10)
        end, told = time.monotonic() + 30, ""
        while "step 10" not in told and time.monotonic() < end:
            time.sleep(0.05)
            told += capsys.readouterr().out
        run.log({"loss": 2.0, "images_per_s": 50.0}, step=20)
    assert told.splitlines() == ["pretrain: step 10 of 20 (50 %), loss 3.000, 50 images/s, 2 s left"]
    assert capsys.readouterr().out.splitlines() == ["pretrain: step 20 of 20 (100 %), loss 2.000, 50 images/s"]
