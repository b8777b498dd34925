"""What a study costs: the fit, and the table."""

from __future__ import annotations

import pytest
import yaml

from benchmarks.cluster_cost import PRICES, estimate, fit, parse, report

WORDS = ["--slides=10000", "--images=1e8", "--tissue-mm2=100"]


def test_the_fixed_part_of_a_slide_is_told_from_what_its_tissue_costs() -> None:
    slides = [{"segmenter": "x", "tissue_mm2": mm2, "cpu_s": 3 + 20 * mm2} for mm2 in (0.1, 0.5, 2.0)]
    assert fit(slides, "x", "cpu_s") == pytest.approx((3, 20))
    falling = [{"segmenter": "x", "tissue_mm2": mm2, "cpu_s": 5 * mm2 - 0.1} for mm2 in (0.1, 0.5, 2.0)]
    assert fit(falling, "x", "cpu_s") == pytest.approx((0, 5))


def test_hours_grow_with_the_work_and_the_fixed_part_only_with_slides() -> None:
    small, slides, tissue, images = (
        {line.stage: line.node_hours for line in estimate(parse([*WORDS, *more]))}
        for more in ([], ["--slides=20000"], ["--tissue-mm2=200"], ["--images=2e8"])
    )
    for stage, hours in small.items():
        assert hours > 0
        assert slides[stage] == pytest.approx(hours if stage.startswith("pretrain") else 2 * hours)
        assert images[stage] == pytest.approx(2 * hours if stage.startswith("pretrain") else hours)
        assert tissue[stage] <= 2 * hours * (1 + 1e-9)


def test_a_price_that_is_not_known_is_not_made_up() -> None:
    lines = list(report(parse(WORDS)))
    prices = yaml.safe_load(PRICES.read_text())
    (training,) = (line for line in lines if line.startswith("pretrain"))
    hours = next(line.node_hours for line in estimate(parse(WORDS)) if line.stage.startswith("pretrain"))
    assert prices["nodes"]["train"]["spot"] is None
    assert training.split()[-2:] == [f"${hours * prices['nodes']['train']['on_demand']:,.0f}", "-"]
    assert prices["s3_gb_month"] is None
    assert "cells in S3, 108 GB, a month: fill in benchmarks/prices.yaml" in lines


def test_curation_on_a_card_waits_for_the_slower_of_the_card_and_the_cores_beside_it() -> None:
    def hours(l4: float) -> float:
        lines = estimate(parse([*WORDS, f"--l4={l4}"]))
        return next(line.node_hours for line in lines if line.node == "gpu")

    assert hours(40) == pytest.approx(2 * hours(20))  # the card
    assert hours(1e-6) == hours(1e-9) > 0  # the cores
