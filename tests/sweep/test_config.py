"""What a study is made of."""

from __future__ import annotations

from pathlib import Path

from lemon.runtime.config import load
from lemon.sweep import grid
from lemon.sweep.config import SweepConfig


def test_encoders_are_an_axis_of_any_study(tmp_path: Path) -> None:
    words = [f"cells={tmp_path}", "tasks=amibr", "output=o", "sweep.points=1000,5000", "sweep.encoders=vit_s8,vit_b8"]
    config = load("scaling_sweep", words, SweepConfig)
    assert [(point.name, point.value) for point in config.sweep.points] == [
        ("1k-vit_s8", "1000, vit_s8"),
        ("5k-vit_s8", "5000, vit_s8"),
        ("1k-vit_b8", "1000, vit_b8"),
        ("5k-vit_b8", "5000, vit_b8"),
    ]
    made = [grid.point_config(config, point, organs=[]) for point in config.sweep.points]
    assert [each.encoder.dim for each in made] == [384, 384, 768, 768]
    assert [each.select.n_cells for each in made] == [1000, 5000] * 2


def test_an_encoder_is_added_to_a_points_own_words(tmp_path: Path) -> None:
    points = "sweep.points=[{name: a, overrides: [epochs=200]}]"
    words = [f"cells={tmp_path}", "tasks=amibr", "output=o", points, "sweep.encoders=vit_b8"]
    config = load("scaling_sweep", words, SweepConfig)
    (point,) = config.sweep.points
    made = grid.point_config(config, point, organs=[])
    assert (point.name, made.epochs, made.encoder.name) == ("a-vit_b8", 200, "vit_b8")
