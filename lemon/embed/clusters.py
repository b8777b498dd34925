"""Clusters of nuclei by their embeddings: fitted on a uniform sample of all slides, then assigned to every cell."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from sklearn.cluster import MiniBatchKMeans

from lemon.cells.select import Selection
from lemon.embed.names import CENTRES, DERIVED, clusters_name, embeddings_name
from lemon.embed.stream import directions, read_ahead, vectors_of
from lemon.runtime.store import Store, fingerprint
from lemon.schema import CLUSTERS, EMBEDDINGS

# matplotlib's petroff10 (arXiv 2107.02270): ten colours chosen to differ to eyes of any colour vision as well.
_PALETTE = ("3f90da", "ffa90e", "bd1f01", "94a4a2", "832db6", "a96b59", "e76300", "b9ac70", "717581", "92dadd")


@dataclass(frozen=True)
class Clusters:
    """Centres of k clusters, the largest first; vectors are compared by direction, as the encoder's losses do."""

    centres: list[list[float]]  # [K, D]
    fingerprint: str

    @property
    def colors(self) -> list[tuple[int, int, int]]:
        """Red, green, blue of each cluster."""
        return palette(len(self.centres))

    @property
    def hex_colors(self) -> list[str]:
        """The colours as ``#rrggbb``."""
        return ["#{:02x}{:02x}{:02x}".format(*color) for color in self.colors]

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        """The nearest centre of each of [N, D]: int16 [N]."""
        centres = np.array(self.centres, np.float32)
        distance = (centres**2).sum(axis=1) - 2 * directions(vectors) @ centres.T  # [N, K], less a term of the row
        return distance.argmin(axis=1).astype(np.int16)


def palette(count: int) -> list[tuple[int, int, int]]:
    """``count`` colours that differ: ten known ones, then hues by the golden ratio."""
    known = [(int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16)) for code in _PALETTE]
    for index in range(len(known), count):
        red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.55 + 0.4 * (index % 2), 0.85)
        known.append((round(red * 255), round(green * 255), round(blue * 255)))
    return known[:count]


def fit_clusters(vectors: np.ndarray, *, k: int, seed: int, name: str) -> Clusters:
    """k-means with mini-batches on the directions of [N, D]; fewer clusters where there are fewer cells."""
    unit = directions(vectors)
    means = MiniBatchKMeans(min(k, len(unit)), random_state=seed, n_init=3, batch_size=4096).fit(unit)
    order = np.argsort(-np.bincount(means.labels_, minlength=len(means.cluster_centers_)), kind="stable")
    return Clusters(centres=np.round(means.cluster_centers_[order], 6).tolist(), fingerprint=name)


def open_clusters(
    selection: Selection, store: Store, *, k: int | None, seed: int, parents: Sequence[str | None]
) -> Clusters | None:
    """The clusters of an output; None for k = None.

    They are fitted again when k, the seed, the selected cells or the ``parents`` (fingerprints of what the embeddings
    were made from) changed, and then everything that was made from the former ones is discarded. Raises ShardError when
    an embedding cannot be read.
    """
    cells = [(part.slide_id, part.n_rows) for part in selection.parts]
    name = fingerprint({"k": k} | ({"seed": seed, "cells": cells, "parents": list(parents)} if k else {}))
    if store.exists(CENTRES):
        earlier: Clusters = store.read_json(CENTRES, Clusters)
        if earlier.fingerprint == name:
            return earlier if k else None
    for folder in DERIVED:
        store.delete(folder)
    if k is None:
        clusters = Clusters(centres=[], fingerprint=name)
    else:
        clusters = fit_clusters(_sample(selection, store), k=k, seed=seed, name=name)
    store.write_json(CENTRES, asdict(clusters))
    return clusters if k else None


def assign_clusters(clusters: Clusters, store: Store, slide_id: str) -> None:
    """Write the cluster of each of a slide's cells, in the order of its embeddings. Raises ShardError."""
    parts = [
        pa.table([batch["cell_id"], clusters.assign(vectors_of(batch["embedding"]))], schema=CLUSTERS)
        for batch in read_ahead(store, embeddings_name(slide_id), schema=EMBEDDINGS, columns=["cell_id", "embedding"])
    ]
    store.write_table(clusters_name(slide_id), pa.concat_tables(parts or [CLUSTERS.empty_table()]), compression="zstd")


def _sample(selection: Selection, store: Store) -> np.ndarray:
    """The selected cells' embeddings, float16 or float32 [N, D]: prefixes, as embeddings are in the order of cells."""
    return np.concatenate([rows for part in selection.parts for rows in _prefix(store, part.slide_id, part.n_rows)])


def _prefix(store: Store, slide_id: str, count: int) -> Iterable[np.ndarray]:
    for batch in read_ahead(store, embeddings_name(slide_id), schema=EMBEDDINGS, columns=["embedding"]):
        vectors = vectors_of(batch["embedding"])[:count]
        yield vectors
        count -= len(vectors)
        if not count:
            return
