"""Which file of nuclei is of which slide: by name, by table, or the one that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from lemon.curate.config import CurateConfig
from lemon.errors import ConfigError
from lemon.nuclei.given.config import CellsFrom, Files
from lemon.runtime.config import load
from lemon.slides.errors import SlideError


def touch(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return str(path)


def test_a_folder_has_files_named_like_the_slides(tmp_path: Path) -> None:
    files = {
        "a.b": touch(tmp_path / "a.b.geojson.gz"),
        "c": touch(tmp_path / "c.ome.tif").replace("c.ome.tif", "c.npy"),
        "d": touch(tmp_path / "d" / "nucleus_boundaries.parquet").rpartition("/")[0],
        "e": touch(tmp_path / "e" / "cell_detection" / "cells.json").partition("/cell_detection")[0],
    }
    touch(tmp_path / "c.npy")
    found = Files(str(tmp_path))
    assert {slide: found.of(slide) for slide in files} == files
    with pytest.raises(SlideError, match="has no file of nuclei for it"):
        found.of("x")
    touch(tmp_path / "c.json")
    with pytest.raises(SlideError, match=r"has 2 files for it \(c.json, c.npy\); expected one: name it in a table"):
        found.of("c")


def test_a_table_maps_slides_to_files_beside_it(tmp_path: Path) -> None:
    touch(tmp_path / "n" / "1.json")
    (tmp_path / "t.csv").write_text("slide_id,path\na,n/1.json\nb,\n")
    found = Files(str(tmp_path / "t.csv"))
    assert found.of("a") == str(tmp_path / "n" / "1.json")
    with pytest.raises(SlideError, match="has no file of nuclei for it"):
        found.of("b")


def test_a_table_of_centroids_is_no_map_of_files(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,y\n1,2\n")
    assert Files(str(tmp_path / "t.csv")).single


def test_one_file_for_several_slides_and_none_for_any_are_told_at_once(tmp_path: Path) -> None:
    one = touch(tmp_path / "n" / "1.json")
    with pytest.raises(ConfigError, match=r"got one file, .*1.json, for 2 slides; expected a folder"):
        CellsFrom(path=one).check(["a", "b"])
    with pytest.raises(ConfigError, match="has no file for any of 2 slides, as a, b"):
        CellsFrom(path=str(tmp_path / "n")).check(["a", "b"])
    with pytest.raises(ConfigError, match="which is not there"):
        CellsFrom(path=str(tmp_path / "absent")).check(["a"])
    CellsFrom(path=one).check(["a"])


def test_the_path_may_be_given_alone_or_with_other_keys() -> None:
    words = ["slides=s", "output=o", "cells_from=n.json"]
    assert load("curate", words, CurateConfig).cells_from == CellsFrom(path="n.json")
    config = load("curate", [*words, "cells_from.unit=um", "cells_from.offset_px=[3,-4]"], CurateConfig)
    assert config.cells_from == CellsFrom(path="n.json", unit="um", offset_px=(3, -4))
    assert not config.uses_gpu


@pytest.mark.parametrize("words", [["unit=um", "level=1"], ["unit=um", "mpp=1"], ["level=1", "mpp=1"], ["flip=z"]])
def test_settings_that_contradict_each_other_are_refused(words: list[str]) -> None:
    keys = [f"cells_from.{word}" for word in words]
    with pytest.raises(ConfigError, match="cells_from"):
        load("curate", ["slides=s", "output=o", "cells_from=n.json", *keys], CurateConfig)


@pytest.mark.parametrize("text", ["1,2\n3,4", "a,b,c\n1,2,3\n0,0,1", "1,0,0\n0,1,0\n0,0,2", "1,1,0\n1,1,0\n0,0,1"])
def test_an_alignment_that_is_no_matrix_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"cells_from\.alignment"):
        CellsFrom(path=touch(tmp_path / "n.json"), alignment=str(tmp_path / "m.csv")).check(["a"])
