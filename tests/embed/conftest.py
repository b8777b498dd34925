"""A cells table of three slides, and an encoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lemon.runtime.store import Store
from tests.embed.tables import SLIDES, write_cells, write_encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture
def cells(tmp_path: Path) -> Store:
    store = Store(tmp_path / "cells")
    for seed, (slide_id, count) in enumerate(SLIDES.items()):
        write_cells(store, slide_id, count, seed=seed)
    return store
