"""Robustness cards of the encoders at hand, on the sets at hand; writes the table and picture of docs/robustness.md.

python -m benchmarks.robustness --data FOLDER --work FOLDER [--weights FOLDER] [--cells 20] [--encoders ...]

FOLDER of ``--data`` holds ``amibr/`` and ``masks/`` (see benchmarks.learning). Labelled: AMi-Br by scanner. Without
labels: nuclei of four collections, a collection being a site and an image a slide, ``--cells`` of each image. The
collections differ in organ too, which encoders should know: these figures compare encoders, and do not measure scanners
alone. ``--weights``: a folder of exported encoders, also of those whose weights are stored as float16
(``model.half.safetensors``). What is in ``--work`` already is not made again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.learning import write_collection
from benchmarks.record import record
from lemon.encoders.config import CONFIG, WEIGHTS
from lemon.probe import job as probing
from lemon.probe.card import FOLDER, TABLE
from lemon.probe.config import ProbeConfig
from lemon.runtime.job import framed
from lemon.runtime.store import Store
from lemon.schema import RobustnessRow

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- cards:begin -->", "<!-- cards:end -->"
PICTURE = (
    "![A line for each measure, a point with its interval for each encoder: the table's numbers](images/robustness.svg)"
)
COLLECTIONS = {
    "monuseg_train": "several organs",
    "consep_train": "colon",
    "gbm40": "brain",
    "cpm15": "brain, head and neck, lung",
}
"""Each a site; the organs that its authors name."""

ENCODERS = ["lemon_mini", "efficientnet_lite0", "untrained_vit_s8"]


def main() -> None:
    """Write the cells, score the encoders, put the cards into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--encoders", nargs="+", default=ENCODERS)
    options = parser.parse_args()
    work = options.work.absolute()
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{work / 'mlflow.db'}")
    cells = Store(work / "collections")
    for name, organ in COLLECTIONS.items():
        write_collection(options.data / "masks" / name, cells, most=options.cells, site=name, organ=organ)
    models = [*options.encoders, *exported(options.weights, work / "encoders")]
    config = ProbeConfig(
        models=models,
        tasks=["amibr", *(f"{kind}:{cells.uri}" for kind in ("site", "restained", "jpeg"))],
        data=str(options.data.absolute()),
        output=str(work / "probe"),
        protocols=["leak-free"],
        probes=["linear"],
    )
    start = time.monotonic()
    if framed("probe", lambda: probing.main(config)):
        raise SystemExit("not all encoders and tasks were scored")
    store = Store(config.output)
    write_page(store)
    rows = RobustnessRow.read(store.read_table(TABLE))
    figures = [{"model": Path(row.model).name, "task": row.task.partition(":")[0], **values_of(row)} for row in rows]
    record(
        "robustness",
        {"cells": options.cells, "minutes": (time.monotonic() - start) / 60, "measures": figures},
        packages=("torch", "timm", "scikit-learn"),
    )


def exported(weights: Path | None, folder: Path) -> list[str]:
    """Folders that ``lemon.load_encoder`` opens, of all encoders in a folder; float16 is written out as float32."""
    found = sorted(config.parent for config in weights.glob("*/config.json")) if weights else []
    return [str(exported_one(encoder, folder / encoder.name)) for encoder in found]


def exported_one(encoder: Path, target: Path) -> Path:
    """One encoder, its weights as float32, in the folder ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(encoder / CONFIG, target / CONFIG)
    (stored,) = encoder.glob("model*.safetensors")
    save_file({name: value.float() for name, value in load_file(stored).items()}, target / WEIGHTS)
    return target


def values_of(row: RobustnessRow) -> dict[str, object]:
    """What is recorded of a measure."""
    names = ("measure", "value", "low", "high", "chance", "n", "n_batches")
    return {name: getattr(row, name) for name in names}


def write_page(store: Store) -> None:
    """Put the table between the page's marks, and the picture beside its others."""
    page = DOCS / "robustness.md"
    before, rest = page.read_text().split(BEGIN)
    table = store.read_bytes(f"{FOLDER}/cards.md").decode().partition("\n\n")[0]
    page.write_text(f"{before}{BEGIN}\n{table}\n\n{PICTURE}\n{END}{rest.split(END)[1]}")
    (DOCS / "images" / "robustness.svg").write_bytes(store.read_bytes(f"{FOLDER}/cards.svg"))


if __name__ == "__main__":
    main()
