"""The three stages that are drilled: their commands, what they have committed, and their tables beside others."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil

from benchmarks.drills.cluster import ROOT, Cluster
from lemon.cells.ledger import read_ledger
from lemon.pretrain.checkpoint import Checkpoints
from lemon.runtime.ledger import ATTEMPTS_FOLDER
from lemon.runtime.store import Store
from lemon.runtime.tracking import Run, metric_history
from lemon.slides.synthetic import make_tissue, write_pyramid
from lemon.sweep.table import PARQUET
from tests.cells_table import synthetic_crops, write_slide
from tests.probe.tasks.test_folder import write_crops
from tests.sweep.studies import TINY, write_cells


@dataclass(frozen=True)
class Output:
    """What a job leaves: its output, and the MLflow database that it logged to."""

    store: Store
    mlflow_uri: str


@dataclass(frozen=True)
class Difference:
    """How an output differs from that of an undisturbed run, in rows."""

    lost: int
    doubled: int
    changed: int
    same_bits: bool | None = None
    """Whether the weights of encoders are equal bit for bit; None where there are none."""


class Stage(ABC):
    """A job on small inputs in a folder, with two workers at a time."""

    name: ClassVar[str]
    job: ClassVar[str]
    rows: ClassVar[str]
    """What is counted as lost or doubled."""

    def __init__(self, inputs: Path) -> None:
        self.inputs = inputs

    @abstractmethod
    def write_inputs(self) -> None:
        """Make what the job reads, where it is not there yet."""

    @abstractmethod
    def words(self, output: str) -> list[str]:
        """Arguments of the job."""

    @abstractmethod
    def workers(self, cluster: Cluster) -> list[psutil.Process]:
        """The processes that do the work, oldest first."""

    @abstractmethod
    def committed(self, output: Store) -> set[str]:
        """Pieces of work that are done."""

    @abstractmethod
    def in_hand(self, output: Store) -> set[str]:
        """Pieces of work that were begun and are not done."""

    @abstractmethod
    def difference(self, reference: Output, output: Output) -> Difference:
        """An output beside the undisturbed one."""

    def command(self, output: str) -> list[str]:
        """The job as a user starts it."""
        return [sys.executable, str(ROOT / "jobs" / f"{self.job}.py"), *self.words(output)]

    def victim(self, cluster: Cluster, output: Store) -> psutil.Process | None:
        """A worker that has work in hand; None where there is none now."""
        workers = self.workers(cluster)
        return workers[-1] if workers and self.in_hand(output) else None


class Curate(Stage):
    """Slides by two actors."""

    name, job, rows = "curate", "curate", "cells and rows of the ledger"
    n_slides, side_px = 6, 1600

    def write_inputs(self) -> None:
        """Slides of 400 um."""
        self.inputs.mkdir(parents=True, exist_ok=True)
        for seed in range(self.n_slides):
            path = self.inputs / f"s{seed}.tiff"
            if not path.exists():
                write_pyramid(path, make_tissue(self.side_px, seed=seed, border_px=100).image, mpp=0.25)

    def words(self, output: str) -> list[str]:
        """Two actors of one CPU."""
        workers = ["workers.actors=2", "workers.cpus=1", "workers.readers=1"]
        return [f"slides={self.inputs}", f"output={output}", "region_px=512", "cells_per_slide=200", *workers]

    def workers(self, cluster: Cluster) -> list[psutil.Process]:
        """The actors."""
        return cluster.workers("ItemActor")

    def committed(self, output: Store) -> set[str]:
        """Slides with a row."""
        return {Path(name).stem for name in output.list("slides", suffix=".parquet")}

    def in_hand(self, output: Store) -> set[str]:
        """Slides with a mark of an attempt."""
        return {name.split("/")[2] for name in output.list(ATTEMPTS_FOLDER)} - self.committed(output)

    def difference(self, reference: Output, output: Output) -> Difference:
        """Cells whole, rows of the ledger but for times and the version of the code."""
        stores = [reference.store, output.store]
        tables = [
            [row for name in store.list("cells", suffix=".parquet") for row in store.read_table(name).to_pylist()]
            for store in stores
        ]
        cells = compare(*tables, key=("cell_id",))
        ledgers = [read_ledger(store).to_pylist() for store in stores]
        times = [name for name in ledgers[0][0] if name.endswith("_s")]
        slides = compare(*ledgers, key=("slide_id",), without=[*times, "code_version"])
        return Difference(cells.lost + slides.lost, cells.doubled + slides.doubled, cells.changed + slides.changed)


class Pretrain(Stage):
    """Two workers of Ray Train that share each batch."""

    name, job, rows = "pretrain", "pretrain", "steps of the loss curve"
    n_steps, checkpoint_every = 100, 5

    def write_inputs(self) -> None:
        """Four hundred cells."""
        for slide in range(0 if self.inputs.exists() else 4):
            write_slide(Store(self.inputs), f"s{slide}", synthetic_crops(100, seed=slide))

    def words(self, output: str) -> list[str]:
        """A tiny encoder and many checkpoints."""
        recipe = ["encoder.dim=64", "encoder.depth=2", "encoder.heads=2", "ssl.hidden_dim=64", "ssl.out_dim=32"]
        recipe += ["batch=32", "images_per_epoch=320", f"epochs={self.n_steps // 10}"]
        pace = ["log_every=1", f"checkpoint_every={self.checkpoint_every}", "workers.count=2"]
        cache = f"cache={self.inputs.parent / 'cache'}"
        return [f"cells={self.inputs}", f"output={output}", cache, "variant=smoke", *recipe, *pace]

    def workers(self, cluster: Cluster) -> list[psutil.Process]:
        """Those of Ray Train."""
        return cluster.workers("RayTrainWorker")

    def committed(self, output: Store) -> set[str]:
        """Steps up to the newest checkpoint, a checkpoint's distance apart."""
        newest = max(Checkpoints(output).steps(), default=0)
        return {str(step) for step in range(self.checkpoint_every, newest + 1, self.checkpoint_every)}

    def in_hand(self, output: Store) -> set[str]:
        """The step of the next checkpoint."""
        coming = (1 + len(self.committed(output))) * self.checkpoint_every
        return {str(coming)} if coming <= self.n_steps else set()

    def difference(self, reference: Output, output: Output) -> Difference:
        """Losses, each step's once: one whose checkpoint was lost is done and logged twice, with the same loss."""
        curves = []
        for each in (reference, output):
            run = Run(each.mlflow_uri, each.store.read_json("run.json")["run_id"])
            curves.append([{"step": step, "loss": loss} for step, loss in sorted(set(metric_history(run, "loss")))])
        found = compare(*curves, key=("step",))
        weights = {_digest(each.store, "encoder/model.safetensors") for each in (reference, output)}
        return Difference(found.lost, found.doubled, found.changed, len(weights) == 1)


class Sweep(Stage):
    """Two points with two seeds, two trials of Ray Tune at a time."""

    name, job, rows = "sweep", "scaling_sweep", "rows of sweep.parquet and runs in MLflow"

    def write_inputs(self) -> None:
        """Cells and labelled crops."""
        if not self.inputs.exists():
            write_cells(self.inputs / "cells", per_slide=50)
            write_crops(self.inputs / "data")

    def words(self, output: str) -> list[str]:
        """Two views with two seeds."""
        folders = [f"cells={self.inputs / 'cells'}", f"output={output}", f"data={self.inputs / 'data'}"]
        study = ["sweep.points=[a0,a1]", "seeds=[0,1]", "tasks=folder:mine", "launcher=ray", "max_concurrent=2"]
        study += ["exclude_benchmarks=[]"]  # slides of the table and of the labelled crops have the same names
        return [*TINY, *study, *folders, "pretrain.epochs=20", f"pretrain.cache={self.inputs.parent / 'cache'}"]

    def workers(self, cluster: Cluster) -> list[psutil.Process]:
        """Those whose working directory is a trial's."""
        found = []
        for process in cluster.workers("ray::"):
            with contextlib.suppress(psutil.Error):
                if Path(process.cwd()).name.startswith("augmentation-"):  # Tune runs a trial in a folder of its name
                    found.append(process)
        return found

    def committed(self, output: Store) -> set[str]:
        """Trials with a result."""
        return {name.split("/")[1] for name in output.list("trials", suffix="/result.json")}

    def in_hand(self, output: Store) -> set[str]:
        """Trials whose pretraining began."""
        return {name.split("/")[1] for name in output.list("trials", suffix="/pretrain.json")} - self.committed(output)

    def victim(self, cluster: Cluster, output: Store) -> psutil.Process | None:
        """A worker whose trial is in hand."""
        wanted = self.in_hand(output)
        return next((worker for worker in self.workers(cluster) if Path(worker.cwd()).name in wanted), None)

    def difference(self, reference: Output, output: Output) -> Difference:
        """The sweep's table but for the runs' ids; a trial with a second run in MLflow is doubled."""
        tables = [each.store.read_table(PARQUET).to_pylist() for each in (reference, output)]
        found = compare(*tables, key=("trial", "task", "protocol", "metric"), without=["run_id"])
        weights = [{row["trial"]: row["model_fingerprint"] for row in table} for table in tables]
        return Difference(found.lost, found.doubled + _extra_runs(output), found.changed, weights[0] == weights[1])


STAGES: tuple[type[Stage], ...] = (Curate, Pretrain, Sweep)


def compare(
    expected: Iterable[dict[str, Any]],
    found: Iterable[dict[str, Any]],
    *,
    key: tuple[str, ...],
    without: Iterable[str] = (),
) -> Difference:
    """Rows by their key, as multisets: missing ones are lost, surplus ones doubled, others with a known key changed."""
    left_out = set(without)

    def read(rows: Iterable[dict[str, Any]]) -> tuple[Counter[Hashable], dict[Hashable, dict[str, Any]]]:
        keyed = [(tuple(row[name] for name in key), row) for row in rows]
        content = {each: {name: value for name, value in row.items() if name not in left_out} for each, row in keyed}
        return Counter(each for each, _ in keyed), content

    (n_expected, expected_rows), (n_found, found_rows) = read(expected), read(found)
    changed = sum(found_rows[each] != row for each, row in expected_rows.items() if each in found_rows)
    return Difference((n_expected - n_found).total(), (n_found - n_expected).total(), changed)


def _digest(store: Store, name: str) -> str:
    return hashlib.sha256(store.read_bytes(name)).hexdigest()


def _extra_runs(output: Output) -> int:
    """Runs in MLflow beyond one for each trial."""
    import mlflow

    client = mlflow.MlflowClient(output.mlflow_uri)
    parent = client.get_run(output.store.read_json("run.json")["run_id"]).info
    runs = client.search_runs([parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    return len(runs) - len({run.info.run_name for run in runs})
