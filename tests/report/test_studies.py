"""What is said of a study's points: means, intervals and differences over seeds, against scipy's own."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lemon.encoders.registry import encoder_names
from lemon.errors import ConfigError
from lemon.probe.tasks.catalogue import TASKS
from lemon.report import figures
from lemon.report.config import ReportConfig
from lemon.report.paper import ARTEFACTS, CONTRADICTIONS, SHIPPED, PaperNumbers, plain_key, read_paper
from lemon.report.sentences import study_sentences
from lemon.report.sources import OutputTable, TrackedSettings, read_sweep
from lemon.runtime.config import preset_names
from lemon.runtime.store import Store
from lemon.schema import SWEEP_FILE, SweepRow
from lemon.sweep import studies

SEEDS = (0, 1, 2)


def row(point: str, seed: int, mean: float | None, **more: Any) -> SweepRow:
    """A row of a sweep's table."""
    known = {"study": "size", "point": point, "value": point, "seed": seed, "trial": f"size-{point}-s{seed}"}
    known |= {"status": "done", "task": "t", "protocol": "leak-free", "metric": "balanced_accuracy", "mean": mean}
    known |= {"spread": 0.1, "n_cells": 100, "n_slides": 2, "n_organs": 1}
    return SweepRow(**known | more)


def rows_of(scores: dict[str, list[float]], **more: Any) -> list[SweepRow]:
    """Rows seed by seed, as sweeps write them; a point that is a number has so many cells."""
    return [
        row(point, seed, values[seed], **({"n_cells": int(point)} if point.isdigit() else {}), **more)
        for seed in SEEDS
        for point, values in scores.items()
        if seed < len(values)
    ]


def as_output(folder: Path, rows: list[SweepRow]) -> OutputTable[SweepRow]:
    store = Store(folder)
    store.write_table(SWEEP_FILE, SweepRow.table(rows))
    return OutputTable(store, read_sweep(store))


def test_means_deviations_and_intervals_are_those_of_students_t() -> None:
    values = [0.5, 0.61, 0.57]
    over = studies.over_seeds(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (over.n, over.mean) == (3, pytest.approx(np.mean(values)))
    assert over.sd == pytest.approx(np.std(values, ddof=1))
    assert over.se == pytest.approx(stats.sem(values))
    assert (over.low, over.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_a_single_seed_has_a_mean_and_nothing_else() -> None:
    over = studies.over_seeds([0.5])
    assert over.mean == 0.5
    assert all(math.isnan(value) for value in over[2:])


def test_differences_are_paired_by_the_seeds_that_both_points_have() -> None:
    scores = {"a": [0.5, 0.6, 0.7], "b": [0.56, 0.64], "c": [0.9]}
    found = {each.point: each for each in studies.differences_to_first(studies.study_values(rows_of(scores)))}
    expected = stats.ttest_rel(scores["b"], scores["a"][:2]).confidence_interval(0.95)
    assert (found["b"].over.n, found["b"].over.mean) == (2, pytest.approx(0.05))
    assert (found["b"].over.low, found["b"].over.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert (found["c"].over.n, found["c"].over.mean) == (1, pytest.approx(0.4))
    assert {each.against for each in found.values()} == {"a"}
    apart = studies.study_values([row("a", 0, 0.5), row("b", 1, 0.6)])
    assert studies.differences_to_first(apart) == []


def test_a_point_leads_with_all_whose_distance_may_be_chance() -> None:
    column = ("t", "leak-free")
    near = {"a": [0.5, 0.51, 0.52], "b": [0.7, 0.72, 0.71], "c": [0.71, 0.70, 0.72]}
    assert studies.leading_points(studies.study_values(rows_of(near)))[column] == {"b", "c"}
    alone = {"a": [0.5, 0.51, 0.52], "b": [0.7, 0.71, 0.72]}
    assert studies.leading_points(studies.study_values(rows_of(alone)))[column] == {"b"}
    one_seed = {"a": [0.5], "b": [0.9]}
    assert studies.leading_points(studies.study_values(rows_of(one_seed)))[column] == set()


def test_a_trial_or_a_score_that_is_lost_is_listed_and_counts_nowhere() -> None:
    failed = row("b", 0, None, status="failed", error="no luck", task=None, protocol=None, metric=None)
    found = [row("a", 0, 0.5), row("a", 1, math.nan), failed, row("a", 0, 0.9, metric="knn_balanced_accuracy")]
    (value,) = studies.study_values(found)
    assert value.by_seed == {0: 0.5}
    assert [each.trial for each in studies.missing_results(found)] == ["size-a-s1", "size-b-s0"]
    assert "not a number" in studies.missing_results(found)[0].reason
    assert studies.point_names(found) == ["a", "b"]


def test_splits_without_leaks_are_preferred_task_by_task() -> None:
    both = [row("a", 0, value, protocol=protocol) for value, protocol in ((0.9, "paper"), (0.5, "leak-free"))]
    only = row("a", 0, 0.7, task="u", protocol="paper")
    chosen = studies.main_values(studies.study_values([*both, only]))
    assert {task: [value.over.mean for value in own] for task, own in chosen.items()} == {"t": [0.5], "u": [0.7]}


def test_figure_3_has_points_in_the_order_of_x_and_bars_of_standard_error() -> None:
    scores = {"1000": [0.7, 0.8, 0.75], "10": [0.5, 0.6], "100": [0.66]}
    figure = figures.scaling_figure("size", studies.study_values(rows_of(scores)))
    (axis,) = figure.axes
    line = axis.lines[0]
    assert list(line.get_xdata()) == [10, 100, 1000]
    np.testing.assert_allclose(line.get_ydata(), [0.55, 0.66, 0.75])
    (bars,) = [each for each in axis.containers if each.has_yerr]
    segments = bars.lines[2][0].get_segments()
    assert [segment[0][0] for segment in segments] == [10, 1000]  # none at the single seed
    assert segments[1][1][1] - segments[1][0][1] == pytest.approx(2 * stats.sem(scores["1000"]))


def test_figure_3_is_the_mean_over_the_tasks_with_a_curve_an_encoder() -> None:
    scores = {"10": [0.5, 0.6], "100": [0.7, 0.9]}
    small = [each for task in ("t", "u") for each in rows_of(scores, task=task, encoder="vit_s8")]
    large = rows_of({f"{name}0": [0.8, 0.8] for name in scores}, encoder="vit_b8")
    large += rows_of({f"{name}0": [0.4, 0.6] for name in scores}, encoder="vit_b8", task="u")
    large = [replace(each, point=f"b{each.point}") for each in large]
    values = studies.study_values([*small, *large])
    means = studies.task_means(values)
    assert {value.task for value in means} == {"mean of 2 tasks"}
    assert {value.point: value.by_seed for value in means if value.encoder == "vit_b8"} == {
        "b100": {0: pytest.approx(0.6), 1: pytest.approx(0.7)},
        "b1000": {0: pytest.approx(0.6), 1: pytest.approx(0.7)},
    }
    drawn = figures.scaling_figures("size", values)
    assert {end: len(figure.axes) for end, figure in drawn.items()} == {"": 1, "_tasks": 2}
    (axis,) = drawn[""].axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["ViT-S/8", "ViT-B/8"]
    assert "mean of 2 tasks" in axis.get_ylabel()


def test_a_point_or_a_seed_without_a_score_on_every_task_is_in_no_mean() -> None:
    rows = [*rows_of({"10": [0.5, 0.6], "100": [0.7]}), *rows_of({"10": [0.7]}, task="u")]
    (mean,) = studies.task_means(studies.study_values(rows))
    assert (mean.point, mean.by_seed) == ("10", {0: pytest.approx(0.6)})
    apart = studies.study_values([*rows_of({"10": [0.5]}), *rows_of({"100": [0.7]}, task="u")])
    assert studies.task_means(apart) == []
    assert {end: len(figure.axes) for end, figure in figures.scaling_figures("size", apart).items()} == {"": 2}


def test_a_single_size_stands_in_the_middle() -> None:
    (axis,) = figures.scaling_figure("size", studies.study_values(rows_of({"100": [0.5, 0.6]}))).axes
    low, high = axis.get_xlim()
    assert low * high == pytest.approx(100**2)


def test_a_sweep_of_before_the_column_encoder_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_table(SWEEP_FILE, SweepRow.table(rows_of({"10": [0.5]})).drop_columns(["encoder"]))
    (only,) = read_sweep(store)
    assert (only.mean, only.encoder) == (0.5, None)


def test_encoders_are_told_apart_where_a_study_has_several(tmp_path: Path) -> None:
    rows = rows_of({"10": [0.5], "100": [0.6]}, encoder="vit_s8")
    rows += [replace(each, point=f"b{each.point}", encoder="vit_b8") for each in rows_of({"10": [0.9]})]
    small, large = study_sentences(as_output(tmp_path, rows))
    assert small.startswith("size, t (leak-free, vit_s8): from 10 to 100, 0.500 to 0.600")
    assert large == "size, t (leak-free, vit_b8): b10 0.900, the only point with a result."


def test_organs_have_a_panel_a_task_and_a_line_a_number_of_slides() -> None:
    found = [
        row(f"o{organs}-s{slides}", 0, 0.5, n_organs=organs, n_slides=slides, task=task)
        for organs in (1, 5)
        for slides in (10, 40)
        for task in ("t", "u")
    ]
    figure = figures.scaling_tasks_figure("organs", studies.study_values(found))
    assert [len(axis.lines) for axis in figure.axes] == [2, 2]
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[1, 5], [1, 5]]


def test_sentences_say_what_is_gained_and_whether_seeds_explain_it(tmp_path: Path) -> None:
    sure = rows_of({"10": [0.5, 0.51, 0.52], "100": [0.6, 0.61, 0.62], "1000": [0.601, 0.612, 0.619]})
    (told,) = study_sentences(as_output(tmp_path / "a", sure))
    assert "from 10 to 1000, 0.510 to 0.611" in told
    assert "+0.101 (95 % interval" in told
    assert "beyond the chance of seeds. The last step, from 100:" in told
    assert told.endswith("over 3 seeds, no difference beyond seeds.")
    views = rows_of({"a0": [0.5, 0.6], "a1": [0.56, 0.64]}, study="augmentation")
    (told,) = study_sentences(as_output(tmp_path / "b", views))
    assert "a1 0.600 is highest, against a0 0.550: +0.050" in told
    assert "over 2 seeds, no difference beyond seeds" in told
    (told,) = study_sentences(as_output(tmp_path / "c", rows_of({"a0": [0.6], "a1": [0.5]}, study="ssl")))
    assert "a0 0.600 is highest, against a1 0.500: +0.100 with one seed, which says nothing about chance" in told


def test_images_seen_are_whole_batches() -> None:
    told = {"epochs": "150.0", "images_per_epoch": "1000000", "batch": "4096"}
    told |= {"encoder.name": "small", "encoder.dim": "32", "encoder.depth": "1", "ssl.name": "mocov3"}
    settings = TrackedSettings.model_validate(told | {"select.exclude_patients": "[]"})
    assert settings.images_seen == 150 * 244 * 4096
    assert settings.patients_left_out == "none"
    benchmarks = {"select.exclude_patients": "['TCGA-A2-A0SX']", "exclude_benchmarks": "['nucls-super', 'folder:mine']"}
    assert TrackedSettings.model_validate(told | benchmarks).patients_left_out == "those of nucls-super, folder:mine"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "artefact,row,value\n",
            "no column 'column'; it has artefact, row, value; expected artefact, row, column, value, spread",
        ),
        ("artefact,row,column,value,spread\nTable 9,a,b,1,\n", "line 2: got the artefact 'Table 9'"),
        ("artefact,row,column,value,spread\nTable 1,a,b,high,\n", "line 2, column value: got 'high'"),
        ("artefact,row,column,value,spread\nTable 1,a,b,nan,\n", "line 2, column value: got nan"),
        ("artefact,row,column,value,spread\nTable 1,a\n", "line 2: has 2 values"),
    ],
)
def test_a_mistake_in_the_papers_numbers_is_one_line(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "paper.csv").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_paper(str(tmp_path / "paper.csv"))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_of_the_paper_are_found_however_names_are_spelt(tmp_path: Path) -> None:
    lines = ["artefact,row,column,value,spread", "table 2,a1+gray,NuCLS super,0.5,0.1", '"Figure 3, size",1M,t,0.6,']
    (tmp_path / "paper.csv").write_text("\n".join(lines))
    numbers = PaperNumbers(read_paper(str(tmp_path / "paper.csv")))
    found = numbers.find("table2", row=["a1_gray"], column="nucls-super")
    assert found is not None
    assert (found.value, found.spread) == (0.5, 0.1)
    assert numbers.find("table2", row=["a0"], column="nucls-super") is None
    assert numbers.left("table2") == []
    assert [each.row for each in numbers.left("figure3_size")] == ["1M"]


def test_the_papers_scores_come_with_the_package_and_are_the_default() -> None:
    assert ReportConfig().paper == SHIPPED
    printed = read_paper(SHIPPED)
    by_artefact = {key: sum(each.artefact == key for each in printed) for key in ARTEFACTS}
    assert {key: n for key, n in by_artefact.items() if n} == {"table1": 55, "table2": 25, "table5": 8}
    assert all(0 < each.spread < each.value < 1 for each in printed)
    found = PaperNumbers(printed).find("table1", row=["lemon"], column="midog25-atypical")
    assert found is not None
    assert (found.value, found.spread) == (0.746, 0.015)


def test_every_row_of_the_papers_tables_is_a_name_that_is_known_here() -> None:
    """So that each number finds its place beside one of ours."""
    printed = read_paper(SHIPPED)
    assert {each.row for each in printed if each.artefact == "table1"} <= {*encoder_names()}
    for key, group in (("table2", "views"), ("table5", "ssl")):
        known = {plain_key(name) for name in preset_names(group)}
        assert {plain_key(each.row) for each in printed if each.artefact == key} <= known
    assert {each.column for each in printed} <= {*TASKS.names()}


def test_what_contradicts_itself_in_the_paper_is_noted_with_its_own_numbers() -> None:
    printed = read_paper(SHIPPED)
    elsewhere = {0.773, 0.748, 0.147}  # in its text, or of a column that is not in the file
    for each in CONTRADICTIONS:
        numbers = {float(text) for text in re.findall(r"0\.\d{3}", each.text)} - elsewhere
        assert numbers <= {one.value for one in printed}, each
    assert sum(len(PaperNumbers(printed).notes(key)) for key in ARTEFACTS) == 4
    assert PaperNumbers().notes("table1") == []
    breast = {one.row: one.value for one in printed if (one.artefact, one.column) == ("table1", "hest-breast")}
    better = {name for name, value in breast.items() if value > breast["lemon"]}
    assert better == {"dinov2_g", "dinov2_s", "h-optimus-0"}
