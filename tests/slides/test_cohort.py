from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lemon.errors import ConfigError
from lemon.slides.cohort import Slide, list_slides, with_barcode

BARCODE = "TCGA-A2-A0SX-01Z-00-DX1.8B4F6C1A-1111-2222-3333-444455556666"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/one.svs", "a/b/two.TIFF", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("source", ["a", "a/**/*.[sT][vI]*", "a/one.svs"])
def test_a_folder_a_glob_and_a_file_all_name_slides(folder: Path, source: str) -> None:
    found = [slide.slide_id for slide in list_slides(str(folder / source))]
    assert found == (["one"] if source == "a/one.svs" else ["one", "two"])


def test_a_csv_cohort_may_name_ids_and_clinical_columns(folder: Path) -> None:
    (folder / "c.csv").write_text("path,slide_id,organ,extra\na/one.svs,007,breast,x\na/b/two.TIFF,,lung,y\n")
    seven, two = list_slides(str(folder / "c.csv"))
    assert seven == Slide("007", str(folder / "a/one.svs"), organ="breast")
    assert (two.slide_id, two.organ, two.site) == ("two", "lung", None)


@pytest.mark.parametrize("word", ["NA", "NaN", "None", "n/a", " ", "-", ""])
def test_a_patient_that_is_no_patient_gives_way_to_the_barcode(folder: Path, word: str) -> None:
    (folder / "c.csv").write_text(f"path,slide_id,patient_id,site,project\na/one.svs,{BARCODE},{word},{word},{word}\n")
    (slide,) = list_slides(str(folder / "c.csv"))
    assert (slide.patient_id, slide.site, slide.project) == ("TCGA-A2-A0SX", "A2", "TCGA")


def test_a_patient_that_the_barcode_denies_and_patients_that_look_alike_are_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "c.csv").write_text(f"path,slide_id,patient_id\na/one.svs,{BARCODE},P1\na/b/two.TIFF,x,p1\n")
    assert [slide.patient_id for slide in list_slides(str(folder / "c.csv"))] == ["P1", "p1"]
    alike, denied = caplog.messages
    assert "'P1' and 'p1' look alike" in alike
    assert f"patient_id is not the barcode's ({BARCODE}: P1)" in denied


@pytest.mark.parametrize("name", ["c.csv", "c.CSV", "c.tsv", "c.txt"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_cohort_of_any_separator_and_line_end_keeps_its_ids(folder: Path, name: str, end: str) -> None:
    (folder / name).write_bytes(f"path\tSlide_ID{end}a/one.svs\t0012{end}a/b/two.TIFF\t1e5{end}".encode())
    assert [slide.slide_id for slide in list_slides(str(folder / name))] == ["0012", "1e5"]


def test_a_folder_that_is_called_like_a_table_is_searched(folder: Path) -> None:
    (folder / "a").rename(folder / "slides.csv")
    assert [slide.slide_id for slide in list_slides(str(folder / "slides.csv"))] == ["one", "two"]


def test_a_parquet_cohort_says_the_same(folder: Path) -> None:
    table = pa.table({"slide_id": ["x"], "path": ["a/one.svs"], "patient_id": ["p"], "site": ["s"]})
    pq.write_table(table, folder / "c.parquet")
    (slide,) = list_slides(str(folder / "c.parquet"))
    assert slide == Slide("x", str(folder / "a/one.svs"), patient_id="p", site="s")


def test_a_tcga_barcode_fills_patient_site_and_project_where_it_parses() -> None:
    filled = with_barcode(Slide(BARCODE, "x.svs"))
    assert (filled.patient_id, filled.site, filled.project) == ("TCGA-A2-A0SX", "A2", "TCGA")
    named = with_barcode(Slide(BARCODE, "x.svs", project="TCGA-BRCA", site="Walter Reed"))
    assert (named.project, named.site) == ("TCGA-BRCA", "Walter Reed")
    for other in ("CMU-1", "TCGA-A2-A0SX", "TCGA-A2-A0SX-01A-11R-A084-07"):
        assert with_barcode(Slide(other, "x.svs")).patient_id is None


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("nothing/*.svs", "matches no file"),
        ("absent.csv", "no such file"),
        ("no_path.csv", "expected path"),
        ("empty.csv", "no rows"),
        ("hole.csv", "line 3, column path: got nothing; expected a value"),
        ("twins.csv", "names 2 files"),
        ("paths.csv", "2 columns 'path'"),
        ("sheet.xlsx", "save the sheet as CSV"),
    ],
)
def test_what_cannot_be_a_cohort_is_told_in_one_line(folder: Path, source: str, part: str) -> None:
    (folder / "no_path.csv").write_text("slide_id,file\na,b\n")
    (folder / "empty.csv").write_text("slide_id,path\n")
    (folder / "hole.csv").write_text("slide_id,path\na,a/one.svs\nb,\n")
    (folder / "twins.csv").write_text("slide_id,path\nz,a/one.svs\nz,a/b/two.TIFF\n")
    (folder / "paths.csv").write_text("path,slide_id,path\na/one.svs,a,a/b/two.TIFF\n")
    (folder / "sheet.xlsx").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=part) as caught:
        list_slides(str(folder / source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["s3://KEY:pl4nted@b/x.svs", "https://h/x.svs?X-Amz-Signature=pl4nted"])
def test_an_address_with_a_key_in_a_cohort_is_refused_untold(path: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(f"path\n{path}\n")
    with pytest.raises(ConfigError, match="a path holds a key") as caught:
        list_slides(str(tmp_path / "c.csv"))
    assert "pl4nted" not in str(caught.value)
