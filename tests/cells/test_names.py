from __future__ import annotations

import re
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemon.cells.names import geojson_name
from lemon.runtime.identifiers import MAX_STEM_BYTES, file_stem

ANY_ID = st.text(st.characters(), max_size=400)  # lone surrogates among them


@pytest.mark.parametrize(
    "slide_id",
    [
        "CMU-1",
        "TCGA-A2-A0SX-01Z-00-DX1.8B4F6C1A-1111-2222-3333-444455556666",
        "a b (2)[x],;@+=",
        "slide_0.ome",
        "~draft",
        "-rf",
        "con-1",
        "x" * MAX_STEM_BYTES,
    ],
)
def test_an_ordinary_id_is_its_own_name(slide_id: str) -> None:
    assert file_stem(slide_id) == slide_id


def test_other_characters_are_percent_encoded_as_they_were() -> None:
    assert file_stem("a/b:c*é") == urllib.parse.quote("a/b:c*é", safe="") == "a%2Fb%3Ac%2A%C3%A9"


@pytest.mark.parametrize(
    "slide_id",
    [
        "",
        ".",
        "..",
        "...",
        ".hidden",
        "../../etc/passwd",
        "a.tmp-b",
        "con",
        "NUL.x",
        "com1",
        "dot.",
        "blank ",
        "线" * 34,
        "x" * 300,
        "\udcff" * 90,
        "a\n/\0'\"" * 40,
        "😀" * 60,
    ],
)
def test_an_odd_or_long_id_gets_a_readable_beginning_and_a_hash(slide_id: str, tmp_path: Path) -> None:
    stem = file_stem(slide_id)
    assert re.fullmatch(r"[A-Za-z0-9_-]+![0-9a-f]{32}", stem)
    path = tmp_path / f".tmp-12345678-{Path(geojson_name(slide_id)).name}"
    path.touch()  # as a file being written: no file system refuses it
    assert path.exists()


@given(ANY_ID)
def test_a_name_is_one_short_visible_file_in_its_folder(slide_id: str) -> None:
    stem = file_stem(slide_id)
    assert stem.isascii()
    assert stem.isprintable()
    assert 0 < len(stem) <= MAX_STEM_BYTES
    assert not stem.startswith(".")
    assert not stem.endswith((".", " "))
    assert "/" not in stem
    assert "\\" not in stem
    assert ".tmp-" not in stem
    assert Path("cells", stem).parent == Path("cells")


@given(ANY_ID, ANY_ID)
def test_two_ids_have_two_names(one: str, other: str) -> None:
    assert (file_stem(one) == file_stem(other)) == (one == other)
    # Also where one id is the other's name.
    assert file_stem(file_stem(one)) != file_stem(one) or file_stem(one) == one
