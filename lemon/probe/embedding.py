"""Embeddings of the crops of tasks: a crop that several tasks hold is encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

CROPS_A_TICK = 1024  # of the progress bar; the encoder chooses its own batches within


class SharedEmbeddings:
    """Embeddings by one encoder, each distinct crop encoded once.

    Args:
        embed: uint8 [N, 60, 60, 3] -> float32 [N, D].
    """

    def __init__(self, embed: Callable[[np.ndarray], np.ndarray]) -> None:
        self._embed = embed
        self._known: dict[bytes, np.ndarray] = {}

    def of(self, images: np.ndarray, *, title: str | None = None) -> np.ndarray:
        """Embeddings float32 [N, D] of crops uint8 [N, 60, 60, 3], N > 0; with a title, a bar shows the progress."""
        keys = [hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() for image in images]
        fresh = {key: index for index, key in enumerate(keys) if key not in self._known}
        names, rows = list(fresh), np.array(list(fresh.values()), np.int64)
        hidden = True if title is None else None  # None: where there is no terminal
        for start in tqdm(range(0, len(rows), CROPS_A_TICK), desc=title, disable=hidden):
            some = slice(start, start + CROPS_A_TICK)
            self._known |= zip(names[some], self._embed(images[rows[some]]), strict=True)
        return np.stack([self._known[key] for key in keys])
