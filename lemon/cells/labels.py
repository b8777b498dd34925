"""Labels of cells that a user gives: a table with the columns cell_id and label."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from lemon.config import ConfigError
from lemon.runtime.store import locate


def read_labels(path: str | Path, *, key: str) -> dict[str, str]:
    """The label of each cell id in a CSV or Parquet file; empty labels are left out.

    Raises ConfigError, which names the config's ``key``: no such file, a column is absent, or a cell has two labels.
    """
    try:
        store, name = locate(path)
        content = pa.BufferReader(store.read_bytes(name))
        # Ids and classes that look like numbers are still names.
        as_text = pa_csv.ConvertOptions(column_types={"cell_id": pa.string(), "label": pa.string()})
        table = (
            pq.read_table(content) if name.endswith(".parquet") else pa_csv.read_csv(content, convert_options=as_text)
        )
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{key}: {path} not found; expected a CSV or Parquet file with cell_id, label") from None
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{key}: {path} cannot be read: {' '.join(str(error).split())}") from None
    absent = [name for name in ("cell_id", "label") if name not in table.column_names]
    if absent:
        raise ConfigError(f"{key}: {path} has columns {', '.join(table.column_names)}; expected cell_id, label")
    labels: dict[str, str] = {}
    for cell_id, label in zip(table["cell_id"].to_pylist(), table["label"].to_pylist(), strict=True):
        if label in (None, ""):
            continue
        if labels.setdefault(str(cell_id), str(label)) != str(label):
            raise ConfigError(f"{key}: {path} gives {cell_id} two labels; expected one row a cell")
    return labels
