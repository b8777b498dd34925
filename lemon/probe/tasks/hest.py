"""HEST-1k, Xenium slides: gene expression of cells from their nuclei: ``hest-bowel``, ``hest-breast``, ``hest-lung``.

Licence: CC BY-NC-SA, gated. To obtain: https://huggingface.co/datasets/MahmoodLab/hest, the slides in ``SLIDES``.
Expected folder, of each slide <id>:

    wsis/<id>.tif
    metadata/<id>.json                             pixel_size_um_estimated
    transcripts/<id>_transcripts.parquet           cell_id, feature_name, qv
    xenium_seg/<id>_xenium_cell_seg.parquet        polygons in level-0 px, by cell_id (_nucleus_ for centre="nucleus")

Counts are made from the transcripts (``xenium.py``): ``st/<id>.h5ad`` has pooled spots, no cells. Cells are those with
a counted transcript whose crop lies inside the slide; the 10,000 of lowest rank of a slide are a random sample that
depends on no order. Crops are centred on the cell's polygon (default), or on its nucleus's, where cells without one
are left out; counts are the whole cell's in both. Resolution is metadata's estimate: the one embedded
in the file is wrong by up to five times. Genes: those on every slide's panel, ranked within each slide by mean count
over all its cells, ranks summed, the best 50; the ranking sees test slides, as the paper's does, but no image.

Target ``log1p`` (default, as HEST-Bench) is log(1 + count); ``counts`` is the bare count. The paper leaves one slide
out (10,000 cells of each of 5, 5 and 20 slides); the leak-free protocol leaves one donor out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from lemon.cells.crop import cut_crops
from lemon.cells.select import rank_of
from lemon.probe.folds import LEAK_FREE, PAPER, leave_one_group_out
from lemon.probe.task import Count, Protocol, Task, TaskEntry, TaskError
from lemon.probe.tasks.assemble import check_protocols
from lemon.probe.tasks.crops import corners, is_whole, size_at_crop_mpp
from lemon.probe.tasks.xenium import MIN_QV, count_transcripts, read_centroids
from lemon.schema import CELL_PX
from lemon.slides.reader import RegionError, SlideError, SlideReader

OBTAIN = "HEST-1k (gated, CC BY-NC-SA): https://huggingface.co/datasets/MahmoodLab/hest"
_LUNG = (856, 857, 858, 859, 860, 861, 864, 865, 866, 867, 870, 873, 875, 876, 879, 880, 881, 882, 883, 884)
SLIDES: dict[str, tuple[str, ...]] = {
    "bowel": ("TENX149", "TENX148", "TENX147", "TENX139", "TENX111"),
    "breast": ("NCBI783", "NCBI785", "TENX94", "TENX95", "TENX98"),
    "lung": tuple(f"NCBI{number}" for number in _LUNG),
}
DONORS = {
    **dict.fromkeys(("TENX147", "TENX148", "TENX149"), "TENX147-149"),  # HEST's table has one patient for all three
    **dict.fromkeys(("NCBI856", "NCBI857"), "VUILD96"),
    **dict.fromkeys(("NCBI858", "NCBI859"), "VUILD91"),
    **dict.fromkeys(("NCBI860", "NCBI861"), "VUILD78"),
    **dict.fromkeys(("NCBI881", "NCBI882"), "TILD117"),
    **dict.fromkeys(("NCBI875", "NCBI876"), "VUHD116"),
}
"""Donors of more than one slide. A slide that is not here is its own donor."""

N_CELLS, N_GENES = 10_000, 50
BLOCK_PX = 1024  # side at 0.25 um/px of what is read of a slide at once: 4 MB, whatever the slide's size

Target = Literal["log1p", "counts"]
Centre = Literal["cell", "nucleus"]


@dataclass(frozen=True)
class Sample:
    """The cells that are taken of one slide."""

    slide_id: str
    mpp: float
    sample_ids: np.ndarray  # str [N], sorted
    corner_px: np.ndarray  # int [N, 2], at 0.25 um/px
    counts: np.ndarray  # float32 [N, G]
    genes: np.ndarray  # str [G]
    mean: np.ndarray  # float64 [G], over all cells with a transcript
    tally: dict[str, int]  # what each filter left


def load(
    folder: Path,
    *,
    organ: str,
    seed: int = 0,
    target: Target = "log1p",
    centre: Centre = "cell",
    n_cells: int = N_CELLS,
    n_genes: int = N_GENES,
    slides: Sequence[str] | None = None,
) -> Task:
    """Crops of cells and the expression of their genes.

    Args:
        folder: as the module's head says.
        organ: bowel, breast or lung.
        seed: which cells are drawn.
        target: what is regressed.
        centre: on whose centroid crops are centred.
        n_cells: of each slide, at most.
        n_genes: at most.
        slides: some of the organ's; None: the paper's.

    Raises:
        TaskError: a file or column is absent, a slide cannot be opened, or the panels share no gene.
    """
    if target not in ("log1p", "counts"):
        raise TaskError(f"target: got {target!r}; expected log1p or counts")
    if centre not in ("cell", "nucleus"):
        raise TaskError(f"centre: got {centre!r}; expected cell or nucleus")
    chosen = tuple(slides or SLIDES[organ])
    check_slides(folder, chosen, organ=organ, centre=centre)
    names = tqdm(chosen, unit="slide", desc=f"hest-{organ} cells", disable=None)
    samples = [take_cells(folder, slide_id, centre=centre, n_cells=n_cells, seed=seed) for slide_id in names]
    genes = common_genes(samples, n_genes=n_genes)
    images, readable = read_crops(folder, samples, desc=f"hest-{organ} crops")
    counts = np.concatenate([_columns(sample, genes) for sample in samples])[readable]
    slide = np.repeat([sample.slide_id for sample in samples], [len(sample.sample_ids) for sample in samples])[readable]
    donor = np.array([DONORS.get(name, name) for name in slide.tolist()], str)
    protocols = _protocols(slide, donor)
    check_protocols(f"hest-{organ}", protocols, labels=None)
    return Task(
        name=f"hest-{organ}",
        kind="regression",
        images=images,
        target=np.log1p(counts) if target == "log1p" else counts,
        target_names=tuple(genes.tolist()),
        sample_ids=np.concatenate([sample.sample_ids for sample in samples])[readable],
        groups={"slide": slide, "patient": donor},
        protocols=protocols,
        cluster="patient",
        counts=_counts(samples, slide),
        notes=_notes(protocols, target=target, centre=centre),
    )


def check_slides(folder: Path, slides: Sequence[str], *, organ: str, centre: Centre) -> None:
    """Raise TaskError, before anything is read, where a file of a slide is absent or all slides are of one donor."""
    for slide_id in slides:
        for path in files_of(folder, slide_id, centre=centre):
            if not path.is_file():
                raise TaskError(
                    f"{path}: no such file; expected the files of {', '.join(slides)}: {OBTAIN}, or slides=[...]"
                )
    if len({DONORS.get(name, name) for name in slides}) < 2:
        raise TaskError(
            f"hest-{organ}: {', '.join(slides)} are of one donor; expected two or more: choose slides=[...]"
        )


def files_of(folder: Path, slide_id: str, *, centre: Centre) -> tuple[Path, Path, Path, Path]:
    """Slide, metadata, transcripts and segmentation, of cells or of their nuclei."""
    return (
        folder / "wsis" / f"{slide_id}.tif",
        folder / "metadata" / f"{slide_id}.json",
        folder / "transcripts" / f"{slide_id}_transcripts.parquet",
        folder / "xenium_seg" / f"{slide_id}_xenium_{centre}_seg.parquet",
    )


def take_cells(folder: Path, slide_id: str, *, centre: Centre, n_cells: int, seed: int) -> Sample:
    """Draw the cells of one slide and count their transcripts."""
    slide, metadata, transcripts, segmentation = files_of(folder, slide_id, centre=centre)
    mpp = read_mpp(metadata)
    reader = open_slide(slide, mpp=mpp)
    ids, centre_px = read_centroids(segmentation)
    expression = count_transcripts(transcripts, ids)
    width_px, height_px = size_at_crop_mpp(reader.width_px, reader.height_px, mpp=mpp)
    reader.close()
    corner = corners(centre_px, mpp=mpp)
    expressed = np.asarray(expression.counts.sum(axis=1)).ravel() > 0
    usable = np.flatnonzero(expressed & is_whole(corner, width_px=width_px, height_px=height_px))
    names = np.array([f"{slide_id}_{name}" for name in ids.tolist()], str)
    rank = rank_of(f"{seed}/{name}" for name in names[usable].tolist())
    taken = np.sort(usable[np.argsort(rank, kind="stable")[:n_cells]])
    tally = {
        "transcripts": expression.n_transcripts,
        f"transcripts of a gene, in a cell, qv >= {MIN_QV:g}": expression.n_counted,
        "cells" if centre == "cell" else "cells with a nucleus": len(ids),
        "cells with a transcript": int(expressed.sum()),
        "whole crop inside the slide": len(usable),
    }
    counts = expression.counts[taken].toarray().astype(np.float32)
    mean = np.asarray(expression.counts.sum(axis=0)).ravel() / expressed.sum()
    return Sample(slide_id, mpp, names[taken], corner[taken], counts, expression.genes, mean, tally)


def read_mpp(path: Path) -> float:
    """pixel_size_um_estimated of a slide's metadata; raises TaskError where it is absent or no resolution."""
    try:
        value = json.loads(path.read_text()).get("pixel_size_um_estimated")
    except ValueError as error:
        raise TaskError(f"{path}: no JSON ({error}); expected the slide's metadata: download it again") from None
    if not isinstance(value, int | float) or not 0.05 < value < 2:
        raise TaskError(f"{path}: pixel_size_um_estimated={value!r}; expected um/px, 0.1 to 0.5: download it again")
    return float(value)


def open_slide(path: Path, *, mpp: float) -> SlideReader:
    """A slide that is read at the resolution given, whatever its file states."""
    try:
        return SlideReader(path, mpp=mpp)
    except SlideError as error:
        raise TaskError(f"{path}: {error}; expected the tiled TIFF of {OBTAIN}: download it") from None


def common_genes(samples: Sequence[Sample], *, n_genes: int = N_GENES) -> np.ndarray:
    """Genes on all panels of lowest summed rank by mean count, str [n_genes], best first; ties by name."""
    shared = np.array(sorted(set.intersection(*(set(sample.genes.tolist()) for sample in samples))), str)
    if not len(shared):
        names = ", ".join(sample.slide_id for sample in samples)
        raise TaskError(
            f"no gene is on the panels of {names} alike; expected slides with common genes: choose slides=[...]"
        )
    total = np.zeros(len(shared))
    for sample in samples:
        mean = sample.mean[np.searchsorted(sample.genes, shared)]
        total[np.argsort(-mean, kind="stable")] += np.arange(len(shared))
    return shared[np.argsort(total, kind="stable")[:n_genes]]


def read_crops(folder: Path, samples: Sequence[Sample], *, desc: str) -> tuple[np.ndarray, np.ndarray]:
    """Crops of all samples, uint8 [K, 60, 60, 3], and which of the N cells could be read: bool [N].

    A slide is read in blocks of ``BLOCK_PX`` around its cells.
    """
    n_cells = sum(len(sample.sample_ids) for sample in samples)
    images, readable = np.empty((n_cells, CELL_PX, CELL_PX, 3), np.uint8), np.ones(n_cells, bool)
    start = 0
    for sample in tqdm(samples, unit="slide", desc=desc, disable=None):
        reader = open_slide(folder / "wsis" / f"{sample.slide_id}.tif", mpp=sample.mpp)
        blocks, owner = np.unique(sample.corner_px // BLOCK_PX, axis=0, return_inverse=True)
        side = BLOCK_PX + CELL_PX
        for number, (x_px, y_px) in enumerate((blocks * BLOCK_PX).tolist()):
            indices = np.flatnonzero(owner.ravel() == number)
            try:
                block = reader.region(x_px, y_px, width_px=side, height_px=side)
            except (RegionError, SlideError):
                readable[start + indices] = False
                continue
            images[start + indices] = cut_crops(block, sample.corner_px[indices] - (x_px, y_px))
        reader.close()
        start += len(sample.sample_ids)
    return (images if readable.all() else images[readable]), readable


def _columns(sample: Sample, genes: np.ndarray) -> np.ndarray:
    return sample.counts[:, np.searchsorted(sample.genes, genes)]


def _protocols(slide: np.ndarray, donor: np.ndarray) -> tuple[Protocol, ...]:
    by_donor = Protocol(LEAK_FREE, leave_one_group_out(donor), inner_groups=donor)
    if len(np.unique(slide)) == len(np.unique(donor)):
        return (by_donor,)
    return Protocol(PAPER, leave_one_group_out(slide), inner_groups=slide), by_donor


def _counts(samples: Sequence[Sample], slide: np.ndarray) -> tuple[Count, ...]:
    totals = (Count(what, sum(sample.tally[what] for sample in samples)) for what in samples[0].tally)
    taken = (Count(f"cells of {sample.slide_id}", int((slide == sample.slide_id).sum()), N_CELLS) for sample in samples)
    return (*totals, *taken, Count("cells", len(slide), N_CELLS * len(samples)))


def _notes(protocols: tuple[Protocol, ...], *, target: Target, centre: Centre) -> tuple[str, ...]:
    counted = "log(1 + count)" if target == "log1p" else "count"
    notes = [f"target: {counted} of transcripts in the cell", f"crops are centred on the centroid of the {centre}"]
    if len(protocols) == 1:
        notes.append("each slide is of another donor: the paper's protocol is the leak-free one")
    else:
        notes.append("donors have up to three slides: the paper's folds have donors on both sides")
    return tuple(notes)


def _entry(organ: str) -> TaskEntry:
    return TaskEntry("hest", partial(load, organ=organ), OBTAIN, lambda _folder: SLIDES[organ])


BOWEL, BREAST, LUNG = map(_entry, SLIDES)
