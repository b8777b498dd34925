"""A miniature of the paper's studies on real nuclei: augmentation, method and size, each with several seeds.

python -m benchmarks.study [key=value ...] --data FOLDER --work FOLDER [--seeds 0 1 2]
  [--studies augmentation ssl size] [--weights FOLDER]

FOLDER holds ``masks/`` (see benchmarks.learning) and ``amibr/``. Every nucleus of the masks becomes a cell to pretrain
on, without its label; the encoders are scored on cell types of CoNSeP (folds by image) and on AMi-Br (folds by slide).
Below ``--work``: the cells, a sweep a study (``jobs/scaling_sweep.py``; the same command goes on after an interruption)
and ``report/index.html``, where the encoders of ``--weights`` (see benchmarks.robustness), lemon_mini and untrained
twins stand beside them, scored alike. Words are overrides of every sweep.
"""

from __future__ import annotations

import argparse
import functools
import os
from dataclasses import asdict
from pathlib import Path

from benchmarks.learning import COLLECTIONS, write_collection
from benchmarks.record import record
from benchmarks.robustness import exported
from lemon.probe import job as probing
from lemon.probe.config import ProbeConfig
from lemon.report import job as report
from lemon.report.config import ReportConfig
from lemon.report.sources import read_sweep
from lemon.runtime.config import load
from lemon.runtime.job import framed
from lemon.runtime.store import Store
from lemon.sweep import job as sweep
from lemon.sweep.config import SweepConfig
from lemon.sweep.studies import study_values

# An encoder of 0.5 M parameters that sees 25,600 cells: about a minute of two cores a trial.
PRETRAIN = (
    "pretrain.variant=smoke pretrain.encoder.name=vit_demo pretrain.encoder.dim=96 pretrain.encoder.depth=4 "
    "pretrain.encoder.heads=3 pretrain.batch=128 pretrain.images_per_epoch=6400 pretrain.epochs=4 "
    "pretrain.log_every=20 pretrain.checkpoint_every=200"
)
PROBE = "probe.probes=[linear] probe.protocols=[leak-free] probe.robustness=false probe.bootstrap=100"
TASKS = "consep-type,amibr"
MOCO = "pretrain.ssl.base_lr=1.0e-3 pretrain.ssl.out_dim=128"
STUDIES = {
    "augmentation": f"sweep=augmentation sweep.points=[a0,a1_gray,a1_gray_blur1] {MOCO}",
    "ssl": "sweep=ssl_tiny",
    "size": f"sweep=size sweep.points=[300,3000,28000] {MOCO}",
}


def main() -> None:
    """Write the cells, run the sweeps, record their means and intervals, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--weights", type=Path, help="a folder of exported encoders")
    parser.add_argument("overrides", nargs="*", help="of every sweep")
    options = parser.parse_args()
    work = options.work.absolute()
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{work / 'mlflow.db'}")
    cells = Store(work / "cells")
    count = sum(write_collection(options.data / "masks" / name, cells) for name in COLLECTIONS)
    print(f"{count:,} cells to pretrain on, in {cells.uri}")
    scored = [f"data={benchmarks_folder(options.data.absolute(), work / 'benchmarks_data')}", f"tasks=[{TASKS}]"]
    common = [
        f"cells={cells.uri}",
        *scored,
        f"seeds=[{','.join(map(str, options.seeds))}]",
        f"pretrain.cache={work / 'cache'}",
        *PRETRAIN.split(),
        *PROBE.split(),
    ]
    found = {}
    for study in options.studies:
        words = [*STUDIES[study].split(), *common, f"output={work / study}", *options.overrides]
        framed("scaling_sweep", functools.partial(sweep.main, load("scaling_sweep", words, SweepConfig)))
        found[study] = [asdict(value) for value in study_values(read_sweep(Store(work / study)))]
    record(
        "study", {"seeds": options.seeds, "overrides": options.overrides, "studies": found}, packages=("torch", "ray")
    )
    models = ",".join(["lemon_mini", *exported(options.weights, work / "encoders")])
    probes = [word.removeprefix("probe.") for word in PROBE.split()]
    words = [*scored, *probes, f"models=[{models}]", f"output={work / 'probe'}"]
    framed("probe", functools.partial(probing.main, load("probe", words, ProbeConfig)))
    sweeps = ",".join(str(work / study) for study in found)
    words = [f"output={work / 'report'}", f"sweeps=[{sweeps}]", f"probes=[{work / 'probe'}]"]
    words.append("title=Miniature studies on real nuclei")
    framed("report", functools.partial(report.main, load("report", words, ReportConfig)))


def benchmarks_folder(data: Path, folder: Path) -> Path:
    """A folder with a subfolder for each benchmark, as ``jobs/probe.py`` wants it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in (("consep", data / "masks" / "consep_train"), ("amibr", data / "amibr")):
        if not (folder / name).exists():
            (folder / name).symlink_to(source)
    return folder


if __name__ == "__main__":
    main()
