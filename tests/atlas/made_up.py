"""A small atlas to start from: cells of one colour each, of two slides, one of which has a malicious name."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lemon.atlas.config import AtlasConfig
from lemon.embed import job as embedding
from lemon.embed.config import EmbedConfig
from lemon.runtime.config import load
from lemon.runtime.store import Store
from tests.cells_table import write_slide
from tests.embed.tables import write_encoder

MALICIOUS = """</script><img src=x onerror="alert('1')">&amp;,"""
SLIDES = {"plain": 70, MALICIOUS: 50}
K = 3


def flat_images(count: int, *, seed: int) -> np.ndarray:
    """Images of one random colour each, uint8 [count, 60, 60, 3]."""
    colors = np.random.default_rng(seed).integers(20, 236, (count, 1, 1, 3), np.uint8)
    return np.broadcast_to(colors, (count, 60, 60, 3)).copy()


def write_cells(store: Store) -> None:
    """The slides, with random areas."""
    for seed, (slide_id, count) in enumerate(SLIDES.items()):
        area = np.random.default_rng(seed).uniform(20, 90, count).astype(np.float32)
        images = flat_images(count, seed=seed)
        write_slide(store, slide_id, images, arrays={"area_um2": area}, organ="lung" if seed else None)


def write_embedded(folder: Path) -> tuple[Store, Store]:
    """Cells and their embeddings, as the jobs write them."""
    cells, embeddings = Store(folder / "cells"), Store(folder / "embeddings")
    write_cells(cells)
    model = write_encoder(folder / "run")
    words = [f"model={model}", f"cells={cells.uri}", f"output={embeddings.uri}", "device=cpu", f"clusters.k={K}"]
    assert embedding.main(load("embed", words, EmbedConfig)) == 0
    return cells, embeddings


def config_for(cells: Store, embeddings: Store, output: Path | str, *words: str) -> AtlasConfig:
    """The config of an atlas of all cells."""
    given = [f"cells={cells.uri}", f"embeddings={embeddings.uri}", f"output={output}", "variant=smoke"]
    return load("atlas", [*given, *words], AtlasConfig)
