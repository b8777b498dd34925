"""No job with any flags touches a file that LEMON did not write."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from lemon.cells.names import shard_name
from lemon.curate import job as curate
from lemon.curate.config import CurateConfig
from lemon.embed import job as embedding
from lemon.embed.config import EmbedConfig
from lemon.errors import ConfigError
from lemon.runtime.config import load
from lemon.runtime.lease import hold
from lemon.runtime.ledger import Ledger
from lemon.runtime.records import INTERNAL_FOLDER, FileRecord, ForeignFileError
from lemon.runtime.store import Store
from lemon.slides.cohort import Slide
from lemon.slides.synthetic import make_tissue, write_pyramid
from tests.cells_table import write_slide
from tests.embed.tables import write_encoder

EXAMPLES = int(os.environ.get("LEMON_EXAMPLES", "40"))

SLIDES = ("1", "10", "a b")

# Where LEMON itself would write, and beside it.
FOLDERS = ("", "slides", "cells", "geojson", "embeddings", "clusters", "h5ad", "spatialdata/1.zarr", "attempts")
FOLDERS += ("encoder", "checkpoints", "scores", "trials", "downloads", "notes", "slides/deeper", "cells/.cache")
NAMES = ("notes.txt", "1.parquet", "10.parquet", "a b.parquet", "1.geojson.gz", "1.h5ad", "cohort.parquet", "run.json")
NAMES += ("curate.json", "embed.json", "pretrain.json", "clusters.json", "index.html", "model.safetensors", ".DS_Store")
NAMES += (".tmp-00000000-1.parquet", "1.parquet.part", "x" * 150, "1.parquet~", "Präparat 三.svs", "-rf")

files = st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.binary(max_size=20))
trees = st.lists(files, max_size=6)


def _commit(slides: list[Slide], *, ledger: Ledger, **options: object) -> None:
    """Stands for the segmentation of slides: writes what curation commits of each."""
    for slide in slides:
        write_slide(ledger.store, slide.slide_id, np.full((3, 60, 60, 3), 200, np.uint8))
        ledger.store.write_bytes(f"geojson/{slide.slide_id}.geojson.gz", b"{}")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides, a cells table and an encoder to make embeddings with."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "slides").mkdir()
    for name in SLIDES:
        write_pyramid(folder / "slides" / f"{name}.tiff", make_tissue(64, seed=0).image, mpp=0.25)
        write_slide(Store(folder / "cells"), name, np.full((12, 60, 60, 3), 200, np.uint8))
    write_encoder(folder / "run")
    return folder


def _curate(source: Path, output: Path, *words: str) -> None:
    config = load("curate", [f"slides={source / 'slides'}", f"output={output}", "geojson=true", *words], CurateConfig)
    curate.main(config)


def _embed(source: Path, output: Path, *words: str) -> None:
    given = [f"model={source / 'run'}", f"cells={source / 'cells'}", f"output={output}", *words]
    embedding.main(load("embed", [*given, "device=cpu", "clusters.k=2"], EmbedConfig))


def _write_all(source: Path, output: Path) -> None:
    """Every other stage writes single files through the store."""
    with hold(str(output), stage="test") as store:
        for folder in FOLDERS:
            for name in NAMES:
                with contextlib.suppress(ForeignFileError, OSError):
                    store.write_bytes(f"{folder}/{name}".lstrip("/"), b"lemon")


def _delete_all(source: Path, output: Path) -> None:
    with hold(str(output), stage="test") as store:
        for folder in FOLDERS:
            with contextlib.suppress(ForeignFileError):
                store.delete(folder)


JOBS: dict[str, Callable[[Path, Path], None]] = {
    "curate": lambda source, output: _curate(source, output),
    "curate overwrite": lambda source, output: _curate(source, output, "overwrite=true"),
    "curate other settings": lambda source, output: _curate(source, output, "overwrite=true", "cells_per_slide=7"),
    "embed": lambda source, output: _embed(source, output),
    "embed overwrite": lambda source, output: _embed(source, output, "overwrite=true"),
    "write": _write_all,
    "delete": _delete_all,
}

rounds = st.lists(st.tuples(trees, st.sampled_from(sorted(JOBS))), min_size=1, max_size=3)


def _plant(output: Path, tree: list[tuple[str, str, bytes]], foreign: dict[Path, bytes]) -> None:
    """Files of a user's: also in place of what LEMON wrote, as when somebody edits it."""
    for folder, name, content in tree:
        path = output / folder / name
        with contextlib.suppress(OSError):  # a name that is a file on one path and a folder on another
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            foreign[path] = content


@pytest.mark.slow
@example(rounds=[([("slides", "notes.txt", b"mine")], "curate overwrite")])
@example(rounds=[([("attempts", "notes.txt", b"mine")], "curate")])
@example(rounds=[([], "embed"), ([("spatialdata/1.zarr", "notes.txt", b"mine")], "embed overwrite")])
@example(rounds=[([], "curate"), ([("cells", "1.parquet", b"edited")], "curate overwrite")])
@given(rounds=rounds)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_after_any_jobs_with_any_flags_every_foreign_file_is_there_byte_for_byte(
    source: Path, rounds: list[tuple[list[tuple[str, str, bytes]], str]]
) -> None:
    foreign: dict[Path, bytes] = {}
    output = Path(tempfile.mkdtemp(prefix="lemon-foreign-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curate, "_curate_all", _commit)
        patch.setattr(curate, "check_and_allocate", curate.check)  # it would start Ray for each new output
        for tree, job in rounds:
            _plant(output, tree, foreign)
            with contextlib.suppress(ConfigError):  # refused: one line, exit code 2
                JOBS[job](source, output)
    found = {path: path.read_bytes() if path.exists() else None for path in foreign}
    shutil.rmtree(output)
    assert found == foreign


@pytest.mark.parametrize("name", ["slides/notes.txt", "cells/deep/x.bin", "geojson/1.geojson.gz", "curate.json"])
def test_an_output_with_foreign_content_under_its_names_is_refused_untouched(
    source: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"did not write; move it away, or choose another output"):
        _curate(source, tmp_path, "overwrite=true")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def test_hidden_files_of_the_system_stand_in_nobodys_way(source: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / ".DS_Store").write_bytes(b"mine")
    with hold(str(tmp_path), stage="curate", names=curate.OUTPUT_NAMES) as store:
        store.write_bytes("slides/a.parquet", b"x")
        store.delete("slides")
    assert (tmp_path / "slides" / ".DS_Store").read_bytes() == b"mine"


def test_slides_that_lie_in_the_outputs_own_folders_are_refused(tmp_path: Path) -> None:
    slide = tmp_path / "proj" / "slides" / "s.tiff"
    slide.parent.mkdir(parents=True)
    write_pyramid(slide, make_tissue(64, seed=0).image, mpp=0.25)
    words = [f"slides={slide.parent}", f"output={tmp_path / 'proj'}", "overwrite=true"]
    with pytest.raises(ConfigError, match="lies in the folder of a table of output="):
        curate.main(load("curate", words, CurateConfig))
    assert slide.exists()
    assert not (tmp_path / "proj" / INTERNAL_FOLDER).exists()


def test_a_file_is_known_again_after_a_copy_that_lost_its_time(tmp_path: Path) -> None:
    store = Store(tmp_path / "a")
    store.write_bytes("x/y.bin", b"content")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    copy = Store(tmp_path / "b")
    copy.write_bytes("x/y.bin", b"newer")
    copy.delete("x/y.bin")
    assert copy.list("") == []


@pytest.mark.parametrize("changed", [b"changed", b"contenu"])
def test_a_file_that_somebody_changed_is_theirs(tmp_path: Path, changed: bytes) -> None:
    store = Store(tmp_path)
    store.write_bytes("h5ad/a.h5ad", b"content")
    (tmp_path / "h5ad" / "a.h5ad").write_bytes(changed)
    for act in (lambda: store.write_bytes("h5ad/a.h5ad", b"new"), lambda: store.delete("h5ad/a.h5ad")):
        with pytest.raises(ForeignFileError, match=r"a\.h5ad was changed since lemon wrote it; move it away"):
            act()
    store.delete("h5ad")
    assert (tmp_path / "h5ad" / "a.h5ad").read_bytes() == changed


def test_of_a_writer_killed_between_record_and_name_both_files_are_known(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_bytes("x", b"old")
    (tmp_path / "new").write_bytes(b"new")
    store.records.note("x", FileRecord.of(tmp_path / "new"), replaced=store.records.require("x"))
    store.write_bytes("x", b"newest")
    assert store.read_bytes("x") == b"newest"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "..", "a/./b"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leads out of"):
        Store(tmp_path / "out").write_bytes(name, b"x")
    assert shard_name("a/b").count("/") == 1
