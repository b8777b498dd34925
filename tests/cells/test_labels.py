"""A user's labels of cells, whatever program wrote the table."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lemon.cells.labels import read_labels
from lemon.errors import ConfigError


@pytest.mark.parametrize(
    "content",
    [
        b"cell_id,label\n0012,tumor\nb,\nc,NA\nd,-\n",
        b"cell_id,label\r0012,tumor\rb,\rc,NA\rd,-\r",
        b"Cell ID;Label\r\n0012;tumor\r\nb;\r\nc;nan\r\nd;-\r\n",
        "cell_id\tlabel\n0012\t tumor \nb\t\nc\tNone\nd\t-\n".encode("utf-16"),
    ],
)
def test_labels_are_read_from_any_spelling_of_a_table(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "l.csv").write_bytes(content)
    assert read_labels(tmp_path / "l.csv", key="labels") == {"0012": "tumor", "d": "-"}


def test_numbers_in_parquet_are_ids_and_classes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"cell_id": [7, 8, 9], "label": [1.0, None, 2.0]}), tmp_path / "l.parquet")
    assert read_labels(tmp_path / "l.parquet", key="labels") == {"7": "1", "9": "2"}


def test_classes_that_look_alike_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "l.csv").write_text("cell_id,label\nx,Tumor\ny,tumor\nz,stroma\n")
    assert len(read_labels(tmp_path / "l.csv", key="labels")) == 3
    (told,) = caplog.messages
    assert "label: 'Tumor' and 'tumor' look alike" in told


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (
            "cell_id,label\nx,a\n x ,b\n",
            r"labels: .*l\.csv, line 3: x has two labels, a and b; expected one row a cell",
        ),
        ("cell_id,label\n,a\n", r"labels: .*l\.csv, line 2, column cell_id: got nothing"),
        ("cell_id,class\nx,a\n", r"labels: .*l\.csv: no column 'label'; it has cell_id, class"),
    ],
)
def test_what_is_wrong_with_labels_is_one_line(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "l.csv").write_text(content)
    with pytest.raises(ConfigError, match=part):
        read_labels(tmp_path / "l.csv", key="labels")
