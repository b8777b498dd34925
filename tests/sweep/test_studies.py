"""Which point of a study leads, and whether that may be chance."""

from __future__ import annotations

import pytest

from lemon.sweep import studies
from tests.report.test_studies import rows_of


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        (
            {"a": [0.5, 0.6, 0.7], "b": [0.52, 0.62, 0.721]},
            "b has the highest balanced_accuracy, 0.620 (0.371 to 0.870",
        ),
        ({"a": [0.5, 0.6, 0.7], "b": [0.52, 0.62, 0.721]}, "over 3 seeds); its lead over a, 0.020, is beyond chance"),
        ({"a": [0.5, 0.6, 0.7], "b": [0.7, 0.6, 0.58]}, "; its lead over a, 0.027, may be chance"),
        (
            {"a": [0.5], "b": [0.4], "c": [0.3]},
            "a has the highest balanced_accuracy, 0.500 (one seed); its lead over b",
        ),
        ({"a": [0.5], "b": [0.4]}, "0.100, may be chance"),
        ({"a": [0.5]}, "t, leak-free: a has the highest balanced_accuracy, 0.500 (one seed)"),
    ],
)
def test_the_best_point_is_told_with_its_interval_and_whether_its_lead_may_be_chance(
    scores: dict[str, list[float]], sentence: str
) -> None:
    (leader,) = studies.best_points(studies.study_values(rows_of(scores)))
    assert sentence in leader.sentence
