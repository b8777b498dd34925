"""A small atlas to start from: cells of one colour each, of two slides, one of which has a malicious name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import shapely

from lemon.atlas.config import AtlasConfig
from lemon.cells.ledger import cells_ledger, rows_with_cells
from lemon.embed import job as embedding
from lemon.embed.config import EmbedConfig
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.slides.synthetic import write_pyramid
from tests.cells_table import write_slide
from tests.embed.tables import write_encoder

MALICIOUS = """</script><img src=x onerror="alert('1')">&amp;,"""
SLIDES = {"plain": 70, MALICIOUS: 50}
K = 3


def flat_images(count: int, *, seed: int) -> np.ndarray:
    """Images of one random colour each, uint8 [count, 60, 60, 3]."""
    colors = np.random.default_rng(seed).integers(20, 236, (count, 1, 1, 3), np.uint8)
    return np.broadcast_to(colors, (count, 60, 60, 3)).copy()


SLIDE_PX = 600, 400  # width and height of a slide, at 0.25 um/px


def write_cells(store: Store) -> None:
    """The slides, with random areas and places; the file of the plain one is there, the other's is not."""
    slide = Path(store.uri).parent / "plain.tiff"
    write_pyramid(slide, np.full((*SLIDE_PX[::-1], 3), (230, 180, 210), np.uint8), mpp=0.25)
    for seed, (slide_id, count) in enumerate(SLIDES.items()):
        generator = np.random.default_rng(seed)
        area = generator.uniform(20, 90, count).astype(np.float32)
        places = generator.permutation(12 * 8)[:count]  # of a grid, so that each can be hit alone
        x, y = 25.0 + 50 * (places % 12), 25.0 + 50 * (places // 12)
        polygons = [shapely.Point(*place).buffer(10).wkb for place in zip(x, y, strict=True)]
        arrays = {"area_um2": area, "x_level0_px": x, "y_level0_px": y, "mpp": np.full(count, 0.25)}
        images = flat_images(count, seed=seed)
        write_slide(store, slide_id, images, arrays=arrays | {"polygon": polygons}, organ="lung" if seed else None)
    sizes = {"mpp": 0.25, "width_px": SLIDE_PX[0], "height_px": SLIDE_PX[1]}
    for row in rows_with_cells(store):
        path = str(slide if row.slide_id == "plain" else slide.with_name("gone.tiff"))
        cells_ledger(store, config_fingerprint="test").commit(replace(row, path=path, **sizes))


def write_embedded(folder: Path) -> tuple[Store, Store]:
    """Cells and their embeddings, as the jobs write them."""
    cells, embeddings = Store(folder / "cells"), Store(folder / "embeddings")
    write_cells(cells)
    model = write_encoder(folder / "run")
    words = [f"model={model}", f"cells={cells.uri}", f"output={embeddings.uri}", "device=cpu", f"clusters.k={K}"]
    assert embedding.main(load("embed", words, EmbedConfig)) == 0
    return cells, embeddings


def write_other(folder: Path) -> Store:
    """The same cells by an encoder of other weights."""
    model = write_encoder(folder / "other-run", seed=1)
    words = [f"model={model}", f"cells={folder / 'cells'}", f"output={folder / 'other'}", "device=cpu"]
    assert embedding.main(load("embed", [*words, "clusters.k=null"], EmbedConfig)) == 0
    return Store(folder / "other")


def config_for(cells: Store, embeddings: Store, output: Path | str, *words: str) -> AtlasConfig:
    """The config of an atlas of all cells."""
    given = [f"cells={cells.uri}", f"embeddings={embeddings.uri}", f"output={output}", "variant=smoke"]
    return load("atlas", [*given, *words], AtlasConfig)
