"""Detection and area of nuclei by the segmenter that needs no weights, beside a plain Otsu watershed, in one run.

    python -m benchmarks.segmentation --data <folder with one folder a data set>    measure
    python -m benchmarks.segmentation --data <the same> --fit                       fit the gates anew on that data, and
                                                                                    test how they carry over

A data set is a folder of ``<name>.jpg`` and ``<name>_inst.npz`` (``inst_map``, 0 is background) at 0.25 um/px. Every
image counts as a slide of its own. Detection: predicted and drawn centroids are paired one to one, nearest pairs first,
up to 3 um (12 px) apart. All figures are means over images. Results go to ``benchmarks/results/segmentation.json`` and
between the markers of ``docs/segmentation.md``.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from scipy import ndimage, optimize
from skimage.color import rgb2hed
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.io import imread
from skimage.segmentation import watershed

from benchmarks.record import hardware
from lemon.nuclei.hematoxylin import Gate, calibrate, candidates, choose, score, segment
from lemon.nuclei.scores import centroids, detection, dice
from lemon.runtime.store import code_version

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/segmentation.json"
PAGE = ROOT / "docs/segmentation.md"
MIN_AREA_PX = 80  # 5 um2
DEVELOPMENT = ("monuseg_train", "consep_train", "gbm40")
OTHERS = ("cpm15", "dsb2018_he")
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


@dataclass(frozen=True)
class Labelled:
    """An image uint8 [H, W, 3] and its drawn instances int32 [H, W]."""

    name: str
    image: np.ndarray
    drawn: np.ndarray


# --- data and metrics -------------------------------------------------------------------------------------------------


def labelled_images(folder: Path) -> Iterator[Labelled]:
    """Images of a data set, sorted by name; of cpm15 those of 40x only."""
    names = sorted(path.name.removesuffix("_inst.npz") for path in folder.glob("*_inst.npz"))
    table = folder / "images.csv"
    if table.exists():
        with table.open() as file:
            at_20x = {row["image"] for row in csv.DictReader(file) if row.get("objective_power") == "20"}
        names = [name for name in names if name not in at_20x]
    for name in names:
        image = imread(folder / f"{name}.jpg")
        yield Labelled(name, image, np.load(folder / f"{name}_inst.npz")["inst_map"].astype(np.int32))


# --- what is compared -------------------------------------------------------------------------------------------------


def hematoxylin(image: np.ndarray) -> np.ndarray:
    """The platform's embedded segmenter with its defaults."""
    return segment(image, calibration=calibrate([image]))


def otsu_watershed(image: np.ndarray) -> np.ndarray:
    """Otsu on the blurred hematoxylin channel of scikit-image, distance transform, watershed; objects over 5 um2."""
    blurred = cv2.GaussianBlur(rgb2hed(image)[..., 0], (0, 0), 2)
    mask = blurred > threshold_otsu(blurred)
    distance = cv2.GaussianBlur(ndimage.distance_transform_edt(mask), (0, 0), 2)
    markers = np.zeros(mask.shape, np.int32)
    peaks = peak_local_max(distance, min_distance=6, exclude_border=False)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = watershed(-distance, markers, mask=mask)
    small = np.bincount(labels.ravel()) < MIN_AREA_PX
    return np.where(small[labels], 0, labels)


def measured(image: Labelled, method: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    """Figures of one image; ``seconds`` is processor time."""
    start = time.process_time()
    labels = method(image.image)
    seconds = time.process_time() - start
    figures = detection(centroids(labels), centroids(image.drawn))
    return figures | {"dice": dice(labels, image.drawn), "seconds": seconds, "mpx": labels.size / 1e6}


def summary(images: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over images, rounded to four digits, and seconds per million pixels."""
    means = {key: float(np.mean([image[key] for image in images])) for key in ("f1", "dice", "precision", "recall")}
    means["s_per_mpx"] = sum(image["seconds"] for image in images) / sum(image["mpx"] for image in images)
    return {key: round(value, 4) for key, value in means.items()}


def measure(data: Path) -> list[dict]:
    """One row a data set and subset."""
    rows = []
    for name in (*DEVELOPMENT, *OTHERS):
        if not (data / name).is_dir():
            print(f"{name}: absent, left out")
            continue
        methods = {"hematoxylin": hematoxylin, "otsu_watershed": otsu_watershed}
        figures: dict[str, list] = {method: [] for method in methods}
        for image in labelled_images(data / name):
            for method, function in methods.items():
                figures[method].append(measured(image, function))
        n = len(figures["hematoxylin"])
        for subset in [13, n] if name in DEVELOPMENT and n > 13 else [n]:
            row = {"data": name, "images": "all" if subset == n else f"first {subset}", "n": subset}
            rows.append(row | {method: summary(values[:subset]) for method, values in figures.items()})
            print(json.dumps(rows[-1]), flush=True)
    return rows


# --- fitting the gates ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """The pieces of one image, their IoU with the drawn nucleus that fits best, and the drawn centroids."""

    data: str
    pieces: dict[str, np.ndarray]
    iou: np.ndarray  # [N]
    drawn: np.ndarray  # [M, 2]


def example(data: str, image: Labelled) -> Example:
    """Pieces of an image of which both sides are cut to multiples of 4."""
    height, width = (side // 4 * 4 for side in image.drawn.shape)
    region, drawn = np.ascontiguousarray(image.image[:height, :width]), image.drawn[:height, :width]
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


def fit(data: Path) -> dict:
    """Fit on everything; then on part of it, and test on the rest."""
    examples = [example(name, image) for name in DEVELOPMENT for image in labelled_images(data / name)]
    gates, scale = fitted(examples)
    for gate in gates:
        print(f'    Gate("{gate.feature}", {gate.middle:.3g}, {gate.slope:.3g}),')
    print(f"SCALE = {scale:.3g}")
    by_half, half_scale = fitted(examples[::2])
    transfer = []
    for name in DEVELOPMENT:
        own = [e for e in examples if e.data == name]
        half = [e for e in examples[1::2] if e.data == name]
        by_others, others_scale = fitted([e for e in examples if e.data != name])
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


# --- writing down -----------------------------------------------------------------------------------------------------


def results_table(results: dict) -> str:
    """Markdown of the measured rows."""
    lines = [
        f"Commit {results['commit']}, {results['hardware']}, one thread, processor time.",
        "",
        "| data | images | F1 | Dice | precision | recall | s/Mpx | Otsu watershed: F1 | Dice | s/Mpx |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        ours, peer = row["hematoxylin"], row["otsu_watershed"]
        lines.append(
            f"| {row['data']} | {row['images']} ({row['n']}) | **{ours['f1']:.3f}** | {ours['dice']:.3f} "
            f"| {ours['precision']:.3f} | {ours['recall']:.3f} | {ours['s_per_mpx']:.2f} "
            f"| {peer['f1']:.3f} | {peer['dice']:.3f} | {peer['s_per_mpx']:.2f} |"
        )
    return "\n".join(lines)


def transfer_table(results: dict) -> str:
    """Markdown of how the fitted gates carry over."""
    lines = [
        f"Commit {results['commit']}. F1 of the chosen pieces, before outlines are mended.",
        "",
        "| data | fitted on all | fitted on the other two sets | half the images, fitted on all | on the other half |",
        "|---|---|---|---|---|",
    ]
    for row in results["transfer"]:
        lines.append(
            f"| {row['data']} | {row['fit_on_all']:.3f} | {row['fit_on_other_sets']:.3f} "
            f"| {row['half_fit_on_all']:.3f} ({row['n_half']} images) | {row['half_fit_on_other_half']:.3f} |"
        )
    return "\n".join(lines)


def write_down(part: str, results: dict, *, table: str) -> None:
    """Replace one part of the results file and one block of the page."""
    everything = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(everything | {part: results}, indent=1) + "\n")
    begin, end = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    before, rest = PAGE.read_text().split(begin)
    PAGE.write_text(f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    circumstances = {"commit": code_version(), "hardware": hardware()}
    if arguments.fit:
        results = circumstances | fit(arguments.data)
        write_down("fit", results, table=transfer_table(results))
        return
    results = circumstances | {"rows": measure(arguments.data)}
    table = results_table(results)
    print(table)
    write_down("measured", results, table=table)


if __name__ == "__main__":
    main()
