"""Tables of scores: who leads, short names, differences."""

from __future__ import annotations

import pytest

from lemon.probe.score import OVER_FOLDS
from lemon.probe.tables import PairedDifference, leaders, leading_encoders, main_cells, table1, task_labels
from lemon.schema import ScoreRow

SCORES = {"a": 0.9, "b": 0.85, "c": 0.6}


def test_the_best_shares_its_lead_with_all_that_it_cannot_be_told_apart_from() -> None:
    assert leaders(SCORES, lambda first, second: False) == {"a"}
    assert leaders(SCORES, lambda first, second: (first, second) == ("a", "b")) == {"a", "b"}
    assert leaders(SCORES, lambda first, second: True) == set()  # nobody stands out
    assert leaders({"a": 0.9}, lambda first, second: True) == set()  # nobody is compared


@pytest.mark.parametrize(
    ("tasks", "labels"),
    [
        (["nucls-super", "folder:mine"], ["nucls-super", "folder:mine"]),
        (["morphometry:/home/me/runs/cells"], ["morphometry:cells"]),
        (["morphometry:s3://bucket/cells/"], ["morphometry:cells"]),
        (["morphometry:/a/cells", "restained:/a/cells"], ["morphometry:cells", "restained:cells"]),
        (["folder:/x/a/cells", "folder:/x/b/cells"], ["folder:a/cells", "folder:b/cells"]),
    ],
)
def test_a_task_is_called_by_as_little_of_its_path_as_tells_it_apart(tasks: list[str], labels: list[str]) -> None:
    assert list(task_labels(tasks).values()) == labels


def rows_of(model: str, folds: list[float], *, low: float, high: float) -> list[ScoreRow]:
    known = {"model": model, "task": "folder:/data/mine", "protocol": "leak-free", "n": 10, "seed": 0}
    known |= {"model_fingerprint": model * 16, "data_fingerprint": "d"}
    values = [*((fold, "pearson", value) for fold, value in enumerate(folds))]
    values += [(OVER_FOLDS, "pearson_low", low), (OVER_FOLDS, "pearson_high", high)]
    return [ScoreRow(**known, fold=fold, metric=metric, value=value) for fold, metric, value in values]


def test_a_cell_is_a_mean_over_folds_with_its_own_interval_and_bold_where_it_leads() -> None:
    rows = [*rows_of("a", [0.5, 0.7], low=0.55, high=0.65), *rows_of("b", [0.4, 0.4], low=0.3, high=0.5)]
    cell = main_cells(rows)["a-aaaaaaaaaaaaaaaa", "folder:/data/mine", "leak-free"]
    assert cell == pytest.approx((0.6, 0.1414, 0.55, 0.65), abs=1e-4)
    sure = PairedDifference("folder:/data/mine", "leak-free", "b", "a", -0.2, -0.3, -0.1)
    assert not sure.may_be_chance
    assert sure.turned()[4:] == (0.2, 0.1, 0.3)
    assert leading_encoders(rows, [sure]) == {("folder:/data/mine", "leak-free"): {"a"}}
    lines = table1(rows, [sure]).splitlines()
    assert lines[0] == "| encoder | folder:mine, leak-free |"
    assert lines[2:] == ["| a | **0.600 (0.141)** |", "| b | 0.400 (0.000) |"]
    assert "**" not in table1(rows, [sure._replace(low=-0.3, high=0.1)])
