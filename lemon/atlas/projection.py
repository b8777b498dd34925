"""From vectors to a map: t-SNE or UMAP by cosine distance, and what is asked of the positions afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from openTSNE import TSNE
from openTSNE.nearest_neighbors import Annoy
from sklearn.decomposition import PCA
from tqdm import tqdm

from lemon.embed.stream import directions
from lemon.errors import ConfigError

EARLY_STEPS, STEPS = 250, 500  # openTSNE's own numbers
STEPS_A_TICK = 25

MAPPED = 100_000  # cells that a map is made of
NEAR = 10  # of them, where a further cell is placed

COMPACT_DIM = 64  # of 12 neighbours 11 are those of the whole vectors: see docs/log.md

COMPACT_FITTED = 100_000  # cells that the components are fitted on
PIECE = 20_000  # vectors that are unpacked at once

LEVELS = 65_535
"""Positions are stored in 16 bits a coordinate: 1/65 px of a map of 1000 px, finer than a screen."""


def open_method(method: str) -> Callable[..., np.ndarray]:
    """The function that ``method=`` names. Raises ConfigError where its package is absent."""
    if method == "tsne":
        return map_tsne
    try:
        import umap  # noqa: F401
    except ImportError:
        raise ConfigError("method: got umap, which is not installed; expected pip install umap-learn") from None
    return map_umap


def map_cells(
    method: Callable[..., np.ndarray], vectors: np.ndarray, *, perplexity: float, seed: int, threads: int
) -> np.ndarray:
    """Positions float32 [N, 2] by a method, of which the first MAPPED cells, a random sample, are given to it.

    Further cells are placed among these. On such a map rare cells lie where the sample has some.
    """
    positions = method(vectors[:MAPPED], perplexity=perplexity, seed=seed, threads=threads)
    return place_others(positions, vectors, seed=seed, threads=threads)


def place_others(positions: np.ndarray, vectors: np.ndarray, *, seed: int, threads: int) -> np.ndarray:
    """Positions float32 [N, 2] of all of [N, D], of which the first [M, 2] are known.

    Each further cell lies at the median of its NEAR nearest of these (of the first MAPPED at most), by cosine:
    openTSNE's start for new points. They are found by annoy, in COMPACT_DIM principal components.
    """
    known = len(positions)
    if len(vectors) == known:
        return positions
    packed, weights = compact(vectors)
    scale = np.sqrt(weights)
    among = packed[: min(known, MAPPED)] * scale
    near_most = min(NEAR, len(among) - 1)
    index = Annoy(among, near_most, metric="euclidean", n_jobs=threads, random_state=seed)
    index.build()
    placed = [positions]
    with tqdm(total=len(vectors) - known, unit="cell", desc="placing the others", disable=None) as bar:
        for start in range(known, len(vectors), PIECE):
            near, _ = index.query(packed[start : start + PIECE] * scale, near_most)
            placed.append(np.median(positions[near], axis=1).astype(np.float32))
            bar.update(len(near))
    return np.concatenate(placed)


def map_tsne(vectors: np.ndarray, *, perplexity: float, seed: int, threads: int) -> np.ndarray:
    """t-SNE of [N, D] with PCA as the start: float32 [N, 2].

    The same for the same seed and number of threads. Another number finds other approximate neighbours and adds in
    another order, which t-SNE grows into another, equally good map (measured with openTSNE 1.0.4).
    """
    unit = directions(vectors)
    # More would only be lowered by openTSNE, with a warning: every cell needs three times as many neighbours.
    perplexity = min(perplexity, (len(unit) - 1) / 3)
    with tqdm(total=EARLY_STEPS + STEPS, unit="step", desc="t-SNE (neighbours first)", disable=None) as bar:

        def tick(_step: int, divergence: float, _positions: np.ndarray) -> None:
            bar.set_description("t-SNE", refresh=False)
            bar.set_postfix(KL=f"{divergence:.3f}", refresh=False)
            bar.update(STEPS_A_TICK)

        positions = TSNE(
            perplexity=perplexity,
            metric="cosine",
            initialization="pca",
            early_exaggeration_iter=EARLY_STEPS,
            n_iter=STEPS,
            n_jobs=threads,
            random_state=seed,
            callbacks=tick,
            callbacks_every_iters=STEPS_A_TICK,
        ).fit(unit)
    return np.asarray(positions, np.float32)


def map_umap(vectors: np.ndarray, *, perplexity: float, seed: int, threads: int) -> np.ndarray:  # noqa: ARG001
    """UMAP of [N, D]: float32 [N, 2]. ``perplexity`` is the number of neighbours; a seed allows one thread only."""
    import umap

    neighbours = min(round(perplexity), len(vectors) - 1)
    reducer = umap.UMAP(
        n_neighbors=neighbours, metric="cosine", init="pca", random_state=seed, n_jobs=1, tqdm_kwds={"disable": None}
    )
    return np.asarray(reducer.fit_transform(directions(vectors)), np.float32)


def compact(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [N, D] in a byte a value, whose distances are nearly those of the directions: int8 [N, K], float32 [K].

    The first COMPACT_DIM principal components of the directions, each in 127 steps of its own; the square of a distance
    is the sum of squared differences of bytes times the second array. Between directions it is 2 (1 - cosine).
    """
    seen = directions(vectors[:COMPACT_FITTED])  # of lowest rank: a random sample
    width = min(COMPACT_DIM, *seen.shape)
    fitted = PCA(width, svd_solver="randomized", random_state=0).fit(seen)
    parts = np.concatenate([fitted.transform(directions(part)) for part in _pieces(vectors)])
    step = np.abs(parts).max(axis=0).clip(1e-12) / 127
    return np.round(parts / step).astype(np.int8), (step**2).astype(np.float32)


def _pieces(vectors: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of a large array, some at a time."""
    for start in range(0, len(vectors), PIECE):
        yield vectors[start : start + PIECE]


def to_unit_square(positions: np.ndarray) -> np.ndarray:
    """Positions [N, 2] moved and scaled (both axes alike) to fill the unit square, y downwards: float64 [N, 2]."""
    low, high = positions.min(axis=0).astype(np.float64), positions.max(axis=0).astype(np.float64)
    unit = 0.5 + (positions - (low + high) / 2) / max(float((high - low).max()), 1e-12)
    unit[:, 1] = 1 - unit[:, 1]
    return unit.clip(0, 1)


def quantise(unit: np.ndarray) -> np.ndarray:
    """Positions in the unit square as uint16 [N, 2]."""
    return np.round(unit * LEVELS).astype(np.uint16)


def curve_order(quantised: np.ndarray) -> np.ndarray:
    """Cells along a Z-order curve through the map, so that neighbours come together: int64 [N] of indices."""
    code = np.zeros(len(quantised), np.uint64)
    for axis in (0, 1):
        values = quantised[:, axis].astype(np.uint64)
        for bit in range(16):
            code |= ((values >> np.uint64(bit)) & np.uint64(1)) << np.uint64(2 * bit + axis)
    return np.argsort(code, kind="stable")


def nearest_in_squares(unit: np.ndarray, *, squares: int) -> np.ndarray:
    """The cell nearest the centre of each square of a grid over the map: int64 [squares, squares], -1 for none."""
    place = np.minimum((unit * squares).astype(np.int64), squares - 1)  # [N, 2]: column, row
    distance = np.linalg.norm(unit * squares - place - 0.5, axis=1)
    square = place[:, 1] * squares + place[:, 0]
    order = np.lexsort((distance, square))
    first = order[np.unique(square[order], return_index=True)[1]]
    chosen = np.full(squares * squares, -1, np.int64)
    chosen[square[first]] = first
    return chosen.reshape(squares, squares)
