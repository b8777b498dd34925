"""The whole way of somebody who has QuPath's nuclei of a slide and ten labels: back to QuPath with a class of each."""

from __future__ import annotations

import csv
import gzip
import json
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lemon.cells.ledger import cells_ledger
from lemon.cells.names import geojson_name
from lemon.curate.config import CurateConfig
from lemon.curate.slide import curate_slide
from lemon.nuclei.hematoxylin import Hematoxylin
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.slides.cohort import list_slides
from tests.conftest import shared
from tests.jobs.warm import run_job

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SLIDE_ID = "CMU-1-Small-Region"
GIVEN = "Detected"
LABELS = 5
"""Of each class."""


def export_of_qupath(slide: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Write qupath.geojson, a curation's nuclei as another program's: with its ids and class; features by id."""
    words = [f"slides={slide}", f"output={folder / 'found'}", "cells_per_slide=null", "geojson=true"]
    config = load("curate", words, CurateConfig)
    store = cells_ledger(Store(config.output), config_fingerprint="f").store
    (listed,) = list_slides(str(slide))
    with ThreadPoolExecutor(1) as threads:
        curate_slide(listed, config=config, segmenter=Hematoxylin(), processes=threads, store=store)
    document = json.loads(gzip.decompress((folder / "found" / geojson_name(SLIDE_ID)).read_bytes()))
    for number, feature in enumerate(document["features"]):
        feature["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, str(number)))
        feature["properties"] = {"objectType": "detection", "classification": {"name": GIVEN, "color": [200, 0, 0]}}
    (folder / "qupath.geojson").write_text(json.dumps(document))
    return {feature["id"]: feature for feature in document["features"]}


def run(stage: str, *words: str) -> str:
    """What a job that ends well prints."""
    done = run_job(stage, words, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def label_in_the_page(browser: Any, page: Path, classes: dict[str, Sequence[str]]) -> Path:
    """Find cells by their ids, give each its class by its key, export: the CSV."""
    browser.get(page.as_uri())
    end = time.monotonic() + 60
    while not browser.execute_script("return performance.getEntriesByName('first-frame').length"):
        assert time.monotonic() < end
        time.sleep(0.1)

    def find(selector: str) -> Any:
        return browser.find_element("css selector", selector)

    for name in classes:
        find("#new-class").send_keys(f"{name}\n")
    for key, ids in enumerate(classes.values(), 1):
        for each in ids:
            find("#find").clear()
            find("#find").send_keys(f"{each}\n")
            assert each in find("#pinned-card").text
            find("#map").send_keys(str(key))
    find("#export-csv").click()
    exported: Path = browser.downloads / "cells.csv"
    while not exported.exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    return exported


def test_nuclei_of_qupath_and_ten_labels_become_a_class_of_every_nucleus_under_its_id(
    tmp_path: Path, browser: Any
) -> None:
    slide = shared("data/slides/CMU-1-Small-Region.svs")
    nuclei = export_of_qupath(slide, tmp_path)
    cells, embeddings, classes = (tmp_path / name for name in ("cells", "embeddings", "classes"))
    given = f"cells_from={tmp_path / 'qupath.geojson'}"
    told = run("curate", f"slides={slide}", given, f"output={cells}", "workers.actors=1")
    assert f"{len(nuclei):,} nuclei, {len(nuclei):,} cells" in told  # all of them, though no key asks for it
    run("embed", "model=lemon_mini", f"cells={cells}", f"output={embeddings}", "device=cpu", "clusters.k=null")
    run("atlas", f"embeddings={embeddings}", f"cells={cells}", f"output={tmp_path / 'atlas'}", "perplexity=10")

    table = pd.read_parquet(cells / "cells", columns=["foreign_id", "foreign_class", "area_um2"])
    table = table.set_index("foreign_id").sort_values("area_um2")
    assert set(table.index) == set(nuclei)
    assert set(table["foreign_class"]) == {GIVEN}
    tenth = len(table) // 10
    chosen = {"small": table.index[tenth:][:LABELS].tolist(), "large": table.index[-tenth:][:LABELS].tolist()}
    labels = label_in_the_page(browser, tmp_path / "atlas" / "atlas.html", chosen)
    with labels.open(newline="") as stream:
        written = {row["foreign_id"]: row["label"] for row in csv.DictReader(stream)}
    assert written == {each: name for name, ids in chosen.items() for each in ids}

    places = [f"embeddings={embeddings}", f"cells={cells}", f"output={classes}"]
    told = run("classify", f"labels={labels}", *places, "format=[geojson,h5ad]")
    assert "10 labels (large 5, small 5); balanced accuracy" in told
    found = pd.read_parquet(classes / "classes").set_index("foreign_id")
    assert set(found.index) == set(nuclei)
    assert found[found["given"]]["label"].to_dict() == written
    area = table["area_um2"].reindex(found.index)
    others = area[~found["given"]].groupby(found["label"]).median()
    assert others["large"] > 1.3 * others["small"]  # nobody told the head what an area is

    document = json.loads(gzip.decompress((classes / geojson_name(SLIDE_ID)).read_bytes()))
    back = {feature["id"]: feature for feature in document["features"]}
    assert back.keys() == nuclei.keys()
    assert {each: feature["properties"]["classification"]["name"] for each, feature in back.items()} == dict(
        found["label"]
    )
    for each in list(nuclei)[::100]:  # the outlines that QuPath sent, to a hundredth of a pixel
        sent, returned = (np.array(one[each]["geometry"]["coordinates"][0]) for one in (nuclei, back))
        assert np.abs(sent.min(axis=0) - returned.min(axis=0)).max() < 0.02
        assert np.abs(sent.max(axis=0) - returned.max(axis=0)).max() < 0.02
    measured = back[next(iter(back))]["properties"]["measurements"]
    assert 0.5 <= measured["Class confidence"] <= 1
