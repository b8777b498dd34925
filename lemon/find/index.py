"""An index of all vectors of an output, on disk: built anew only for slides that changed, read as it is needed.

The vectors lie in inverted lists of float16 (faiss: IVF, SQfp16), in segments of about a million cells. A segment is a
file that is never changed. It names the slides it holds by the digests of their embeddings, so a slide that changed,
came or went costs the segment that it is in. All segments share the centres of their lists, which are fitted once on a
random sample, and again when the number of cells has quadrupled. A query looks through the lists whose centres are
nearest, in every segment; segments are mapped, so that only these lists are read.

Jegou, Douze, Schmid: Product quantization for nearest neighbor search, TPAMI 2011, describes inverted lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import faiss
import numpy as np
from tqdm import tqdm

from lemon.embed.read import Embeddings
from lemon.embed.stream import directions
from lemon.errors import ConfigError
from lemon.runtime.lease import hold
from lemon.runtime.store import Store, fingerprint

CONTENT, CENTRES, SEGMENTS = "index.json", "centres", "segments"

OUTPUT_NAMES = (CONTENT, CENTRES, SEGMENTS)
"""What an index writes in its folder."""

SEGMENT_CELLS = 1_000_000
EXACT_CELLS = 20_000
"""Up to here there is one list, so that a query looks at every cell."""

VALUES = "float16"
"""As embeddings are stored, so that the index ranks cells as their stored vectors do. 8 bits take half the disk, but
found only 0.964 of the ten nearest of a million cells in 128 lists (benchmarks/find.py)."""

SAMPLES_A_LIST = 32  # that k-means sees
STEPS = 10  # of k-means
GROWTH = 4


class IndexedSlide(NamedTuple):
    """A slide of a segment, by its content."""

    slide_id: str
    digest: str | None
    n_cells: int


@dataclass(frozen=True)
class Segment:
    """A file of the index, and its slides in their order."""

    name: str
    slides: list[IndexedSlide]

    @property
    def n_cells(self) -> int:
        """Of all its slides."""
        return sum(slide.n_cells for slide in self.slides)


@dataclass(frozen=True)
class Content:
    """What an index holds. ``fitted_on`` is the number of cells that there were when the centres were fitted."""

    centres: str
    model_fingerprint: str
    width: int
    n_lists: int
    fitted_on: int
    segments: list[Segment]
    values: str = ""

    @property
    def names(self) -> set[str]:
        """Files of its segments."""
        return {segment.name for segment in self.segments}

    def fits(self, embeddings: Embeddings) -> bool:
        """Whether its centres may be kept for embeddings."""
        spec = embeddings.spec
        same = (self.values, self.model_fingerprint, self.width) == (VALUES, spec.model_fingerprint, spec.width)
        return same and self.fitted_on / GROWTH <= embeddings.n_cells <= self.fitted_on * GROWTH


class Hit(NamedTuple):
    """A neighbour: its slide, its row there, the cosine similarity."""

    slide_id: str
    row: int
    similarity: float


class NeighbourIndex:
    """An index that is open for queries.

    Args:
        store: its folder, local.
        content: what it holds.
    """

    def __init__(self, store: Store, content: Content) -> None:
        self.content = content
        self._empty: Any = faiss.read_index(store.path(content.centres))  # faiss types its base class alone
        self._segments: list[tuple[Any, Segment]] = [
            (faiss.read_index(store.path(segment.name), faiss.IO_FLAG_MMAP), segment) for segment in content.segments
        ]

    def search(self, vectors: np.ndarray, *, k: int, probes: int = 32) -> list[list[Hit]]:
        """The ``k`` nearest of each vector float [N, D] by cosine, the nearest first; fewer where there are fewer."""
        queries = directions(vectors)
        probes = min(probes, self.content.n_lists)
        near, lists = self._empty.quantizer.search(queries, probes)
        found: list[list[Hit]] = [[] for _ in queries]
        for lists_of_segment, segment in self._segments:
            lists_of_segment.nprobe = probes
            similarity, rows = lists_of_segment.search_preassigned(queries, k, lists, near)
            for hits, values, numbers in zip(found, similarity, rows, strict=True):
                hits += _hits(segment, values[numbers >= 0], numbers[numbers >= 0])
        return [sorted(hits, key=lambda hit: -hit.similarity)[:k] for hits in found]


def _hits(segment: Segment, similarity: np.ndarray, rows: np.ndarray) -> Iterator[Hit]:
    ends = np.cumsum([slide.n_cells for slide in segment.slides])
    for value, row, place in zip(similarity.tolist(), rows.tolist(), np.searchsorted(ends, rows, "right"), strict=True):
        slide = segment.slides[place]
        yield Hit(slide.slide_id, row - int(ends[place]) + slide.n_cells, value)


def open_index(embeddings: Embeddings, folder: str | None) -> NeighbourIndex:
    """The index of embeddings, brought up to date first. Raises ConfigError."""
    store = Store(folder or f"{embeddings.store.uri}/index")
    if not store.is_local:
        raise ConfigError(f"index: got {store.uri}, but an index is mapped from a disk; expected index=a local folder")
    known = _read_content(store)
    content = _planned(known, embeddings)
    if content != known:
        with hold(store.uri, stage="find", names=OUTPUT_NAMES) as held:
            _update(held, embeddings, content)
    return _opened(store, content)


def known_index(embeddings: Embeddings) -> NeighbourIndex | None:
    """The index beside embeddings as it is; None where there is none, or one that is not up to date."""
    store = Store(f"{embeddings.store.uri}/index")
    known = _read_content(store) if store.is_local else None
    return None if known is None or known != _planned(known, embeddings) else _opened(store, known)


def _opened(store: Store, content: Content) -> NeighbourIndex:
    for name in (content.centres, *content.names):  # one that is cut short would end the process when it is mapped
        store.records.require(name)
    return NeighbourIndex(store, content)


def _read_content(store: Store) -> Content | None:
    if not store.exists(CONTENT):
        return None
    content: Content = store.read_json(CONTENT, Content)
    files = set(store.list(""))
    return content if {content.centres, *content.names} <= files else None


def _planned(known: Content | None, embeddings: Embeddings) -> Content:
    """What the index of embeddings holds, keeping of a known one as much as still holds."""
    slides = {
        slide_id: IndexedSlide(slide_id, row.embeddings_digest, row.n_cells)
        for slide_id, row in embeddings.rows.items()
    }
    n_cells = embeddings.n_cells
    if known is None or not known.fits(embeddings):
        spec = embeddings.spec
        name = f"{CENTRES}/{fingerprint([VALUES, spec.model_fingerprint, list(slides.values())])}.faiss"
        known = Content(name, spec.model_fingerprint, spec.width, n_lists_for(n_cells), n_cells, [], VALUES)
    return replace(known, segments=plan_segments(known.segments, slides, centres=known.centres, size=SEGMENT_CELLS))


def n_lists_for(n_cells: int) -> int:
    """How many lists an index of so many cells has: a power of two near twice the root of their number."""
    return 1 if n_cells <= EXACT_CELLS else 2 ** round(np.log2(2 * n_cells**0.5))


def plan_segments(
    known: Sequence[Segment], slides: Mapping[str, IndexedSlide], *, centres: str, size: int
) -> list[Segment]:
    """Segments of ``size`` cells or fewer (of one slide: as it is), in place of the known ones.

    A known segment stays where all its slides are as they were. With slides to place, those that are less than half
    full are dissolved, so that many small additions do not leave many small files.
    """
    kept = [segment for segment in known if all(slides.get(slide.slide_id) == slide for slide in segment.slides)]
    placed = {slide.slide_id for segment in kept for slide in segment.slides}
    if placed != slides.keys():
        kept = [segment for segment in kept if segment.n_cells * 2 >= size]
        placed = {slide.slide_id for segment in kept for slide in segment.slides}
    groups: list[list[IndexedSlide]] = []
    for slide in (slides[slide_id] for slide_id in sorted(slides.keys() - placed)):
        if not groups or sum(each.n_cells for each in groups[-1]) + slide.n_cells > size:
            groups.append([])
        groups[-1].append(slide)
    new = [Segment(f"{SEGMENTS}/{fingerprint([centres, group])}.faiss", group) for group in groups]
    return [*kept, *new]


def _update(store: Store, embeddings: Embeddings, content: Content) -> None:
    """Write the centres and segments that are not there, then what the index holds; remove what it no longer does."""
    files = set(store.list(""))
    new = [segment for segment in content.segments if segment.name not in files]
    if content.centres not in files:
        with store.write_path(content.centres) as path:
            faiss.write_index(_fit_centres(embeddings, content), str(path))
    empty = faiss.read_index(store.path(content.centres))
    with tqdm(total=sum(each.n_cells for each in new), unit="cell", desc="index", disable=None) as bar:
        for segment in new:
            _write_segment(store, segment, embeddings, empty=empty, bar=bar)
    store.write_json(CONTENT, asdict(content))
    for name in {*store.list(SEGMENTS), *store.list(CENTRES)} - {content.centres, *content.names}:
        store.delete(name)


def _fit_centres(embeddings: Embeddings, content: Content) -> Any:
    """An index without vectors whose lists are fitted on the first rows of each slide, which are a random sample."""
    share = min(1.0, SAMPLES_A_LIST * content.n_lists / embeddings.n_cells)
    sample = np.concatenate([rows for slide_id in embeddings.rows for rows in _first(embeddings, slide_id, share)])
    quantizer = faiss.IndexFlatIP(content.width)
    index = faiss.IndexIVFScalarQuantizer(
        # Without residuals a segment can be searched without the centres, which it so need not hold.
        quantizer,
        content.width,
        content.n_lists,
        faiss.ScalarQuantizer.QT_fp16,
        faiss.METRIC_INNER_PRODUCT,
        False,
    )
    index.cp.niter, index.cp.spherical, index.cp.min_points_per_centroid = STEPS, True, 1
    index.train(sample)
    return index


def _first(embeddings: Embeddings, slide_id: str, share: float) -> Iterator[np.ndarray]:
    left = max(1, round(share * embeddings.rows[slide_id].n_cells))
    for vectors in embeddings.vectors(slide_id):
        yield directions(vectors[:left])
        left -= min(left, len(vectors))
        if not left:
            return


def _write_segment(store: Store, segment: Segment, embeddings: Embeddings, *, empty: Any, bar: Any) -> None:
    index: Any = faiss.clone_index(empty)
    for slide in segment.slides:
        for vectors in embeddings.vectors(slide.slide_id):
            index.add(directions(vectors))
            bar.update(len(vectors))
    index.own_fields = False  # the centres are in a file of their own
    index.quantizer = without_centres = faiss.IndexFlatIP(empty.d)
    with store.write_path(segment.name) as path:
        faiss.write_index(index, str(path))
    del index, without_centres
