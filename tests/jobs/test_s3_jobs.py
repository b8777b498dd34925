"""The whole chain with every path at s3://, and kill -9 in between."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import STDOUT

import pytest

from benchmarks.processes import family, kill
from lemon.cells.ledger import read_ledger
from lemon.runtime.scratch import PREFIX
from lemon.runtime.store import Store
from lemon.slides.synthetic import make_tissue, write_pyramid
from tests import s3
from tests.jobs.warm import Job
from tests.probe.tasks.test_folder import write_crops
from tests.sweep.studies import TINY, write_cells

JOBS = Path(__file__).resolve().parents[2] / "jobs"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PATIENCE_S = 600

SMALL = ["encoder.dim=32", "encoder.depth=1", "encoder.heads=2", "ssl.hidden_dim=32", "ssl.out_dim=16", "batch=16"]


@pytest.fixture
def home(bucket: s3.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where processes run: what they log, and the little that is local."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("PYTHONPATH", str(JOBS.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other on a busy machine take minutes
    return tmp_path


@contextlib.contextmanager
def started(job: str, *words: str, home: Path) -> Iterator[Job]:
    """A job in a process of its own; it and all that it started are gone (kill -9) when the block ends."""
    with (home / "log.txt").open("a") as log:
        process = Job(job, words, cwd=home, stdout=log, stderr=STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill(family(process.pid))
        process.wait()


def run(job: str, *words: str, home: Path, code: int = 0) -> None:
    with started(job, *words, home=home) as process:
        assert process.wait(timeout=PATIENCE_S) == code, (home / "log.txt").read_text()[-3000:]


def kill_when(condition: Callable[[], object], job: str, *words: str, home: Path) -> None:
    """kill -9 of a job and of everything that it started, once something is there."""
    end = time.monotonic() + PATIENCE_S
    with started(job, *words, home=home) as process:
        while not condition():
            assert process.poll() is None, (home / "log.txt").read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.1)


@pytest.mark.ray
def test_slides_at_s3_become_cells_at_s3(bucket: s3.Bucket, home: Path) -> None:
    store, scratch = Store(bucket.uri), home / "scratch"
    for seed in range(3):
        write_pyramid(home / f"s{seed}.tiff", make_tissue(1200, seed=seed, border_px=100).image, mpp=0.25)
        store.write_bytes(f"slides/s{seed}.tiff", (home / f"s{seed}.tiff").read_bytes())
    words = [f"slides={bucket.uri}/slides/**/*.tiff", f"output={bucket.uri}/cells", f"scratch={scratch}"]
    words += ["variant=smoke", "region_px=512"]
    kill_when(lambda: store.list("cells/slides"), "curate", *words, home=home)
    run("curate", *words, home=home)
    ledger = read_ledger(Store(f"{bucket.uri}/cells")).to_pylist()
    assert [row["status"] for row in ledger] == ["done"] * 3
    assert all(row["n_cells"] > 0 for row in ledger)
    assert not store.list("cells/attempts")
    assert not list(scratch.glob(f"{PREFIX}*"))
    assert_no_secret(home)


def test_cells_become_an_encoder_embeddings_scores_and_an_atlas_at_s3(bucket: s3.Bucket, home: Path) -> None:
    store = Store(bucket.uri)
    write_cells(f"{bucket.uri}/cells")
    pretrain = [f"cells={bucket.uri}/cells", f"output={bucket.uri}/run", f"cache={home / 'cache'}", *SMALL]
    pretrain += ["variant=smoke", "images_per_epoch=64", "epochs=8", "checkpoint_every=8", "log_every=4", "device=cpu"]
    kill_when(lambda: store.list("run/checkpoints"), "pretrain", *pretrain, home=home)
    assert not store.exists("run/encoder/config.json"), "it was to be killed before its end"
    run("pretrain", *pretrain, home=home)
    assert store.exists("run/encoder/config.json")

    output = f"output={bucket.uri}/embeddings"
    run("embed", f"model={bucket.uri}/run", f"cells={bucket.uri}/cells", output, "format=h5ad", home=home)
    assert len(store.list("embeddings/h5ad")) == len(store.list("embeddings/embeddings")) == 6

    write_crops(home / "data")
    for file in (home / "data").rglob("*.*"):
        store.write_bytes(f"data/{file.relative_to(home / 'data').as_posix()}", file.read_bytes())
    tasks, data = f"tasks=['morphometry:{bucket.uri}/cells','folder:mine']", f"data={bucket.uri}/data"
    run("probe", f"models={bucket.uri}/run", tasks, data, f"output={bucket.uri}/probe", "device=cpu", home=home)
    assert len(store.list("probe/scores")) == 4, "the run and an untrained encoder of its shape, on two tasks"

    inputs = [f"embeddings={bucket.uri}/embeddings", f"cells={bucket.uri}/cells"]
    run("atlas", *inputs, f"output={bucket.uri}/atlas", "n_cells=60", "perplexity=5", home=home)
    assert store.exists("atlas/atlas.html")
    assert_no_secret(home)


@pytest.mark.ray
def test_a_sweep_on_ray_tune_at_s3_goes_on_after_it_was_killed(bucket: s3.Bucket, home: Path) -> None:
    write_cells(home / "cells")
    write_crops(home / "data")
    store = Store(f"{bucket.uri}/out")
    words = [*TINY, f"cells={home / 'cells'}", f"output={store.uri}", f"pretrain.cache={home / 'cache'}"]
    words += [
        f"data={home / 'data'}",
        "tasks=folder:mine",
        "exclude_benchmarks=[]",
        "sweep.points=[a0,a1]",
        "launcher=ray",
        "max_concurrent=1",
    ]

    def results() -> list[str]:
        return [name for name in store.list("trials") if name.endswith("result.json")]

    kill_when(results, "scaling_sweep", *words, home=home)
    assert len(results()) == 1
    run("scaling_sweep", *words, home=home)
    assert len(results()) == 2
    assert {row["status"] for row in store.read_table("sweep.parquet").to_pylist()} == {"done"}
    assert_no_secret(home)


@pytest.mark.ray
def test_training_on_ray_train_at_s3_has_its_storage_there(bucket: s3.Bucket, home: Path) -> None:
    write_cells(home / "cells")
    words = [f"cells={home / 'cells'}", f"output={bucket.uri}/run", f"cache={home / 'cache'}", "variant=smoke", *SMALL]
    words += ["images_per_epoch=32", "epochs=2", "ssl.warmup_epochs=1", "device=cpu", "workers.count=2"]
    run("pretrain", *words, "workers.cpus=1", home=home)
    assert Store(bucket.uri).exists("run/encoder/config.json")


def test_a_server_that_refuses_everything_is_told_in_a_line(bucket: s3.Bucket, home: Path) -> None:
    bucket.faults.slow_down = 100_000
    words = [f"embeddings={bucket.uri}/e", f"cells={bucket.uri}/c", f"output={home / 'out'}"]
    run("atlas", *words, home=home, code=3)
    told = (home / "log.txt").read_text().splitlines()
    assert len(told) == 1
    assert told[0].startswith("atlas: stopped: s3://")
    assert "HTTP 503" in told[0]


def test_an_output_whose_key_is_refused_is_told_in_a_line_before_a_sweep_starts(
    bucket: s3.Bucket, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    write_cells(home / "cells")
    write_crops(home / "data")
    words = [*TINY, f"cells={home / 'cells'}", f"output={bucket.uri}/out", f"data={home / 'data'}", "tasks=folder:mine"]
    run("scaling_sweep", *words, "sweep.points=[a0,a1]", home=home, code=2)
    told = (home / "log.txt").read_text().splitlines()
    assert len(told) == 1
    assert told[0].startswith("scaling_sweep: output: ")
    assert "HTTP 403" in told[0]
    assert "another-secret" not in told[0]


def assert_no_secret(home: Path) -> None:
    log = (home / "log.txt").read_text()
    assert s3.SECRET not in log
    assert s3.KEY not in log
