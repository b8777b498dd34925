"""Whether two checkouts make the same: ``python -m benchmarks.same OLD NEW`` after ``make demo`` in both.

Compares what the demos left, value by value (cells, ledger, GeoJSON, embeddings, clusters, AnnData, the encoder, curves
of the loss), and the losses of 30 steps of MoCo v3 and the three DINOv2 of the paper's Table 5, bit for bit, trained
by each checkout's own ``jobs/pretrain.py`` on its own demo's cells. Times, versions and paths are left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pyarrow.parquet as pq
import safetensors.numpy

METHODS = ("mocov3", "dinov2", "dinov2_no_l2g", "dinov2_kde")
SMALL = (
    "encoder.name=small encoder.dim=64 encoder.depth=2 encoder.heads=1 batch=64 images_per_epoch=640 epochs=3 "
    "log_every=1 device=cpu register_as=null checkpoint_every=1000 ssl.hidden_dim=128 ssl.warmup_epochs=1"
)
OF_THE_RUN = ("code_version", "path", "source_mtime_ns", "s_per_mm2", "device_share", "peak_mib")  # and of seconds


def tables(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, values) of all that is compared in a demo's output."""
    for path in sorted(folder.glob("*/**/*.parquet")):
        if path.parts[len(folder.parts)] in ("cells", "embeddings"):
            rows = pq.read_table(path)
            kept = [name for name in rows.column_names if name not in OF_THE_RUN and not name.endswith("_s")]
            yield str(path.relative_to(folder)), rows.select(kept).to_pylist()
    for path in sorted(folder.glob("*/geojson/*.gz")):
        yield str(path.relative_to(folder)), json.loads(gzip.decompress(path.read_bytes()))
    for path in sorted(folder.glob("embeddings/h5ad/*.h5ad")):
        data = anndata.read_h5ad(path)
        yield str(path.relative_to(folder)), [np.asarray(data.X).tolist(), data.obs.to_csv(), sorted(data.obsm)]
    for path in sorted(folder.glob("encoder/encoder/*.safetensors")):
        weights = safetensors.numpy.load_file(path)
        yield str(path.relative_to(folder)), {name: value.tobytes() for name, value in sorted(weights.items())}
    yield "losses of the demo's pretraining", losses(folder / "mlflow.db", experiment="pretrain")


def losses(database: Path, *, experiment: str) -> list[tuple[int, str]]:
    """(step, loss as written in hexadecimal) of the first run of an experiment."""
    query = (
        "select m.step, m.value from metrics m join runs r on r.run_uuid = m.run_uuid join experiments e on "
        "e.experiment_id = r.experiment_id where m.key = 'loss' and e.name = ? order by r.start_time, m.step"
    )
    with sqlite3.connect(database) as connection:
        return [(step, float(value).hex()) for step, value in connection.execute(query, (experiment,))]


def train(checkout: Path, method: str, folder: Path) -> list[tuple[int, str]]:
    """The losses of 30 steps by a checkout's own job."""
    words = [f"cells={checkout / 'demo' / 'cells'}", f"output={folder / 'run'}", f"cache={folder / 'cache'}"]
    extra = [] if method == "mocov3" else ["ssl.prototypes=256", "ssl.head_dim=64"]
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "OMP_NUM_THREADS": "1",
    }
    own = checkout / ".venv" / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    command = [python, str(checkout / "jobs" / "pretrain.py"), *words, f"ssl={method}", *SMALL.split(), *extra]
    subprocess.run(command, check=True, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
    return losses(folder / "mlflow.db", experiment="pretrain")


def main() -> None:
    """Compare and print a line for each thing; the exit code is 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    pairs: dict[str, list[Any]] = {}
    for checkout in (options.old.absolute(), options.new.absolute()):
        for name, values in tables(checkout / "demo"):
            pairs.setdefault(name, []).append(values)
        for method in METHODS:
            with tempfile.TemporaryDirectory() as folder:
                pairs.setdefault(f"30 losses of {method}", []).append(train(checkout, method, Path(folder)))
    same = {name: len(values) == 2 and repr(values[0]) == repr(values[1]) for name, values in pairs.items()}
    for name, equal in same.items():
        print(f"{'same' if equal else 'DIFFERS':<8} {name} ({len(pairs[name][0]):,} values)")
    sys.exit(0 if all(same.values()) else 1)


if __name__ == "__main__":
    main()
