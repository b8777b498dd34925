"""How much of the site curated cells tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lemon.probe.config import ProbeSettings
from lemon.probe.score import OVER_FOLDS, ROBUSTNESS, score_task
from lemon.probe.task import Task, TaskError
from lemon.probe.tasks.catalogue import open_task
from lemon.runtime.store import Store
from tests.cells_table import numbered, write_slide

SITES = ("north", "south")


def open_site(folder: Path) -> Task:
    return open_task(f"site:{folder}", "nowhere")


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Two sites of four slides each, two slides a patient, and a slide of no known site."""
    store = Store(tmp_path / "cells")
    for number in range(8):
        site, patient = SITES[number % 2], f"p{number % 4}"
        write_slide(store, f"s{number}", numbered(30), site=site, patient_id=patient, organ="lung")
    write_slide(store, "nowhere", numbered(30))
    return tmp_path / "cells"


def test_folds_never_divide_a_patient_and_cells_of_no_site_are_left_out(cells: Path) -> None:
    task = open_site(cells)
    assert len(task.images) == 240
    assert task.target_names == ("north", "south")
    assert {count.what: count.n for count in task.counts}["of a known site"] == 240
    (protocol,) = task.protocols
    for fold in protocol.folds:
        assert not set(task.groups["patient"][fold.train]) & set(task.groups["patient"][fold.test])
    assert not any("organ" in note for note in task.notes)


def test_a_site_free_embedding_is_at_chance_and_site_noise_tells_all(cells: Path) -> None:
    task = open_site(cells)
    noise = np.random.default_rng(0).normal(size=(240, 6)).astype(np.float32)
    of_site = noise + 5 * (task.target == "north")[:, None].astype(np.float32)
    accuracy = []
    for embedding in (noise, of_site):
        scores = score_task(task, embedding, ProbeSettings(probes=["linear"], bootstrap=100)).scores
        found = {(each.protocol, each.fold, each.metric): each.value for each in scores}
        accuracy.append(found["leak-free", OVER_FOLDS, "balanced_accuracy"])
        assert found[ROBUSTNESS, OVER_FOLDS, "batches"] == 2
    assert accuracy[0] < 0.7
    assert accuracy[1] > 0.95


def test_sites_of_other_organs_have_a_note(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(4):
        site = SITES[number % 2]
        write_slide(store, f"s{number}", numbered(30), site=site, organ={"north": "lung", "south": "skin"}[site])
    assert any("the organ" in note for note in open_site(tmp_path).notes)


def test_cells_without_sites_or_of_one_site_are_one_line(tmp_path: Path) -> None:
    for number in range(2):
        write_slide(Store(tmp_path / "none"), f"s{number}", numbered(30))
        write_slide(Store(tmp_path / "one"), f"s{number}", numbered(30), site="north")
    with pytest.raises(TaskError, match=r"^site: no cell of .* has a site; expected the column site"):
        open_site(tmp_path / "none")
    with pytest.raises(TaskError, match=r"^site:.*only the class north is left.*expected two or more"):
        open_site(tmp_path / "one")
