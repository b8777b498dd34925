"""The pretraining job as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from subprocess import PIPE, STDOUT

import psutil
import pytest

from benchmarks.processes import family, kill
from lemon.pretrain.config import PretrainConfig
from lemon.runtime.config import load, preset_names
from lemon.runtime.store import Store
from lemon.runtime.tracking import Run, metric_history
from tests.cells_table import synthetic_crops, write_slide
from tests.jobs.warm import Job, run_job

SMALL = [
    "encoder.dim=32",
    "encoder.depth=2",
    "encoder.heads=2",
    "ssl.hidden_dim=32",
    "ssl.out_dim=16",
    "batch=16",
    "images_per_epoch=64",
    "log_every=1",
    "checkpoint_every=4",
    "variant=smoke",
    "tasks=null",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cells")
    for slide in range(2):
        write_slide(Store(folder), f"s{slide}", synthetic_crops(60, seed=slide))
    return folder


def command(cells: Path, output: Path, *words: str) -> list[str]:
    cache = f"cache={output.parent / 'cache'}"
    return [f"cells={cells}", f"output={output}", cache, *SMALL, *words]


def environment(output: Path) -> dict[str, str]:
    return os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{output.parent / 'mlflow.db'}"}


def losses(output: Path, *, same_workers: bool = True) -> list[tuple[int, float]]:
    """(step, loss); a step that was done twice, because its checkpoint was lost, has the same loss both times, unless
    the number of workers changed."""
    uri = f"sqlite:///{output.parent / 'mlflow.db'}"
    history = metric_history(Run(uri, Store(output).read_json("run.json")["run_id"]), "loss")
    assert len(set(history)) == len(dict(history)) or not same_workers
    return list(dict(history).items())


def run(words: list[str], output: Path) -> subprocess.CompletedProcess[str]:
    return run_job("pretrain", words, env=environment(output), timeout=400)


@pytest.fixture(scope="module")
def undisturbed(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run(command(cells, output, "epochs=10"), output)
    assert done.returncode == 0, done.stderr
    assert (output / "encoder" / "config.json").exists()
    curve = losses(output)
    assert [step for step, _ in curve] == list(range(1, 41))
    return curve


def test_a_job_killed_at_any_moment_goes_on_with_the_same_losses(
    cells: Path, tmp_path: Path, undisturbed: list[tuple[int, float]]
) -> None:
    output = tmp_path / "run"
    words = command(cells, output, "epochs=10")
    job = Job("pretrain", words, env=environment(output))
    while not (output / "checkpoints").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.wait()
    done = run(words, output)
    assert done.returncode == 0, done.stderr
    assert losses(output) == undisturbed


@pytest.mark.ray
def test_a_ray_worker_killed_mid_run_is_replaced_and_the_losses_stay_the_same(
    cells: Path, tmp_path: Path, undisturbed: list[tuple[int, float]]
) -> None:
    output = tmp_path / "run"
    words = command(cells, output, "epochs=10", "workers.launcher=ray")
    job = Job("pretrain", words, env=environment(output), stdout=PIPE, stderr=STDOUT)
    while not (output / "checkpoints").exists():
        assert job.poll() is None
        time.sleep(0.05)
    for child in psutil.Process(job.pid).children(recursive=True):
        if "RayTrainWorker" in " ".join(child.cmdline()):
            child.kill()
    told, _ = job.communicate(timeout=400)
    assert job.returncode == 0, told
    curve = losses(output)
    assert [step for step, _ in curve] == [step for step, _ in undisturbed]
    # Ray gives a worker one thread, the job's own process has several: sums are rounded in another order.
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in undisturbed], rel=1e-5)


@pytest.mark.ray
def test_two_workers_see_the_same_batches_and_reach_the_same_loss(
    cells: Path, tmp_path: Path, undisturbed: list[tuple[int, float]]
) -> None:
    """Views are drawn by each worker for its own cells, so losses agree as two draws of one experiment do."""
    output = tmp_path / "run"
    done = run(command(cells, output, "epochs=10", "workers.count=2"), output)
    assert done.returncode == 0, done.stderr
    curve = [loss for _, loss in losses(output)]
    alone = [loss for _, loss in undisturbed]
    assert len(curve) == len(alone)
    assert sum(curve) / len(curve) == pytest.approx(sum(alone) / len(alone), rel=0.05)


@pytest.mark.ray
def test_a_run_that_loses_half_of_its_workers_goes_on_with_the_same_batches(
    cells: Path, tmp_path: Path, undisturbed: list[tuple[int, float]]
) -> None:
    """Begun by two workers and killed; the same elastic run then finds room for one alone."""
    output = tmp_path / "run"
    words = command(cells, output, "epochs=10", "workers.count=[1,2]")
    job = Job("pretrain", words, env=environment(output))
    while not (output / "checkpoints").exists():
        assert job.poll() is None
        time.sleep(0.05)
    kill(family(job.pid))
    job.wait()
    done = run([*words, f"workers.cpus={os.cpu_count()}"], output)
    assert done.returncode == 0, done.stderr
    curve, alone = losses(output, same_workers=False), [loss for _, loss in undisturbed]
    assert [step for step, _ in curve] == [step for step, _ in undisturbed]
    assert sum(loss for _, loss in curve) / len(curve) == pytest.approx(sum(alone) / len(alone), rel=0.05)


def test_an_output_begun_with_other_settings_is_refused(cells: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert run(command(cells, output, "epochs=2"), output).returncode == 0
    again = run(command(cells, output, "epochs=2", "seed=5"), output)
    assert again.returncode == 2
    assert "seed" in again.stderr
    assert "other settings" in again.stderr


def test_a_table_without_cells_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run(command(tmp_path / "nothing", tmp_path / "run"), tmp_path / "run")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("pretrain: cells: ")


@pytest.mark.parametrize("variant", ["default", "smoke", "laptop"])
@pytest.mark.parametrize("ssl", preset_names("ssl"))
def test_every_shipped_config_composes_and_validates(variant: str, ssl: str) -> None:
    words = ["cells=c", "output=o", f"variant={variant}", f"ssl={ssl}"]
    assert load("pretrain", words, PretrainConfig).ssl.name == ssl.split("_")[0]
