"""What neighbours are sought of: the vectors of cells of the output, or of pictures by the same encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from lemon.embed.read import Embeddings
from lemon.embed.stream import vectors_of
from lemon.errors import ConfigError
from lemon.schema import CELL_MPP, CELL_PX


@dataclass(frozen=True)
class Queries:
    """Names, vectors float32 [N, D], and of cells of the output where each is (slide, row); of pictures the crops."""

    names: list[str]
    vectors: np.ndarray
    places: list[tuple[str, int] | None]
    crops: list[np.ndarray | None]


def queries_of_cells(embeddings: Embeddings, cell_ids: Sequence[str]) -> Queries:
    """Queries of cells by their ids. Raises ConfigError for one that is not embedded."""
    found = embeddings.find(cell_ids)
    absent = [cell_id for cell_id in cell_ids if cell_id not in found]
    if absent:
        raise ConfigError(
            f"cell: got {absent[0]!r}, which is none of the {embeddings.n_cells:,} cells of {embeddings.store.uri}; "
            "expected a cell_id of its tables"
        )
    places = [found[cell_id] for cell_id in cell_ids]
    vectors = [vectors_of(embeddings.row(*place)["embedding"]) for place in places]
    return Queries(list(cell_ids), np.concatenate(vectors).astype(np.float32), [*places], [None] * len(places))


def queries_of_images(embeddings: Embeddings, paths: Sequence[str], *, mpp: float, model: str | None) -> Queries:
    """Queries of pictures of nuclei, by the encoder that made the embeddings. Raises ConfigError."""
    if embeddings.spec.context is not None:
        raise ConfigError(
            f"image: vectors of {embeddings.store.uri} have context={embeddings.spec.context_name}, which a picture of "
            "a nucleus lacks; expected cell=, or embeddings with context=nucleus"
        )
    crops = [read_crop(path, mpp=mpp) for path in paths]
    from lemon.embed.encode import open_encoder  # torch: only where it is needed

    spec = embeddings.spec
    try:
        encoder = open_encoder(model or spec.model)
    except ConfigError as error:
        raise ConfigError(f"{error}; the embeddings are by {spec.model}, expected model=where it is") from None
    if encoder.fingerprint != spec.model_fingerprint:
        raise ConfigError(
            f"model: {model or spec.model} is {encoder.fingerprint}, but the embeddings are by {spec.model} "
            f"({spec.model_fingerprint}); expected model=that encoder"
        )
    vectors = encoder.embed(np.stack(crops), bf16=spec.precision == "bf16").float().cpu().numpy()
    return Queries(list(paths), vectors, [None] * len(crops), [*crops])


def read_crop(path: str, *, mpp: float) -> np.ndarray:
    """The middle 15 um of a picture, uint8 [60, 60, 3] at 0.25 um a px. Raises ConfigError."""
    try:
        with Image.open(path) as opened:
            image = np.asarray(opened.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"image: {path}: cannot be read: {' '.join(str(error).split())}") from None
    side = round(CELL_PX * CELL_MPP / mpp)
    height, width = image.shape[:2]
    if min(height, width) < side or side < 1:
        need = f"{side} x {side} px, which are {CELL_PX * CELL_MPP:g} um at image_mpp={mpp:g}"
        raise ConfigError(f"image: {path}: got {width} x {height} px; expected at least {need}")
    top, left = (height - side) // 2, (width - side) // 2
    middle = image[top : top + side, left : left + side]
    if side == CELL_PX:
        return middle.copy()
    smooth = cv2.INTER_AREA if side > CELL_PX else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(middle, (CELL_PX, CELL_PX), interpolation=smooth))
