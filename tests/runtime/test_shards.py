from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemon.runtime.shards import RowsDigest, ShardError, read_shard, write_shard
from lemon.runtime.store import Store
from lemon.schema import CELLS, CLUSTERS, EMBEDDINGS

ROWS = pa.table(
    {
        "text": pa.array(["a", None, "", "bc", "d" * 300, "e"]),
        "number": pa.array([1.5, None, float("nan"), 0.0, -1.0, 2.0]),
        "bytes": pa.array([b"ab", b"cd", b"ef", b"gh", b"ij", b"kl"], pa.binary(2)),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(12, dtype=np.float16)), 2),
        "repeated": pa.array(["x", "y", "x", None, "x", "y"]),
    }
)


def digest(*parts: pa.Table) -> str:
    rows = RowsDigest(ROWS.schema)
    for part in parts:
        rows.update(part)
    return rows.hexdigest()


@given(cuts=st.lists(st.integers(0, len(ROWS)), max_size=4), encoded=st.booleans())
def test_the_digest_is_that_of_the_rows_however_they_are_cut_and_stored(cuts: list[int], encoded: bool) -> None:
    edges = [0, *sorted(cuts), len(ROWS)]
    parts = [ROWS.slice(start, end - start) for start, end in pairwise(edges)]
    if encoded:
        place = ROWS.schema.get_field_index("repeated")
        parts = [part.set_column(place, "repeated", part["repeated"].dictionary_encode()) for part in parts]
    assert digest(*parts) == digest(pa.concat_tables([part.cast(ROWS.schema) for part in parts])) == digest(ROWS)


@pytest.mark.parametrize("column", ROWS.column_names)
def test_another_value_or_order_in_any_column_is_another_digest(column: str) -> None:
    place = ROWS.schema.get_field_index(column)
    turned = ROWS.set_column(place, column, ROWS[column].take([1, 0, 2, 3, 4, 5]))
    assert digest(turned) != digest(ROWS)


def test_null_is_neither_nothing_nor_zero() -> None:
    one, other = (ROWS.slice(1, 1).set_column(0, "text", pa.array([value], pa.string())) for value in (None, ""))
    assert digest(one) != digest(other)


def test_a_shard_is_read_only_as_the_table_and_the_rows_that_it_is_named_by(tmp_path: Path) -> None:
    store, rows = Store(tmp_path), pa.table([["a", "b"], pa.array([1, 2], pa.int16())], schema=CLUSTERS)
    with write_shard(store, "clusters/a.parquet", CLUSTERS) as shard:
        shard.write(rows)
    read = read_shard(store, "clusters/a.parquet", schema=CLUSTERS, columns=["cluster"], digest=shard.digest)
    assert [batch["cluster"].to_pylist() for batch in read] == [[1, 2]]
    for schema, columns, named in (
        (EMBEDDINGS, ["cell_id"], shard.digest),
        (CLUSTERS, ["absent"], shard.digest),
        (CLUSTERS, ["cell_id"], "another"),
        (CELLS, ["cell_id"], None),
    ):
        with pytest.raises(ShardError, match=r"clusters/a\.parquet: "):
            list(read_shard(store, "clusters/a.parquet", schema=schema, columns=columns, digest=named))
