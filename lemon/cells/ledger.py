"""The slides table of a cells table: what happened to every slide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from lemon.errors import ConfigError
from lemon.runtime.ledger import Ledger
from lemon.runtime.store import Store
from lemon.schema import SLIDE_STATUSES, SLIDES, EmbeddedRow, SlideRow


def cells_ledger(store: Store, *, config_fingerprint: str) -> Ledger[SlideRow]:
    """The ledger of a cells table."""
    return Ledger(store, SlideRow, facts={"config_fingerprint": config_fingerprint})


def tell_statuses(rows: Sequence[SlideRow | EmbeddedRow]) -> str:
    """Print the reason of each row that has one; returns how many slides are done, partial and failed, in words."""
    for row in rows:
        if row.error:
            print(f"  {row.slide_id}: {row.status}: {row.error}")
    counts = Counter(row.status for row in rows)
    return ", ".join(f"{counts[status]} {status}" for status in SLIDE_STATUSES)


def read_ledger(store: Store) -> pa.Table:
    """The slides table of an output, sorted by slide id; empty where there is none. Raises ConfigError."""
    return store.read_tables("slides", schema=SLIDES).sort_by("slide_id")


def rows_with_cells(store: Store) -> list[SlideRow]:
    """The ledger's rows of slides that have cells. Raises ConfigError where there are none."""
    rows = [row for row in SlideRow.read(read_ledger(store)) if row.status != "failed" and row.n_cells]
    if not rows:
        raise ConfigError(_no_cells(store))
    return rows


def require_cells(cells: str) -> None:
    """Raises ConfigError where a path is no cells table, by a look at its folder alone."""
    try:
        store = Store(cells)
    except ValueError as error:
        raise ConfigError(f"cells: {error}") from None
    if not store.entries("slides"):
        raise ConfigError(_no_cells(store))


def _no_cells(store: Store) -> str:
    return f"cells: {store.uri} holds no cells; expected the output of jobs/curate.py"
