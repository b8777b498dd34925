from __future__ import annotations

import os
from pathlib import Path

from lemon.slides.source import files_of, read_source, size_and_time
from lemon.slides.synthetic import make_tissue
from tests.slides.dicom import write_slide

IMAGE = make_tissue(300, seed=1).image


def test_a_dicom_slide_is_the_files_of_its_series_and_not_its_neighbours(tmp_path: Path) -> None:
    write_slide(tmp_path, IMAGE, stem="a", levels=2)
    before = read_source(str(tmp_path / "a_2.dcm"), local=tmp_path / "a_2.dcm")
    write_slide(tmp_path, IMAGE, stem="b", levels=2)
    assert [file.name for file in files_of(tmp_path / "a_2.dcm")] == ["a_0.dcm", "a_1.dcm", "a_2.dcm"]
    assert read_source(str(tmp_path / "a_2.dcm"), local=tmp_path / "a_2.dcm") == before
    (tmp_path / "a_1.dcm").write_bytes((tmp_path / "a_1.dcm").read_bytes()[:-1] + b"\x07")
    assert read_source(str(tmp_path / "a_2.dcm"), local=tmp_path / "a_2.dcm") != before


def test_a_pipe_has_no_source_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.svs")
    assert size_and_time(str(tmp_path / "a.svs")) is None
    assert read_source(str(tmp_path / "a.svs"), local=tmp_path / "a.svs") is None


def test_a_name_that_is_no_utf8_has_a_source(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xe9.svs")).write_bytes(b"x")
    path = rf"{tmp_path}/\xe9.svs"
    source = read_source(path, local=Path(path))
    assert source is not None
    assert source.size_bytes == 1
