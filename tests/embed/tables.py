"""What tests of embedding start from: a tiny encoder on disk, and a small cells table with polygons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import torch

from lemon.embed import stream
from lemon.encoders.config import LEMON_MEAN, LEMON_STD, EncoderConfig
from lemon.encoders.export import CellInput, export_encoder
from lemon.encoders.vit import build_vit
from lemon.runtime.store import Store
from tests.cells_table import write_slide

WIDTH = 32


SLIDES = {"a": 40, "b c": 30, "d": 1}
"""Cells of the slides of the fixture ``cells``."""


def write_encoder(folder: Path, *, seed: int = 0) -> Path:
    """A run's output with an untrained encoder of 32 values."""
    torch.manual_seed(seed)
    config = EncoderConfig(name="vit_test", dim=WIDTH, depth=1, heads=2)
    export_encoder(build_vit(config), folder / "encoder", cell_input=CellInput(LEMON_MEAN, LEMON_STD))
    return folder


def write_cells(
    store: Store,
    slide_id: str,
    count: int,
    *,
    seed: int = 0,
    organ: str | None = "breast",
    foreign_ids: Sequence[str] | None = None,
) -> None:
    """A slide of ``count`` cells: noise for images, ellipses for polygons, in small row groups."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 60, 60, 3), np.uint8)
    center = generator.uniform(50, 4000, (count, 2))
    arrays: dict[str, Any] = {
        "x_level0_px": center[:, 0],
        "y_level0_px": center[:, 1],
        "mpp": np.full(count, 0.25),
        "area_um2": generator.uniform(20, 90, count),
        "polygon": list(shapely.to_wkb(shapely.buffer(shapely.points(center), 12))),
    }
    if foreign_ids is not None:
        arrays["foreign_id"] = list(foreign_ids)
    write_slide(store, slide_id, images, arrays=arrays, row_group_size=16, organ=organ)


@contextmanager
def killed_at(batch: int) -> Iterator[None]:
    """Raises KeyboardInterrupt where the ``batch``-th batch of images would be encoded, counted from 1."""
    real, calls = stream.encode_images, 0

    def encode(*args: Any, **kwargs: Any) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == batch:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "encode_images", encode)
        yield
