"""One slide's embeddings: reading, encoding and writing a batch at a time, so that no slide is too large."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from lemon import schema
from lemon.cells.shard import images_from_arrow
from lemon.encoders.open import Encoder
from lemon.runtime.metrics import Stopwatch
from lemon.runtime.shards import ShardError, read_shard, write_shard
from lemon.runtime.store import Store

COLUMNS = ["cell_id", "slide_id", "x_level0_px", "y_level0_px", "image"]

# zstd takes 10 % off float16 vectors, for a fifth more time of writing (100,000 x 384, two cores). Splitting bytes
# takes off 18 %, but not every reader knows it for float16.
PARQUET_OPTIONS = {
    "compression": "zstd",
    "use_dictionary": ["slide_id", "model_fingerprint"],
    "write_statistics": False,
}


def read_ahead(
    store: Store, name: str, *, schema: pa.Schema, columns: list[str], digest: str | None = None
) -> Generator[pa.RecordBatch]:
    """Batches of ``read_shard``, each read by a thread while the caller works on the one before. Raises ShardError."""
    batches = read_shard(store, name, schema=schema, columns=columns, digest=digest)
    with contextlib.closing(batches), ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


def embed_shard(
    cells: Store,
    shard: str,
    *,
    encoder: Encoder,
    output: Store,
    name: str,
    n_cells: int,
    dtype: str = "float16",
    precision: str = "fp32",
    digest: str | None = None,
    progress: Callable[[int], object] = lambda _: None,
    device: Stopwatch | None = None,
) -> str:
    """Write the embeddings of a shard, in its order, atomically; returns the digest of the table.

    Args:
        cells, shard: the store and name of a slide's cells.
        encoder: on the device that it is to run on.
        output, name: where the table of ``schema.embeddings`` goes.
        n_cells: rows that the shard must have.
        dtype: float16 or float32, of the stored vectors.
        precision: fp32 or bf16, of the arithmetic.
        digest: of the rows that the shard must hold; None takes any.
        progress: called with the number of cells of each batch.
        device: runs while the encoder does.

    Raises:
        ShardError: the shard cannot be read, is damaged or has other rows, or a vector does not fit dtype.
        OSError, pa.ArrowException: the output cannot be written.
    """
    table = schema.embeddings(encoder.width, dtype=pa.type_for_alias(dtype))
    facts = {"model": encoder.name, "model_fingerprint": encoder.fingerprint, "precision": precision}
    with (
        write_shard(output, name, schema.marked(table, **facts), **PARQUET_OPTIONS) as written,
        contextlib.closing(read_ahead(cells, shard, schema=schema.CELLS, columns=COLUMNS, digest=digest)) as batches,
    ):
        for batch in batches:
            with (device or Stopwatch()).running():
                vectors = _vectors(batch["image"], encoder=encoder, dtype=dtype, precision=precision)
            written.write(_rows(batch, vectors, table=table, fingerprint=encoder.fingerprint))
            progress(len(batch))
        if written.n_rows != n_cells:
            raise ShardError(f"{shard}: holds {written.n_rows:,} cells; expected {n_cells:,}, as the slides table says")
    return written.digest


def _vectors(column: pa.Array, *, encoder: Encoder, dtype: str, precision: str) -> np.ndarray:
    """Embeddings [N, D] of an image column."""
    if column.type != pa.binary(schema.CELL_BYTES):
        raise ShardError(f"image: got {column.type}; expected fixed-size binary of {schema.CELL_BYTES} bytes")
    # The copy makes the images writable, which torch asks for.
    images = images_from_arrow(column).copy()
    features = encoder.embed(images, bf16=precision == "bf16").float().cpu().numpy()
    with np.errstate(over="ignore"):
        vectors = features.astype(dtype)
    if not np.isfinite(vectors).all():
        remedy = "dtype=float32" if np.isfinite(features).all() else "another model"
        raise ShardError(f"embeddings do not fit {dtype} (largest {np.abs(features).max():.3g}); try {remedy}")
    return vectors


def _rows(batch: pa.RecordBatch, vectors: np.ndarray, *, table: pa.Schema, fingerprint: str) -> pa.Table:
    columns = [batch[name] for name in COLUMNS[:-1]]
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    return pa.table([*columns, values, pa.repeat(fingerprint, len(batch))], schema=table)


def vectors_of(column: pa.Array) -> np.ndarray:
    """An embedding column as a float array [N, D] of the type that it is stored in."""
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def directions(vectors: np.ndarray) -> np.ndarray:
    """float32 [N, D] of length one: vectors are compared by direction, as the encoder's losses do."""
    vectors = vectors.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
