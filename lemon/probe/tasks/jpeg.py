"""``jpeg:PATH``: does an embedding know a cell again when it is turned and compressed as JPEG? Needs no labels.

PATH is an output of ``lemon curate``. Each of ``n_cells`` cells of lowest rank gets copies in one other orientation: as
it is (``turned``), and compressed with each of ``QUALITIES``, colours at half the resolution, as scanners do. Each is a
protocol of its own; the score is the share of cells whose nearest copy (cosine) is their own. What compression costs is
the fall from ``turned``. Cells of slides that hold JPEG were compressed once before.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch

from lemon.probe.measures import QUALITIES, TURNED
from lemon.probe.task import Task
from lemon.probe.tasks.copies import retrieval_task, turned
from lemon.probe.tasks.curated import read_cells


def load(folder: str, *, seed: int = 0, n_cells: int = 5_000) -> Task:
    """Retrieval of compressed copies of a table's cells; raises TaskError where there is none, or of too few cells."""
    cells = read_cells(folder, task="jpeg", n_cells=n_cells)
    copies = turned(torch.from_numpy(cells.images), torch.Generator().manual_seed(seed)).numpy()
    by_quality = {f"q{quality}": compressed(copies, quality=quality) for quality in QUALITIES}
    return retrieval_task(cells, name=f"jpeg:{folder}", copies={TURNED: copies, **by_quality})


def compressed(images: np.ndarray, *, quality: int) -> np.ndarray:
    """Images RGB uint8 [N, H, W, 3] after JPEG of a quality from 1 to 100, colours at half the resolution (4:2:0)."""
    colours = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, *colours]
    encoded = (cv2.imencode(".jpg", image[..., ::-1], options)[1] for image in images)
    decoded: list[Any] = [cv2.imdecode(each, cv2.IMREAD_COLOR) for each in encoded]
    return np.stack(decoded)[..., ::-1]
