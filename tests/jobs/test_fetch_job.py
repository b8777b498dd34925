"""The job that fetches slides as a user starts it: killed and started again, and straight into cells."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest

from lemon.cells.ledger import read_ledger
from lemon.demo.slide import make_synthetic_slide
from lemon.fetch.download import PARTS
from lemon.fetch.job import STREAM_FOLDER, download_ledger
from lemon.runtime.store import Store
from tests.fetch.gdc_server import GdcServer, Served, serving
from tests.jobs.test_curate_job import kill_all, wait_for
from tests.jobs.warm import Job, run_job


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def command(server: GdcServer, output: Path, *words: str) -> list[str]:
    fast = ["download.attempts=2", "download.backoff_s=0.01", "download.reserve_gb=0"]
    source = [f"api={server.url}", f"output={output}", "organs=BRCA", "slides_per_organ=null"]
    return [*source, *fast, *words]


def run(server: GdcServer, output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_job("fetch_tcga", command(server, output, *words))


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it is deleted while we look
        return 0


def part_bytes(output: Path) -> int:
    return sum(size(path) for path in (output / PARTS).glob("*"))


@pytest.mark.slow
def test_a_job_killed_in_the_middle_of_downloads_goes_on_with_the_bytes_it_has(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(4_000_000)
    files = [Served(f"TCGA-A2-A00{number}-01Z-00-DX1.svs", content, always=("slow", 100_000)) for number in range(3)]
    with serving(*files) as server:
        job = Job("fetch_tcga", command(server, tmp_path))
        wait_for(lambda: part_bytes(tmp_path) > 1_500_000, job=job)
        kill_all(job)
        assert list(tmp_path.glob("*.svs")) == []
        for file in files:
            file.always = ()
        done = run(server, tmp_path)
        assert done.returncode == 0, done.stderr
        assert all(len(server.offsets(file)) == 2 for file in files)
        assert max(server.offsets(file)[1] for file in files) > 300_000
    assert all((tmp_path / file.name).read_bytes() == content for file in files)
    assert part_bytes(tmp_path) == 0


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_synthetic_slide(tmp_path_factory.mktemp("slide")).read_bytes()


@pytest.fixture
def slides(slide: bytes) -> Iterator[list[Served]]:
    """Three good slides, one that OpenSlide does not open, and one that cannot be had."""
    files = [Served(f"TCGA-A2-A00{number}-01Z-00-DX1.tiff", slide) for number in range(3)]
    corrupt = Served("TCGA-A2-A003-01Z-00-DX1.tiff", slide[:300_000])
    lost = Served("TCGA-A2-A004-01Z-00-DX1.tiff", slide, always=("garbage",))
    return [*files, corrupt, lost]


STREAM = ["stream=true", "curation.cells_per_slide=40", "curation.max_failed_share=0.5"]
STREAM += ["curation.workers.actors=1", "curation.workers.readers=1"]


def committed(output: Path) -> dict[str, float]:
    """When each slide was committed."""
    return {path.stem: path.stat().st_mtime for path in (output / "cells" / "slides").glob("TCGA*.parquet")}


@pytest.mark.ray
@pytest.mark.slow
def test_slides_become_cells_as_they_come_and_leave_the_disk(slides: list[Served], tmp_path: Path) -> None:
    *good, corrupt, lost = slides
    with serving(*slides) as server:
        job = Job("fetch_tcga", command(server, tmp_path, *STREAM), stdout=PIPE)
        on_disk = [0]
        while job.poll() is None:
            there = [path for path in (tmp_path / STREAM_FOLDER).rglob("*.tiff*") if size(path)]
            on_disk.append(len({path.name for path in there}))
            time.sleep(0.02)
        told = job.stdout.read()
        assert job.returncode == 3, told
        assert max(on_disk) == 2  # the one that is curated, and the one ahead
        assert part_bytes(tmp_path / STREAM_FOLDER) == 0
        assert list((tmp_path / STREAM_FOLDER).glob("*.tiff")) == []
        rows = {row["slide_id"]: row for row in read_ledger(Store(tmp_path / "cells")).to_pylist()}
        assert [rows[file.slide_id]["status"] for file in (*good, corrupt)] == ["done"] * 3 + ["failed"]
        assert lost.slide_id not in rows
        assert "not a slide" in rows[corrupt.slide_id]["error"]
        for file in good:
            row = rows[file.slide_id]
            assert (row["n_cells"], row["path"]) == (40, f"{server.url}/data/{file.file_id}")
            assert (row["organ"], row["project"], row["patient_id"]) == ("breast", "TCGA-BRCA", file.name[:12])
        downloads = download_ledger(Store(tmp_path / "cells")).rows()
        assert [downloads[file.slide_id].status for file in slides] == ["done"] * 4 + ["failed"]
        assert f"{lost.slide_id}: failed: md5" in told
        second = sorted(request.at_s for file in slides for request in server.asked(file)[:1])[1]
        assert second < min(committed(tmp_path).values())  # it came while the first was curated
        # What could not be had is all that a rerun asks for; after that there is nothing left.
        lost.always = ()
        before = server.downloads()
        done = run(server, tmp_path, *STREAM)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.downloads() == before + 1
        again = run(server, tmp_path, *STREAM)
        assert again.returncode == 0, again.stdout + again.stderr
        assert server.downloads() == before + 1
        assert "5 slides (5 done, 0 failed; 5 of an earlier run)" in again.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_stream_goes_on_and_downloads_no_committed_slide_again(slides: list[Served], tmp_path: Path) -> None:
    good = slides[:3]
    with serving(*good) as server:
        job = Job("fetch_tcga", command(server, tmp_path, *STREAM))
        wait_for(lambda: committed(tmp_path), job=job)
        kill_all(job)
        kept = committed(tmp_path)
        assert len(kept) < len(good)
        done = run(server, tmp_path, *STREAM)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{len(kept)} of an earlier run" in done.stdout
        assert all(len(server.offsets(file)) == 1 for file in good if file.slide_id in kept)
    assert kept.items() <= committed(tmp_path).items()
    rows = read_ledger(Store(tmp_path / "cells")).to_pylist()
    assert [(row["status"], row["n_cells"]) for row in rows] == [("done", 40)] * 3
    assert part_bytes(tmp_path / STREAM_FOLDER) == 0
    assert list((tmp_path / STREAM_FOLDER).glob("*.tiff")) == []
