"""Disturb curation, pretraining and sweeps in every way that is known, and see that no row is lost or doubled.

python -m benchmarks.drills --work FOLDER [--only worker-killed disk-full/pretrain sweep ...]
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.drills.cluster import N_NODES, Cluster
from benchmarks.drills.faults import FAULTS, NotApplicableError
from benchmarks.drills.report import PAGE, Row, row_of, table, write_page
from benchmarks.drills.scene import DrillError, Scene
from benchmarks.drills.stages import STAGES, Output
from benchmarks.record import record


def main() -> int:
    """Run the drills and write the page of all rows in the work folder; returns 3 where one is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs, outputs and rows")
    parser.add_argument("--only", nargs="+", default=[], help="faults, stages or fault/stage; others keep their rows")
    parser.add_argument("--limit", type=float, default=240.0, metavar="S", help="seconds after which a job hangs")
    options = parser.parse_args()
    work = options.work.absolute()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the cluster is ended, whatever ends this
    only = set(options.only)
    rows = run(work, wanted=lambda *names: not only or bool(only & set(names)), limit_s=options.limit)
    record("drills", {"rows": [asdict(row) for row in rows]}, packages=("ray", "torch", "mlflow", "pyarrow"))
    every = write_page(_kept(rows, work / "rows.json"))
    print(table(rows))
    print(f"drills: {sum(row.good for row in rows)} of {len(rows)} as they should be; {len(every)} rows in {PAGE}")
    return 0 if all(row.good for row in rows) else 3


def run(work: Path, *, wanted: Callable[..., bool], limit_s: float) -> list[Row]:
    """Every fault of ``FAULTS`` in every stage, those that are wanted."""
    plan = {
        stage: [fault for fault in FAULTS if wanted(fault, stage.name, f"{fault}/{stage.name}")] for stage in STAGES
    }
    rows: list[Row] = []
    cluster = Cluster(N_NODES)
    try:
        for kind, faults in plan.items():
            if not faults:
                continue
            stage = kind(work / "inputs" / kind.name)
            stage.write_inputs()
            cluster.whole()
            try:
                reference = undisturbed(Scene(stage, cluster, _empty(work / f"{stage.name}-undisturbed"), limit_s))
            except DrillError as error:
                rows += [Row(stage.name, fault, failure=f"drill failed: undisturbed: {error}") for fault in faults]
                continue
            for fault in faults:
                start = time.monotonic()
                scene = Scene(stage, cluster, _empty(work / f"{stage.name}-{fault}"), limit_s)
                rows.append(drill(fault, scene, reference))
                _kept(rows, work / "rows.json")  # a run that is stopped leaves what it found
                print(f"drills: {' | '.join(rows[-1].cells())} ({time.monotonic() - start:.0f} s)", flush=True)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        cluster.close()
    return rows


def undisturbed(scene: Scene) -> Output:
    """What the job leaves when nothing happens."""
    scene.start()
    if code := scene.finish():
        raise DrillError(f"exit code {code}: {scene.told}")
    print(f"drills: {scene.stage.name}, undisturbed: {scene.seconds[0]:.0f} s, {scene.told}", flush=True)
    return scene.output


def drill(fault: str, scene: Scene, reference: Output) -> Row:
    """One fault in one stage; a drill that fails is a row too."""
    try:
        scene.cluster.whole()
        FAULTS[fault](scene)
        return row_of(scene, fault, scene.stage.difference(reference, scene.output))
    except NotApplicableError as reason:
        return Row(scene.stage.name, fault, not_applicable=str(reason))
    except Exception as error:  # the other drills go on  # noqa: BLE001
        if not isinstance(error, DrillError):
            traceback.print_exc()
        told = " ".join(f"drill failed: {error!r}".split())
        return Row(scene.stage.name, fault, done=scene.done, failure=told)
    finally:
        scene.stop()


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _kept(rows: list[Row], path: Path) -> list[Row]:
    """These rows and, of an earlier run with the same work folder, those of the other drills."""
    earlier = [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []
    found = {row.name: row for row in [*earlier, *rows]}
    path.write_text(json.dumps([asdict(row) for row in found.values()], indent=2))
    return [found[name] for stage in STAGES for fault in FAULTS if (name := f"{fault}/{stage.name}") in found]


if __name__ == "__main__":
    sys.exit(main())
