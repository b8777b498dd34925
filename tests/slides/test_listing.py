from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemon.errors import ConfigError
from lemon.runtime.store import Store
from lemon.schema import COHORT
from lemon.slides.cohort import Slide, list_slides
from lemon.slides.listing import find_slides
from lemon.slides.paths import as_text, on_disk
from lemon.slides.reader import SlideReader
from lemon.slides.synthetic import make_tissue, write_pyramid
from tests import s3
from tests.slides.dicom import write_instance, write_slide

pytestmark = pytest.mark.usefixtures("console")

IMAGE = make_tissue(512, seed=1).image


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def ids(source: str | list[str] | Path) -> list[str]:
    return [slide.slide_id for slide in list_slides(source if isinstance(source, list) else str(source))]


@pytest.mark.parametrize("pattern", ["", "*/*", "**/*.dcm", "**/*"])
def test_the_files_of_a_dicom_series_are_one_slide(
    tmp_path: Path, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_slide(tmp_path / "one", IMAGE, levels=3)
    write_slide(tmp_path / "two", IMAGE, levels=2, stem="other")
    assert ids(tmp_path / pattern) == ["level_3", "other_2"]  # the finest levels
    assert capsys.readouterr().out == "slides: passed over 5 files: 5 .dcm of a slide already listed\n"


def test_two_slides_of_dicom_in_one_folder_are_two(tmp_path: Path) -> None:
    write_slide(tmp_path, IMAGE, stem="a")
    write_slide(tmp_path, IMAGE, stem="b")
    assert ids(tmp_path) == ["a_3", "b_3"]


def test_dicom_without_a_suffix_is_found_and_what_is_no_slide_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_slide(tmp_path, IMAGE, levels=2)
    (tmp_path / "level_2.dcm").rename(tmp_path / "IM0001")
    (tmp_path / "level_1.dcm").rename(tmp_path / "IM0002")
    write_instance(tmp_path / "ct.dcm", IMAGE, series="1.2.3", mpp=(1, 1), wsi=False)
    write_instance(tmp_path / "photo.dcm", IMAGE, series="1.2.4", mpp=(1, 1), kind="OVERVIEW")
    (tmp_path / "junk.dcm").write_bytes(b"junk")
    assert ids(tmp_path) == ["IM0001"]
    told = capsys.readouterr().out
    assert "2 .dcm of a slide already listed" in told
    assert "3 .dcm without pixels of a slide" in told


def test_files_of_one_dicom_slide_that_are_named_one_by_one_are_one(tmp_path: Path) -> None:
    write_slide(tmp_path, IMAGE)
    assert len(ids([str(tmp_path / "level_1.dcm"), str(tmp_path / "level_2.dcm"), str(tmp_path)])) == 1


@pytest.mark.parametrize("pattern", ["", "**/*.svs", "**/*"])
def test_links_are_followed_by_folder_as_by_glob_and_each_slide_is_listed_once(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path, "elsewhere/deep/far.svs", "slides/a/near.svs", "slides/z/last.svs")
    (tmp_path / "slides" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "slides" / "a" / "ring").symlink_to(tmp_path / "slides", target_is_directory=True)
    (tmp_path / "slides" / "a" / "twice").symlink_to(tmp_path / "slides" / "z", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "slides", target_is_directory=True)
    os.link(tmp_path / "slides" / "a" / "near.svs", tmp_path / "slides" / "a" / "same.svs")
    for path in tmp_path.rglob("*.svs"):
        path.write_bytes(path.name.encode())  # distinct files, but for the hard link
    assert ids(tmp_path / "slides" / pattern) == ["far", "last", "near"]


def test_a_folder_reached_by_a_link_too_keeps_its_own_path(tmp_path: Path) -> None:
    touch(tmp_path, "s/z/x.svs", "s/a/n.txt")
    (tmp_path / "s" / "a" / "link").symlink_to(tmp_path / "s" / "z", target_is_directory=True)
    assert [slide.path for slide in list_slides(str(tmp_path / "s"))] == [str(tmp_path / "s/z/x.svs")]


def test_what_is_passed_over_is_told_in_one_line_with_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path, "x.svs", "._x.svs", ".DS_Store", ".snapshot/y.svs", "y.svs.part", "Thumbs.db", "README", "odd.a b")
    touch(tmp_path, *(f"{index}.txt" for index in range(9)))
    assert ids(tmp_path) == ["x"]
    assert capsys.readouterr().out == (
        "slides: passed over 16 files: 9 .txt, 3 hidden, 2 of no known suffix, 1 .db, 1 unfinished\n"
    )


def test_without_any_slide_the_line_says_what_there_was(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    for source in (str(tmp_path), str(tmp_path / "*.jpg")):
        with pytest.raises(ConfigError, match=r"no slide \(passed over 2 files: 2 \.jpg\)"):
            list_slides(source)
    with pytest.raises(ConfigError, match="matches no file"):
        list_slides(str(tmp_path / "*.svs"))
    with pytest.raises(ConfigError, match="empty path"):
        list_slides(" ")


@pytest.mark.parametrize("name", ["scan.btf", "scan", "scan.v2"])
def test_what_openslide_opens_is_a_slide_whatever_its_suffix(tmp_path: Path, name: str) -> None:
    write_pyramid(tmp_path / name, IMAGE, mpp=0.25)
    touch(tmp_path, "other.btf")
    assert ids(tmp_path) == ids(tmp_path / "*") == ["scan"]


def test_the_folder_of_a_mirax_slide_is_a_part_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, "a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "b.vms", "b/x.svs")
    assert ids(tmp_path) == ["a", "b", "x"]
    assert capsys.readouterr().out == ""


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.dcm")
    touch(tmp_path, "x.svs")
    assert ids(tmp_path) == ["x"]


def test_one_file_under_two_ids_of_a_cohort_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs")
    (tmp_path / "link.svs").symlink_to(tmp_path / "a.svs")
    write_slide(tmp_path / "d", IMAGE)
    for one, other in (("a.svs", "a.svs"), ("a.svs", "link.svs"), ("d/level_1.dcm", "d/level_2.dcm")):
        (tmp_path / "c.csv").write_text(f"slide_id,path\nx,{one}\ny,{other}\n")
        with pytest.raises(ConfigError, match=r"'x' and 'y' name one slide .* one row a slide") as caught:
            list_slides(str(tmp_path / "c.csv"))
        assert "\n" not in str(caught.value)


def test_a_cohorts_row_outranks_the_same_file_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, "a.svs", "b.svs")
    (tmp_path / "c.csv").write_text("slide_id,path,organ\nx,a.svs,colon\n")
    for words in ([str(tmp_path), str(tmp_path / "c.csv")], [str(tmp_path / "c.csv"), str(tmp_path)]):
        assert [(slide.slide_id, slide.organ) for slide in list_slides(words)] == [("b", None), ("x", "colon")]
    assert "passed over 1 file: 1 .csv" in capsys.readouterr().out


@pytest.mark.parametrize("mpp", ["0.5", "0.499", "0.05", "20"])
def test_a_cohort_may_state_the_resolution(tmp_path: Path, mpp: str) -> None:
    touch(tmp_path, "a.svs", "b.svs")
    (tmp_path / "c.csv").write_text(f"path,mpp\na.svs,{mpp}\nb.svs,\n")
    assert [slide.mpp for slide in list_slides(str(tmp_path / "c.csv"))] == [float(mpp), None]
    assert COHORT.field("mpp").type == pa.float64()
    assert COHORT.field("mpp").nullable


@pytest.mark.parametrize("mpp", ["25", "inf", "0", "-0.25", "0.01", "0.25 um", "0,25"])
def test_a_resolution_that_cannot_be_right_is_refused_before_work_begins(tmp_path: Path, mpp: str) -> None:
    touch(tmp_path, "a.svs")
    (tmp_path / "c.csv").write_text(f'path,mpp\na.svs,"{mpp}"\n')
    with pytest.raises(ConfigError, match=r"column mpp: got .*; expected 0\.05 to 20 um/px") as caught:
        list_slides(str(tmp_path / "c.csv"))
    assert "\n" not in str(caught.value)


def test_ids_that_differ_by_case_only_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, "a/X1.svs", "b/x1.svs")
    assert ids(tmp_path) == ["X1", "x1"]
    assert "differ by case only" in capsys.readouterr().out


def test_objects_at_s3_go_by_the_same_rule(bucket: s3.Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("s/x.svs", "s/._x.svs", "s/.DS_Store", "s/n.txt", "s/y.tiff.part", "s/d/1.dcm", "s/d/2.dcm"):
        Store(bucket.uri).write_bytes(name, b"x")
    for name in ("s/m.mrxs", "s/m/Data0000.dat"):
        Store(bucket.uri).write_bytes(name, b"x")
    for source in (f"{bucket.uri}/s", f"{bucket.uri}/s/**"):
        assert [slide.path.removeprefix(bucket.uri) for slide in list_slides(source)] == [
            "/s/d/1.dcm",
            "/s/m.mrxs",
            "/s/x.svs",
        ]
        told = capsys.readouterr().out
        assert "passed over 5 files: 2 hidden, 1 .txt, 1 unfinished, 1 .dcm of a slide already listed" in told


def test_a_name_that_is_no_utf8_is_escaped_and_the_slide_opens(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"f\xfcr")
    folder.mkdir()
    write_pyramid(tmp_path / "a.tiff", IMAGE, mpp=0.25)
    (tmp_path / "a.tiff").rename(folder / os.fsdecode(b"Mamma\xe9.tiff"))
    (slide,) = list_slides(str(tmp_path))
    assert slide == Slide(r"Mamma\xe9", rf"{tmp_path}/f\xfcr/Mamma\xe9.tiff")
    assert pa.array([slide.slide_id, slide.path]).to_pylist() == [slide.slide_id, slide.path]  # valid Unicode
    assert (SlideReader(slide.path).region(0, 0, width_px=512, height_px=512) == IMAGE).all()
    assert list_slides(slide.path) == [slide]


@given(st.binary(min_size=1, max_size=40).filter(lambda name: b"/" not in name and b"\0" not in name))
def test_any_bytes_of_a_name_become_text(name: bytes) -> None:
    as_text(os.fsdecode(name)).encode()


def test_an_ordinary_backslash_is_no_escape(tmp_path: Path) -> None:
    touch(tmp_path, r"a\xe9.svs")
    assert on_disk(str(tmp_path / r"a\xe9.svs")) == str(tmp_path / r"a\xe9.svs")
    assert on_disk(r"/absent/a\xe9.svs") == r"/absent/a\xe9.svs"


@pytest.mark.parametrize("name", ["线" * 34, "x" * 240, "-rf", "a\nb", "it's", "😀", "a.tmp-b", "%2e", "con", ".."])
def test_a_file_of_any_name_is_listed(tmp_path: Path, name: str) -> None:
    touch(tmp_path, f"{name}.svs")
    assert ids(tmp_path / "*.svs" if name != ".." else tmp_path / "...svs") == [name]


def test_folders_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads every folder")
    touch(tmp_path, "a.svs", "locked/b.svs")
    (tmp_path / "locked").chmod(0)
    passed_over: Counter[str] = Counter()
    assert len(find_slides(str(tmp_path), passed_over)) == 1
    assert passed_over == {"in folders that cannot be read": 1}
    (tmp_path / "locked").chmod(0o700)
