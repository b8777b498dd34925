"""How well segmenters find drawn nuclei, by source: with weights and without, on folders of labelled images.

    python -m benchmarks.nuclei --data FOLDER [FOLDER ...] [--checkpoint FILE ...] [--held-out-share 0.08]

A folder holds ``<name>.jpg`` (or png, tif) and ``<name>_inst.npz`` (``inst_map``, 0 is background), at 0.25 um/px;
images that ``images.csv`` says are at 20x are enlarged twice and are a source of their own. Every image is a slide of
its own. ``--held-out-share`` keeps of each source the images that training with that share never saw.

    python -m benchmarks.nuclei --slide SLIDE --window X Y WIDTH HEIGHT

counts what a whole slide's curation finds in a window, in pixels of level 0, that has no nuclei, or hardly any.

Compared are ``hematoxylin``, ``hoverfast`` with the weights of LEMON, and with each checkpoint named. Figures (see
``lemon/nuclei/scores.py``) are means over images with 95 % intervals, images drawn 10,000 times with replacement;
seconds are processor time a million pixels. A line goes to ``benchmarks/results/nuclei.jsonl``, a table to standard
output.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.record import record
from lemon.cells.names import shard_name
from lemon.curate.config import CurateConfig
from lemon.curate.slide import curate_slide, start_processes
from lemon.nuclei.hematoxylin import Hematoxylin
from lemon.nuclei.hoverfast import HoverFast
from lemon.nuclei.scores import labels_of, scores
from lemon.nuclei.segmenter import Segmenter
from lemon.nuclei.training.images import Labelled, read_folder, split
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.slides.cohort import list_slides

SHOWN = ("f1", "precision", "recall", "f1_iou", "pq", "aji", "dice")
DRAWS = 10_000
PACKAGES = ("torch", "opencv-python-headless", "numpy")


def measured(segmenter: Segmenter, image: Labelled) -> dict[str, float]:
    """Scores of one image that is its own slide; ``seconds`` is processor time, its calibration left out."""
    # A network's region that is its own slide needs no calibration; it would take the network a second time.
    calibration = segmenter.calibrate([image.image]) if isinstance(segmenter, Hematoxylin) else None
    start = time.process_time()
    (prediction,) = segmenter.predict(image.image[None])
    nuclei = segmenter.postprocess(image.image, prediction, calibration)
    seconds = time.process_time() - start
    found = labels_of(nuclei, shape=image.instances.shape)
    return scores(found, image.instances) | {"seconds": seconds, "mpx": found.size / 1e6}


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over images, each with its interval; nuclei found a drawn one; seconds a million pixels."""
    drawn = np.random.default_rng(0).integers(0, len(rows), (DRAWS, len(rows)))
    figures: dict[str, Any] = {}
    for key in SHOWN:
        values = np.array([row[key] for row in rows])
        ends = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
        figures[key] = [round(float(value), 4) for value in (values.mean(), *ends)]
    total = {key: sum(row[key] for row in rows) for key in ("found", "drawn", "seconds", "mpx")}
    return figures | {
        "found_per_drawn": round(total["found"] / max(total["drawn"], 1), 3),
        "s_per_mpx": round(total["seconds"] / total["mpx"], 3),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of the rows."""
    lines = [
        "| source | images | segmenter | F1 within 3 um | F1, IoU 0.5 | PQ | AJI | Dice | found a drawn one | s/Mpx |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(*row[key]) for key in ("f1", "f1_iou", "pq")]
        cells += [f"{row[key][0]:.3f}" for key in ("aji", "dice")]
        cells += [f"{row['found_per_drawn']:.2f}", f"{row['s_per_mpx']:.2f}"]
        lines.append(f"| {row['source']} | {row['images']} | {row['segmenter']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(images: Sequence[Labelled], segmenters: Mapping[str, Segmenter]) -> list[dict[str, Any]]:
    """One row a source and segmenter."""
    rows: list[dict[str, Any]] = []
    for source in dict.fromkeys(image.source for image in images):
        own = [image for image in images if image.source == source]
        for name, segmenter in segmenters.items():
            figures = summary([measured(segmenter, image) for image in own])
            rows.append({"source": source, "images": len(own), "segmenter": name, **figures})
            print(rows[-1], flush=True)
    return rows


def found_in_window(slide_file: Path, *, window: Sequence[int], words: Sequence[str]) -> dict[str, Any]:
    """Nuclei of a slide, and of a window (x, y, width, height), whose centroids lie in it."""
    x, y, width, height = window
    with tempfile.TemporaryDirectory() as folder, start_processes(1) as processes:
        given = [f"slides={slide_file}", f"output={folder}", "cells_per_slide=null", *words]
        config = load("curate", given, CurateConfig)
        (slide,) = list_slides(config.slides)
        segmenter, store = config.segmenter.build(), Store(config.output)
        row = curate_slide(slide, config=config, segmenter=segmenter, processes=processes, store=store)
        cells = store.read_table(shard_name(slide.slide_id), columns=["x_level0_px", "y_level0_px"])
    at_x, at_y = (np.asarray(cells[name]) for name in ("x_level0_px", "y_level0_px"))
    inside = (at_x >= x) & (at_x < x + width) & (at_y >= y) & (at_y < y + height)
    assert row.mpp is not None
    mm2 = width * height * row.mpp**2 / 1e6
    found = int(inside.sum())
    return {"slide": row.n_nuclei, "window": found, "per_mm2": round(found / mm2), "network_s": row.network_s}


def measure_window(slide_file: Path, *, window: Sequence[int], checkpoints: Sequence[str]) -> None:
    """One line a segmenter, printed and recorded."""
    named = {"hematoxylin": ["segmenter=hematoxylin"], "hoverfast": ["segmenter=hoverfast"]}
    for file in checkpoints:
        named[f"hoverfast, {Path(file).name}"] = ["segmenter=hoverfast", f"segmenter.checkpoint={file}"]
    rows = {}
    for name, words in named.items():
        rows[name] = found_in_window(slide_file, window=window, words=words)
        print(name, rows[name], flush=True)
    record("nuclei", {"slide": slide_file.name, "window": list(window), "found": rows}, packages=PACKAGES)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders of labelled images")
    parser.add_argument("--checkpoint", nargs="*", default=[], help="further weights of HoverFast's network")
    parser.add_argument("--held-out-share", type=float, help="only images that training with this share never saw")
    parser.add_argument("--slide", type=Path, help="a slide with a window that has hardly any nuclei")
    parser.add_argument("--window", type=int, nargs=4, help="x, y, width, height at level 0")
    options = parser.parse_args()
    if bool(options.data) == bool(options.slide) or bool(options.slide) != bool(options.window):
        parser.error("expected --data, or --slide and --window")
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    if options.slide:
        measure_window(options.slide, window=options.window, checkpoints=options.checkpoint)
        return
    images = [image for folder in options.data for image in read_folder(folder)]
    if options.held_out_share is not None:
        images = split(images, held_out_share=options.held_out_share)[1]
    segmenters: dict[str, Segmenter] = {"hematoxylin": Hematoxylin(), "hoverfast": HoverFast(batch=1)}
    segmenters |= {f"hoverfast, {Path(file).name}": HoverFast(file, batch=1) for file in options.checkpoint}
    rows = measure(images, segmenters)
    print(table(rows))
    what = "all" if options.held_out_share is None else f"held out, share {options.held_out_share}"
    record("nuclei", {"which": what, "rows": rows}, packages=PACKAGES)


if __name__ == "__main__":
    main()
