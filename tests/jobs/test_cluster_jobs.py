"""Jobs through the Jobs API, as an operator submits them; ``python -m benchmarks.local_cluster`` drills all stages."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.local_cluster import CURATE, LocalCluster, check_cells, expect_one_done, local_cluster, make_slides
from lemon.runtime.metrics import COUNTERS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # short, for Ray's sockets
        with local_cluster(Path(folder), nodes=1) as started:
            yield started


def test_a_job_with_a_wrong_key_fails_with_one_line(cluster: LocalCluster) -> None:
    done = cluster.run("jobs/curate.py", "slides=s", "output=o", "worker.actors=2")
    assert done.code != 0
    assert done.driver_code == 2
    (line,) = done.lines("curate")
    assert "worker: unknown key" in line
    assert "Traceback" not in done.told


def test_the_same_job_submitted_twice_at_once_and_again_leaves_each_cell_once(cluster: LocalCluster) -> None:
    slides, output = make_slides(cluster.folder / "slides", count=2), cluster.folder / "cells"
    words = ("jobs/curate.py", f"slides={slides}", f"output={output}", *CURATE, "workers.actors=1")
    expect_one_done(cluster.run_at_once([words, words]), "curate")
    check_cells(output, slides=2)
    again = cluster.run(*words)
    assert again.driver_code == 0, again.told
    assert "2 of an earlier run" in again.told


def test_prometheus_would_find_what_the_actors_counted(cluster: LocalCluster) -> None:
    """Of the two slides above, found without a network and embedded by one; Ray collects counters every 10 s."""
    words = (f"cells={cluster.folder / 'cells'}", f"output={cluster.folder / 'embeddings'}", "model=lemon_mini")
    embedded = cluster.run("jobs/embed.py", *words, "workers.actors=1")
    assert embedded.driver_code == 0, embedded.told
    lines = cluster.metrics()
    deadline = time.monotonic() + 60
    while not any("ray_lemon_device_seconds_total" in line for line in lines) and time.monotonic() < deadline:
        time.sleep(1)
        lines = cluster.metrics()
    counted = {name: [line for line in lines if line.startswith(f"ray_{name}{{")] for name in COUNTERS}
    slides = counted["lemon_slides_total"]
    assert all('status="done"' in line for line in slides)
    for stage in ("curate", "embed"):
        assert sum(float(line.split()[-1]) for line in slides if f'stage="{stage}"' in line) == 2
    for name in ("lemon_cells_total", "lemon_worker_seconds_total"):
        assert all(any(f'stage="{stage}"' in line for line in counted[name]) for stage in ("curate", "embed")), name
    seconds = counted["lemon_device_seconds_total"]
    assert seconds
    assert all('stage="embed"' in line for line in seconds)
