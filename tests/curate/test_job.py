"""Slides to cells in one process: what happens to good and to bad slides, without Ray where it is not needed."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.spatial import cKDTree

from lemon import schema
from lemon.cells.ledger import read_ledger
from lemon.cells.names import shard_name
from lemon.curate import job as curate
from lemon.curate.config import CurateConfig
from lemon.curate.job import open_ledger, with_segmenter
from lemon.curate.processes import WorkerProcesses
from lemon.curate.slide import FetchedSlide, curate_slide
from lemon.errors import ConfigError
from lemon.nuclei.instances import Nucleus
from lemon.runtime import pool
from lemon.runtime.config import load
from lemon.runtime.job import framed
from lemon.runtime.store import Store, locate
from lemon.schema import SlideRow
from lemon.slides import reader as reader_module
from lemon.slides.cohort import Slide, list_slides
from lemon.slides.errors import SlideError
from lemon.slides.synthetic import SyntheticTissue, make_tissue, write_pyramid
from tests import s3
from tests.conftest import shared

pytestmark = pytest.mark.usefixtures("console")

GOOD = ["slides=s.tiff", "output=o"]
SIDE_PX = 1600


@pytest.fixture(scope="module")
def tissue() -> SyntheticTissue:
    return make_tissue(SIDE_PX, seed=3, border_px=80)


@pytest.fixture(scope="module")
def slide_file(tissue: SyntheticTissue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "s1.tiff"
    write_pyramid(path, tissue.image, mpp=0.25)
    return path


@pytest.fixture(scope="module")
def processes() -> Iterator[WorkerProcesses]:
    with WorkerProcesses(2) as pool:
        yield pool


def config_for(slides: object, output: object, *words: str) -> CurateConfig:
    return load("curate", [f"slides={slides}", f"output={output}", "region_px=512", *words], CurateConfig)


def curate_one(path: Path, output: Path, processes: WorkerProcesses, *words: str) -> SlideRow:
    config = config_for(path, output, *words)
    (slide,) = list_slides(str(path))
    return curate_slide(
        slide, config=config, segmenter=config.segmenter.build(), processes=processes, store=Store(output)
    )


@pytest.mark.slow
def test_a_slide_becomes_cells_that_lie_on_its_nuclei(
    tissue: SyntheticTissue, slide_file: Path, tmp_path: Path, processes: WorkerProcesses
) -> None:
    row = curate_one(slide_file, tmp_path, processes, "cells_per_slide=null", "geojson=true")
    assert row.status == "done"
    assert row.error is None
    cells = pq.read_table(tmp_path / shard_name("s1"))
    assert len(cells) == row.n_cells == row.n_nuclei
    points = np.stack([cells["x_level0_px"], cells["y_level0_px"]], 1)
    distance, _ = cKDTree(points).query(tissue.center_px)
    assert (distance < 8).mean() > 0.97  # every nucleus, also at seams
    assert len(points) < 1.03 * len(tissue.center_px)
    close, _ = cKDTree(points).query(points, k=2)
    assert close[:, 1].min() > 8  # none twice
    assert (tmp_path / "geojson" / "s1.geojson.gz").exists()
    assert all(getattr(row, f"{stage}_s") >= 0 for stage in ("open", "read", "network", "instances", "write"))


@pytest.mark.slow
def test_fewer_cells_are_the_lowest_ranks_of_all(slide_file: Path, tmp_path: Path, processes: WorkerProcesses) -> None:
    curate_one(slide_file, tmp_path / "all", processes, "cells_per_slide=null")
    row = curate_one(slide_file, tmp_path / "few", processes, "cells_per_slide=40")
    all_cells, few = (pq.read_table(tmp_path / name / shard_name("s1")) for name in ("all", "few"))
    assert row.n_cells == 40
    assert row.n_nuclei == len(all_cells)
    assert few.equals(all_cells.slice(0, 40))


@pytest.mark.slow
def test_the_size_of_regions_hardly_matters(slide_file: Path, tmp_path: Path, processes: WorkerProcesses) -> None:
    """Seams fall elsewhere; the nuclei stay."""
    found = []
    for size in (512, 1024):
        curate_one(slide_file, tmp_path / str(size), processes, "cells_per_slide=null", f"region_px={size}")
        cells = pq.read_table(tmp_path / str(size) / shard_name("s1"))
        found.append(np.stack([cells["x_level0_px"], cells["y_level0_px"]], 1))
    distance, _ = cKDTree(found[1]).query(found[0])
    assert (distance < 2).mean() > 0.98
    assert abs(len(found[0]) - len(found[1])) <= 0.02 * len(found[0])


def test_a_mask_of_the_user_says_where_to_look(slide_file: Path, tmp_path: Path, processes: WorkerProcesses) -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :4] = 255
    (tmp_path / "masks").mkdir()
    cv2.imwrite(str(tmp_path / "masks" / "s1.png"), mask)
    curate_one(slide_file, tmp_path, processes, f"tissue.masks={tmp_path / 'masks'}")
    cells = pq.read_table(tmp_path / shard_name("s1"))
    assert len(cells) > 0
    assert max(cells["x_level0_px"].to_pylist()) < SIDE_PX / 2


def bad_slides(folder: Path, tissue: SyntheticTissue) -> dict[str, tuple[str, str]]:
    """Writes one slide of each kind of trouble; returns the expected status and a part of the reason of each."""
    folder.mkdir()
    write_pyramid(folder / "good.tiff", tissue.image, mpp=0.25)
    (folder / "zero.svs").write_bytes(b"")
    (folder / "truncated.tiff").write_bytes((folder / "good.tiff").read_bytes()[:300_000])
    (folder / "text.svs").write_text("patient,organ\n" * 1000)
    write_pyramid(folder / "coarse.tiff", tissue.image, mpp=2.0)
    write_pyramid(folder / "unscaled.tiff", tissue.image, mpp=None)
    write_pyramid(folder / "white.tiff", np.full((800, 800, 3), 244, np.uint8), mpp=0.25)
    dark = np.zeros((800, 800, 3), np.uint8)
    dark[300:500, 300:500] = (10, 20, 200)
    write_pyramid(folder / "dapi.tiff", dark, mpp=0.25)
    return {
        "good": ("done", ""),
        "zero": ("failed", "empty"),
        "truncated": ("failed", "not a slide"),
        "text": ("failed", "not a slide"),
        "coarse": ("failed", "2 um/px is coarser"),
        "unscaled": ("done", "um/px missing"),
        "white": ("done", "no tissue"),
        "dapi": ("failed", "not H&E"),
    }


@pytest.mark.ray
@pytest.mark.slow
def test_every_kind_of_bad_slide_gets_its_row_and_reason_and_the_others_are_complete(
    tissue: SyntheticTissue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = bad_slides(tmp_path / "slides", tissue)
    words = ["workers.actors=1", "cells_per_slide=50"]
    assert curate.main(config_for(tmp_path / "slides", tmp_path / "out", *words)) == 3
    rows = {row["slide_id"]: row for row in read_ledger(Store(tmp_path / "out")).to_pylist()}
    assert {name: row["status"] for name, row in rows.items()} == {
        name: status for name, (status, _) in expected.items()
    }
    assert all(part in (rows[name]["error"] or "") for name, (_, part) in expected.items())
    assert rows["unscaled"]["mpp_assumed"] is True
    assert (rows["good"]["n_cells"], rows["white"]["n_cells"]) == (50, 0)
    assert rows["good"]["config_fingerprint"] == rows["zero"]["config_fingerprint"]
    told = capsys.readouterr().out
    assert all(f"{name}: failed: " in told for name, (status, _) in expected.items() if status == "failed")
    # The same with a larger allowance: nothing new to do but the failed ones, and the exit code says all is well.
    assert curate.main(config_for(tmp_path / "slides", tmp_path / "out", *words, "max_failed_share=0.7")) == 0
    assert "3 of an earlier run" in capsys.readouterr().out


@pytest.mark.slow
def test_unreadable_regions_are_counted_and_make_a_slide_partial(
    slide_file: Path, tmp_path: Path, processes: WorkerProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reader_module.SlideReader.region

    def region(self: reader_module.SlideReader, x: int, y: int, **size: int) -> np.ndarray:
        if (x, y) == (320, 320):
            raise reader_module.RegionError("corrupt tile")
        return real(self, x, y, **size)

    monkeypatch.setattr(reader_module.SlideReader, "region", region)
    row = curate_one(slide_file, tmp_path / "a", processes)
    assert (row.status, row.n_failed_regions) == ("partial", 1)
    assert "corrupt tile" in row.error
    assert row.n_cells > 0
    row = curate_one(slide_file, tmp_path / "b", processes, "max_failed_region_share=0.01")
    assert row.status == "failed"
    assert f"1 of {row.n_regions} regions" in row.error
    assert not (tmp_path / "b" / "cells").exists()


class CrashingSegmenter:
    """Kills the worker process that it runs in, as a segmentation fault would."""

    def calibrate(self, samples: Sequence[np.ndarray]) -> None:
        return None

    def predict(self, regions: np.ndarray) -> list[None]:
        return [None] * len(regions)

    @property
    def postprocess(self) -> Any:
        return functools.partial(_die)


def _die(region: np.ndarray, prediction: None, calibration: None) -> list[Nucleus]:
    os._exit(1)


class HeldSegmenter(CrashingSegmenter):
    """Holds the network, or the instances, of regions until what is to go on meanwhile has happened."""

    def __init__(self, *, batch_wanted: int = 0, fetched: threading.Event | None = None) -> None:
        self.batches, self.held, self.too_late, self.begun = 0, 0, False, threading.Event()
        self.batch_wanted, self.computed, self.fetched = batch_wanted, threading.Event(), fetched

    def predict(self, regions: np.ndarray) -> list[None]:
        self.begun.set()
        self.batches += 1
        if self.batches == self.batch_wanted:
            self.computed.set()
        if self.fetched is not None:
            self.too_late |= not self.fetched.wait(60)
        return [None] * len(regions)

    @property
    def postprocess(self) -> Any:
        return self._hold if self.batch_wanted else _nothing

    def _hold(self, region: np.ndarray, prediction: None, calibration: None) -> list[Nucleus]:
        self.held += 1
        self.too_late |= not self.computed.wait(60)
        return []


def _nothing(region: np.ndarray, prediction: None, calibration: None) -> list[Nucleus]:
    return []


def test_the_network_computes_on_later_regions_while_instances_of_the_first_are_held(
    slide_file: Path, tmp_path: Path
) -> None:
    config, segmenter = config_for(slide_file, tmp_path, "region_px=256"), HeldSegmenter(batch_wanted=4)
    (slide,) = list_slides(str(slide_file))
    with ThreadPoolExecutor(config.workers.cpus) as threads:
        row = curate_slide(slide, config=config, segmenter=segmenter, processes=threads, store=Store(tmp_path))
    assert (row.status, segmenter.too_late) == ("done", False)
    assert segmenter.held == segmenter.batches == row.n_regions > 20


def call(actor: pool.ItemActor, slide: Slide) -> SlideRow:
    """A slide through an actor, as Ray calls it."""
    item = pickle.dumps(curate.LocatedSlide(slide, slide.path))
    return pickle.loads(actor({"item": np.array([item], object)})["result"][0])["row"]  # noqa: S301


def test_the_next_slide_is_fetched_while_one_is_curated_and_what_fails_is_its_own_row(
    slide_file: Path, tmp_path: Path, bucket: s3.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", "b", "gone", "c"]
    slides = [Slide(slide_id=name, path=f"{bucket.uri}/{name}.tiff") for name in names]
    for slide in slides:
        if slide.slide_id != "gone":
            store, name = locate(slide.path)
            store.write_bytes(name, slide_file.read_bytes())
    fetched, on_disk, most = threading.Event(), 0, 0
    config = config_for(bucket.uri, tmp_path / "out", "workers.cpus=1", f"scratch={tmp_path / 'scratch'}")
    worker = worker_for(config)
    worker.segmenter = HeldSegmenter(fetched=fetched)
    true_fetch = curate.fetch_slide

    @contextlib.contextmanager
    def counted(slide: Slide, **options: Any) -> Iterator[Any]:
        nonlocal on_disk, most
        with true_fetch(slide, **options) as result:
            on_disk += 1
            most = max(most, on_disk)
            if slide.slide_id == "b":
                fetched.set()
            yield result
            on_disk -= 1

    monkeypatch.setattr(curate, "fetch_slide", counted)
    actor: pool.ItemActor = pool.ItemActor(lambda: worker, "run", 3)
    with ThreadPoolExecutor(2) as threads:  # as many as Ray gives an actor that gets one slide ready ahead
        first = threads.submit(call, actor, slides[0])
        assert worker.segmenter.begun.wait(60)
        rows = [*threads.map(functools.partial(call, actor), slides[1:])]
        rows = [first.result(), *rows]
    assert [row.status for row in rows] == ["done", "done", "failed", "done"]
    assert rows[2].error == "file not found"
    assert not worker.segmenter.too_late
    assert most == 2
    assert all((row.total_s or 0) > 0 and row.source_digest for row in rows if row.status == "done")
    assert list((tmp_path / "scratch").rglob("*.tiff")) == []


def _kill(path: str, slide: Slide, config: CurateConfig) -> None:
    os._exit(1)


@pytest.mark.slow
def test_the_next_slide_is_looked_at_while_one_is_curated_and_its_row_and_cells_are_the_same(
    slide_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.tiff").write_bytes(b"II*")
    slides = [Slide("a", str(slide_file)), Slide("b", str(slide_file)), Slide("broken", str(tmp_path / "broken.tiff"))]
    rows: dict[bool, list[SlideRow]] = {}
    for ahead in (False, True):
        worker = worker_for(config_for(slide_file, tmp_path / str(ahead), "workers.cpus=1"), surveys_ahead=ahead)
        if ahead:
            monkeypatch.setattr(worker, "_survey", surveyed := Mock(wraps=worker._survey))
        actor: pool.ItemActor = pool.ItemActor(lambda worker=worker: worker, "run", 3)
        with ThreadPoolExecutor(1 + ahead) as threads:
            rows[ahead] = [*threads.map(functools.partial(call, actor), slides)]
    assert surveyed.call_count == 3
    took = [name for name in vars(rows[True][0]) if name.endswith("_s")]
    measured = dict.fromkeys([*took, "s_per_mm2", "device_share", "peak_mib"])
    assert [replace(row, **measured) for row in rows[True]] == [replace(row, **measured) for row in rows[False]]
    assert [row.status for row in rows[True]] == ["done", "done", "failed"]
    for name in (shard_name("a"), shard_name("b")):
        assert pq.read_table(tmp_path / "True" / name).equals(pq.read_table(tmp_path / "False" / name))


def test_a_mask_that_changes_after_a_slide_was_looked_at_counts_as_it_is_in_its_turn(
    slide_file: Path, tmp_path: Path
) -> None:
    mask = tmp_path / "masks/a.png"
    mask.parent.mkdir()
    cv2.imwrite(str(mask), np.full((16, 16), 255, np.uint8))
    config = config_for(slide_file, tmp_path / "out", "workers.cpus=1", f"tissue.masks={mask.parent}")
    worker, slide = worker_for(config, surveys_ahead=True), Slide("a", str(slide_file))
    worker.segmenter = HeldSegmenter()
    with worker.ready(curate.LocatedSlide(slide, slide.path)) as item:
        assert item.fetched is not None
        assert item.fetched.survey is not None
        small = np.zeros((16, 16), np.uint8)
        small[8, 8] = 255
        cv2.imwrite(str(mask), small)
        row = worker.work(item)
    assert row.n_regions is not None
    assert 0 < row.n_regions < len(item.fetched.survey.regions)


def test_a_file_that_kills_what_looks_ahead_is_worked_on_in_its_turn_and_the_next_is_looked_at_again(
    slide_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_for(config_for(slide_file, tmp_path, "workers.cpus=1"), surveys_ahead=True)
    worker.segmenter = HeldSegmenter()
    slide = Slide("a", str(slide_file))
    with monkeypatch.context() as patch:
        patch.setattr(curate, "survey_file", _kill)
        with worker.ready(curate.LocatedSlide(slide, slide.path)) as item:
            assert item.fetched is not None
            assert item.fetched.survey is None
            assert worker.work(item).status == "done"
    with worker.ready(curate.LocatedSlide(slide, slide.path)) as item:
        assert item.fetched is not None
        assert item.fetched.survey is not None
        assert item.fetched.survey.regions


def test_a_slide_for_which_there_was_no_room_beside_another_is_fetched_in_its_turn(
    slide_file: Path, tmp_path: Path
) -> None:
    worker = worker_for(config_for(slide_file, tmp_path, "workers.cpus=1"))
    worker.segmenter = HeldSegmenter()
    (slide,) = list_slides(str(slide_file))
    ahead = FetchedSlide(slide.path, None, begun_s=0.0, seconds=0.0, error=SlideError("no space to fetch it"))
    row = worker.work(curate.LocatedSlide(slide, slide.path, fetched=ahead))
    assert (row.status, row.error) == ("done", None)


class RaisingSegmenter(CrashingSegmenter):
    @property
    def postprocess(self) -> Any:
        return functools.partial(_raise)


def _raise(region: np.ndarray, prediction: None, calibration: None) -> list[Nucleus]:
    raise ZeroDivisionError("a strange\nslide")


def worker_for(config: CurateConfig, *, surveys_ahead: bool = False) -> curate.Curator:
    ledger = open_ledger(Store(config.output), config)
    return curate.Curator(config, ledger=ledger, surveys_ahead=surveys_ahead)


def curated(worker: curate.Curator, slide: Slide) -> SlideRow | None:
    """The row of a slide, as an actor makes it."""
    items, attempts = [curate.LocatedSlide(slide, slide.path)], worker.config.max_attempts
    (row,) = pool.run(items, lambda: worker, actors=None, max_attempts=attempts)
    return row


@pytest.mark.slow
def test_a_slide_that_keeps_crashing_its_worker_is_given_up(slide_file: Path, tmp_path: Path) -> None:
    worker = worker_for(config_for(slide_file, tmp_path, "max_attempts=2", "workers.cpus=1"))
    worker.segmenter = CrashingSegmenter()
    assert curated(worker, *list_slides(str(slide_file))).error == "given up after 2 crashes of its worker"
    (row,) = read_ledger(Store(tmp_path)).to_pylist()
    assert row["status"] == "failed"
    assert Store(tmp_path).list("attempts") == []


@pytest.mark.slow
def test_crashes_of_an_earlier_job_do_not_count_against_a_slide(slide_file: Path, tmp_path: Path) -> None:
    worker = worker_for(config_for(slide_file, tmp_path, "max_attempts=1", "workers.cpus=1"))
    worker.ledger.begin("s1", run_id="killed")
    assert curated(worker, *list_slides(str(slide_file))).status == "done"


def test_an_unexpected_error_becomes_the_slides_row(slide_file: Path, tmp_path: Path) -> None:
    worker = worker_for(config_for(slide_file, tmp_path, "workers.cpus=1"))
    worker.segmenter = RaisingSegmenter()
    row = curated(worker, *list_slides(str(slide_file)))
    assert (row.status, row.error) == ("failed", "unexpected ZeroDivisionError: a strange slide")


@pytest.mark.slow
def test_a_full_disk_stops_the_job_and_is_no_fault_of_the_slide(
    slide_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_for(config_for(slide_file, tmp_path, "workers.cpus=1"))

    def full(self: Store, name: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Store, "write", full)
    monkeypatch.setattr(Store, "write_bytes", lambda *args: None)
    with pytest.raises(pool.FatalError, match=r"cannot write to .*No space left on device"):
        curated(worker, *list_slides(str(slide_file)))
    assert read_ledger(Store(tmp_path)).num_rows == 0


def test_a_job_on_a_full_disk_says_so_in_one_line(
    slide_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: CurateConfig, **options: object) -> None:
        raise pool.FatalError("[Errno 28] No space left on device")

    monkeypatch.setattr(curate, "run", run)
    monkeypatch.setattr(curate, "check_and_allocate", lambda config: None)  # Ray is left out
    assert framed("curate", lambda: curate.main(config_for(slide_file, tmp_path))) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert "rerun goes on" in line


def test_an_output_that_cannot_be_written_is_one_line_and_exit_code_2(slide_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    job = Path(__file__).resolve().parents[2] / "jobs" / "curate.py"
    words = [f"slides={slide_file}", f"output={tmp_path / 'file' / 'out'}"]
    done = subprocess.run([sys.executable, str(job), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("curate: output: cannot write to")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (
            ["segmenter=hoverfast", "segmenter.checkpoint=/nowhere.pth"],
            "segmenter.checkpoint: checkpoint /nowhere.pth: no",
        ),
        (["tissue.masks=/nowhere"], "tissue.masks: got '/nowhere'"),
    ],
)
def test_a_path_that_is_not_there_is_told_before_work_begins(
    slide_file: Path, tmp_path: Path, words: list[str], part: str
) -> None:
    with pytest.raises(ConfigError, match=part):
        curate.run(config_for(slide_file, tmp_path, *words))


def test_an_output_of_other_settings_is_not_mixed_with_new_ones(slide_file: Path, tmp_path: Path) -> None:
    open_ledger(Store(tmp_path), config_for(slide_file, tmp_path, "cells_per_slide=7"))  # in which nothing was made
    open_ledger(Store(tmp_path), config_for(slide_file, tmp_path)).commit(SlideRow("a", "", status="done", n_cells=0))
    open_ledger(Store(tmp_path), config_for(slide_file, tmp_path, "geojson=true"))
    with pytest.raises(ConfigError, match="cells_per_slide 1000 then, 5 now"):
        open_ledger(Store(tmp_path), config_for(slide_file, tmp_path, "cells_per_slide=5"))
    open_ledger(Store(tmp_path), config_for(slide_file, tmp_path, "cells_per_slide=5", "overwrite=true"))
    open_ledger(Store(tmp_path), config_for(slide_file, tmp_path, "cells_per_slide=5"))


def test_the_largest_slides_come_first_and_absent_ones_last_in_their_order(tmp_path: Path) -> None:
    for name, size in {"a": 10, "b": 30, "c": 20}.items():
        (tmp_path / name).write_bytes(bytes(size))
    paths = {name: str(tmp_path / name) for name in "abc"} | {"x": "s", "d": str(tmp_path / "none")}
    slides = [Slide(slide_id, path) for slide_id, path in paths.items()]
    assert [slide.slide_id for slide in curate.largest_first(slides)] == ["b", "c", "a", "x", "d"]


def test_the_end_says_seconds_a_mm2_share_of_the_network_and_memory() -> None:
    rows = [
        SlideRow("a", "a", status="done", n_cells=1, area_mm2=10.0, total_s=30.0, network_s=15.0, peak_mib=2048.0),
        SlideRow("b", "b", status="done", n_cells=1, area_mm2=20.0, total_s=30.0, network_s=30.0, peak_mib=512.0),
        SlideRow("c", "c", status="failed", n_cells=0),
    ]
    said = curate._describe_speed(rows)
    assert said.startswith("30.0 mm2 at 2.00 s/mm2 of an actor, 75% of it in the network")
    assert said.endswith("2.0 GiB")
    assert curate._describe_speed(rows[2:]) == ""


@pytest.mark.parametrize(
    ("has_gpus", "words", "chosen"),
    [
        (True, [], "hoverfast"),
        (False, [], "hematoxylin"),
        (True, ["workers.gpus=0"], "hematoxylin"),
        (True, ["segmenter=hematoxylin"], "hematoxylin"),
    ],
)
def test_the_segmenter_is_chosen_by_whether_there_is_a_gpu_and_told(
    has_gpus: bool,
    words: list[str],
    chosen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(curate, "has_gpus", lambda: has_gpus)  # no machine of the tests has both
    config = with_segmenter(config_for("s.tiff", tmp_path, *words), log=True)
    assert config.segmenter == load("curate", [*GOOD, f"segmenter={chosen}"], CurateConfig).segmenter
    assert (f"segmenter={chosen}: " in capsys.readouterr().out) == (words != ["segmenter=hematoxylin"])


def test_an_output_goes_on_with_the_segmenter_that_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curate, "has_gpus", lambda: True)
    for name in ("hematoxylin", "hoverfast"):
        open_ledger(Store(tmp_path / name), config_for("s.tiff", tmp_path / name, f"segmenter={name}"))
        again = config_for("s.tiff", tmp_path / name)
        assert with_segmenter(again).segmenter.name == name
        open_ledger(Store(tmp_path / name), with_segmenter(again))  # raises if it were other settings
    overwritten = config_for("s.tiff", tmp_path / "hematoxylin", "overwrite=true")
    assert with_segmenter(overwritten).segmenter.name == "hoverfast"
    larger = with_segmenter(config_for("s.tiff", tmp_path / "hematoxylin", "segmenter.min_area_um2=9"))
    assert larger.segmenter.model_dump() == {"name": "hematoxylin", "min_area_um2": 9}


@pytest.mark.slow
def test_the_ledger_has_the_columns_of_the_schema(slide_file: Path, tmp_path: Path) -> None:
    worker = worker_for(config_for(slide_file, tmp_path, "workers.cpus=1", "cells_per_slide=5"))
    curated(worker, *list_slides(str(slide_file)))
    ledger = read_ledger(Store(tmp_path))
    assert ledger.schema.equals(schema.SLIDES)
    assert isinstance(ledger, pa.Table)
    (row,) = ledger.to_pylist()
    missing = {name for name, value in row.items() if value is None}
    assert missing == {"patient_id", "project", "organ", "site", "error", "mask_digest", "nuclei_digest"}


@pytest.mark.slow
def test_the_real_slide_gives_thousands_of_nuclei(tmp_path: Path, processes: WorkerProcesses) -> None:
    path = shared("data/slides/CMU-1-Small-Region.svs")
    row = curate_one(path, tmp_path, processes, "region_px=1024")
    assert row.status == "done"
    assert row.n_nuclei > 2000
    assert row.n_cells == 1000
