"""The curation job as a user starts it: a process of its own, killed and started again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, STDOUT

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lemon.cells.ledger import read_ledger
from lemon.runtime.ledger import ATTEMPTS_FOLDER
from lemon.runtime.store import Store
from lemon.slides.synthetic import make_tissue, write_pyramid
from tests.jobs.warm import Job, run_job

N_SLIDES = 4

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for seed in range(N_SLIDES):
        write_pyramid(folder / f"s{seed}.tiff", make_tissue(1500, seed=seed, border_px=100).image, mpp=0.25)
    return folder


def command(slides: Path, output: Path) -> list[str]:
    words = [f"slides={slides}", f"output={output}", "variant=smoke", "region_px=512", "cells_per_slide=60"]
    return words


def cells_of(output: Path) -> pa.Table:
    return pq.read_table(output / "cells").sort_by("cell_id")


@pytest.fixture(scope="module")
def undisturbed(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    output = tmp_path_factory.mktemp("undisturbed")
    done = run_job("curate", command(slides, output))
    assert done.returncode == 0, done.stderr
    assert f"{N_SLIDES} slides ({N_SLIDES} done" in done.stdout
    return cells_of(output)


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def named(pid: int, word: str) -> list[psutil.Process]:
    found = []
    for process in descendants(pid):
        try:
            if word in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], object], *, job: Job, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, "the job ended before it could be disturbed"
        assert time.monotonic() < end
        time.sleep(0.05)


def kill_all(job: Job) -> None:
    """kill -9 of the driver and of everything that it started."""
    started = descendants(job.pid)
    job.kill()
    for process in started:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    job.wait()


def committed(output: Path) -> int:
    return len(list((output / "slides").glob("*.parquet"))) if (output / "slides").exists() else 0


@pytest.mark.parametrize("after_commits", [0, 2])
def test_a_job_that_was_killed_goes_on_and_ends_with_the_table_of_an_undisturbed_one(
    slides: Path, undisturbed: pa.Table, tmp_path: Path, after_commits: int
) -> None:
    output = tmp_path / "out"
    job = Job("curate", command(slides, output))
    wait_for(lambda: committed(output) >= after_commits and any((output / ATTEMPTS_FOLDER).glob("*/*")), job=job)
    kill_all(job)
    before = committed(output)
    assert before < N_SLIDES
    done = run_job("curate", command(slides, output))
    assert done.returncode == 0, done.stderr
    assert f"{before} of an earlier run" in done.stdout
    assert cells_of(output).equals(undisturbed)


@pytest.mark.parametrize("victim", ["ItemActor", "multiprocessing.spawn"])
def test_a_killed_worker_costs_no_row(slides: Path, undisturbed: pa.Table, tmp_path: Path, victim: str) -> None:
    output = tmp_path / "out"
    job = Job("curate", command(slides, output), stdout=PIPE, stderr=STDOUT)
    wait_for(lambda: committed(output) >= 1 and named(job.pid, victim), job=job)
    for process in named(job.pid, victim)[:1]:
        process.kill()
    told, _ = job.communicate(timeout=240)
    assert job.returncode == 0, told
    assert cells_of(output).equals(undisturbed)
    ledger = read_ledger(Store(output)).to_pylist()
    assert [row["status"] for row in ledger] == ["done"] * N_SLIDES
    assert [row["n_cells"] for row in ledger] == [60] * N_SLIDES


def test_the_same_command_again_does_nothing_and_says_so(slides: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = run_job("curate", command(slides / "s0.tiff", output))
    assert first.returncode == 0, first.stderr
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    again = run_job("curate", command(slides / "s0.tiff", output))
    assert again.returncode == 0
    assert "1 of an earlier run" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")} == written
