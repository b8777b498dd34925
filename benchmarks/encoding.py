"""How a crop is best kept in Parquet: size, and images a second written and read to a batch, of each encoding.

python -m benchmarks.encoding [--cells FOLDER] [--count 8000]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.record import record
from lemon.cells.shard import ROW_GROUP_ROWS, images_from_arrow, images_to_arrow
from lemon.slides.synthetic import make_tissue


def main() -> None:
    """Measure every encoding on the same crops and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", help="folder of a cells table (default: crops of a synthetic slide)")
    parser.add_argument("--count", type=int, default=8000)
    options = parser.parse_args()
    images = real_crops(options.cells, options.count) if options.cells else synthetic_crops(options.count)
    rows = {}
    for name, (encode, decode, compression) in ENCODINGS.items():
        rows[name] = measure(images, encode=encode, decode=decode, compression=compression)
        size, write, read = rows[name].values()
        print(f"{name:<28} {size:>8.0f} B/image  write {write:>9,.0f}/s  read {read:>9,.0f}/s")
    record("encoding", {"source": "cells" if options.cells else "synthetic", "count": len(images), "encodings": rows})


def real_crops(folder: str, count: int) -> np.ndarray:
    """Crops of a cells table, repeated up to ``count``."""
    images = images_from_arrow(pq.read_table(folder, columns=["image"])["image"])
    return np.resize(images, (count, *images.shape[1:]))


def synthetic_crops(count: int) -> np.ndarray:
    """Windows of a made-up slide at random places."""
    image = make_tissue(3000, seed=0).image
    corners = np.random.default_rng(0).integers(0, 2940, (count, 2))
    windows = np.lib.stride_tricks.sliding_window_view(image, (60, 60, 3))[:, :, 0]
    return windows[corners[:, 0], corners[:, 1]]


def compress(suffix: str, *flags: int) -> Callable[[np.ndarray], pa.Array]:
    """An encoder to PNG or JPEG."""
    return lambda images: pa.array(
        [cv2.imencode(suffix, image[..., ::-1], flags)[1].tobytes() for image in images], pa.binary()
    )


def decompress(column: pa.ChunkedArray) -> np.ndarray:
    """PNG or JPEG bytes to uint8 [N, 60, 60, 3]."""
    decoded = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data in column.to_pylist()]
    return np.stack(decoded)[..., ::-1]


JPEG95 = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
ENCODINGS = {
    "fixed_size_binary": (images_to_arrow, images_from_arrow, "none"),
    "fixed_size_binary lz4": (images_to_arrow, images_from_arrow, "lz4"),
    "fixed_size_binary zstd": (images_to_arrow, images_from_arrow, "zstd"),
    "png": (compress(".png"), decompress, "none"),
    "jpeg q95 4:4:4 (lossy)": (compress(".jpg", *JPEG95), decompress, "none"),
}


def measure(
    images: np.ndarray,
    *,
    encode: Callable[[np.ndarray], pa.Array],
    decode: Callable[[pa.ChunkedArray], np.ndarray],
    compression: str,
) -> dict[str, float]:
    """Bytes an image, images written a second, images read a second (best of three, file in the page cache)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        writes, reads = [], []
        for _ in range(3):
            start = time.perf_counter()
            table = pa.table({"image": encode(images)})
            pq.write_table(table, path, compression=compression, use_dictionary=False, row_group_size=ROW_GROUP_ROWS)
            writes.append(time.perf_counter() - start)
            start = time.perf_counter()
            got = sum(
                len(decode(pa.chunked_array([batch["image"]])))
                for batch in pq.ParquetFile(path).iter_batches(ROW_GROUP_ROWS)
            )
            reads.append(time.perf_counter() - start)
            assert got == len(images)
        return {
            "bytes_per_image": path.stat().st_size / len(images),
            "written_per_s": len(images) / min(writes),
            "read_per_s": len(images) / min(reads),
        }


if __name__ == "__main__":
    main()
