"""An atlas: up to 100,000 cells laid out by their embeddings, as a picture (the paper's Figure 4) and as a page."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from lemon.atlas.cells import AtlasCells, read_cells
from lemon.atlas.config import AtlasConfig
from lemon.atlas.fields import categories_of, measures_of
from lemon.atlas.figure import draw_atlas
from lemon.atlas.page import write_page
from lemon.atlas.projection import open_method, to_unit_square
from lemon.errors import EXIT_OK
from lemon.runtime.console import stage_logger
from lemon.runtime.lease import hold
from lemon.runtime.store import CIRCUMSTANCES, Store, fingerprint
from lemon.schema import MAP, marked

logger = stage_logger(__name__, "atlas")

MAP_NAME = "map.parquet"

OUTPUT_NAMES = ("atlas.html", "atlas.png", "atlas.svg", MAP_NAME)
"""What an atlas writes in its output."""


def main(config: AtlasConfig) -> int:
    """Make the atlas and log what it is; returns the exit code. Raises ConfigError."""
    with hold(config.output, stage="atlas", names=OUTPUT_NAMES) as store:
        return _make_atlas(config, store)


def _make_atlas(config: AtlasConfig, store: Store) -> int:
    place = open_method(config.method)  # before minutes are spent on reading
    cells = read_cells(config)
    circumstances = fingerprint([cells.fingerprint, config.map_settings()])
    positions = read_map(store, cells, circumstances=circumstances)
    if positions is None:
        positions = place(cells.vectors, perplexity=config.perplexity, seed=config.seed, threads=config.threads)
        write_map(store, cells, positions, circumstances=circumstances)
    size = write_views(store, cells, positions, config=config)
    logger.info(f"{len(cells.table):,} cells of {len(cells.slides)} slides by {cells.model}; look at")
    logger.info(f"  {store.uri}/atlas.html ({size / 1e6:.1f} MB; opens without a network)")
    logger.info(f"  {store.uri}/atlas.png, atlas.svg")
    return EXIT_OK


def write_views(store: Store, cells: AtlasCells, positions: np.ndarray, *, config: AtlasConfig) -> int:
    """Draw the picture and write the page; returns the page's size in bytes."""
    unit = to_unit_square(positions)
    categories = categories_of(cells.table)
    draw_atlas(
        store,
        unit=unit,
        thumbnails=cells.thumbnails,
        category=categories[0] if categories else None,
        squares=config.grid,
        title=config.title,
    )
    return write_page(
        store,
        cells,
        unit=unit,
        categories=categories,
        measures=measures_of(cells.table),
        side_px=config.slide_px,
        title=config.title,
        subtitle=subtitle_of(cells, config),
    )


def subtitle_of(cells: AtlasCells, config: AtlasConfig) -> str:
    """What is shown and how it was made, in a line."""
    slides = f"{len(cells.slides)} slide" + ("s" if len(cells.slides) != 1 else "")
    method = {"tsne": "t-SNE, perplexity", "umap": "UMAP, neighbours"}[config.method]
    return (
        f"{len(cells.table):,} cells of {slides}, drawn at random; embedded by {cells.model}; "
        f"{method} {config.perplexity:g}, cosine distance, seed {config.seed}"
    )


def read_map(store: Store, cells: AtlasCells, *, circumstances: str) -> np.ndarray | None:
    """Positions float32 [N, 2] of an earlier run with the same cells, model and settings; None where there are none."""
    if store.circumstances(MAP_NAME) != circumstances:
        return None
    table = store.read_table(MAP_NAME)
    if not table["cell_id"].equals(cells.table["cell_id"]):
        return None
    return np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)


def write_map(store: Store, cells: AtlasCells, positions: np.ndarray, *, circumstances: str) -> None:
    """Keep the positions, so that other labels or another picture cost no new map."""
    columns = [cells.table["cell_id"], cells.table["slide_id"], *(pa.array(axis) for axis in positions.T)]
    table = pa.table(columns, schema=marked(MAP, **{CIRCUMSTANCES: circumstances}))
    store.write_table(MAP_NAME, table, compression="zstd")
