"""Indexes of nearest neighbours: recall, time of a query, time of building, memory and disk, at a million vectors.

python -m benchmarks.find [--count 1000000] [--width 192] [--only NAME ...] [--scratch FOLDER]

Vectors are made up: 2,000 clusters of very different sizes, each spread along 24 directions of its own, and noise.
Queries are 200 further vectors of the same clusters; what is found is compared with all distances. Each index is built
in a process of its own and opened from its file in another, so that memory is that of the step alone. One thread;
seconds are of the processor, so that neighbours on the machine do not count.

``lemon`` is what ``lemon find`` does, of embeddings in tables as ``lemon embed`` writes them: the index is searched and
id and place of each cell found are read. The others are the libraries by themselves, which tell a number of each; they
need ``pip install faiss-cpu hnswlib usearch``, and those that are not installed are left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from benchmarks.record import record
from lemon.embed.ledger import EmbeddingSpec, open_ledger
from lemon.embed.names import embeddings_name
from lemon.embed.read import open_embeddings
from lemon.embed.stream import PARQUET_OPTIONS
from lemon.find.index import open_index
from lemon.find.job import neighbours_of
from lemon.find.query import Queries
from lemon.runtime.shards import write_shard
from lemon.runtime.store import BATCH_ROWS, Store
from lemon.schema import EmbeddedRow, embeddings

CLUSTERS, DIRECTIONS, QUERIES, K = 2000, 24, 200, 10
SLIDES = 10
BLOCK = 50_000
PACKAGES = ("numpy", "pyarrow", "faiss-cpu")


def main() -> None:
    """Make the vectors, try each index, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--only", nargs="+", choices=list(INDEXES), default=list(INDEXES))
    parser.add_argument("--scratch", help="folder for some GB (default: the system's for temporary files)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        queries, truth = make_vectors(scratch, options.count, options.width)
        np.save(scratch / "queries.npy", queries)
        np.save(scratch / "truth.npy", truth)
        facts = {"vectors": options.count, "width": options.width, "queries": QUERIES, "k": K}
        for name in options.only:
            library = name.split()[0]
            if library not in ("lemon", "faiss") and find_spec(library) is None:
                print(f"{name}: {library} is not installed, left out")
                continue
            packages = PACKAGES if library in ("lemon", "faiss") else (*PACKAGES, library)
            record("find", {"index": name, **facts, "runs": tried(name, scratch)}, packages=packages)
            for path in scratch.glob("index*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_vectors(scratch: Path, count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Write vectors.npy, float16 [count, width] of length one; returns queries [Q, width] and their true neighbours."""
    generator = np.random.default_rng(0)
    centres = generator.normal(0, 1, (CLUSTERS, width)).astype(np.float32)
    axes = (generator.normal(0, 0.6, (CLUSTERS, DIRECTIONS, width)) / np.sqrt(DIRECTIONS)).astype(np.float32)
    share = generator.pareto(1.0, CLUSTERS) + 0.05

    def draw(number: int) -> np.ndarray:
        cluster = np.sort(generator.choice(CLUSTERS, number, p=share / share.sum()))
        along = generator.normal(0, 1, (number, DIRECTIONS)).astype(np.float32)
        vectors = centres[cluster] + generator.normal(0, 0.1, (number, width)).astype(np.float32)
        starts = np.searchsorted(cluster, np.arange(CLUSTERS + 1))
        for index in np.flatnonzero(np.diff(starts)):
            rows = slice(starts[index], starts[index + 1])
            vectors[rows] += along[rows] @ axes[index]
        generator.shuffle(vectors)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    stored = np.lib.format.open_memmap(scratch / "vectors.npy", "w+", np.float16, (count, width))
    queries = draw(QUERIES)
    best = np.full((QUERIES, K), -np.inf, np.float32)
    truth = np.zeros((QUERIES, K), np.int64)
    for start in range(0, count, BLOCK):
        block = draw(min(BLOCK, count - start)).astype(np.float16)
        stored[start : start + len(block)] = block
        scores = np.concatenate([best, queries @ block.astype(np.float32).T], axis=1)
        numbers = np.concatenate(
            [truth, np.broadcast_to(np.arange(start, start + len(block)), (QUERIES, len(block)))], 1
        )
        top = np.argpartition(-scores, K, axis=1)[:, :K]
        best, truth = np.take_along_axis(scores, top, 1), np.take_along_axis(numbers, top, 1)
    stored.flush()
    return queries, truth


def tried(name: str, scratch: Path) -> list[dict[str, Any]]:
    """Build an index in one process and search it in another; a row for each setting of the search."""
    build, search = INDEXES[name]
    if name == "lemon":
        in_process(write_embeddings, scratch)
    built = in_process(measured_build, build, scratch)
    rows = []
    for row in in_process(measured_search, search, scratch):
        rows.append({**built, **row})
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of work in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def measured_build(build: Callable[[Path], None], scratch: Path) -> dict[str, Any]:
    """Seconds of the processor, peak memory and size on disk of a build."""
    start = time.process_time()
    build(scratch)
    size = sum(
        path.stat().st_size for top in scratch.glob("index*") for path in (top, *top.rglob("*")) if path.is_file()
    )
    return {"build_s": round(time.process_time() - start, 1), "build_peak_mb": peak_mb(), "disk_mb": round(size / 1e6)}


def measured_search(search: Callable[[Path], Any], scratch: Path) -> list[dict[str, Any]]:
    """Recall and time of a query for each setting of a search."""
    queries, truth = np.load(scratch / "queries.npy"), np.load(scratch / "truth.npy")
    rows = []
    for setting, ask in search(scratch):
        ask(queries[0])
        hits, cpu, wall = 0, [], []
        for query, true in zip(queries, truth, strict=True):
            begun = time.process_time(), time.perf_counter()
            found = ask(query)
            cpu.append(time.process_time() - begun[0])
            wall.append(time.perf_counter() - begun[1])
            hits += len(np.intersect1d(found, true))
        milliseconds = {
            "median_cpu_ms": np.median(cpu),
            "p95_cpu_ms": np.quantile(cpu, 0.95),
            "median_ms": np.median(wall),
        }
        rows.append(
            {"setting": setting, "recall_at_10": round(hits / truth.size, 4)}
            | {key: round(float(value) * 1000, 2) for key, value in milliseconds.items()}
            | {"search_peak_mb": peak_mb()}
        )
    return rows


def peak_mb() -> int:
    """Largest resident size of this process so far (getrusage would count that of its parent before exec)."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def blocks(scratch: Path) -> Any:
    """(first row, float32 [n, D]) of the vectors."""
    stored = np.load(scratch / "vectors.npy", mmap_mode="r")
    for start in range(0, len(stored), BLOCK):
        yield start, stored[start : start + BLOCK].astype(np.float32)


def sample(scratch: Path, count: int) -> np.ndarray:
    """The first vectors: they lie in random order."""
    return np.load(scratch / "vectors.npy", mmap_mode="r")[:count].astype(np.float32)


def build_faiss(scratch: Path, description: str, training: int) -> None:
    """An index of faiss's index_factory."""
    faiss.omp_set_num_threads(1)
    vectors = sample(scratch, training)
    index = faiss.index_factory(vectors.shape[1], description)
    faiss.extract_index_ivf(index).cp.niter = 10
    index.train(vectors)
    for _, block in blocks(scratch):
        index.add(block)
    faiss.write_index(index, str(scratch / "index"))


def build_ivf_sq8(scratch: Path) -> None:
    """Inverted lists of 8-bit values."""
    build_faiss(scratch, "IVF1024,SQ8", 40_000)


def build_ivf_pq(scratch: Path) -> None:
    """Inverted lists of product codes of 48 bytes."""
    build_faiss(scratch, "IVF1024,PQ48", 40_000)


def search_faiss(scratch: Path) -> Any:
    """faiss's lists, mapped from the file."""
    faiss.omp_set_num_threads(1)
    index = faiss.read_index(str(scratch / "index"), faiss.IO_FLAG_MMAP)
    for probes in (4, 16, 64):
        index.nprobe = probes
        yield f"nprobe={probes}", lambda query: index.search(query[None], K)[1][0]


def build_hnswlib(scratch: Path) -> None:
    """A graph of float32 vectors."""
    import hnswlib

    stored = np.load(scratch / "vectors.npy", mmap_mode="r")
    index = hnswlib.Index("ip", stored.shape[1])
    index.init_index(len(stored), M=16, ef_construction=100)
    for start, block in blocks(scratch):
        index.add_items(block, np.arange(start, start + len(block)), num_threads=1)
    index.save_index(str(scratch / "index"))


def search_hnswlib(scratch: Path) -> Any:
    """hnswlib's graph, in memory."""
    import hnswlib

    index = hnswlib.Index("ip", np.load(scratch / "queries.npy").shape[1])
    index.load_index(str(scratch / "index"))
    for width in (32, 128):
        index.set_ef(width)
        yield f"ef={width}", lambda query: index.knn_query(query[None], K, num_threads=1)[0][0]


def build_usearch(scratch: Path) -> None:
    """A graph of 8-bit vectors."""
    from usearch.index import Index

    width = np.load(scratch / "queries.npy").shape[1]
    index = Index(ndim=width, metric="cos", dtype="i8", connectivity=16, expansion_add=100)
    for start, block in blocks(scratch):
        index.add(np.arange(start, start + len(block)), block, threads=1)
    index.save(str(scratch / "index"))


def search_usearch(scratch: Path) -> Any:
    """usearch's graph, mapped from the file."""
    from usearch.index import Index

    index = Index.restore(str(scratch / "index"), view=True)
    for width in (32, 128):
        index.expansion_search = width
        yield f"ef={width}", lambda query: index.search(query, K, threads=1).keys


def write_embeddings(scratch: Path) -> None:
    """The vectors in tables of ten slides, as lemon embed writes them."""
    width = np.load(scratch / "queries.npy").shape[1]
    store, spec = Store(scratch / "embeddings"), EmbeddingSpec("made up", "made up", width, "float16", "fp32")
    ledger = open_ledger(store, spec, overwrite=False)
    table = embeddings(width)
    stored = np.load(scratch / "vectors.npy", mmap_mode="r")
    for number, part in enumerate(np.array_split(np.arange(len(stored)), SLIDES)):
        slide_id = f"slide{number}"
        with write_shard(store, embeddings_name(slide_id), table, **PARQUET_OPTIONS) as shard:
            for rows in np.array_split(part, max(1, len(part) // BATCH_ROWS)):
                ids = [f"{slide_id}_{row}" for row in rows.tolist()]
                values = pa.FixedSizeListArray.from_arrays(pa.array(stored[rows].ravel()), width)
                place = pa.array(rows.astype(np.float64))
                slides, model = (pa.repeat(text, len(rows)) for text in (slide_id, spec.model_fingerprint))
                shard.write(pa.table([pa.array(ids), slides, place, place, values, model], schema=table))
        row = EmbeddedRow(slide_id=slide_id, status="done", n_cells=len(part), embeddings_digest=shard.digest)
        ledger.commit(row)


def build_lemon(scratch: Path) -> None:
    """The index of lemon find, from tables."""
    faiss.omp_set_num_threads(1)
    open_index(open_embeddings(str(scratch / "embeddings")), str(scratch / "index"))


def search_lemon(scratch: Path) -> Any:
    """The same, opened; rows are counted over all slides as the vectors are."""
    faiss.omp_set_num_threads(1)
    opened = open_embeddings(str(scratch / "embeddings"))
    starts = np.cumsum([0, *(row.n_cells for row in opened.rows.values())])
    first = dict(zip(opened.rows, starts.tolist(), strict=False))
    index = open_index(opened, str(scratch / "index"))

    def asked(query: np.ndarray, *, k: int, probes: int) -> list[int]:
        queries = Queries(["query"], query[None], [None], [None])
        ((_, hits),) = neighbours_of(opened, index, queries, k=k, probes=probes)
        return [first[hit.slide_id] + hit.row for hit in hits]

    for probes in (8, 16, 32, 64, 128):
        yield f"probes={probes}", partial(asked, k=K, probes=probes)
    yield "probes=32, k=50", partial(asked, k=50, probes=32)


INDEXES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "lemon": (build_lemon, search_lemon),
    "faiss IVF1024,SQ8": (build_ivf_sq8, search_faiss),
    "faiss IVF1024,PQ48": (build_ivf_pq, search_faiss),
    "usearch HNSW16, i8": (build_usearch, search_usearch),
    "hnswlib HNSW16, float32": (build_hnswlib, search_hnswlib),
}
"""Name -> how it is built, how it is searched."""


if __name__ == "__main__":
    main()
