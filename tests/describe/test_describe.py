"""What differs about a group is found, in its unit and by slide; the page shows it and needs nothing else."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import shapely
from scipy.stats import mannwhitneyu

from lemon.describe.config import DescribeConfig
from lemon.describe.effects import cliffs_delta, effects_of, typical
from lemon.describe.job import main
from lemon.embed.config import EmbedConfig
from lemon.embed.job import run
from lemon.errors import ConfigError
from lemon.runtime.store import Store
from tests.cells_table import synthetic_crops, write_slide
from tests.embed.tables import write_encoder

COUNT = 100


def test_cliffs_delta_is_that_of_mann_and_whitney() -> None:
    values = np.random.default_rng(0).integers(0, 9, 60).astype(float)
    inside = np.arange(60) < 25
    u = mannwhitneyu(values[inside], values[~inside]).statistic
    assert cliffs_delta(values, inside) == pytest.approx(2 * u / (25 * 35) - 1)
    assert cliffs_delta(np.arange(4.0), np.array([False, False, True, True])) == 1
    assert np.isnan(cliffs_delta(values, inside & False))


def test_effects_are_sorted_and_counted_by_slide() -> None:
    inside = np.tile([True, False], 60)
    slides = np.repeat(["a", "b", "c"], [50, 50, 20])  # of the last there are too few
    noise = np.random.default_rng(0).normal(size=120)
    area = np.where(inside, 50.0, 40.0) + np.where(slides == "b", -30 * inside, 0)  # the other way in b
    effects = effects_of({"area_um2": area, "eosin_od_mean": noise, "nearest_um": noise * np.nan}, inside, slides)
    assert [effect.measure.column for effect in effects] == ["area_um2", "eosin_od_mean"]
    assert (effects[0].n, effects[0].n_slides, effects[0].n_agree) == (60, 2, 1)
    assert (effects[0].median, effects[0].others) == (50, 40)


def test_typical_cells_are_those_nearest_to_the_mean_direction() -> None:
    angle = np.deg2rad([0, 10, 20, 90, 200])
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1) * [[1], [9], [1], [1], [1]]
    assert typical(vectors, np.array([True, True, True, False, False]), 3).tolist()[0] == 1
    assert typical(vectors, np.array([True, True, True, False, False]), 1).tolist() == [1]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Cells of two slides in which class "Large <b>" has twice the outline, and their embeddings."""
    folder = tmp_path_factory.mktemp("describe")
    store = Store(folder / "cells")
    images = synthetic_crops(COUNT)
    for slide_id in ("s", "t"):
        centre = np.stack([np.arange(COUNT) % 10, np.arange(COUNT) // 10], axis=1) * 80.0 + 1000
        large = np.arange(COUNT) % 2 == 0
        polygons = shapely.buffer(shapely.points(centre), np.where(large, 24, 12))
        arrays = {
            "x_level0_px": centre[:, 0],
            "y_level0_px": centre[:, 1],
            "mpp": np.full(COUNT, 0.25),
            "area_um2": np.where(large, 110.0, 28.0),
            "polygon": list(shapely.to_wkb(polygons)),
            "foreign_id": [str(index) for index in range(COUNT)],
            "foreign_class": ["Large <b>" if each else "small" for each in large],
        }
        write_slide(store, slide_id, images, arrays=arrays)
    model = write_encoder(folder / "run")
    words = {"model": str(model), "cells": store.uri, "output": str(folder / "out"), "clusters": {"k": 3}}
    run(EmbedConfig(**words, morphometry=True, format=["h5ad"]))
    return folder / "out", folder / "cells"


def test_the_page_says_what_differs_about_a_class(tmp_path: Path, outputs: tuple[Path, Path]) -> None:
    embeddings, cells = map(str, outputs)
    config = DescribeConfig(embeddings=embeddings, cells=cells, output=str(tmp_path), by="foreign_class", typical=5)
    assert main(config) == 0
    rows = list(csv.DictReader((tmp_path / "effects.csv").open()))
    axis = next(row for row in rows if row["group"] == "Large <b>" and row["measure"] == "major_axis_um")
    assert (float(axis["cliffs_delta"]), axis["unit"], axis["n"]) == (1, "um", str(COUNT))
    assert float(axis["median"]) == pytest.approx(12, rel=0.02)  # 2 * 24 px * 0.25, of a polygon in a circle
    assert float(axis["median_of_others"]) == pytest.approx(6, rel=0.02)
    assert (axis["n_slides"], axis["n_slides_same_sign"]) == ("2", "2")
    page = (tmp_path / "describe.html").read_text()
    assert "Large &lt;b&gt;" in page
    assert "<b>" not in page.replace("<b>+", "").replace("<b>-", "")
    assert "same sign in 2 of 2 slides" in page
    assert page.count("<img") == 10
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)  # nothing is loaded


def test_clusters_are_described_where_nothing_else_is_asked_for(tmp_path: Path, outputs: tuple[Path, Path]) -> None:
    embeddings, cells = map(str, outputs)
    assert main(DescribeConfig(embeddings=embeddings, cells=cells, output=str(tmp_path))) == 0
    groups = {row["group"] for row in csv.DictReader((tmp_path / "effects.csv").open())}
    assert groups <= {"Cluster 0", "Cluster 1", "Cluster 2"}
    assert len(groups) > 1


def test_groups_that_are_none_are_one_line(tmp_path: Path, outputs: tuple[Path, Path]) -> None:
    embeddings, cells = map(str, outputs)
    (tmp_path / "l.csv").write_text("cell_id,label\nelsewhere,a\n")
    config = DescribeConfig(
        embeddings=embeddings, cells=cells, output=str(tmp_path / "o"), labels=str(tmp_path / "l.csv")
    )
    with pytest.raises(ConfigError, match="by: got 0 groups of 200 cells; expected two labels among these cells"):
        main(config)


def test_measures_are_in_the_anndata_of_each_slide(outputs: tuple[Path, Path]) -> None:
    import anndata

    data = anndata.read_h5ad(outputs[0] / "h5ad" / "s.h5ad")
    assert data.obs["major_axis_um"].max() == pytest.approx(12, rel=0.02)
    assert data.obs["nearest_um"].to_numpy() == pytest.approx(20)  # 80 px
    assert data.obs["foreign_class"].value_counts().to_dict() == {"Large <b>": 50, "small": 50}
