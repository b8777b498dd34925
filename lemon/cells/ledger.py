"""The slides table of a cells table: what happened to every slide."""

from __future__ import annotations

import pyarrow as pa

from lemon.errors import ConfigError
from lemon.runtime.ledger import Ledger
from lemon.runtime.store import Store
from lemon.schema import SLIDES, SlideRow


def cells_ledger(store: Store, *, config_fingerprint: str) -> Ledger[SlideRow]:
    """The ledger of a cells table."""
    return Ledger(store, SlideRow, facts={"config_fingerprint": config_fingerprint})


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
    return f"cells: {store.uri} holds no cells; expected the output of lemon curate"
