"""An atlas: cells laid out by their embeddings, as a picture (the paper's Figure 4) and as a page, a file or served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pyarrow as pa

from lemon.atlas.cells import AtlasCells, Chosen, choose_cells, read_cells
from lemon.atlas.compare import CELLS, SHEET, Comparison, neighbour_overlap, write_comparison
from lemon.atlas.config import AtlasConfig
from lemon.atlas.fields import categories_of, measures_of
from lemon.atlas.figure import draw_atlas
from lemon.atlas.neighbours import Neighbours
from lemon.atlas.page import PageData, list_facts, page_data, write_page
from lemon.atlas.projection import map_cells, open_method, place_others, to_unit_square
from lemon.atlas.served import FOLDER, Served, circumstances_of, is_written, open_served, write_served
from lemon.atlas.server import HOST, AtlasServer, serve
from lemon.cells.ledger import rows_with_cells
from lemon.embed.read import open_embeddings
from lemon.errors import EXIT_OK, ConfigError
from lemon.runtime.console import stage_logger
from lemon.runtime.lease import hold
from lemon.runtime.records import INTERNAL_FOLDER
from lemon.runtime.scratch import scratch_folder
from lemon.runtime.store import CIRCUMSTANCES, Store, fingerprint
from lemon.runtime.ui import check_port
from lemon.schema import MAP, marked

logger = stage_logger(__name__, "atlas")

MAP_NAME, AGAINST_NAME = "map.parquet", "map-against.parquet"

OUTPUT_NAMES = ("atlas.html", "atlas.png", "atlas.svg", MAP_NAME, AGAINST_NAME, CELLS, SHEET, FOLDER)
"""What an atlas writes in its output."""


def main(config: AtlasConfig) -> int:
    """Make the atlas and log what it is, or serve it until Ctrl-C; returns the exit code. Raises ConfigError."""
    if config.serve:
        return _serve(config)
    with hold(config.output, stage="atlas", names=OUTPUT_NAMES) as store:
        return _make_atlas(config, store)


def _make_atlas(config: AtlasConfig, store: Store) -> int:
    place = open_method(config.method)  # before minutes are spent on reading
    cells = read_cells(config)
    maps = _maps(config, store, cells, place)
    size = write_views(store, cells, maps, config=config)
    logger.info(f"{len(cells.table):,} cells of {len(cells.slides)} slides by {cells.model}; look at")
    logger.info(f"  {store.uri}/atlas.html ({size / 1e6:.1f} MB; opens without a network)")
    logger.info(f"  {store.uri}/atlas.png, atlas.svg")
    return EXIT_OK


def _serve(config: AtlasConfig) -> int:
    check_port(config.port)  # before minutes are spent
    served = _prepare(config)
    server = AtlasServer(served, _neighbours(config, served), port=config.port)
    logger.info(f"{served.count:,} cells of {len(served.slides)} slides; look at")
    logger.info(f"  http://{HOST}:{server.port}/ (from this machine alone; Ctrl-C ends it)")
    serve(server)
    logger.info("ended; the same command serves it again at once")
    return EXIT_OK


def _prepare(config: AtlasConfig) -> Served:
    """Write what is served, unless it is there, made from the same."""
    with hold(config.output, stage="atlas", names=OUTPUT_NAMES) as store:
        if not store.is_local:
            raise ConfigError(f"output: got {store.uri}, but an atlas is served from a disk; expected a local folder")
        chosen = choose_cells(config)
        settings = config.map_settings() | {
            "n_cells": config.n_cells,
            "title": config.title,
            "labels": None if chosen.labels is None else fingerprint(chosen.labels),
            "k": config.k,
        }
        circumstances = circumstances_of(chosen, settings)
        if not is_written(store, circumstances):
            _write_served(config, store, chosen, circumstances=circumstances)
        served = open_served(store)
    rows = {row.slide_id: row for row in rows_with_cells(chosen.selection.store)}  # where the files are now
    slides = tuple(rows[row.slide_id] for row in served.slides)
    return replace(served, slides=slides, facts=served.facts | list_facts(chosen.listed))


def _write_served(config: AtlasConfig, store: Store, chosen: Chosen, *, circumstances: str) -> None:
    place = open_method(config.method)
    with scratch_folder(store.path(INTERNAL_FOLDER)) as scratch:  # of gigabytes: on the disk that has room for it
        cells = read_cells(config, chosen, scratch=scratch)
        data = _page_data(store, cells, _maps(config, store, cells, place), config=config)
        size = write_served(store, cells, data, circumstances=circumstances)
    logger.info(f"{store.uri}/{FOLDER}: {size / 1e6:,.0f} MB")


def _neighbours(config: AtlasConfig, served: Served) -> Neighbours:
    """With the index of ``lemon find`` where that is there, up to date, and can be read."""
    if find_spec("faiss") is not None:
        from lemon.find.index import known_index

        embeddings = open_embeddings(config.embeddings)
        index = known_index(embeddings)
        if index is not None:
            logger.info("neighbours by the index of lemon find")
            return Neighbours(served, embeddings=embeddings, index=index)
    return Neighbours(served)


def _maps(config: AtlasConfig, store: Store, cells: AtlasCells, place: Callable[..., np.ndarray]) -> list[np.ndarray]:
    """The map by each encoder, float32 [N, 2], of an earlier run where it is of the same, else a new one.

    Cells that were added to the sample are placed on the sample's map, which thus stays as it was.
    """
    wanted = [(MAP_NAME, cells.vectors, cells.fingerprint)]
    if cells.against is not None:
        wanted.append((AGAINST_NAME, cells.against.vectors, cells.against.fingerprint))
    settings: dict[str, Any] = {"perplexity": config.perplexity, "seed": config.seed, "threads": config.threads}
    maps, n_drawn = [], len(cells.table) - cells.n_added
    drawn = cells.table[:n_drawn]
    for name, vectors, of in wanted:
        circumstances = fingerprint([of, config.map_settings()])
        positions = read_map(store, name, drawn, circumstances=circumstances)
        if positions is None:
            positions = map_cells(place, vectors[:n_drawn], **settings)
            write_map(store, name, drawn, positions, circumstances=circumstances)
        maps.append(place_others(positions, vectors, seed=config.seed, threads=config.threads))
    return maps


def write_views(store: Store, cells: AtlasCells, maps: Sequence[np.ndarray], *, config: AtlasConfig) -> int:
    """Draw the picture and write the page; returns the page's size in bytes."""
    categories = categories_of(cells.table)
    draw_atlas(
        store,
        unit=to_unit_square(maps[0]),
        thumbnails=cells.thumbnails,
        category=categories[0] if categories else None,
        squares=config.grid,
        title=config.title,
    )
    return write_page(store, cells, _page_data(store, cells, maps, config=config), side_px=config.slide_px)


def _page_data(store: Store, cells: AtlasCells, maps: Sequence[np.ndarray], *, config: AtlasConfig) -> PageData:
    comparison = None
    if cells.against is not None:
        logger.info(f"comparing the {config.k} nearest of {len(cells.table):,} cells by two encoders")
        overlap = neighbour_overlap(cells.vectors, cells.against.vectors, k=config.k)
        comparison = Comparison(overlap, config.k, (cells.model, cells.against.model))
        write_comparison(store, cells, comparison)
        logger.info(f"{comparison.told}; {CELLS}, {SHEET}")
    first, *second = (to_unit_square(positions) for positions in maps)
    return page_data(
        cells,
        unit=first,
        against=(second[0], comparison) if comparison else None,
        categories=categories_of(cells.table),
        measures=measures_of(cells.table),
        title=config.title,
        subtitle=subtitle_of(cells, config),
    )


def subtitle_of(cells: AtlasCells, config: AtlasConfig) -> str:
    """What is shown and how it was made, in a line."""
    slides = f"{len(cells.slides)} slide" + ("s" if len(cells.slides) != 1 else "")
    method = {"tsne": "t-SNE, perplexity", "umap": "UMAP, neighbours"}[config.method]
    added = f", and {cells.n_added:,} that were named" if cells.n_added else ""
    n_drawn = len(cells.table) - cells.n_added
    drawn = ", all there are" if n_drawn == sum(row.n_cells for row in cells.slides) else f", drawn at random{added}"
    return (
        f"{n_drawn:,} cells of {slides}{drawn}; embedded by {cells.model}; "
        f"{method} {config.perplexity:g}, cosine distance, seed {config.seed}"
    )


def read_map(store: Store, name: str, cells: pa.Table, *, circumstances: str) -> np.ndarray | None:
    """Positions float32 [N, 2] of an earlier run with the same cells, model and settings; None where there are none."""
    if store.circumstances(name) != circumstances:
        return None
    table = store.read_table(name)
    if not table["cell_id"].equals(cells["cell_id"]):
        return None
    return np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)


def write_map(store: Store, name: str, cells: pa.Table, positions: np.ndarray, *, circumstances: str) -> None:
    """Keep the positions, so that other labels or another picture cost no new map."""
    columns = [cells["cell_id"], cells["slide_id"], *(pa.array(axis) for axis in positions.T)]
    table = pa.table(columns, schema=marked(MAP, **{CIRCUMSTANCES: circumstances}))
    store.write_table(name, table, compression="zstd")
