"""The atlas's page of 10,000 and 100,000 cells: its size, and how soon a browser shows and redraws it.

python -m benchmarks.atlas [--counts 10000 100000] [--cells FOLDER] [--map]

Needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver); no GPU is used. ``--map`` also times
t-SNE of so many made-up vectors of 384 values on one thread.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from selenium import webdriver

from benchmarks.encoding import real_crops, synthetic_crops
from benchmarks.record import record
from lemon.atlas.cells import THUMBNAIL_PX
from lemon.atlas.fields import categories_of, measures_of
from lemon.atlas.page import write_page
from lemon.atlas.projection import map_tsne, to_unit_square
from lemon.runtime.store import Store
from lemon.schema import MORPHOMETRICS

DIFFERENT_CROPS = 4096  # repeated; sheets are compressed one by one, so that repetition saves nothing
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,900"
)


def main() -> None:
    """Write the pages, open each three times, print and record medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--cells", help="folder of shards, as cells/cells (default: windows of a synthetic slide)")
    parser.add_argument("--map", action="store_true", help="also time t-SNE")
    options = parser.parse_args()
    crops = real_crops(options.cells, DIFFERENT_CROPS) if options.cells else synthetic_crops(DIFFERENT_CROPS)
    rows = []
    for count in options.counts:
        with tempfile.TemporaryDirectory() as scratch:
            row = {"cells": count, **written(Path(scratch), count, crops=crops), **opened(Path(scratch))}
        if options.map:
            row["tsne_s"] = round(tsne_seconds(count), 1)
        rows.append(row)
        print(", ".join(f"{name} {value:,}" for name, value in row.items()))
    source = "cells" if options.cells else "synthetic"
    record("atlas", {"source": source, "runs": rows}, packages=("openTSNE", "pillow", "selenium"))


def written(folder: Path, count: int, *, crops: np.ndarray) -> dict[str, Any]:
    """Size of the page and seconds that it takes to write."""
    generator = np.random.default_rng(0)
    ids = [f"TCGA-A1-0000-01Z-00-DX1_{number:06d}_{number:06d}" for number in range(count)]
    centres = generator.normal(0, 1, (12, 2))
    cluster = generator.integers(0, 12, count)
    positions = centres[cluster] + generator.normal(0, 0.25, (count, 2))
    small = [cv2.resize(crop, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA) for crop in crops]
    columns: dict[str, Any] = {"cluster": cluster.astype(np.int16), "label": [f"class {code % 4}" for code in cluster]}
    columns |= {name: generator.gamma(4, 10, count).astype(np.float32) for name in MORPHOMETRICS}
    columns |= {"organ": ["breast"] * count, "site": ["A1"] * count}
    columns["slide_id"] = [f"slide {number % 50}" for number in range(count)]
    table = pa.table(columns)
    start = time.perf_counter()
    size = write_page(
        Store(folder),
        ids=ids,
        unit=to_unit_square(positions),
        thumbnails=np.stack(small)[generator.integers(0, len(small), count)],
        categories=categories_of(table),
        measures=measures_of(table),
        places=generator.uniform(0, 50_000, (count, 2)),
        title="benchmark",
        subtitle="",
    )
    return {"page_mb": round(size / 1e6, 1), "write_s": round(time.perf_counter() - start, 1)}


def opened(folder: Path, *, rounds: int = 3) -> dict[str, float]:
    """Milliseconds since the page was asked for, of one redrawing, and until every square has its cell; medians."""
    found = [_open_once(folder / "atlas.html") for _ in range(rounds)]
    return {name: round(float(np.median([one[name] for one in found])), 1) for name in found[0]}


def _open_once(page: Path) -> dict[str, float]:
    browser = open_browser()
    try:
        browser.get(page.as_uri())
        figures: dict[str, float] = browser.execute_async_script(
            """
            const done = arguments[0];
            requestAnimationFrame(() => setTimeout(() => {
              const start = performance.now();
              for (let i = 0; i < 10; i++) window.atlas.draw();
              const redraw_ms = (performance.now() - start) / 10;
              const show = document.getElementById("show");
              show.value = "cells";
              const asked = performance.now();
              window.atlas.draw();
              const poll = setInterval(() => {
                if (window.atlas.isWaiting()) return;
                clearInterval(poll);
                done({
                  first_frame_ms: performance.getEntriesByName("first-frame")[0].startTime,
                  dom_content_loaded_ms: performance.getEntriesByType("navigation")[0].domContentLoadedEventEnd,
                  redraw_ms,
                  squares: window.atlas.squaresInView().length,
                  squares_filled_ms: performance.now() - asked,
                });
              }, 10);
            }));
            """
        )
        return figures
    finally:
        browser.quit()


def open_browser() -> webdriver.Chrome:
    """A fresh headless chromium. Exits with a line where there is none."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise SystemExit("needs chromium and chromedriver; Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS.split():
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def tsne_seconds(count: int, *, width: int = 384, groups: int = 12) -> float:
    """Seconds of t-SNE on one thread."""
    generator = np.random.default_rng(0)
    centres = generator.normal(0, 1, (groups, width)).astype(np.float32)
    vectors = centres[generator.integers(0, groups, count)]
    vectors += generator.normal(0, 1, vectors.shape).astype(np.float32)
    start = time.perf_counter()
    map_tsne(vectors, perplexity=30, seed=0, threads=1)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
