"""Tables of few rows: what their files hold, and that a row comes back from a file as it was."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pytest

from lemon import schema
from lemon.runtime.shards import read_shard, write_shard
from lemon.runtime.store import Store

FILES = {
    schema.Slide: """
        slide_id:str path:str patient_id:str? project:str? organ:str? site:str? mpp:float?
    """,
    schema.DownloadRow: """
        slide_id:str file_id:str file_name:str url:str size_bytes:int md5:str status:str total_s:float
        error:str? code_version:str
    """,
    schema.SlideRow: """
        slide_id:str path:str patient_id:str? project:str? organ:str? site:str? mpp:float? mpp_assumed:bool?
        width_px:int? height_px:int? status:str n_regions:int? n_failed_regions:int? n_nuclei:int?
        n_cells:int? n_edge_cells:int? pen_share:float? fold_share:float? blurred_share:float?
        open_s:float? read_s:float? network_s:float? instances_s:float?
        write_s:float? total_s:float? area_mm2:float? s_per_mm2:float? device_share:float? peak_mib:float? error:str?
        source_size_bytes:int? source_mtime_ns:int?
        source_digest:str? mask_digest:str? nuclei_digest:str? cells_digest:str? config_fingerprint:str code_version:str
    """,
    schema.EmbeddedRow: """
        slide_id:str status:str n_cells:int? model:str model_fingerprint:str cells_digest:str?
        embeddings_digest:str? total_s:float? error:str? code_version:str
    """,
    schema.ScoreRow: """
        model:str task:str protocol:str fold:int32 metric:str value:float? n:int? seed:int?
        model_fingerprint:str? data_fingerprint:str?
    """,
    schema.RobustnessRow: """
        model:str model_fingerprint:str task:str measure:str value:float low:float? high:float? chance:float?
        n:int n_batches:int? data_fingerprint:str
    """,
    schema.SweepRow: """
        study:str point:str value:str seed:int trial:str status:str error:str? task:str? protocol:str?
        metric:str? mean:float? spread:float? n_cells:int? n_slides:int? n_organs:int?
        config_fingerprint:str? cells_fingerprint:str? model_fingerprint:str? data_fingerprint:str?
        run_id:str? encoder:str?
    """,
}
"""Column and type of each table, ? where it may be null: as they are in files of this version, which others read."""

SHORT = {"string": "str", "int64": "int", "double": "float"}

ROWS = [
    schema.Slide("a", "a.svs", organ="lung", mpp=0.25),
    schema.SlideRow("a", "a.svs", status="done", n_cells=3, mpp_assumed=False, read_s=0.5, n_regions=2),
    schema.EmbeddedRow(slide_id="a", status="failed", n_cells=0, error="no luck"),
    schema.DownloadRow(
        slide_id="a", file_id="f", file_name="a.svs", url="u", size_bytes=1 << 40, md5="0", status="done", total_s=1.5
    ),
    schema.ScoreRow(
        model="m",
        task="t",
        protocol="paper",
        fold=-1,
        metric="auroc",
        value=0.5,
        n=7,
        seed=0,
        model_fingerprint="f",
        data_fingerprint="d",
    ),
    schema.RobustnessRow(
        model="m", model_fingerprint="f", task="t", measure="croma", value=0.1, low=0.0, n=7, data_fingerprint="d"
    ),
    schema.SweepRow(study="size", point="10", value="10", seed=0, trial="size-10-s0", status="failed", error="no luck"),
]


@pytest.mark.parametrize("row", FILES)
def test_the_columns_of_files_are_those_of_this_version(row: type[schema.Row]) -> None:
    found = [
        f"{field.name}:{SHORT.get(str(field.type), str(field.type))}{'?' if field.nullable else ''}"
        for field in row.schema
    ]
    assert found == FILES[row].split()
    assert row.schema.names == [field.name for field in fields(row)]  # type: ignore[arg-type]
    assert schema.fault_of(row.schema, row.schema) is None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_a_row_comes_back_from_a_file_as_it_was(tmp_path: Path, row: schema.Row) -> None:
    store = Store(tmp_path)
    store.write_table("t.parquet", type(row).table([row, row]))
    table = store.read_table("t.parquet")
    assert table.schema.equals(row.schema, check_metadata=True)
    assert type(row).read(table.select(table.column_names[::-1])) == [row, row]


def test_a_ledger_of_before_there_was_a_column_is_read_with_nulls_there(tmp_path: Path) -> None:
    store, row = Store(tmp_path), ROWS[1]
    store.write_table("slides/a.parquet", type(row).table([row]).drop(["nuclei_digest"]))
    assert schema.SlideRow.read(store.read_tables("slides", schema=schema.SLIDES)) == [row]


def test_cells_of_before_there_was_a_column_are_read_with_nulls_there(tmp_path: Path) -> None:
    later = {*schema.FOREIGN, schema.FOCUS}
    old = pa.schema([field for field in schema.CELLS if field.name not in later], schema.CELLS.metadata)
    columns = [pa.array([b"\0" * schema.CELL_BYTES]) if name == "image" else pa.array(["0"]) for name in old.names]
    rows = pa.table(dict(zip(old.names, columns, strict=True))).cast(old)
    with write_shard(Store(tmp_path), "cells/a.parquet", old) as shard:
        shard.write(rows)
    (batch,) = read_shard(
        Store(tmp_path),
        "cells/a.parquet",
        schema=schema.CELLS,
        columns=["foreign_id", "cell_id", "foreign_probability", "focus"],
    )
    assert batch.schema.names == ["cell_id", "foreign_id", "foreign_probability", "focus"]
    assert batch.to_pylist() == [{"cell_id": "0", "foreign_id": None, "foreign_probability": None, "focus": None}]
