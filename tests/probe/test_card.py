"""Robustness cards: what they take from scores, and what they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lemon.probe.card import (
    FOLDER,
    TABLE,
    beside,
    card_json,
    card_markdown,
    card_rows,
    comparison_markdown,
    not_measured,
    write_cards,
)
from lemon.probe.card_figure import card_figure
from lemon.runtime.store import Store
from lemon.schema import ROBUSTNESS, RobustnessRow, ScoreRow

LABELLED = {
    "robustness_index": 0.6,
    "robustness_index_chance": 0.55,
    "robustness_index_low": 0.5,
    "robustness_index_high": 0.7,
    "croma": 0.1,
    "nipd": -0.2,
}


def scores(model: str = "enc", *, shift: float = 0.0) -> list[ScoreRow]:
    """Rows that a labelled task, one of sites, and two of copies leave, with others that are not of robustness."""
    found = [
        ("nucls-super", "robustness", metric, value + shift * (not metric.endswith("chance")), 600)
        for metric, value in LABELLED.items()
    ]
    found += [
        ("nucls-super", "robustness", "batches", 3, 600),
        ("nucls-super", "leak-free", "balanced_accuracy", 0.7, 900),
    ]
    for end, value in (("", 0.4), ("_low", 0.3), ("_high", 0.5)):
        found += [("site:/a/cells", "leak-free", f"balanced_accuracy{end}", value + shift, 400)]
        found += [("restained:/a/cells", "leak-free", f"recall_at_1{end}", value + shift, 200)]
        found += [("jpeg:/a/cells", quality, f"recall_at_1{end}", value + shift, 200) for quality in ("turned", "q50")]
    found += [("site:/a/cells", "robustness", "batches", 4, 400)]
    return [
        ScoreRow(
            model=model,
            task=task,
            protocol=protocol,
            fold=-1 if protocol == "robustness" or metric.endswith(("_low", "_high")) else 0,
            metric=metric,
            value=value,
            n=n,
            seed=0,
            model_fingerprint=f"f{model}",
            data_fingerprint="d",
        )
        for task, protocol, metric, value, n in found
    ]


def test_a_card_has_every_measure_once_with_interval_and_chance() -> None:
    rows = {(row.task, row.measure): row for row in card_rows(scores())}
    assert [measure for _, measure in rows] == [
        *("robustness_index", "croma", "nipd", "site_accuracy"),
        *("recall_at_1", "recall_at_1_turned", "recall_at_1_q50"),
    ]
    index, site = rows["nucls-super", "robustness_index"], rows["site:/a/cells", "site_accuracy"]
    assert (index.value, index.low, index.high, index.chance, index.n_batches) == (0.6, 0.5, 0.7, 0.55, 3)
    assert (site.value, site.low, site.chance, site.n) == (0.4, 0.3, 0.25, 400)
    assert rows["restained:/a/cells", "recall_at_1"].chance == 1 / 200
    assert rows["nucls-super", "nipd"].low is None


def test_scores_of_folds_and_of_other_tasks_are_no_robustness() -> None:
    assert card_rows(row for row in scores() if row.protocol == "leak-free" and row.task == "nucls-super") == []


def test_the_card_says_what_was_not_measured_and_how_to_measure_it() -> None:
    rows = card_rows(scores())
    assert not_measured(rows) == []
    alone = [row for row in rows if row.task == "nucls-super"]
    text = card_markdown(alone, name="enc")
    assert text.startswith("# Robustness of enc\n")
    assert "| robustness index | nucls-super | 0.600 | 0.500 to 0.700 | 0.55 | 600 | 3 |" in text
    assert "| nIPD | nucls-super | -0.200 |  |  | 600 | 3 |" in text
    for task in ("site:PATH", "restained:PATH", "jpeg:PATH"):
        assert f"tasks={task}" in text
    record = json.loads(card_json(alone))
    assert record["encoder"] == "enc"
    assert len(record["not_measured"]) == 3
    assert record["measures"][0]["measure"] == "robustness_index"


def test_a_comparison_has_a_column_for_each_encoder_and_gaps_where_one_lacks_a_measure() -> None:
    rows = card_rows(scores("a") + [row for row in scores("b", shift=0.05) if row.task.startswith("site")])
    cards = beside(rows)
    assert cards.encoders == ("a", "b")
    lines = {(line.measure.title, line.task): line.rows for line in cards.lines}
    first, second = lines["robustness index", "nucls-super"]
    assert first is not None
    assert first.value == 0.6
    assert second is None
    assert [row and round(row.value, 3) for row in lines["site told, no labels", "site of cells"]] == [0.4, 0.45]
    assert cards.missing == ()
    assert "| robustness index | nucls-super | 0.55 | 0.600 (0.500 to 0.700) |  |" in comparison_markdown(rows)


@pytest.mark.parametrize("models", [["a"], ["a", "b", "c"]])
def test_the_picture_has_a_line_for_each_measure_and_a_point_for_each_encoder(models: list[str]) -> None:
    rows = [row for number, model in enumerate(models) for row in card_rows(scores(model, shift=0.02 * number))]
    (axis,) = card_figure(rows).axes
    points = [line for line in axis.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert len(points) == 7 * len(models)
    assert all(0 <= line.get_xdata()[0] <= 1 for line in points)
    titles = {text.get_text() for text in axis.texts}
    assert {"robustness index", "site told, no labels", "nucls-super"} <= titles


def test_cards_are_files_and_a_table_of_an_output(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for model in ("a", "b"):
        store.write_table(f"scores/t/{model}.parquet", ScoreRow.table(scores(model)))
    names = write_cards(store)
    assert names == [f"{FOLDER}/a-fa/card.md", f"{FOLDER}/b-fb/card.md"]
    assert all((tmp_path / FOLDER / "a-fa" / f"card.{end}").stat().st_size for end in ("md", "json", "png", "svg"))
    table = store.read_table(TABLE)
    assert table.schema.equals(ROBUSTNESS, check_metadata=True)
    assert {row.model for row in RobustnessRow.read(table)} == {"a", "b"}
    assert "| chance | a | b |" in (tmp_path / FOLDER / "cards.md").read_text()


def test_an_output_without_robustness_has_no_cards(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_table("scores/t/a.parquet", ScoreRow.table(scores()[-1:-2:-1]))
    assert write_cards(store) == []
    assert not (tmp_path / FOLDER).exists()
