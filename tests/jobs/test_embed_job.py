"""The embedding job as a user starts it: a process of its own, killed and started again."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lemon.cells.names import shard_name
from lemon.runtime.store import Store
from tests.cells_table import synthetic_crops, write_slide
from tests.embed.tables import write_encoder
from tests.jobs.warm import Job, run_job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("model") / "run")


def embed(*words: str) -> subprocess.CompletedProcess[str]:
    return run_job("embed", words, timeout=300)


def test_a_job_that_was_killed_goes_on_and_ends_with_the_table_of_an_undisturbed_one(
    model: Path, tmp_path: Path
) -> None:
    for slide in range(4):
        images = np.random.default_rng(slide).integers(0, 256, (6000, 60, 60, 3), np.uint8)
        write_slide(Store(tmp_path / "cells"), f"s{slide}", images)
    words = [f"model={model}", f"cells={tmp_path / 'cells'}", "variant=smoke", "clusters.k=null"]
    output = tmp_path / "killed"
    job = Job("embed", [*words, f"output={output}"])
    while not (output / "slides" / "s0.parquet").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    before = len(list((output / "slides").glob("*.parquet")))
    assert before < 4
    again = embed(*words, f"output={output}")
    assert again.returncode == 0, again.stderr
    assert f"{before} of an earlier run" in again.stdout
    undisturbed = embed(*words, f"output={tmp_path / 'undisturbed'}")
    assert undisturbed.returncode == 0, undisturbed.stderr
    tables = [pq.read_table(folder / "embeddings") for folder in (output, tmp_path / "undisturbed")]
    assert tables[0].equals(tables[1])
    assert sorted(path.name for path in (output / "embeddings").iterdir()) == [
        f"s{slide}.parquet" for slide in range(4)
    ]


def test_exit_codes_say_what_happened(model: Path, tmp_path: Path) -> None:
    cells = Store(tmp_path / "cells")
    for slide in ("good", "bad"):
        write_slide(cells, slide, synthetic_crops(20))
    words = [f"model={model}", f"cells={cells.uri}", f"output={tmp_path / 'out'}", "variant=smoke"]
    assert embed(*words).returncode == 0
    cells.write_bytes(shard_name("bad"), b"no Parquet")
    failed = embed(*words, "overwrite=true")
    assert failed.returncode == 3
    assert "bad: failed: cells/bad.parquet: cannot be read" in failed.stdout
    assert "2 slides (1 done, 0 partial, 1 failed" in failed.stdout
    for faulty in (
        ["model=m", "output=o"],
        ["model=m", "output=o", "cells=c", "slides=s"],
        [*words, f"model={write_encoder(tmp_path / 'other', seed=1)}"],
    ):
        done = embed(*faulty)
        assert done.returncode == 2, faulty
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("embed: ")


def test_help_lists_every_key() -> None:
    told = embed("--help")
    assert told.returncode == 0
    keys = ("model", "slides", "clusters.k", "workers.launcher", "segmenter.min_area_um2")
    assert all(key in told.stdout for key in keys)
