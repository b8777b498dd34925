"""What a study costs: the fit, the hours by given rates, and what has no price."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import cluster_cost
from benchmarks.cluster_cost import PRICES, REGION_MM2, estimate, fit, parse, report

WORDS = ["--slides=3600", "--tissue-mm2=100", "--images=3.6e9", "--cells-per-slide=1000", "--busy=0.5"]
NODES = yaml.safe_load(PRICES.read_text())["nodes"]


def slides(segmenter: str, *, a_slide: float, a_mm2: float) -> list[dict[str, Any]]:
    sizes = (0.1, 0.5, 2.0)
    return [
        {"segmenter": segmenter, "tissue_mm2": mm2, "cpu_s": a_slide + a_mm2 * mm2, "behind_s": 1 + 2 * mm2}
        for mm2 in sizes
    ]


@pytest.fixture(autouse=True)
def rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of results: the last line that fits counts, others do not."""
    measured = slides("hematoxylin", a_slide=3, a_mm2=20) + slides("hoverfast", a_slide=4, a_mm2=100)
    lines: dict[str, list[dict[str, Any]]] = {
        "curation": [{"slides": []}, {"slides": measured}],
        "predict": [{"regions": 32, "predict_ms": 7.0}, {"regions": 8, "predict_ms": 70.0}],
        "pretrain": [
            {"method": "mocov3", "batch": 4096, "step_images_per_s": 1e6},
            {"method": "dinov2", "batch": 4096},
        ],
        "encode_cells": [{"bf16": True, "batch": 4096, "cells_per_s": 1e5}, {"bf16": False, "batch": 4096}],
    }
    for name, each in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in each))
    monkeypatch.setattr(cluster_cost, "RESULTS", tmp_path)


def hours(*words: str) -> dict[str, float]:
    return {line.stage: line.node_hours for line in estimate(parse([*WORDS, *words]))}


def test_the_fixed_part_of_a_slide_is_told_from_what_its_tissue_costs() -> None:
    assert fit(slides("x", a_slide=3, a_mm2=20), "x", "cpu_s") == pytest.approx((3, 20))
    a_slide, a_mm2 = fit(slides("x", a_slide=-0.1, a_mm2=5), "x", "cpu_s")
    assert (a_slide, a_mm2) == (0, pytest.approx(5))


def test_hours_are_work_by_rate() -> None:
    cores = NODES["cpu"]["cpus"] / 2 * 0.5  # of a node, half of them at work
    assert hours() == pytest.approx(
        {
            "curate, hematoxylin": (3 + 20 * 100) / cores,
            "curate, hoverfast": (4 + 100 * 100) / cores,
            "curate, hoverfast on L4": 100 / REGION_MM2 * 0.007 * 3.35 / 0.3,
            "pretrain, ViT-S/8, MoCo v3": 1.0,
            "embed the cells": 0.01,
        }
    )


def test_curation_on_a_card_waits_for_the_slower_of_the_card_and_the_cores_beside_it() -> None:
    name = "curate, hoverfast on L4"
    assert hours("--l4=40")[name] == pytest.approx(2 * hours("--l4=20")[name])  # the card
    cores = NODES["gpu"]["cpus"] / 2
    assert hours("--l4=1e-6")[name] == pytest.approx(2 * 100 / cores)


def test_a_price_that_is_not_known_is_not_made_up() -> None:
    lines = list(report(parse(WORDS)))
    (training,) = (line for line in lines if line.startswith("pretrain"))
    assert NODES["train"]["spot"] is None
    assert training.split()[-2:] == [f"${NODES['train']['on_demand']:,.0f}", "-"]
    assert yaml.safe_load(PRICES.read_text())["s3_gb_month"] is None
    assert "cells in S3, 39 GB, a month: fill in benchmarks/prices.yaml" in lines
