"""One slide's cells and vectors a batch at a time, so that no slide is too large: reading, encoding, rows to write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pyarrow as pa

from lemon import schema
from lemon.cells.shard import images_from_arrow
from lemon.encoders.open import Encoder
from lemon.runtime.metrics import Stopwatch
from lemon.runtime.shards import ShardError, read_shard
from lemon.runtime.store import Store

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


@dataclass(frozen=True)
class SlideCells:
    """A slide's cells, and the encoder that they go through.

    Attributes:
        cells, shard: their store and name.
        n_cells: that the shard must have.
        encoder: on the device that it is to run on.
        bf16: whether it computes in bfloat16.
        digest: of the rows that the shard must hold; None takes any.
        path: of the slide's file, local or at s3://.
        progress: called with the number of cells of each batch that was encoded.
        device: runs while an encoder does.
    """

    cells: Store
    shard: str
    n_cells: int
    encoder: Encoder
    bf16: bool = False
    digest: str | None = None
    path: str = ""
    progress: Callable[[int], object] = lambda _: None
    device: Stopwatch = field(default_factory=Stopwatch)

    FACTS: ClassVar = ["cell_id", "slide_id", "x_level0_px", "y_level0_px", "mpp"]
    """Columns that batches have, beside images."""

    def batches(self, columns: list[str]) -> Generator[pa.RecordBatch]:
        """Columns of the cells, in order. Raises ShardError where it is not as expected, at the end if in number."""
        count = 0
        read = read_ahead(self.cells, self.shard, schema=schema.CELLS, columns=columns, digest=self.digest)
        with contextlib.closing(read):
            for batch in read:
                yield batch
                count += len(batch)
        if count != self.n_cells:
            raise ShardError(
                f"{self.shard}: holds {count:,} cells; expected {self.n_cells:,}, as the slides table says"
            )

    def encoded(self) -> Generator[tuple[pa.RecordBatch, np.ndarray]]:
        """Batches with the vectors of their images, float32 [n, D]. Raises ShardError."""
        with contextlib.closing(self.batches([*self.FACTS, "image"])) as batches:
            for batch in batches:
                with self.device.running():
                    vectors = encode_images(batch["image"], encoder=self.encoder, bf16=self.bf16)
                yield batch, vectors
                self.progress(len(batch))


def encode_images(column: pa.Array, *, encoder: Encoder, bf16: bool) -> np.ndarray:
    """Vectors float32 [N, D] of an image column. Raises ShardError where it is none."""
    if column.type != pa.binary(schema.CELL_BYTES):
        raise ShardError(f"image: got {column.type}; expected fixed-size binary of {schema.CELL_BYTES} bytes")
    # The copy makes the images writable, which torch asks for.
    images = images_from_arrow(column).copy()
    return encoder.embed(images, bf16=bf16).float().cpu().numpy()


def embedding_rows(batch: pa.RecordBatch, vectors: np.ndarray, *, table: pa.Schema, fingerprint: str) -> pa.Table:
    """Rows of the embeddings table ``table``. Raises ShardError where vectors do not fit the type that it stores."""
    dtype = np.dtype(table.field("embedding").type.value_type.to_pandas_dtype())
    with np.errstate(over="ignore"):
        cast = vectors.astype(dtype)
    if not np.isfinite(cast).all():
        remedy = "dtype=float32" if np.isfinite(vectors).all() else "another model"
        raise ShardError(f"embeddings do not fit {dtype} (largest {np.abs(vectors).max():.3g}); try {remedy}")
    columns = [batch[name] for name in table.names[:-2]]
    values = pa.FixedSizeListArray.from_arrays(pa.array(cast.ravel()), cast.shape[1])
    return pa.table([*columns, values, pa.repeat(fingerprint, len(batch))], schema=table)


def vectors_of(column: pa.Array) -> np.ndarray:
    """An embedding column as a float array [N, D] of the type that it is stored in."""
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def directions(vectors: np.ndarray) -> np.ndarray:
    """float32 [N, D] of length one: vectors are compared by direction, as the encoder's losses do."""
    vectors = vectors.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
