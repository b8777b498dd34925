"""Retrieval of turned and compressed copies of curated cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lemon.probe.config import ProbeSettings
from lemon.probe.measures import QUALITIES
from lemon.probe.score import OVER_FOLDS, score_task
from lemon.probe.tasks.catalogue import open_task
from lemon.probe.tasks.jpeg import compressed
from lemon.runtime.store import Store
from tests.cells_table import write_slide
from tests.probe.tasks.test_restained import tissue_cells

N = 40


def test_compression_changes_more_the_lower_the_quality_and_keeps_colours() -> None:
    cells = tissue_cells(N)
    error = [np.abs(compressed(cells, quality=quality).astype(int) - cells).mean() for quality in (100, *QUALITIES)]
    assert error == sorted(error)
    assert error[0] < 6  # colours have half the resolution
    assert error[-1] < 20
    change = compressed(cells, quality=80).mean(axis=(0, 1, 2)) - cells.mean(axis=(0, 1, 2))
    assert np.abs(change).max() < 3  # red stays red


def test_each_quality_is_a_protocol_and_all_copies_of_a_cell_lie_alike(tmp_path: Path) -> None:
    write_slide(Store(tmp_path / "cells"), "s", tissue_cells(N))
    task = open_task(f"jpeg:{tmp_path / 'cells'}", "nowhere")
    assert [protocol.name for protocol in task.protocols] == ["turned", "q80", "q50", "q20"]
    cells, turned, *rest = np.split(task.images, 5)
    assert not np.array_equal(cells, turned)
    assert np.array_equal(np.sort(cells.reshape(N, -1)), np.sort(turned.reshape(N, -1)))
    assert all(np.abs(each.astype(int) - turned).mean() < 20 for each in rest)
    # An embedding of a cell's id that gets worse with each copy.
    own, generator = np.eye(N, dtype=np.float32), np.random.default_rng(0)
    noise = [by * generator.normal(size=(N, N)).astype(np.float32) for by in (0, 0, 0.2, 0.5, 9)]
    scores = score_task(task, np.concatenate([own + each for each in noise]), ProbeSettings(bootstrap=100)).scores
    recall = {each.protocol: each.value for each in scores if (each.fold, each.metric) == (OVER_FOLDS, "recall_at_1")}
    assert recall["turned"] == 1
    assert recall["turned"] >= recall["q80"] >= recall["q50"] > recall["q20"]
    assert recall["q20"] == pytest.approx(0, abs=0.15)
