"""Tables as people save them read back to the values that were meant, or are refused in one line."""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import logging
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemon.errors import ConfigError
from lemon.runtime.identifiers import trimmed
from lemon.runtime.tables import ANY_NUMBER, MISSING, Column, Form, UserTable, read_user_table

FORM = Form(
    "slides: cohort",
    (
        Column("path", filled=True),
        Column("slide_id", required=False),
        Column("patient_id", required=False),
        Column("mpp", required=False, number=(0.05, 20.0), unit="um/px"),
    ),
)

# --- what is meant is what is read ------------------------------------------------------------------------------------

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252")
ENDS = ("\n", "\r\n", "\r")
SIGNS = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])
CP1252 = st.sampled_from([chr(code) for code in range(32, 127)] + list("äöüßéèñ€\u2013\u2019"))


def values_of(signs: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    inside = st.text(st.one_of(signs, st.sampled_from(list('",;\t\n0.-'))), min_size=1, max_size=12)
    return inside.map(trimmed).filter(lambda text: text.casefold() not in MISSING)


def written(rows: list[list[str]], *, separator: str, end: str, quoting: Any) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator, lineterminator="\n", quoting=quoting)
    writer.writerows(rows)
    # What is a line end inside quotes is one in the file, too: whoever saves for a Mac turns both.
    return stream.getvalue().replace("\n", end)


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_every_encoding_separator_line_end_and_quoting_reads_back_to_the_same_values(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    encoding = data.draw(st.sampled_from(ENCODINGS))
    end = data.draw(st.sampled_from(ENDS))
    separator = data.draw(st.sampled_from([",", ";", "\t"]))
    value = values_of(CP1252 if encoding == "cp1252" else SIGNS)
    rows = data.draw(st.lists(st.tuples(value, value, value), min_size=1, max_size=5))
    quoting = data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    text = written(
        [["slide_id", "path", "patient_id"], *map(list, rows)], separator=separator, end=end, quoting=quoting
    )
    file = tmp_path_factory.mktemp("table") / "c.csv"
    file.write_bytes(text.encode(encoding))
    table = read_user_table(file, form=FORM)
    meant = [tuple(trimmed(each.replace("\n", end)) for each in row) for row in rows]
    assert list(zip(*(table.columns[name] for name in ("slide_id", "path", "patient_id")), strict=True)) == meant


def read(folder: Path, content: str | bytes, form: Form = FORM, name: str = "c.csv") -> UserTable:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_user_table(folder / name, form=form)


@pytest.mark.parametrize(
    "text", ["0012", "1e5", "True", "2024-01-02", "1.0", "1,5", "inf", "-5", "0x1F", "=1+1", "1_0"]
)
@pytest.mark.parametrize("end", ENDS)
def test_ids_stay_as_they_are_written(tmp_path: Path, text: str, end: str) -> None:
    table = read(tmp_path, f'path,slide_id{end}a.svs,"{text}"{end}b.svs,x{end}')
    assert table.columns["slide_id"] == [text, "x"]
    assert list(table.lines) == [2, 3]


@pytest.mark.parametrize(
    "word", ["", " ", "NA", "na", "NaN", "N/A", "#N/A", "None", "null", "NULL", "-", "--", " nan "]
)
def test_words_for_nothing_are_nothing_and_are_told(
    tmp_path: Path, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = read(tmp_path, f"path,patient_id\na.svs,{word}\nb.svs,p\n")
    assert table.columns["patient_id"] == [None, "p"]
    told = [line for line in caplog.messages if "read as no value" in line]
    assert len(told) == (1 if word.strip() else 0)


def test_blanks_around_headers_and_values_go_and_those_inside_stay(tmp_path: Path) -> None:
    blanks = " \u00a0\u200b\ufeff"
    table = read(tmp_path, f'{blanks}path{blanks}, slide_id\n{blanks}a b.svs , "  X "\n')
    assert list(table.rows()) == [{"path": "a b.svs", "slide_id": "X"}]


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\npath;slide_id\na,b.svs;x\n",
        '"sep=;"\r\npath;slide_id\r\na,b.svs;x\r\n',
        "\n\npath\tslide_id\n\na,b.svs\tx\n\t\n\n",
        '"path";"slide_id";\n"a,b.svs";"x";\n',
        "path;slide_id;note, of a, b, c\na,b.svs;x;\n",
        ' "path" , "slide_id" \n "a,b.svs" ,"x"  \n',
        "path\tslide_id\r\r\na,b.svs\tx\r\r\n\x1a",
    ],
)
def test_what_excel_and_old_systems_add_is_no_row(tmp_path: Path, text: str) -> None:
    assert list(read(tmp_path, text).rows()) == [{"path": "a,b.svs", "slide_id": "x"}]


@pytest.mark.parametrize("header", ["Slide_ID", "slide id", "SLIDE-ID", "SlideId", " slide.id "])
def test_a_header_that_is_spelled_otherwise_is_that_column_and_is_told(
    tmp_path: Path, header: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert read(tmp_path, f"path,{header}\na.svs,007\n").columns["slide_id"] == ["007"]
    assert any("is read as slide_id" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("slid_id", "1 column is not used (slid_id); 'slid_id': did you mean slide_id?"),
        ("patient", "did you mean patient_id?"),
        ("stage", "1 column is not used (stage)"),
    ],
)
def test_a_column_that_is_not_known_is_told_with_the_nearest_name(
    tmp_path: Path, header: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = read(tmp_path, f"path,{header}\na.svs,1\n")
    assert list(table.columns) == ["path"]
    assert any(told in line for line in caplog.messages)
    assert table.notes == tuple(caplog.messages)


def test_a_table_as_expected_has_nothing_to_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert read(tmp_path, "path,slide_id,mpp\na.svs,x,0.25\n").notes == ()
    assert caplog.messages == []


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["25", "inf", "-inf", "nan?", "0", "-0.25", "1e999", "0.25 um", "1_0", "0x1", "\u0660.\u0662", "True"]
)
def test_numbers_that_cannot_be_are_told_with_their_line_and_column(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"c\.csv, line 3, column mpp: got .*; expected 0\.05 to 20 um/px"):
        read(tmp_path, f"path,mpp\na.svs,0.25\nb.svs,{text}\n")


@pytest.mark.parametrize(("text", "value"), [("0.25", 0.25), ("2.5e-1", 0.25), (".5", 0.5), ("+1", 1), (" 20 ", 20)])
def test_numbers_are_read(tmp_path: Path, text: str, value: float) -> None:
    assert read(tmp_path, f"path,mpp\na.svs,{text}\n").columns["mpp"] == [value]


def test_a_decimal_comma_is_read_where_commas_do_not_separate(tmp_path: Path) -> None:
    assert read(tmp_path, "path;mpp\na.svs;0,25\n").columns["mpp"] == [0.25]
    with pytest.raises(ConfigError, match="line 2, column mpp: got '0,25'"):
        read(tmp_path, 'path,mpp\na.svs,"0,25"\n')


# --- Parquet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "meant"),
    [
        ([7, None], ["7", None]),
        ([7.0, float("nan")], ["7", None]),
        ([7.5, None], ["7.5", None]),
        ([True, None], ["True", None]),
        ([b"x ", None], ["x", None]),
        ([" NA ", "007"], [None, "007"]),
        ([datetime.date(2024, 1, 2), None], ["2024-01-02", None]),
        ([Decimal("1.50"), None], ["1.50", None]),
        (pa.array(["a", None]).dictionary_encode(), ["a", None]),
        (pa.array([1, 2], pa.uint8()), ["1", "2"]),
    ],
)
def test_ids_of_other_types_in_parquet_are_text_as_a_person_writes_it(tmp_path: Path, values: Any, meant: Any) -> None:
    table = pa.table({"path": ["a.svs", "b.svs"], "slide_id": values, "image": [b"\xff\x00", b""], "more": [[1], [2]]})
    pq.write_table(table, tmp_path / "c.parquet")
    found = read_user_table(tmp_path / "c.parquet", form=FORM)
    assert found.columns["slide_id"] == meant
    assert found.where(1).endswith("c.parquet, row 2")


def test_parquet_is_known_by_its_content(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.svs"], "mpp": [0.25]}), tmp_path / "c.csv")
    assert list(read_user_table(tmp_path / "c.csv", form=FORM).rows()) == [{"path": "a.svs", "mpp": 0.25}]


@pytest.mark.parametrize("value", [math.inf, 25.0, 0.0, 10**400])
def test_numbers_in_parquet_have_bounds(tmp_path: Path, value: float) -> None:
    column = [str(value)] if isinstance(value, int) else [value]
    pq.write_table(pa.table({"path": ["a.svs"], "mpp": column}), tmp_path / "c.parquet")
    with pytest.raises(ConfigError, match="row 1, column mpp: got"):
        read_user_table(tmp_path / "c.parquet", form=FORM)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty; expected a CSV or Parquet file with path, slide_id"),
        (b"\xff\xfe", "empty"),
        (b"\n\n", "empty"),
        (b",,\n,,\n", "no header"),
        (b"path,slide_id\n", "no rows behind its header"),
        (b"path,path\na,b\n", "2 columns 'path'; expected one"),
        (b"path,Path\na,b\n", "the columns path and Path are both path; expected one"),
        (b"path,note,note\na,b,c\n", "2 columns 'note'"),
        (b"file,slide_id\na,b\n", "no column 'path'; it has file, slide_id; expected path"),
        (b"pth,slide_id\na,b\n", "rename 'pth'?"),
        (b"path,slide_id\na,b\nc\n", "line 3: has 1 values for 2 columns"),
        (b"path,slide_id\na,b\n\nc,d,e\n", "line 4: has 3 values for 2 columns"),
        (b'path,slide_id\r"a\rb",c\rd\r', "line 4: has 1 values"),
        (b'path,slide_id\na,b\n"c,d\ne,f\n', "line 3: a quoted value has no end"),
        (b"path,slide_id\na,b\x00\n", "line 2: holds a NUL byte"),
        ("path,slide_id\na,b\n".encode("utf-16-le"), "holds a NUL byte"),
        (b"path,slide_id\na,\x07\n", "line 2: holds the control character U+0007"),
        (b'"fi\nle",slide_id\n,b\n', "no column 'path'; it has fi le, slide_id"),
        (b"path,slide_id\n,b\n", "line 2, column path: got nothing; expected a value"),
        (b"path,slide_id\nNA,b\n", "line 2, column path: got NA"),
        (b"PK\x03\x04rest", "an Excel workbook"),
        (b"\x1f\x8brest", "compressed (gzip)"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"PAR1 broken", "cannot be read as Parquet"),
        (bytes(range(1, 256)), "neither UTF-8 nor"),
        (b"path,slide_id\na,\x81\x8d\n", "neither UTF-8 nor Windows-1252"),
        (b"\xef\xbb\xbfpath\n\xff\n", "not UTF-8 text"),
        (b"\xff\xfep\x00a", "not UTF-16 text"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path: Path, content: bytes, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, content)
    assert part in str(caught.value)
    assert str(caught.value).startswith(f"slides: cohort {tmp_path}/c.csv")
    assert "\n" not in str(caught.value)
    assert "\r" not in str(caught.value)


def test_a_file_that_is_absent_a_folder_or_a_workbook_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name, part in {
        "absent.csv": "no such file",
        "folder.csv": "a folder",
        "sheet.xlsx": "save the sheet as CSV",
    }.items():
        with pytest.raises(ConfigError, match=part) as caught:
            read_user_table(tmp_path / name, form=FORM)
        assert "\n" not in str(caught.value)


def test_windows_1252_is_read_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(tmp_path, "path\nMüller.svs\n".encode("cp1252")).columns["path"] == ["Müller.svs"]
    assert "read as Windows-1252" in caplog.text


@given(content=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_table_or_a_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for start in (b"", b"path\n", b"\xff\xfe", b"PAR1"):
        with contextlib.suppress(ConfigError):
            read(folder, start + content)


def test_bounds_are_spoken_of_as_what_they_are() -> None:
    assert Column("x", number=ANY_NUMBER).expected == "a number"
    assert Column("x", number=(0, math.inf), unit="bytes").expected == "0 or more bytes"
