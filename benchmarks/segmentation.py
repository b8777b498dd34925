"""How well every segmenter finds drawn nuclei, by source, and how many it finds where there are none.

    python -m benchmarks.segmentation --data FOLDER [FOLDER ...] [--segmenter hoverfast,checkpoint=FILE ...]

A folder is one that ``lemon.nuclei.training.layouts.read_folder`` reads, at 0.25 um/px. Every image is a slide of its
own. ``--held-out-share`` keeps of each source the images that training with that share never saw, ``--seen low`` and
``--seen blur`` show them as a scanner at 20x, or one out of focus, would, and ``--pictures FOLDER`` draws the best and
the worst image of each source and segmenter: drawn nuclei green, found ones red.

    python -m benchmarks.segmentation --empty CMU-1-Small-Region.svs

counts nuclei a mm2 in windows of that slide that have none, or hardly any: keratin, ink, glass; and in the same windows
as a pen and a fold would change them, which are made up.

    python -m benchmarks.segmentation --curated CELLS

counts, in those windows, the nuclei of that slide in an output of ``lemon curate`` with ``cells_per_slide=null``: what
the whole chain draws there, as ``lemon demo`` does.

Figures (``lemon/nuclei/scores.py``) are means over images with 95 % intervals, images drawn 10,000 times with
replacement; ``more`` is the difference to the first segmenter on the same draws. Seconds are processor time. Standard
output gets tables, ``benchmarks/results/segmentation.jsonl`` a line.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed

from benchmarks.record import record
from lemon.cells.ledger import rows_with_cells
from lemon.cells.names import shard_name
from lemon.nuclei.hematoxylin import Hematoxylin
from lemon.nuclei.instances import Nucleus, polygons_from_labels
from lemon.nuclei.open import load_segmenter
from lemon.nuclei.scores import labels_of, scores
from lemon.nuclei.segmenter import Segmenter
from lemon.nuclei.training.images import Labelled, split
from lemon.nuclei.training.layouts import read_folder
from lemon.runtime.store import Store
from lemon.slides.reader import SlideReader
from lemon.slides.tiles import plan_regions, spread
from lemon.slides.tissue import OVERVIEW_MPP, find_tissue

SHOWN = ("f1", "precision", "recall", "f1_iou", "pq", "aji", "dice")
DRAWS = 10_000
PACKAGES = ("torch", "opencv-python-headless", "numpy")
EMPTY = {
    "keratin, flakes": (1260, 1180, 500, 333),
    "keratin, dense": (1440, 1000, 150, 80),
    "green ink on shreds": (1720, 1040, 230, 130),
    "glass": (1850, 100, 350, 450),
    "glass with wisps": (60, 960, 300, 100),
}
"""Windows of CMU-1-Small-Region (x, y, width, height in px of level 0), chosen by eye."""
EMPTY_SLIDE_PX = (2220, 2967)


# --- what is compared -------------------------------------------------------------------------------------------------


class OtsuWatershed:
    """The plain method: Otsu on the blurred hematoxylin channel, watershed of the distance transform; over 5 um2."""

    def calibrate(self, samples: Sequence[np.ndarray]) -> float:
        """One threshold for a slide."""
        return float(threshold_otsu(np.concatenate([_blurred_hematoxylin(sample).ravel() for sample in samples])))

    def predict(self, regions: np.ndarray) -> list[None]:
        """There is no network."""
        return [None] * len(regions)

    def postprocess(self, region: np.ndarray, prediction: None, calibration: float) -> list[Nucleus]:  # noqa: ARG002
        """Nuclei of a region."""
        mask = _blurred_hematoxylin(region) > calibration
        distance = cv2.GaussianBlur(ndimage.distance_transform_edt(mask), (0, 0), 2)
        markers = np.zeros(mask.shape, np.int32)
        peaks = peak_local_max(distance, min_distance=6, exclude_border=False)
        markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
        return polygons_from_labels(watershed(-distance, markers, mask=mask), min_area_px=80)


def _blurred_hematoxylin(image: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(rgb2hed(image)[..., 0], (0, 0), 2)


def opened(words: str) -> Segmenter:
    """A segmenter by ``name,key=value,...``."""
    name, *settings = words.split(",")
    return OtsuWatershed() if name == "otsu" else load_segmenter(name, **dict(word.split("=", 1) for word in settings))


def at_20x(image: np.ndarray) -> np.ndarray:
    """Brought down to half its sides and enlarged again, as a scan at 20x is."""
    height, width = image.shape[:2]
    small = cv2.resize(image, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def out_of_focus(image: np.ndarray) -> np.ndarray:
    """Blurred by a Gaussian of 0.375 um."""
    return cv2.GaussianBlur(image, (0, 0), 1.5)


SEEN: dict[str, Callable[[np.ndarray], np.ndarray]] = {"low": at_20x, "blur": out_of_focus}


# --- drawn nuclei -----------------------------------------------------------------------------------------------------


def found_in(segmenter: Segmenter, image: np.ndarray) -> tuple[list[Nucleus], float]:
    """Nuclei of an image that is its own slide, and processor seconds, calibration left out."""
    # A network's region that is its own slide needs no calibration; it would take the network a second time.
    calibration = segmenter.calibrate([image]) if isinstance(segmenter, Hematoxylin | OtsuWatershed) else None
    start = time.process_time()
    (prediction,) = segmenter.predict(image[None])
    nuclei = segmenter.postprocess(image, prediction, calibration)
    return nuclei, time.process_time() - start


def summary(rows: Sequence[Mapping[str, float]], first: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over images, each with its interval; ``more`` than the first; nuclei found a drawn one; seconds a Mpx."""
    drawn = np.random.default_rng(0).integers(0, len(rows), (DRAWS, len(rows)))

    def interval(values: np.ndarray) -> list[float]:
        ends = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
        return [round(float(value), 4) for value in (values.mean(), *ends)]

    own, other = ({key: np.array([row[key] for row in of]) for key in SHOWN} for of in (rows, first))
    figures: dict[str, Any] = {key: interval(own[key]) for key in SHOWN}
    figures["more"] = {key: interval(own[key] - other[key]) for key in ("f1", "pq")}
    total = {key: sum(row[key] for row in rows) for key in ("found", "drawn", "seconds", "mpx")}
    return figures | {
        "found_per_drawn": round(total["found"] / max(total["drawn"], 1), 3),
        "s_per_mpx": round(total["seconds"] / total["mpx"], 3),
    }


def measure(
    images: Sequence[Labelled], segmenters: Mapping[str, Segmenter], *, pictures: Path | None
) -> list[dict[str, Any]]:
    """One row a source and segmenter, and one a segmenter of all images."""
    each: dict[str, list[dict[str, Any]]] = {name: [] for name in segmenters}
    for image in images:
        for name, segmenter in segmenters.items():
            nuclei, seconds = found_in(segmenter, image.image)
            figures = scores(labels_of(nuclei, shape=image.instances.shape), image.instances)
            each[name].append(figures | {"seconds": seconds, "mpx": image.instances.size / 1e6, "nuclei": nuclei})
            print(f"{image.source} {image.name} {name}: F1 {figures['f1']:.3f}, PQ {figures['pq']:.3f}", flush=True)
    if pictures is not None:
        draw_cases(images, each, folder=pictures)
    sources = list(dict.fromkeys(image.source for image in images))
    rows = []
    for source in [*sources, *["all"] * (len(sources) > 1)]:
        of_source = [i for i, image in enumerate(images) if source in (image.source, "all")]
        first = [next(iter(each.values()))[i] for i in of_source]
        for name, values in each.items():
            figures = summary([values[i] for i in of_source], first)
            rows.append({"source": source, "images": len(of_source), "segmenter": name, **figures})
    return rows


def draw_cases(images: Sequence[Labelled], each: Mapping[str, Sequence[Mapping[str, Any]]], *, folder: Path) -> None:
    """The image of each source with the highest and the lowest F1 of each segmenter: drawn nuclei green, found red."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in dict.fromkeys(image.source for image in images):
        of_source = [i for i, image in enumerate(images) if image.source == source]
        for name, values in each.items():
            order = sorted(of_source, key=lambda i: values[i]["f1"])
            for case, i in (("worst", order[0]), ("best", order[-1])):
                drawn = polygons_from_labels(images[i].instances, min_area_px=1)
                file = folder / f"{source}_{case}_{name.partition(',')[0]}.jpg"
                draw(file, images[i].image, drawn=drawn, found=values[i]["nuclei"])


def draw(file: Path, image: np.ndarray, *, drawn: Sequence[Nucleus], found: Sequence[Nucleus]) -> None:
    """A JPEG of an image uint8 [H, W, 3], enlarged twice, with outlines: drawn ones green, found ones red."""
    picture = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    for colour, outlines in (((0, 255, 0), drawn), ((255, 0, 0), found)):
        rings = [np.round(2 * one.contour_px + 0.5).astype(np.int32) for one in outlines]
        cv2.polylines(picture, rings, isClosed=True, color=colour, thickness=1, lineType=cv2.LINE_AA)
    cv2.imwrite(str(file), picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])


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


# --- where there are none ---------------------------------------------------------------------------------------------


def tissue_samples(reader: SlideReader) -> list[np.ndarray]:
    """Four tissue regions of a slide to calibrate on, uint8 [512, 512, 3] each."""
    overview, mpp = reader.overview(mpp=OVERVIEW_MPP)
    tissue = find_tissue(overview, mpp=mpp).mask
    regions = spread(plan_regions(reader.bounds_base_px, size_px=512, overlap_px=128, tissue=tissue), 4)
    return [reader.region(r.x_px, r.y_px, width_px=r.size_px, height_px=r.size_px) for r in regions]


def empty_windows(reader: SlideReader) -> dict[str, np.ndarray]:
    """Windows at 0.25 um/px, and what a fold and pens make of some of them."""
    factor = reader.mpp / 0.25
    windows = {}
    for name, window in EMPTY.items():
        x, y, width, height = (round(value * factor) for value in window)
        windows[name] = reader.region(x, y, width_px=width, height_px=height)
    flakes, glass = windows["keratin, flakes"], windows["glass"]
    windows["fold (made up)"] = _through(flakes, np.roll(flakes[::-1], 40, axis=1))
    for colour, name in (((40, 60, 150), "blue"), (((30, 30, 35)), "black"), ((30, 130, 70), "green")):
        windows[f"{name} pen on glass (made up)"] = _through(glass, _pen(glass.shape, colour))
    return windows


def _through(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Light through two layers: transmissions multiply."""
    return (image.astype(np.float32) * other / 255).astype(np.uint8)


def _pen(shape: tuple[int, ...], colour: tuple[int, int, int]) -> np.ndarray:
    """Strokes of a pen on white, uint8 of a shape [H, W, 3], with the uneven edge and the streaks that ink has."""
    rng = np.random.default_rng(0)
    stroke = np.zeros(shape[:2], np.float32)
    for _ in range(4):
        ends = [(int(rng.integers(-50, shape[1] + 50)), y) for y in (-50, shape[0] + 50)]
        cv2.line(stroke, *ends, color=1.0, thickness=int(rng.integers(40, 120)))
    noise = cv2.GaussianBlur(rng.normal(0, 1, shape[:2]).astype(np.float32), (0, 0), 6)
    amount = cv2.GaussianBlur(stroke, (0, 0), 5) + 3 * noise * cv2.GaussianBlur(stroke, (0, 0), 15)
    ink = -np.log(np.array(colour, np.float32) / 255)
    return (255 * np.exp(-np.clip(amount, 0, 1.5)[..., None] * ink)).astype(np.uint8)


def count_where_empty(
    slide: Path, segmenters: Mapping[str, Segmenter], *, pictures: Path | None
) -> list[dict[str, Any]]:
    """Nuclei found in each window, and a mm2 of it, by segmenters calibrated on four tissue regions of the slide."""
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
    reader = SlideReader(str(slide))
    samples = tissue_samples(reader)
    calibrations = {name: segmenter.calibrate(samples) for name, segmenter in segmenters.items()}
    rows = []
    for window, image in empty_windows(reader).items():
        row: dict[str, Any] = {"window": window, "mm2": round(image.shape[0] * image.shape[1] * 0.25**2 / 1e6, 4)}
        for name, segmenter in segmenters.items():
            (prediction,) = segmenter.predict(image[None])
            found = segmenter.postprocess(image, prediction, calibrations[name])
            row[name] = len(found)
            if pictures is not None:
                words = re.sub(r"\W+", "_", f"{window} {name.partition(',')[0]}")
                draw(pictures / f"{words}.jpg", image, drawn=(), found=found)
        print(row, flush=True)
        rows.append(row)
    return rows


def count_curated(cells: Store) -> list[dict[str, Any]]:
    """Nuclei of a curated slide whose centroids lie in each window; SystemExit for another slide, or a sample."""
    (row, *others) = rows_with_cells(cells)
    if others or (row.width_px, row.height_px) != EMPTY_SLIDE_PX or row.n_cells != row.n_nuclei:
        raise SystemExit(f"--curated: expected all nuclei (cells_per_slide=null) of {EMPTY_SLIDE_PX} px of one slide")
    table = cells.read_table(shard_name(row.slide_id), columns=["x_level0_px", "y_level0_px"])
    place = np.stack([table["x_level0_px"].to_numpy(), table["y_level0_px"].to_numpy()], axis=1)
    rows = []
    for window, (x, y, width, height) in EMPTY.items():
        inside = ((place >= (x, y)) & (place < (x + width, y + height))).all(1)
        mm2 = width * height * (row.mpp or 0) ** 2 / 1e6
        rows.append({"window": window, "mm2": round(mm2, 4), "curated": int(inside.sum())})
    return rows


def empty_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Markdown of the counts."""
    lines = [f"| window | mm2 | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for row in rows:
        counts = [f"{row[name]} ({row[name] / row['mm2']:.0f} a mm2)" for name in names]
        lines.append(f"| {row['window']} | {row['mm2']:.3f} | {' | '.join(counts)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders of labelled images")
    parser.add_argument("--held-out-share", type=float, help="only images that training with this share never saw")
    parser.add_argument("--seen", choices=SEEN, help="how the images are worsened")
    parser.add_argument("--pictures", type=Path, help="folder for the best and the worst images, or the windows")
    parser.add_argument("--empty", type=Path, help="CMU-1-Small-Region, with windows that have no nuclei")
    parser.add_argument("--curated", help="output of lemon curate of CMU-1-Small-Region")
    parser.add_argument("--segmenter", nargs="+", default=["hematoxylin", "hoverfast", "otsu"])
    options = parser.parse_args()
    if sum(map(bool, (options.data, options.empty, options.curated))) != 1:
        parser.error("expected one of --data, --empty and --curated")
    if options.curated:
        rows = count_curated(Store(options.curated))
        print(empty_table(rows, ["curated"]))
        record("segmentation", {"curated": rows}, packages=PACKAGES)
        return
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    segmenters = {words: opened(words) for words in options.segmenter}
    if options.empty:
        rows = count_where_empty(options.empty, segmenters, pictures=options.pictures)
        print(empty_table(rows, list(segmenters)))
        record("segmentation", {"slide": options.empty.name, "empty": rows}, packages=PACKAGES)
        return
    images = [image for folder in options.data for image in read_folder(folder)]
    if options.held_out_share is not None:
        images = split(images, held_out_share=options.held_out_share)[1]
    if options.seen:
        images = [replace(image, image=SEEN[options.seen](image.image)) for image in images]
    rows = measure(images, segmenters, pictures=options.pictures)
    print(table(rows))
    what = {"held_out_share": options.held_out_share, "seen": options.seen or "as they are"}
    record("segmentation", {**what, "rows": rows}, packages=PACKAGES)


if __name__ == "__main__":
    main()
