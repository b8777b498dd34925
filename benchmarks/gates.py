"""The gates of the segmenter that needs no weights, fitted anew to drawn nuclei, and how they carry over.

    python -m benchmarks.gates --data <folder with one folder a data set> --empty CMU-1-Small-Region.svs

A data set is a folder that ``lemon.nuclei.training.layouts.read_folder`` reads. The slide lends windows of keratin, in
which no piece is a nucleus; they are others than those that ``benchmarks.segmentation`` counts false nuclei in, of the
same slide. The gates are printed as they stand in
``lemon/nuclei/hematoxylin.py``. Then they are fitted to part of the images and F1 within 3 um of the others is told,
means over images; a line goes to ``benchmarks/results/gates.jsonl``.
"""

from __future__ import annotations

import argparse
import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy import optimize

from benchmarks.record import record
from benchmarks.segmentation import tissue_samples
from lemon.nuclei.hematoxylin import Gate, calibrate, candidates, choose, score
from lemon.nuclei.scores import centroids, detection
from lemon.nuclei.training.images import Labelled
from lemon.nuclei.training.layouts import read_folder
from lemon.slides.reader import SlideReader

MIDDLE_PX = 512
MIN_AREA_PX = 80  # 5 um2
DEVELOPMENT = ("monuseg_train", "consep_train", "gbm40")
KERATIN = ((1380, 930, 220, 240), (1180, 1640, 260, 200))
"""Windows of CMU-1-Small-Region (x, y, width, height in px of level 0), chosen by eye."""
KERATIN_TIMES = 4  # how often each window counts
PULL = 0.003  # keeps gates that hardly matter near where they start; a free fit pushes them far outside the data
FEATURES = (
    ("log_area", 1),
    ("log_area", -1),
    ("ellipse_fit", 1),
    ("axis_ratio", 1),
    ("contrast", 1),
    ("edge_slope", 1),
    ("weak_edge", -1),
    ("redness", 1),
    ("crowding", -1),
    ("growth", -1),
)


def labelled_images(folder: Path) -> Iterator[Labelled]:
    """Images of a data set at 40x."""
    return (image for image in read_folder(folder) if image.source == folder.name)


# --- fitting the gates ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """The pieces of one image, their IoU with the drawn nucleus that fits best, and the drawn centroids."""

    data: str
    pieces: dict[str, np.ndarray]
    iou: np.ndarray  # [N]
    drawn: np.ndarray  # [M, 2]


def example(data: str, image: Labelled) -> Example:
    """Pieces of the middle of an image, up to 512 px a side."""
    height, width = (min(side // 4 * 4, MIDDLE_PX) for side in image.instances.shape)
    y, x = ((side - own) // 2 for side, own in zip(image.instances.shape, (height, width), strict=True))
    box = slice(y, y + height), slice(x, x + width)
    region, drawn = np.ascontiguousarray(image.image[box]), image.instances[box]
    _, _, pieces, levels = candidates(region, calibration=calibrate([region]))
    half = np.ascontiguousarray(drawn[::2, ::2])
    drawn_px = np.bincount(half.ravel())
    iou = []
    for labels in levels:
        inside = labels > 0
        n_drawn = len(drawn_px)
        pairs, shared = np.unique(labels[inside].astype(np.int64) * n_drawn + half[inside], return_counts=True)
        piece, nucleus = np.divmod(pairs, n_drawn)
        best, piece_px = np.zeros(labels.max() + 1), np.bincount(labels.ravel())
        overlap = np.where(nucleus > 0, shared / (piece_px[piece] + drawn_px[nucleus] - shared), 0)
        np.maximum.at(best, piece, overlap)
        iou.append(best[1:])
    return Example(data, pieces, np.concatenate(iou), centroids(drawn))


def keratin(slide: Path) -> list[Example]:
    """The windows of keratin, with the calibration of their slide."""
    reader = SlideReader(str(slide))
    calibration, factor = calibrate(tissue_samples(reader)), reader.mpp / 0.25
    examples = []
    for window in KERATIN:
        x, y, width, height = (round(value * factor) // 4 * 4 for value in window)
        region = reader.region(x, y, width_px=width, height_px=height)
        pieces = candidates(region, calibration=calibration)[2]
        examples.append(Example("keratin", pieces, np.zeros(len(pieces["level"])), np.empty((0, 2))))
    return examples


def fitted(examples: Sequence[Example], *, every: int = 10) -> tuple[list[Gate], float]:
    """Gates and scale of least squared error in IoU on every n-th piece; images of small data sets weigh more."""
    x = np.concatenate([np.stack([e.pieces[name][::every] for name, _ in FEATURES], axis=1) for e in examples])
    iou = np.concatenate([e.iou[::every] for e in examples])
    images = collections.Counter(e.data for e in examples)
    weight = np.concatenate([np.full(len(e.iou[::every]), images[e.data] ** -0.5) for e in examples])
    weight /= np.linalg.norm(weight)
    mean, deviation = x.mean(0), x.std(0)
    side = np.array([side for _, side in FEATURES], float)
    k = len(FEATURES)
    start = np.concatenate([-1.5 * side, 3 * side, [0.0]])  # middles and slopes, in standard deviations; log scale

    def residuals(p: np.ndarray) -> np.ndarray:
        passed = -np.logaddexp(0, -p[k : 2 * k] * ((x - mean) / deviation - p[:k])).sum(1)
        return np.concatenate([weight * (np.exp(passed + p[-1]) - iou), PULL * (p - start)])

    highest = np.append(np.full(2 * k, np.inf), 0.25)
    p = optimize.least_squares(residuals, start, bounds=(-np.inf, highest), max_nfev=60).x
    middles, slopes = p[:k] * deviation + mean, p[k : 2 * k] / deviation
    gates = [Gate(name, float(m), float(s)) for (name, _), m, s in zip(FEATURES, middles, slopes, strict=True)]
    return gates, float(np.exp(p[-1]))


def f1_of(examples: Sequence[Example], *, gates: Sequence[Gate], scale: float, min_score: float = 0.25) -> float:
    """Mean F1 of the chosen pieces, before their outlines are mended."""
    values = []
    for e in examples:
        rows = choose(score(e.pieces, gates=gates, scale=scale) - min_score, parents=e.pieces["parent"])
        rows = rows[e.pieces["area_um2"][rows] * 16 >= MIN_AREA_PX]
        found = 2 * np.stack([e.pieces[axis][rows] for axis in ("x_px", "y_px")], axis=1) + 0.5
        values.append(detection(found, e.drawn)["f1"])
    return round(float(np.mean(values)), 4)


def fit(data: Path, slide: Path) -> dict[str, Any]:
    """Fit on everything; then on part of the images, and test on the rest."""
    examples = [example(name, image) for name in DEVELOPMENT for image in labelled_images(data / name)]
    empty = keratin(slide) * KERATIN_TIMES
    gates, scale = fitted([*examples, *empty])
    for gate in gates:
        print(f'    Gate("{gate.feature}", {gate.middle:.3g}, {gate.slope:.3g}),')
    print(f"SCALE = {scale:.3g}")
    by_half, half_scale = fitted([*examples[::2], *empty])
    transfer = []
    for name in DEVELOPMENT:
        own = [e for e in examples if e.data == name]
        half = [e for e in examples[1::2] if e.data == name]
        by_others, others_scale = fitted([*(e for e in examples if e.data != name), *empty])
        transfer.append(
            {
                "data": name,
                "fit_on_all": f1_of(own, gates=gates, scale=scale),
                "fit_on_other_sets": f1_of(own, gates=by_others, scale=others_scale),
                "n_half": len(half),
                "half_fit_on_all": f1_of(half, gates=gates, scale=scale),
                "half_fit_on_other_half": f1_of(half, gates=by_half, scale=half_scale),
            }
        )
        print(json.dumps(transfer[-1]), flush=True)
    return {"gates": [vars(gate) for gate in gates], "scale": scale, "transfer": transfer}


def transfer_table(transfer: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of how the fitted gates carry over."""
    lines = [
        "| data | fitted on all | fitted on the other two sets | half the images, fitted on all | on the other half |",
        "|---|---|---|---|---|",
    ]
    for row in transfer:
        lines.append(
            f"| {row['data']} | {row['fit_on_all']:.3f} | {row['fit_on_other_sets']:.3f} "
            f"| {row['half_fit_on_all']:.3f} ({row['n_half']} images) | {row['half_fit_on_other_half']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder a data set")
    parser.add_argument("--empty", type=Path, required=True, help="CMU-1-Small-Region")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    results = fit(options.data, options.empty)
    print(transfer_table(results["transfer"]))
    record("gates", results)


if __name__ == "__main__":
    main()
