from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from lemon.errors import ConfigError, DamagedError
from lemon.runtime.store import CIRCUMSTANCES, TEMPORARY, Store, file_fingerprint, fingerprint
from lemon.schema import CLUSTERS


def test_a_file_appears_only_when_its_writer_ends_well(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    with store.write("a/b.bin") as stream:
        stream.write(b"half")
        assert not store.exists("a/b.bin")
        assert store.list("a") == []
    assert store.read_bytes("a/b.bin") == b"half"


def test_a_writer_that_fails_leaves_the_earlier_file_and_no_temporary(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_bytes("x", b"old")
    with pytest.raises(RuntimeError), store.write("x") as stream:
        stream.write(b"new")
        raise RuntimeError
    assert store.read_bytes("x") == b"old"
    assert store.list("") == ["x"]
    assert not list(tmp_path.glob(".lemon-tmp-*"))


def test_leftovers_of_killed_writers_are_removed_but_not_those_of_an_output_inside(tmp_path: Path) -> None:
    store, inner = Store(tmp_path), Store(tmp_path / "trials" / "a")
    inner.check_writable()
    for folder in ("cells", "trials/a/cells"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{TEMPORARY}00000000-1.parquet").touch()
        (tmp_path / folder / "mine.txt").touch()
    store.remove_temporaries()
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["mine.txt"]
    assert len(list((tmp_path / "trials" / "a" / "cells").iterdir())) == 2


def test_tables_and_json_make_the_round_trip(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    table = pa.table({"a": [1, 2]})
    store.write_table("t.parquet", table)
    store.write_json("j.json", {"b": [1]})
    assert store.read_table("t.parquet") == table
    assert store.read_json("j.json") == {"b": [1]}


def test_an_absent_folder_lists_as_empty_and_deletes_in_silence(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.list("nowhere") == []
    store.delete("nowhere")


def test_an_unknown_scheme_is_refused_with_what_is_expected() -> None:
    with pytest.raises(ValueError, match="expected a local path or s3://"):
        Store("floppy://a")


def test_a_fingerprint_depends_on_values_and_not_on_the_order_of_keys(tmp_path: Path) -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})
    (tmp_path / "f").write_bytes(b"x")
    first = file_fingerprint(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"y")
    assert file_fingerprint(tmp_path / "f") != first


def test_a_table_tells_what_it_was_made_from(tmp_path: Path) -> None:
    store = Store(tmp_path)
    table = pa.table({"a": [1]})
    store.write_table("silent.parquet", table)
    store.write_table("told.parquet", table.replace_schema_metadata({CIRCUMSTANCES: "abc"}))
    assert store.circumstances("told.parquet") == "abc"
    assert store.circumstances("silent.parquet") is None
    assert store.circumstances("absent.parquet") is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"a": 1', b"[]", b"null", b"3", b"\xff\xfe", b"\0" * 40, b"[" * 100_000, b'{"name": 1, "beat": "x"}'],
    ids=["empty", "cut", "cut2", "list", "null", "number", "bytes", "zeros", "deep", "types"],
)
def test_damaged_json_is_one_line_with_its_file_and_a_remedy(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(DamagedError) as caught:
        Store(tmp_path).read_json("run.json", dict[str, str])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path}/run.json: is damaged")
    assert "run again" in line


@pytest.mark.parametrize("uri", ["", "  "])
def test_an_empty_path_is_not_the_working_directory(uri: str) -> None:
    with pytest.raises(ValueError, match="empty path"):
        Store(uri)


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"PAR1 and no table PAR1"])
def test_a_damaged_row_of_a_ledger_is_one_line_with_its_file_and_a_remedy(tmp_path: Path, damage: bytes) -> None:
    store = Store(tmp_path)
    store.write_table("slides/a.parquet", CLUSTERS.empty_table())
    (tmp_path / "slides" / "a.parquet").write_bytes(damage)
    with pytest.raises(ConfigError, match=r"slides/a\.parquet is damaged .* delete it, and the job that wrote it"):
        store.read_tables("slides", schema=CLUSTERS)
    (tmp_path / "slides" / "a.parquet").unlink()
    store.write_table("slides/a.parquet", pa.table({"a": [1]}))
    with pytest.raises(ConfigError, match=r"slides/a\.parquet is no table of lemon's"):
        store.read_tables("slides", schema=CLUSTERS)
