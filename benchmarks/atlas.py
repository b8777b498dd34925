"""The atlas's page of 10,000 and 100,000 cells of ten slides: its size, and how soon a browser shows and redraws it.

python -m benchmarks.atlas [--counts 10000 100000] [--cells FOLDER] [--slide FILE] [--map] [--served 1000000]

Vectors, outlines and measures are made up; crops and tissue too, unless they are given.

Needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver); no GPU is used. ``--map`` also times
t-SNE of so many made-up vectors of 384 values on one thread.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import shapely
from selenium import webdriver
from shapely import polygons

from benchmarks.encoding import real_crops, synthetic_crops
from benchmarks.record import record
from lemon.atlas.cells import THUMBNAIL_PX, AtlasCells
from lemon.atlas.fields import categories_of, measures_of
from lemon.atlas.neighbours import Neighbours
from lemon.atlas.page import PageData, page_data, write_page
from lemon.atlas.projection import map_tsne, to_unit_square
from lemon.atlas.served import open_served, write_served
from lemon.atlas.server import AtlasServer
from lemon.cells.morphometry import MEASURES
from lemon.runtime.store import Store
from lemon.schema import SlideRow
from lemon.slides.reader import SlideReader
from lemon.slides.synthetic import make_tissue, write_pyramid

SLIDES, GROUPS = 10, 12
MEMORY = {"peak": "VmHWM", "resident": "VmRSS", "anonymous": "RssAnon"}
DIFFERENT_CROPS = 4096  # repeated; sheets are compressed one by one, so that repetition saves nothing
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,900"
)


def main() -> None:
    """Write the pages, open each three times, print and record medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--cells", help="folder of shards, as cells/cells (default: windows of a synthetic slide)")
    parser.add_argument("--slide", type=Path, help="the tissue of each of the slides (default: a synthetic one)")
    parser.add_argument("--map", action="store_true", help="also time t-SNE")
    parser.add_argument("--served", type=int, nargs="*", default=[], help="also so many cells by a local server")
    parser.add_argument("--answer", type=Path, help="serve what --served wrote into a folder")
    options = parser.parse_args()
    if options.answer:
        return answer(options.answer)
    crops = real_crops(options.cells, DIFFERENT_CROPS) if options.cells else synthetic_crops(DIFFERENT_CROPS)
    rows = []
    for count in options.counts:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            slide = options.slide or synthetic_slide(folder)
            row = {"cells": count, **written(folder, count, crops=crops, slide=slide)}
            row |= opened((folder / "atlas.html").as_uri())
        if options.map:
            row["tsne_s"] = round(tsne_seconds(count), 1)
        rows.append(row)
        print(", ".join(f"{name} {value:,}" for name, value in row.items()))
    for count in options.served:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            slide = options.slide or synthetic_slide(folder)
            rows.append({"cells": count, **served(folder, count, crops=crops, slide=slide)})
        print(", ".join(f"{name} {value:,}" for name, value in rows[-1].items()))
    source = "cells" if options.cells else "synthetic"
    record("atlas", {"source": source, "runs": rows}, packages=("openTSNE", "pillow", "selenium"))


def synthetic_slide(folder: Path) -> Path:
    """A pyramid of made-up tissue of 3000 px a side."""
    write_pyramid(folder / "slide.tiff", make_tissue(3000, seed=0).image, mpp=0.25)
    return folder / "slide.tiff"


def made_up_cells(count: int, *, crops: np.ndarray, slide: Path, width: int = 384) -> AtlasCells:
    """Cells of ten slides, each the given file, in 12 groups: vectors of ``width`` values, outlines of 36 corners."""
    generator = np.random.default_rng(0)
    group = generator.integers(0, GROUPS, count)
    with SlideReader(slide) as reader:
        size, mpp = (reader.width_px, reader.height_px), reader.mpp
    places = generator.uniform(0.02, 0.98, (count, 2)) * size
    number = generator.integers(0, SLIDES, count)
    names = [f"TCGA-A1-{slide:04d}-01Z-00-DX1" for slide in range(SLIDES)]
    columns: dict[str, Any] = {"cell_id": [f"{names[at]}_{cell:08d}" for cell, at in enumerate(number)]}
    columns |= {"slide_id": [names[at] for at in number], "mpp": np.full(count, mpp)}
    columns |= {"x_level0_px": places[:, 0], "y_level0_px": places[:, 1], "polygon": outlines_around(places, mpp)}
    columns |= {"cluster": group.astype(np.int16), "label": [f"class {code % 4}" for code in group]}
    columns |= {each.column: generator.gamma(4, 10, count).astype(np.float32) for each in MEASURES}
    columns |= {
        "row": np.zeros(count, np.int32),
        "foreign_id": pa.nulls(count, pa.string()),
        "foreign_class": pa.nulls(count, pa.string()),
        "organ": [f"organ {at % 4}" for at in number],
        "site": [f"site {at % 3}" for at in number],
    }
    small = [cv2.resize(crop, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA) for crop in crops]
    thumbnails = Repeated(np.stack(small), generator.integers(0, len(small), count))
    rows = tuple(SlideRow(name, str(slide), mpp=mpp, status="done", n_cells=count // SLIDES) for name in names)
    return AtlasCells(pa.table(columns), vectors_in_groups(group, width=width), thumbnails, "made up", rows, "")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Repeated:
    """Images of which few differ, as an array of all [N, P, P, 3] that takes no room."""

    images: np.ndarray
    numbers: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all."""
        return len(self.numbers), *self.images.shape[1:]

    def __getitem__(self, cells: np.ndarray) -> np.ndarray:
        return self.images[self.numbers[cells]]


def outlines_around(places: np.ndarray, mpp: float) -> pa.ChunkedArray:
    """Ellipses of 36 corners, some 6 um wide, in level-0 px as WKB [N]."""
    generator = np.random.default_rng(1)
    angles = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    circle = np.stack([np.cos(angles), 0.7 * np.sin(angles)], axis=1)
    parts = []
    for start in range(0, len(places), 50_000):
        part = places[start : start + 50_000]
        radii = generator.gamma(40, 3 / 40, (len(part), 1, 1)) / mpp
        parts.append(pa.array(shapely.to_wkb(polygons(part[:, None] + radii * circle)), pa.binary()))
    return pa.chunked_array(parts)


def vectors_in_groups(group: np.ndarray, *, width: int) -> np.ndarray:
    """Vectors around a centre for each group, float16 [N, width]."""
    generator = np.random.default_rng(0)
    centres = generator.normal(0, 1, (GROUPS, width)).astype(np.float32)
    vectors = np.empty((len(group), width), np.float16)
    for start in range(0, len(group), 10_000):
        part = group[start : start + 10_000]
        vectors[start : start + 10_000] = centres[part] + generator.normal(0, 1, (len(part), width))
    return vectors


def positions_in_groups(group: np.ndarray) -> np.ndarray:
    """A map in so many heaps, float64 [N, 2]."""
    generator = np.random.default_rng(0)
    return generator.normal(0, 1, (GROUPS, 2))[group] + generator.normal(0, 0.25, (len(group), 2))


def made_up_page(cells: AtlasCells) -> PageData:
    """Those cells on a made-up map."""
    return page_data(
        cells,
        unit=to_unit_square(positions_in_groups(cells.table["cluster"].to_numpy())),
        categories=categories_of(cells.table),
        measures=measures_of(cells.table),
        title="benchmark",
        subtitle="",
    )


def written(folder: Path, count: int, *, crops: np.ndarray, slide: Path) -> dict[str, Any]:
    """Size of the page and seconds that it takes to write."""
    cells = made_up_cells(count, crops=crops, slide=slide)
    start = time.perf_counter()
    size = write_page(Store(folder), cells, made_up_page(cells), side_px=4096)
    return {"page_mb": round(size / 1e6, 1), "write_s": round(time.perf_counter() - start, 1)}


def served(folder: Path, count: int, *, crops: np.ndarray, slide: Path) -> dict[str, Any]:
    """What ``lemon atlas serve=true`` takes for made-up cells of 64 values: disk, start, memory, a search, the page."""
    store = Store(folder)
    cells = made_up_cells(count, crops=crops, slide=slide, width=64)
    start = time.perf_counter()
    size = write_served(store, cells, made_up_page(cells), circumstances="benchmark")
    row: dict[str, Any] = {"served_mb": round(size / 1e6), "write_s": round(time.perf_counter() - start, 1)}
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.atlas", "--answer", folder], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        address = f"http://127.0.0.1:{int(process.stdout.readline())}/"
        urllib.request.urlopen(address).read()
        row["start_s"] = round(time.perf_counter() - start, 2)
        seconds = []
        for cell in range(0, count, count // 20):
            start = time.perf_counter()
            urllib.request.urlopen(f"{address}neighbours?cell={cell}&k=12").read()
            seconds.append(time.perf_counter() - start)
        row["neighbours_ms"] = round(1000 * float(np.median(seconds)), 1)
        row |= opened(address)
        status = Path(f"/proc/{process.pid}/status").read_text()
        memory = dict(line.split(":") for line in status.splitlines())
        # Mapped files count as resident while the system has room for them; anonymous memory is the process's own.
        row |= {f"{name}_mib": int(memory[key].split()[0]) >> 10 for name, key in MEMORY.items()}
    finally:
        process.terminate()
        process.wait()
    return row


def answer(folder: Path) -> None:
    """Serve a folder at any free port, which is printed."""
    content = open_served(Store(folder))
    with AtlasServer(content, Neighbours(content), port=0) as server:
        print(server.port, flush=True)
        server.serve_forever()


def opened(address: str, *, rounds: int = 3) -> dict[str, float]:
    """Milliseconds since the page was asked for, of one redrawing, and until every square has its cell; medians."""
    found = [_open_once(address) for _ in range(rounds)]
    return {name: round(float(np.median([one[name] for one in found])), 1) for name in found[0]}


def _open_once(address: str) -> dict[str, float]:
    browser = open_browser()
    try:
        browser.set_script_timeout(120)
        browser.get(address)
        figures: dict[str, float] = browser.execute_async_script(
            """
            const done = arguments[0];
            let readAt = 0;
            const begin = () => requestAnimationFrame(() => setTimeout(() => {
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
                  all_read_ms: readAt,
                  dom_content_loaded_ms: performance.getEntriesByType("navigation")[0].domContentLoadedEventEnd,
                  redraw_ms,
                  squares: window.atlas.map.squaresInView().length,
                  squares_filled_ms: performance.now() - asked,
                });
              }, 10);
            }));
            const whenRead = setInterval(() => {
              if (!window.atlas.isRead()) return;
              clearInterval(whenRead);
              readAt = performance.now();
              begin();
            }, 5);
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
