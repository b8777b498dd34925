"""One thing is changed at a time: what each stage does again, and what it keeps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from lemon.cells.names import SETTINGS
from lemon.cells.select import Selection, select_cells
from lemon.cells.shard import images_from_arrow
from lemon.curate import job as curate
from lemon.curate.config import CurateConfig
from lemon.curate.job import open_ledger
from lemon.curate.processes import WorkerProcesses
from lemon.curate.slide import curate_slide
from lemon.embed import job as embedding
from lemon.embed.config import EmbedConfig
from lemon.errors import ConfigError
from lemon.nuclei.released import weights_path
from lemon.runtime.config import load
from lemon.runtime.ledger import Ledger
from lemon.runtime.store import Store, file_fingerprint
from lemon.schema import SlideRow
from lemon.slides.cohort import Slide
from lemon.slides.synthetic import make_tissue, write_pyramid
from tests.embed.tables import write_encoder

SIDE_PX = 400


@pytest.fixture(scope="module")
def processes() -> Iterator[WorkerProcesses]:
    with WorkerProcesses(1) as pool:
        yield pool


@dataclass
class Lab:
    """Two slides, their masks, and what was made of them; notes which slides each stage worked on."""

    folder: Path
    cells: Path
    embeddings: Path
    curated: list[str]

    def curate(self, *words: str) -> list[str]:
        """Slides that the job curated now."""
        self.curated.clear()
        given = [f"slides={self.folder / 'slides'}", f"output={self.cells}", "cells_per_slide=20", "region_px=512"]
        given += [f"tissue.masks={self.folder / 'masks'}", *words]
        curate.run(load("curate", list({word.partition("=")[0]: word for word in given}.values()), CurateConfig))
        return sorted(self.curated)

    def selection(self) -> Selection:
        """All cells."""
        return select_cells(Store(self.cells))

    def embed(self) -> int:
        """Slides that the job embedded now."""
        words = [f"model={self.folder / 'run'}", f"cells={self.cells}", f"output={self.embeddings}", "device=cpu"]
        return 2 - embedding.run(load("embed", [*words, "clusters.k=2"], EmbedConfig)).n_skipped

    def is_consistent(self) -> bool:
        """Whether the embeddings are of the cells that are there."""
        cells, embeddings = Store(self.cells), Store(self.embeddings)
        return all(
            cells.read_table(f"cells/{name}.parquet")["cell_id"].equals(
                embeddings.read_table(f"embeddings/{name}.parquet")["cell_id"]
            )
            for name in ("a", "b")
        )


def write_slide(path: Path, *, seed: int) -> None:
    write_pyramid(path, make_tissue(SIDE_PX, seed=seed).image, mpp=0.25)


@pytest.fixture
def lab(tmp_path: Path, processes: WorkerProcesses, monkeypatch: pytest.MonkeyPatch) -> Lab:
    for name in ("slides", "masks"):
        (tmp_path / name).mkdir()
    for seed, name in enumerate(("a", "b")):
        write_slide(tmp_path / "slides" / f"{name}.tiff", seed=seed)
        cv2.imwrite(str(tmp_path / "masks" / f"{name}.png"), np.full((32, 32), 255, np.uint8))
    write_encoder(tmp_path / "run")
    lab = Lab(tmp_path, tmp_path / "cells", tmp_path / "embeddings", [])

    def here(slides: list[Slide], *, config: CurateConfig, ledger: Ledger, source: object) -> None:
        """Curation without Ray."""
        segmenter = config.segmenter.build()
        for slide in slides:
            row = curate_slide(
                replace(slide), config=config, segmenter=segmenter, processes=processes, store=ledger.store
            )
            ledger.commit(row)
            lab.curated.append(slide.slide_id)

    monkeypatch.setattr(curate, "_curate_all", here)
    monkeypatch.setattr(curate, "check_and_allocate", curate.check)
    assert lab.curate() == ["a", "b"]
    assert lab.embed() == 2
    return lab


def nothing(lab: Lab) -> None:
    """The same commands again."""


def touched(lab: Lab) -> None:
    os.utime(lab.folder / "slides" / "a.tiff")


def moved_slides(lab: Lab) -> None:
    shutil.copytree(lab.folder / "slides", lab.folder / "elsewhere")
    shutil.rmtree(lab.folder / "slides")
    shutil.move(lab.folder / "elsewhere", lab.folder / "slides")


def moved_table(lab: Lab) -> None:
    shutil.copytree(lab.cells, lab.folder / "moved", copy_function=shutil.copyfile)  # also without its times
    lab.cells = lab.folder / "moved"


def a_pixel(lab: Lab) -> None:
    """In place: neither size nor the file's time tell it."""
    path = lab.folder / "slides" / "a.tiff"
    stat = path.stat()
    image = make_tissue(SIDE_PX, seed=0).image.copy()
    image[200, 200] ^= 0x40
    write_pyramid(path, image, mpp=0.25)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def another_slide(lab: Lab) -> None:
    write_slide(lab.folder / "slides" / "a.tiff", seed=7)


def a_mask(lab: Lab) -> None:
    mask = np.full((32, 32), 255, np.uint8)
    mask[:, :16] = 0
    cv2.imwrite(str(lab.folder / "masks" / "a.png"), mask)


def a_lost_shard(lab: Lab) -> None:
    (lab.cells / "cells" / "a.parquet").unlink()


@pytest.mark.parametrize(
    ("change", "curated", "same_cells"),
    [
        (nothing, [], True),
        (touched, [], True),
        (moved_slides, [], True),
        (moved_table, [], True),
        (a_pixel, ["a"], None),  # whether a cell shows it is chance
        (another_slide, ["a"], False),
        (a_mask, ["a"], None),
        (a_lost_shard, ["a"], True),
    ],
)
def test_what_changed_is_made_again_in_every_stage_and_nothing_else_is(
    lab: Lab, change: Callable[[Lab], None], curated: list[str], same_cells: bool | None
) -> None:
    before = lab.selection()
    change(lab)
    assert lab.curate() == curated
    after = lab.selection()
    if same_cells is not None:
        assert (after.fingerprint == before.fingerprint) == same_cells
    changed = sum(one.digest != other.digest for one, other in zip(before.parts, after.parts, strict=True))
    assert lab.embed() == changed
    assert lab.is_consistent()
    assert lab.curate() == []
    assert lab.embed() == 0


def test_geojson_that_is_gone_or_was_not_asked_for_is_made_and_none_outlives_its_pixels(lab: Lab) -> None:
    before, made = lab.selection(), lab.cells / "geojson" / "a.geojson.gz"
    assert lab.curate("geojson=true") == ["a", "b"]
    assert lab.curate("geojson=true") == []
    made.unlink()
    assert lab.curate("geojson=true") == ["a"]
    assert made.exists()
    assert lab.selection().fingerprint == before.fingerprint  # nothing downstream is done again
    another_slide(lab)
    assert lab.curate() == ["a"]
    assert not made.exists()
    assert (lab.cells / "geojson" / "b.geojson.gz").exists()


def test_the_images_of_a_selection_are_those_of_its_table_after_curation_anew(lab: Lab) -> None:
    another_slide(lab)
    lab.curate()
    selection = lab.selection()
    (first, _) = selection.parts
    read = np.concatenate([images_from_arrow(batch["image"]) for batch in selection.batches(first, ["image"])])
    table = Store(lab.cells).read_table(first.name)
    assert np.array_equal(read, images_from_arrow(table["image"])[: first.n_rows])


def test_other_settings_are_refused_until_told_to_overwrite_and_then_all_is_made_again(lab: Lab) -> None:
    with pytest.raises(ConfigError, match=r"begun with other settings .*min_area_um2"):
        lab.curate("segmenter.min_area_um2=9")
    assert lab.curate("segmenter.min_area_um2=9", "overwrite=true") == ["a", "b"]


def test_other_weights_of_the_segmenter_are_other_settings_wherever_their_file_lies(tmp_path: Path) -> None:
    def begin(weights: bytes, folder: str) -> None:
        path = tmp_path / folder / "w.pth"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(weights)
        begin_ledger(tmp_path, f"segmenter.checkpoint={path}")

    begin(b"weights", "one")
    begin(b"weights", "two")
    with pytest.raises(ConfigError, match=r"segmenter\.checkpoint \w+ then, \w+ now"):
        begin(b"other", "one")


def test_the_weights_that_come_with_lemon_are_known_by_their_content(tmp_path: Path) -> None:
    released = Path(weights_path(None))
    begin_ledger(tmp_path)
    assert Store(tmp_path / "out").read_json(SETTINGS)["segmenter"]["checkpoint"] == file_fingerprint(released)
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(released.read_bytes())
    begin_ledger(tmp_path, f"segmenter.checkpoint={copy}")
    copy.write_bytes(b"others")
    with pytest.raises(ConfigError, match=r"segmenter\.checkpoint \w+ then, \w+ now"):
        begin_ledger(tmp_path, f"segmenter.checkpoint={copy}")


def begin_ledger(folder: Path, *words: str) -> None:
    given = [f"slides={folder}", f"output={folder}", "segmenter=hoverfast", *words]
    ledger = open_ledger(Store(folder / "out"), load("curate", given, CurateConfig))
    ledger.commit(SlideRow("a", "", status="done", n_cells=0))


@pytest.mark.parametrize(
    ("version", "told"), [("1", "make it again in another output"), ("3", "install the lemon that")]
)
def test_a_table_of_another_version_is_one_line(lab: Lab, version: str, told: str) -> None:
    store = Store(lab.cells)
    table = store.read_table("slides/a.parquet")
    store.write_table("slides/a.parquet", table.replace_schema_metadata({"lemon.table": f"slides/{version}"}))
    with pytest.raises(ConfigError, match=rf"slides/a\.parquet is the table slides of version {version}.*{told}"):
        lab.selection()
