"""Retrieval of re-stained, turned copies of curated cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lemon.probe.config import ProbeSettings
from lemon.probe.score import OVER_FOLDS, nearest, score_task
from lemon.probe.task import Task, TaskError
from lemon.probe.tasks.catalogue import open_task
from lemon.probe.tasks.restained import restained_copies
from lemon.runtime.store import Store
from lemon.slides.synthetic import make_tissue
from tests.cells_table import write_slide

N = 60


def tissue_cells(count: int = N) -> np.ndarray:
    """Crops of made-up tissue, which has both stains: uint8 [N, 60, 60, 3]."""
    image = make_tissue(700, seed=0, border_px=0).image
    corners = np.random.default_rng(0).integers(0, 640, (count, 2))
    return np.stack([image[y : y + 60, x : x + 60] for y, x in corners])


@pytest.fixture
def task(tmp_path: Path) -> Task:
    write_slide(Store(tmp_path / "cells"), "s", tissue_cells())
    return open_task(f"restained:{tmp_path / 'cells'}", "nowhere")


def test_every_copy_is_turned_or_mirrored_and_none_is_the_cell_itself() -> None:
    ramp = np.broadcast_to(np.arange(60, dtype=np.uint8)[:, None, None], (200, 60, 60, 3)).copy()
    ramp[:, :, :30] //= 2  # no orientation gives another's picture; a grey ramp has no stains, so colours stay
    copies = restained_copies(ramp, seed=0)
    orientations = {copy.tobytes() for copy in copies}
    assert ramp[0].tobytes() not in orientations
    assert len(orientations) == 7
    assert all(np.array_equal(np.sort(copy, axis=None), np.sort(ramp[0], axis=None)) for copy in copies[:20])


def test_copies_have_other_colours_and_the_same_seed_gives_the_same() -> None:
    cells = tissue_cells()
    copies = restained_copies(cells, seed=1)
    change = np.abs(copies.mean(axis=(1, 2)) - cells.mean(axis=(1, 2))).max(axis=1)
    assert np.median(change) > 2, "grey levels"
    assert np.array_equal(copies, restained_copies(cells, seed=1))
    assert not np.array_equal(copies, restained_copies(cells, seed=2))


@pytest.mark.slow
def test_an_embedding_that_knows_every_cell_scores_1_and_one_that_knows_none_scores_chance(task: Task) -> None:
    n = len(task.images) // 2
    own = np.random.default_rng(0).normal(size=(n, 32)).astype(np.float32)
    perfect = np.concatenate([own, own * 3 + 0.01])
    blind = np.random.default_rng(1).normal(size=(2 * n, 32)).astype(np.float32)
    for embedding, low, high in ((perfect, 1.0, 1.0), (blind, 0.0, 0.1)):
        scores = score_task(task, embedding, ProbeSettings()).scores
        found = {(score.fold, score.metric): score.value for score in scores}
        assert low <= found[0, "recall_at_1"] <= high
        # Of a single slide there is no interval over slides.
        assert np.isnan([found[OVER_FOLDS, f"recall_at_1_{end}"] for end in ("low", "high")]).all()
        assert found[OVER_FOLDS, "recall_at_1"] == found[0, "recall_at_1"]


def test_predictions_name_the_cell_whose_copy_was_nearest(task: Task) -> None:
    n = len(task.images) // 2
    own = np.eye(n, dtype=np.float32)
    shifted = np.concatenate([own, np.roll(own, 1, axis=0)])  # the copy of cell 1 looks like cell 0
    predictions = score_task(task, shifted, ProbeSettings()).predictions
    truth, predicted = (np.concatenate(predictions[name].to_pylist()) for name in ("truth", "predicted"))
    assert (truth != predicted).all()
    assert sorted(predicted) == sorted(truth)


def test_nearest_is_by_cosine_in_any_chunk() -> None:
    generator = np.random.default_rng(3)
    queries = generator.normal(size=(50, 8))
    searched = generator.normal(size=(40, 8)) * generator.uniform(1, 9, (40, 1))
    cosine = (queries @ searched.T) / np.linalg.norm(searched, axis=1)
    for chunk in (1, 7, 1024):
        assert np.array_equal(nearest(queries, searched, chunk=chunk), cosine.argmax(axis=1))


def test_too_few_cells_and_no_cells_are_one_line(tmp_path: Path) -> None:
    write_slide(Store(tmp_path / "few"), "s", tissue_cells(4))
    with pytest.raises(TaskError, match="4 cells; expected 10 at least"):
        open_task(f"restained:{tmp_path / 'few'}", "nowhere")
    with pytest.raises(TaskError, match="no folder"):
        open_task(f"restained:{tmp_path / 'none'}", "nowhere")
