"""Labels of cells that a user gives: a table with the columns cell_id and label."""

from __future__ import annotations

import logging
from pathlib import Path

from lemon.errors import ConfigError
from lemon.runtime.identifiers import look_alikes_line
from lemon.runtime.tables import Column, Form, read_user_table

logger = logging.getLogger(__name__)


def read_labels(path: str | Path, *, key: str) -> dict[str, str]:
    """The label of each cell id in a CSV or Parquet file; empty labels are left out.

    Raises ConfigError, which names the config's ``key``: no such file, a column is absent, or a cell has two labels.
    """
    dashes = frozenset(["-", "--"])  # a class, beside +
    columns = Column("cell_id", filled=True), Column("label", keep=dashes)
    table = read_user_table(path, form=Form(f"{key}:", columns))
    labels: dict[str, str] = {}
    for index, (cell_id, label) in enumerate(zip(*table.columns.values(), strict=True)):
        if label is not None and labels.setdefault(cell_id, label) != label:
            where = f"{table.where(index)}: {cell_id} has two labels, {labels[cell_id]} and {label}"
            raise ConfigError(f"{where}; expected one row a cell")
    if line := look_alikes_line(f"{table.place}: label", set(labels.values())):
        logger.warning("%s", line)
    return labels
