"""Figure 2: what it is the mean of, and that its points and names can be seen."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from lemon.encoders.registry import FAMILIES, encoder_names, family_of
from lemon.probe import figures
from lemon.probe.figures import CostPoint
from lemon.runtime.store import Store
from lemon.schema import ScoreRow

NUCLS = {"nucls-super": 0.7, "nucls-main": 0.5, "midog25-atypical": 0.6}


def point(encoder: str, task: str, mean: float, **more: Any) -> CostPoint:
    known = {"family": "LEMON", "parameters": 2_000_000, "gflop": 1.0, "paper_gmac": 0.5, "spread": 0.01}
    return CostPoint(encoder=encoder, task=task, mean=mean, **known | more)


def points_of(encoder: str, scores: dict[str, float], **more: Any) -> list[CostPoint]:
    return [point(encoder, task, mean, **more) for task, mean in scores.items()]


def markers(figure: Figure) -> list[PathCollection]:
    """Of the first panel."""
    return [each for each in figure.axes[0].collections if isinstance(each, PathCollection)]


def places(figure: Figure) -> np.ndarray:
    """Of the points of the first panel, as shares of its width and height: float [N, 2]."""
    axis = figure.axes[0]
    offsets = np.concatenate([np.asarray(each.get_offsets()) for each in markers(figure)])
    return axis.transAxes.inverted().transform(axis.transData.transform(offsets))


def test_a_panel_is_the_mean_over_those_of_its_tasks_that_were_scored() -> None:
    points = points_of("a", NUCLS | {"hest-lung": 0.1, "amibr": 0.9}) + points_of("b", NUCLS)
    means = {(mean.encoder, mean.panel.partition(":")[0]): mean for mean in figures.cost_means(points)}
    assert set(means) == {("a", "cell types"), ("b", "cell types"), ("a", "gene expression")}
    assert means["a", "cell types"].mean == pytest.approx(0.6)
    assert means["a", "cell types"].tasks == "nucls-super nucls-main midog25-atypical"
    assert means["a", "gene expression"].mean == pytest.approx(0.1)


def test_an_encoder_without_one_of_the_tasks_is_left_out_and_told() -> None:
    points = points_of("a", NUCLS) + points_of("b", {"nucls-super": 0.9})
    means = figures.cost_means(points)
    assert [mean.encoder for mean in means] == ["a"]
    (line,) = figures.left_out_of_means(points, means)
    assert line == "cell types: NuCLS, MIDOG: b is left out, as it has no score on nucls-main, midog25-atypical."


def test_figure_2_has_the_papers_two_panels_and_each_task_by_itself() -> None:
    points = points_of("a", NUCLS | {"hest-lung": 0.1})
    drawn = figures.cost_figures(points)
    assert {stem: len(figure.axes) for stem, figure in drawn.items()} == {"figure2": 2, "figure2_tasks": 4}
    assert [axis.get_ylabel() for axis in drawn["figure2"].axes] == ["balanced accuracy", "Pearson correlation"]
    own = figures.cost_figures(points_of("a", {"folder:mine": 0.5}))
    assert {stem: len(figure.axes) for stem, figure in own.items()} == {"figure2": 1}
    assert figures.cost_figures([]) == {}


def test_a_lone_encoder_and_encoders_of_one_cost_stand_in_the_middle() -> None:
    for names in (["a"], ["a", "b", "c"]):
        points = [point(name, "t", 0.5 + number / 10) for number, name in enumerate(names)]
        x, y = places(figures.cost_figure(points)).T
        np.testing.assert_allclose(x, 0.5, atol=1e-6)
        assert ((y > 0.02) & (y < 0.98)).all()
        assert len(set(y.round(6))) == len(names)


def test_the_least_and_the_largest_cost_have_room_on_both_sides() -> None:
    points = [point("a", "t", 0.5, gflop=0.1), point("b", "t", 0.6, gflop=600.0)]
    x, _ = places(figures.cost_figure(points)).T
    assert 0.05 < x.min() < 0.3
    assert 0.7 < x.max() < 0.95


def test_size_is_the_parameters_and_colour_the_family() -> None:
    points = [
        point("a", "t", 0.5, parameters=1_800_000, family="LEMON"),
        point("b", "t", 0.6, parameters=1_134_000_000, family="tissue"),
    ]
    first, second = markers(figures.cost_figure(points))
    assert first.get_sizes()[0] < second.get_sizes()[0] / 3
    assert not np.allclose(first.get_facecolor(), second.get_facecolor())


def test_each_encoder_of_the_registry_has_a_family_and_a_run_is_lemons() -> None:
    assert {family_of(name) for name in encoder_names()} == {*FAMILIES}
    assert family_of("uni2-h") == "tissue"
    assert family_of("runs_x") == "LEMON"


def test_names_do_not_lie_on_each_other() -> None:
    generator = np.random.default_rng(0)
    points = [
        point(f"encoder-{number}", "t", 0.6 + 0.1 * generator.random(), gflop=float(10 ** generator.uniform(0, 2)))
        for number in range(9)
    ]
    figure = figures.cost_figure([*points, point("same", "t", points[0].mean, gflop=points[0].gflop)])
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 10
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_points_lead_where_they_are_told(tmp_path: Path) -> None:
    figure = figures.cost_figure([point("a", "t", 0.5), point("b", "t", 0.6)], links={"a": "#row-a"})
    figures.save_figure(figure, Store(tmp_path), "figure2")
    assert (tmp_path / "figure2.svg").read_text().count('xlink:href="#row-a"') == 1


def test_by_the_papers_protocol_a_task_counts_that_has_only_the_leak_free_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    known = {"model": "lemon_mini", "metric": "balanced_accuracy", "n": 10, "seed": 0, "data_fingerprint": "d"}
    rows = [
        ScoreRow(task=task, protocol=protocol, fold=fold, value=value, model_fingerprint="f", **known)
        for task, protocol, value in (("t", "paper", 0.9), ("t", "leak-free", 0.5), ("u", "leak-free", 0.7))
        for fold in (0, 1)
    ]
    store.write_table("scores/t/lemon_mini-f.parquet", ScoreRow.table(rows))
    store.write_bytes("costs/lemon_mini-f.json", json.dumps({"parameters": 5, "flop": 2e9, "paper_mac": 1e9}).encode())
    found = {name: figures.cost_points(store, protocol=name) for name in ("paper", "leak-free")}
    assert {name: {each.task: each.mean for each in points} for name, points in found.items()} == {
        "paper": {"t": pytest.approx(0.9), "u": pytest.approx(0.7)},
        "leak-free": {"t": pytest.approx(0.5), "u": pytest.approx(0.7)},
    }
    one = found["paper"][0]
    assert (one.family, one.parameters, one.gflop, one.paper_gmac) == ("LEMON", 5, 2.0, 1.0)
