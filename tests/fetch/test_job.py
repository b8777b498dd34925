"""Slides of the GDC in a folder: which are chosen, what is skipped, and what becomes of those that fail."""

from __future__ import annotations

import functools
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lemon import schema
from lemon.cells.ledger import cells_ledger
from lemon.cells.select import rank_of
from lemon.curate import job as curate
from lemon.curate.job import open_ledger
from lemon.errors import ConfigError
from lemon.fetch import download
from lemon.fetch import job as fetch
from lemon.fetch.config import FetchConfig
from lemon.fetch.gdc import GdcFile
from lemon.fetch.job import lowest_ranks
from lemon.runtime import pool
from lemon.runtime.config import load
from lemon.runtime.job import framed
from lemon.runtime.store import Store
from lemon.schema import DownloadRow, SlideRow
from lemon.slides.cohort import list_slides
from lemon.slides.synthetic import make_tissue, write_pyramid
from tests.fetch.gdc_server import GdcServer, Served, serving

pytestmark = pytest.mark.usefixtures("console")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "BLOCK_BYTES", 1_000)


def served(number: int, *, project: str = "TCGA-BRCA", **options: object) -> Served:
    content = np.random.default_rng(number).bytes(20_000 + number)
    return Served(f"TCGA-A2-A{number:03}-01Z-00-DX1.{number}.svs", content, project=project, **options)


def config_for(server: GdcServer, output: Path, *words: str) -> FetchConfig:
    fast = ["download.attempts=2", "download.backoff_s=0.001", "download.reserve_gb=0"]
    words = (*fast, "organs=BRCA", "slides_per_organ=null", *words)
    return load("fetch_tcga", [f"api={server.url}", f"output={output}", *words], FetchConfig)


def rows_of(output: Path) -> dict[str, DownloadRow]:
    return fetch.download_ledger(Store(output)).rows()


def many(count: int, *, per_patient: int = 1) -> list[GdcFile]:
    return [
        GdcFile(
            file_id=f"{number:08x}-0000-4000-8000-000000000000",
            file_name=f"TCGA-A2-{number // per_patient:04}-01Z-00-DX{number % per_patient}.{number}.svs",
            md5=f"{number:032x}",
            size_bytes=1,
        )
        for number in range(count)
    ]


def test_a_choice_is_that_of_lowest_rank_whatever_the_order_of_the_list_and_nested() -> None:
    files = many(200)
    order = np.random.default_rng(0).permutation(len(files))
    choices = [lowest_ranks([files[index] for index in order], n, one_per_patient=True) for n in (5, 50, None)]
    assert choices[0] == choices[1][:5]
    assert choices[1] == choices[2][:50]
    assert choices[1] == lowest_ranks(files, 50, one_per_patient=True)
    ranks = rank_of(file.slide_id for file in choices[2])
    assert (np.diff(ranks) > 0).all()
    assert len(choices[2]) == 200


def test_of_a_patient_there_is_one_slide_unless_all_are_asked_for() -> None:
    files = many(90, per_patient=3)
    one = lowest_ranks(files, None, one_per_patient=True)
    patients = Counter(file.slide("").patient_id for file in one)
    assert set(patients.values()) == {1}
    assert len(patients) == 30
    for file in one:
        siblings = [other.slide_id for other in files if other.slide_id[:12] == file.slide_id[:12]]
        assert min(rank_of(siblings)) == rank_of([file.slide_id])[0]
    assert len(lowest_ranks(files, None, one_per_patient=False)) == 90


def test_slides_of_every_organ_are_downloaded_and_listed_in_a_cohort_that_curation_reads(tmp_path: Path) -> None:
    files = [served(number, project=("TCGA-BRCA", "TCGA-LUAD", "TCGA-LUSC")[number % 3]) for number in range(12)]
    with serving(*files) as server:
        summary = fetch.run(config_for(server, tmp_path, "organs=[BRCA,lung]", "slides_per_organ=3"))
    assert (summary.exit_code, summary.n_skipped, len(summary.rows)) == (0, 0, 6)
    slides = list_slides(str(tmp_path / "cohort.parquet"))
    assert Counter(slide.organ for slide in slides) == {"breast": 3, "lung": 3}
    by_id = {file.slide_id: file for file in files}
    for slide in slides:
        assert Path(slide.path).read_bytes() == by_id[slide.slide_id].content
        assert (slide.project, slide.site) == (by_id[slide.slide_id].project, "A2")
        assert slide.patient_id == slide.slide_id[:12]
    lung = [file for file in files if file.project != "TCGA-BRCA"]
    lowest = np.argsort(rank_of(file.slide_id for file in lung))[:3]
    assert {lung[index].slide_id for index in lowest} == {slide.slide_id for slide in slides if slide.organ == "lung"}
    assert pq.read_table(tmp_path / "cohort.parquet").schema.equals(schema.COHORT)
    assert all(pq.read_schema(path).equals(schema.DOWNLOADS) for path in (tmp_path / "downloads").iterdir())


def test_a_rerun_downloads_nothing_but_what_is_new_or_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [served(number) for number in range(5)]
    with serving(*files) as server:
        assert fetch.main(config_for(server, tmp_path, "slides_per_organ=3")) == 0
        assert server.downloads() == 3
        assert fetch.main(config_for(server, tmp_path, "slides_per_organ=3")) == 0
        assert server.downloads() == 3
        assert "3 slides (3 done, 0 failed; 3 of an earlier run)" in capsys.readouterr().out
        assert fetch.main(config_for(server, tmp_path, "slides_per_organ=4")) == 0
        assert server.downloads() == 4
        next(tmp_path.glob("*.svs")).unlink()
        assert fetch.main(config_for(server, tmp_path, "slides_per_organ=4")) == 0
        assert server.downloads() == 5
    assert len(list_slides(str(tmp_path / "cohort.parquet"))) == 4


def test_failures_are_rows_with_reasons_and_are_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        served(0),
        served(1, always=("garbage",)),
        served(2, always=("status", 500)),
        served(3, always=("status", 403)),
        served(4, faults=[("cut", 9_000), ("status", 503), ("cut", 5_000), ("garbage",)]),
    ]
    with serving(*files) as server:
        assert fetch.main(config_for(server, tmp_path)) == 3
        rows = rows_of(tmp_path)
        errors = [rows[file.slide_id].error for file in files]
        assert [error is None for error in errors] == [True, False, False, False, True]
        assert "md5" in errors[1]
        assert "500" in errors[2]
        assert "HTTP 403" in errors[3]
        told = capsys.readouterr().out
        assert all(
            f"{file.slide_id}: failed: {error}" in told for file, error in zip(files, errors, strict=True) if error
        )
        assert {slide.slide_id for slide in list_slides(str(tmp_path / "cohort.parquet"))} == {
            files[0].slide_id,
            files[4].slide_id,
        }
        n_requests = server.downloads()
        for file in files:
            file.always = ()
        assert fetch.main(config_for(server, tmp_path)) == 0
        assert server.downloads() == n_requests + 3
    assert all(row.status == "done" for row in rows_of(tmp_path).values())
    assert all((tmp_path / file.name).read_bytes() == file.content for file in files)


def test_a_disk_without_room_is_a_reason_and_no_request(tmp_path: Path) -> None:
    with serving(served(0), served(1)) as server:
        summary = fetch.run(config_for(server, tmp_path, "download.reserve_gb=1e9"))
        assert server.downloads() == 0
    assert summary.exit_code == 3
    assert all("no room" in row.error for row in summary.rows)


def test_a_manifest_takes_the_place_of_the_list(tmp_path: Path) -> None:
    files = [served(number) for number in range(4)]
    lines = [f"{file.file_id}\t{file.name}\t{file.md5}\t{len(file.content)}\treleased" for file in files]
    (tmp_path / "manifest.txt").write_text("\n".join(["id\tfilename\tmd5\tsize\tstate", *lines]))
    with serving(*files) as server:
        words = [f"manifest={tmp_path / 'manifest.txt'}", "organs=breast", "slides_per_organ=2"]
        assert fetch.main(config_for(server, tmp_path / "out", *words)) == 0
        assert all(request.path.startswith("/data/") for request in server.requests)
    slides = list_slides(str(tmp_path / "out" / "cohort.parquet"))
    assert [(slide.organ, slide.project, slide.site) for slide in slides] == [("breast", "TCGA", "A2")] * 2


def test_an_interrupted_job_stops_soon_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [served(0, faults=[("stall", 0)])] + [served(number) for number in range(1, 6)]
    with serving(*files) as server:

        def interrupted(futures: object) -> None:
            server.closing.set()
            raise KeyboardInterrupt

        monkeypatch.setattr(fetch, "as_completed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch.run(config_for(server, tmp_path, "download.parallel=1"))
        monkeypatch.setattr(fetch, "as_completed", as_completed)
        assert all(row.status == "done" for row in rows_of(tmp_path).values())
        assert fetch.run(config_for(server, tmp_path)).exit_code == 0


def test_an_organ_without_slides_and_a_list_that_cannot_be_had_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(served(0)) as server:
        with pytest.raises(ConfigError, match="organs: UVM has no diagnostic slides"):
            fetch.run(config_for(server, tmp_path, "organs=[BRCA,UVM]"))
        assert fetch.main(config_for(server, tmp_path, "slides_per_organ=2")) == 0
        assert "BRCA has 1 slides, not 2" in capsys.readouterr().out
        config = config_for(server, tmp_path)
    assert framed("fetch_tcga", lambda: fetch.main(config)) == 3
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["output=s3://b/x"], r"output: got 's3://b/x'; expected a path on a local disk"),
        (["organs=[]"], "organs: missing"),
        (["slides_per_organ=0"], "slides_per_organ"),
        (["cells=c"], "cells: only with stream=true"),
        (["curation.region_px=512"], "curation: only with stream=true"),
        (["stream=true", "curation.output=c"], r"curation.output: expected cells=\.\.\. instead"),
        (["stream=true", "curation.region_px=a"], "curation.region_px: got 'a'"),
        (["manifest=m.txt", "organs=[BRCA,LUAD]"], "organs: got several beside a manifest"),
        (["api=ftp://x"], "api"),
        (["download.attempts=0"], "download.attempts: got 0"),
    ],
)
def test_a_mistake_is_told_before_anything_is_asked_for(words: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        load("fetch_tcga", ["organs=BRCA", "slides_per_organ=2", "output=out", *words], FetchConfig)


def test_the_number_of_slides_is_never_left_to_chance() -> None:
    with pytest.raises(ConfigError, match="slides_per_organ: missing"):
        load("fetch_tcga", ["organs=BRCA", "output=out"], FetchConfig)
    assert load("fetch_tcga", ["manifest=m.txt", "output=out"], FetchConfig).slides_per_organ is None


@pytest.mark.slow
def test_an_actor_downloads_the_next_slide_while_it_curates_one_and_commits_no_download_that_failed(
    tmp_path: Path,
) -> None:
    """As Ray calls it from two threads: the second slide's download begins before the first slide is committed."""
    write_pyramid(tmp_path / "s.tiff", make_tissue(1000, seed=0, border_px=80).image, mpp=0.25)
    content = (tmp_path / "s.tiff").read_bytes()
    files = [Served(f"TCGA-A2-A00{number}-01Z-00-DX1.tiff", content) for number in range(3)]
    lost = Served("TCGA-A2-A003-01Z-00-DX1.tiff", content, always=("garbage",))
    with serving(*files, lost) as server:
        words = ["stream=true", "curation.region_px=512", "curation.workers.cpus=1", "curation.cells_per_slide=9"]
        config = config_for(server, tmp_path, *words)
        curation, chosen = config.curate_config(), fetch._choose_files(config)
        ledger = open_ledger(Store(curation.output), curation)
        opening = functools.partial(
            fetch.StreamedSlides, chosen, tmp_path / fetch.STREAM_FOLDER, config, cells=Store(curation.output)
        )
        source = pickle.loads(pickle.dumps(curate.SlideAccess(open=opening, ahead=1)))  # noqa: S301
        make = functools.partial(curate.Curator, curation, ledger=ledger, source=source)
        actor = pool.ItemActor(make, "run", 3)

        def call(file: Served) -> SlideRow | None:
            slide = chosen[file.slide_id].slide("https://there")
            item = pickle.dumps(curate.LocatedSlide(slide, slide.path))
            return pickle.loads(actor({"item": np.array([item], object)})["result"][0])["row"]  # noqa: S301

        with ThreadPoolExecutor(2) as threads:
            rows = list(threads.map(call, [*files, lost]))
        asked = sorted(request.at_s for file in files for request in server.asked(file))
    assert [row and row.status for row in rows] == ["done"] * 3 + [None]
    assert "md5" in fetch.download_ledger(Store(curation.output)).rows()[lost.slide_id].error
    committed = [path.stat().st_mtime for path in Path(curation.output, "slides").iterdir()]
    assert asked[1] < min(committed)
    assert asked[2] > min(committed) - 1e-2  # the clock of files is coarser; never three slides on disk
    assert [(row.path, row.n_cells) for row in ledger.rows().values()] == [("https://there", 9)] * 3
    assert list((tmp_path / fetch.STREAM_FOLDER).glob("*.tiff")) == []


def test_a_download_forgets_no_attempt_of_curation_in_the_same_output(tmp_path: Path) -> None:
    store = Store(tmp_path)
    file = {"file_id": "f", "file_name": "a.svs", "url": "u", "size_bytes": 1, "md5": "0"}
    cells = cells_ledger(store, config_fingerprint="x")
    assert cells.begin("a", run_id="r") == 0
    fetch.download_ledger(store).commit(DownloadRow(slide_id="a", **file, status="done", total_s=0.0))
    assert cells.begin("a", run_id="r") == 1
