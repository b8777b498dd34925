"""Encoders for ``benchmarks.context``: one trained on fields of tissue, and one on nuclei by the same recipe beside it.

python -m benchmarks.field_encoder --data FOLDER --output FOLDER [--um 56 10] [--epochs 4]

FOLDER of --data has masks/ with images and label maps (consep_train, monuseg_train, gbm40, cpm15: what lemon_mini was
trained on). They become slides, their outlines the nuclei of a cells table (``lemon curate cells_from=``), and ``lemon
pretrain variant=laptop`` trains on it, with field_um and without. Then, with both beside lemon_mini:

python -m benchmarks.context --data FOLDER --weights OUTPUT --fields lemon_mini um56 um10

Images are mirrored at their border, as there, since most fields reach over it. No label is used. An output that is
there is gone on with.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import numpy as np

from benchmarks.record import record
from lemon.curate import job as curation
from lemon.curate.config import CurateConfig
from lemon.nuclei.training.layouts import read_folder
from lemon.pretrain import job as pretraining
from lemon.pretrain.config import PretrainConfig
from lemon.runtime.config import load
from lemon.schema import CELL_MPP, VIEW_PX
from lemon.slides.synthetic import write_pyramid

SETS = ("consep_train", "monuseg_train", "gbm40", "cpm15")
CELL_UM = VIEW_PX * CELL_MPP  # the cells' own images: no field_um
MARGIN_PX = 256  # more than half a field and what a turned view sees beyond it


def main() -> None:
    """Curate, train both, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--um", type=float, nargs="+", default=[56, CELL_UM])
    parser.add_argument("--epochs", type=float, default=4)
    options = parser.parse_args()
    cells = curated(options.data / "masks", options.output / "slides")
    for um in options.um:
        name, field_um = f"um{um:g}", None if um == CELL_UM else um
        run = options.output / "runs" / name
        words = [f"cells={cells}", f"output={run}", f"cache={options.output / 'cache'}", "variant=laptop"]
        words += [f"epochs={options.epochs}", f"ssl.warmup_epochs={options.epochs / 10}"]
        words += ["register_as=null", "tasks=null", "probe=null"]
        words += [] if field_um is None else [f"field_um={field_um}"]
        config, start = load("pretrain", words, PretrainConfig), time.process_time()
        assert pretraining.main(config) == 0
        shutil.copytree(run / pretraining.EXPORT, options.output / name, dirs_exist_ok=True)
        facts = {"trained": name, "um": um, "images": config.total_steps * config.batch}
        row = facts | {"encoder": config.encoder.name, "cpu_s": round(time.process_time() - start)}
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
        record("context", row, packages=("numpy", "torch"))


def curated(masks: Path, slides: Path) -> Path:
    """A cells table of the nuclei that experts outlined in images and their label maps."""
    nuclei, cells = slides.parent / "nuclei", slides.parent / "cells"
    for folder in (slides, nuclei):
        folder.mkdir(parents=True, exist_ok=True)
    pad = ((MARGIN_PX, MARGIN_PX), (MARGIN_PX, MARGIN_PX))
    for each in (labelled for name in SETS for labelled in read_folder(masks / name)):
        stem, image = f"{each.source}-{each.name}", np.pad(each.image, (*pad, (0, 0)), mode="symmetric")
        if not (slides / f"{stem}.tiff").exists():  # else cells would be of another file than their slide
            np.save(nuclei / f"{stem}.npy", np.pad(each.instances, pad))
            write_pyramid(slides / f"{stem}.tiff", image, mpp=CELL_MPP, levels=1)
    words = [f"slides={slides}", f"cells_from={nuclei}", f"output={cells}", "tissue.require_he=false"]
    assert curation.main(load("curate", words, CurateConfig)) == 0
    return cells


if __name__ == "__main__":
    main()
