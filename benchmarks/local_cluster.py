"""A drill of the cluster on one machine: a head without CPUs, two more nodes, MLflow, and jobs through the Jobs API.

python -m benchmarks.local_cluster [--keep FOLDER]

Ray starts as ``cluster/aws.yaml`` starts it: from the repository, with a token, after ``cluster/mlflow_server.sh`` and
``cluster/prometheus/prometheus.sh``; but on ports, and with a home and a temporary folder, of its own. MLflow has a
PostgreSQL, and Prometheus runs, where this machine has them. Jobs are submitted as an operator does it, without
``--working-dir``: curate, pretrain with two workers, a sweep on Ray Tune; each is also submitted twice, at once and one
after another, and once with a wrong key. What they leave is checked, every query of the dashboard is asked, and at the
end, with the cluster gone, the runs are dumped, restored and read again; seconds are recorded. Ends what it started,
and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import psutil

from benchmarks.processes import family, free_ports, kill
from benchmarks.record import record
from benchmarks.services import (
    PROMETHEUS,
    Database,
    ask_prometheus,
    dashboard_expressions,
    postgres,
    postgres_programs,
    prometheus_settings,
)
from lemon.cells.ledger import read_ledger
from lemon.runtime.store import Store
from lemon.runtime.tracking import Run, metric_history
from lemon.slides.synthetic import make_tissue, write_pyramid

ROOT = Path(__file__).resolve().parents[1]
N_SLIDES = 4
CURATE = ["variant=smoke", "region_px=512", "cells_per_slide=60", "workers.actors=2"]
TINY = "encoder.dim=32 encoder.depth=2 encoder.heads=2 ssl.hidden_dim=32 ssl.out_dim=16 log_every=1".split()  # noqa: SIM905
PRETRAIN = ["variant=smoke", *TINY, "batch=16", "images_per_epoch=64", "epochs=5", "checkpoint_every=4", "device=cpu"]


@dataclass(frozen=True)
class Submitted:
    """What became of a job: the exit code of ``ray job submit``, all that it printed, and how long it took."""

    code: int
    told: str
    seconds: float

    @property
    def driver_code(self) -> int:
        """Exit code of the job's own process."""
        found = re.search(r"exit code (\d+)", self.told)
        return int(found[1]) if found else self.code

    def lines(self, stage: str) -> list[str]:
        """What the job itself said."""
        return list(dict.fromkeys(line for line in self.told.splitlines() if line.startswith(f"{stage}:")))


_ALL_OF_BEFORE = re.compile(r"\((\d+) done, [^()]*; \1 of an earlier run\)")


class LocalCluster:
    """A head, more nodes and MLflow, each a process of this machine."""

    def __init__(self, folder: Path, *, database: Database | None = None, prometheus: bool = False) -> None:
        self.folder, self.has_prometheus = folder, prometheus
        self.runs_uri = database.uri() if database else f"sqlite:///{folder}/mlflow/mlflow.db"
        ports = iter(free_ports(60))
        self.port, self.dashboard_port, self.mlflow_port = next(ports), next(ports), next(ports)
        self.jobs_address = f"http://127.0.0.1:{self.dashboard_port}"
        self._ports = ports
        (folder / "token").write_text(secrets.token_hex(32))
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        self.environment |= {
            "HOME": str(folder),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_API_SERVER_ADDRESS": self.jobs_address,
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",  # of 60; after it Ray goes on without the Jobs API
            "MLFLOW_HOST": "127.0.0.1",
            "MLFLOW_PORT": str(self.mlflow_port),
            "MLFLOW_FOLDER": str(folder / "mlflow"),
            "MLFLOW_BACKEND_STORE_URI": self.runs_uri,
            **({"PGPASSFILE": str(database.passwords)} if database else {}),
        }
        self.tracking_uri = f"http://127.0.0.1:{self.mlflow_port}"
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._metrics_ports: list[int] = []

    def start(self, *, nodes: int = 2, cpus: int = 2) -> None:
        """The head, of CPU 0, and so many nodes; returns when all have joined."""
        head = (
            f"--head --port={self.port} --dashboard-host=127.0.0.1 --dashboard-port={self.dashboard_port} --num-cpus=0"
        )
        self._start_node(f"source cluster/mlflow_server.sh && {self._prometheus()} exec ray start {head}")
        self._wait_for_jobs_api()
        for _ in range(nodes):
            join = f"--address=127.0.0.1:{self.port} --num-cpus={cpus}"
            self._start_node(f"export MLFLOW_TRACKING_URI={self.tracking_uri}; exec ray start {join}")

    def _prometheus(self) -> str:
        """What starts Prometheus before Ray; nothing where it is not wanted."""
        if not self.has_prometheus:
            return ""
        settings = prometheus_settings(self.folder, ray_folder=self.folder / "r")
        self.prometheus_address = f"127.0.0.1:{next(self._ports)}"
        self.environment |= {
            "PROMETHEUS_FOLDER": str(self.folder / "prometheus"),
            "PROMETHEUS_CONFIG": str(settings),
            "PROMETHEUS_ADDRESS": self.prometheus_address,
        }
        return "source cluster/prometheus/prometheus.sh &&"

    def _start_node(self, command: str, *, tries: int = 6) -> None:
        """Start a node and wait until it has joined; Ray gives up after 30 s, which a busy machine may need twice."""
        for _ in range(tries):
            path = self.folder / f"node{len(self._nodes)}.log"
            with path.open("wb") as log:
                words = ["bash", "-c", f"{command} {self._own_options()}"]
                node = subprocess.Popen(
                    words, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
            self._nodes.append(node)
            while node.poll() is None:
                if "block forever" in path.read_text(errors="replace"):  # what ray start --block says last
                    return
                time.sleep(0.5)
        raise SystemExit(f"local_cluster: a node did not start:\n{path.read_text()[-2000:]}")

    def _wait_for_jobs_api(self, *, seconds: float = 180) -> None:
        """Until it answers: Ray says that a head has started also where this part of it has not."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.dashboard_port), timeout=5):
                return
            time.sleep(0.5)
        told = [
            path.read_text(errors="replace")[-2000:] for path in self.folder.glob("r/session_latest/logs/dashboard.*")
        ]
        raise SystemExit("\n".join([f"local_cluster: nothing answers at {self.jobs_address}:", *told]))

    def _own_options(self) -> str:
        """What nodes on one machine must not share, and a small object store."""
        self._metrics_ports.append(next(self._ports))
        return (
            f"--block --temp-dir={self.folder}/r --object-store-memory=200000000 --disable-usage-stats "
            f"--dashboard-agent-listen-port={next(self._ports)} --dashboard-agent-grpc-port={next(self._ports)} "
            f"--metrics-export-port={self._metrics_ports[-1]} --runtime-env-agent-port={next(self._ports)}"
        )

    def submit(self, *words: str) -> subprocess.Popen[str]:
        """``ray job submit -- python ...``, from another folder than the repository, as from an operator's machine."""
        command = ["ray", "job", "submit", "--", "python", *words]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def metrics(self) -> list[str]:
        """What the nodes tell Prometheus, line by line."""
        lines = []
        for port in self._metrics_ports:
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                lines += answer.read().decode().splitlines()
        return lines

    def run(self, *words: str) -> Submitted:
        """Submit a job and wait for its end."""
        return self.run_at_once([words])[0]

    def run_at_once(self, jobs: list[tuple[str, ...]]) -> list[Submitted]:
        """Submit several jobs and wait for all."""
        start = time.monotonic()
        started = [self.submit(*words) for words in jobs]
        told = [job.communicate(timeout=3600)[0] for job in started]
        seconds = time.monotonic() - start
        return [Submitted(job.returncode, text, seconds) for job, text in zip(started, told, strict=True)]

    def stop(self) -> None:
        """End the nodes, MLflow and Prometheus, which their data mark as ours, and all that they started."""
        found = [process for node in self._nodes for process in family(node.pid)]
        ours = {self.runs_uri, f"--storage.tsdb.path={self.folder}/prometheus/data"}
        for process in psutil.process_iter(["cmdline"]):
            if ours.intersection(process.info["cmdline"] or []):
                found += family(process.pid)
        kill(found)
        for node in self._nodes:
            node.wait()


@contextlib.contextmanager
def local_cluster(
    folder: Path, *, nodes: int = 2, database: Database | None = None, prometheus: bool = False
) -> Iterator[LocalCluster]:
    """A cluster while the block runs. The folder's path must be short: Ray's sockets lie in it."""
    cluster = LocalCluster(folder, database=database, prometheus=prometheus)
    try:
        cluster.start(nodes=nodes)
        yield cluster
    finally:
        cluster.stop()


def make_slides(folder: Path, *, count: int = N_SLIDES) -> Path:
    """Small synthetic slides."""
    folder.mkdir(parents=True)
    for seed in range(count):
        write_pyramid(folder / f"s{seed}.tiff", make_tissue(1200, seed=seed, border_px=100).image, mpp=0.25)
    return folder


def expect(condition: object, message: str, *jobs: Submitted) -> None:
    """End the drill where something is not as it must be."""
    if not condition:
        raise SystemExit("\n".join([f"local_cluster: {message}", *(job.told[-4000:] for job in jobs)]))


def expect_one_done(jobs: list[Submitted], stage: str) -> None:
    """Of jobs submitted at once with the same output, one did the work and the others said why they did not.

    Curation of small slides may be over before another job comes to the output: that one finds all done.
    """
    codes = sorted(job.driver_code for job in jobs if not _ALL_OF_BEFORE.search(job.told))
    expect(codes == [0, *[2] * (len(codes) - 1)], f"{stage}: exit codes {codes}, expected one 0 and else 2", *jobs)
    for job in jobs:
        if job.driver_code == 2:
            lines = job.lines(stage)
            expect(len(lines) == 1 and "is being written by" in lines[0], f"{stage}: told {lines}", job)


def check_cells(output: Path, *, slides: int = N_SLIDES) -> None:
    """Every slide is done, once, with all its cells."""
    store = Store(output)
    rows = read_ledger(store).to_pylist()
    expect([row["status"] for row in rows] == ["done"] * slides, f"ledger: {rows}")
    ids = [cell for name in store.list("cells") for cell in store.read_table(name)["cell_id"].to_pylist()]
    expect(
        len(ids) == len(set(ids)) == sum(row["n_cells"] for row in rows) > 0, f"{len(ids)} cells, {len(set(ids))} ids"
    )


def check_run(output: Path, tracking_uri: str, *, steps: int) -> None:
    """The encoder is there, and MLflow has the loss of each step once, in one run."""
    run = Run(tracking_uri, Store(output).read_json("run.json")["run_id"])
    curve = metric_history(run, "loss")
    expect([step for step, _ in curve] == list(range(1, steps + 1)), f"steps in MLflow: {curve}")
    expect((output / "encoder" / "config.json").is_file(), f"no encoder in {output}")


def check_metrics(cluster: LocalCluster, *, images: int) -> list[str]:
    """What Prometheus has is what was done, and it can answer the dashboard; returns the queries without an answer."""
    if not cluster.has_prometheus:
        print("Prometheus is not installed: metrics were not checked", flush=True)
        return []
    address = cluster.prometheus_address
    time.sleep(20)  # Ray reports every 10 s, and Prometheus comes every 2

    def total(selector: str) -> float:
        """Over all workers, of which most have ended: Ray drops their series then."""
        return sum(float(series["value"][1]) for series in ask_prometheus(address, f"max_over_time({selector}[1h])"))

    slides = total('ray_lemon_slides_total{stage="curate",status="done"}')
    expect(slides == N_SLIDES, f"Prometheus counts {slides} curated slides, expected {N_SLIDES}")
    seen = total('ray_lemon_cells_total{stage="pretrain"}')
    expect(seen == images, f"Prometheus counts {seen} cells of training steps, expected {images}")
    busy, worked = (total(f"ray_lemon_{name}_seconds_total") for name in ("device", "worker"))
    expect(0 < busy <= worked, f"devices were busy for {busy} s of {worked} s")
    return [expression for expression in dashboard_expressions() if not ask_prometheus(address, expression)]


def check_backup(folder: Path, database: Database) -> None:
    """With the cluster gone: a dump, restored elsewhere, has every value of every run."""
    counted = "SELECT count(*), count(DISTINCT run_uuid), sum(value) FROM metrics"
    before = database.run("psql", "-d", "mlflow", "-tAc", counted)
    dump = folder / "mlflow.dump"
    database.run("pg_dump", "--format=custom", f"--file={dump}", "mlflow")
    database.run("createdb", "restored")
    database.run("pg_restore", "--no-owner", "--dbname=restored", str(dump))
    after = database.run("psql", "-d", "restored", "-tAc", counted)
    expect(before == after and int(before.split("|")[0]) > 0, f"metrics before {before}, restored {after}")


def drill(cluster: LocalCluster) -> dict[str, float]:
    """All jobs; returns the seconds of each."""
    folder, seconds = cluster.folder, {}
    slides, cells = make_slides(folder / "slides"), folder / "cells"
    curate = ("jobs/curate.py", f"slides={slides}", f"output={cells}", *CURATE)
    pretrain = (
        "jobs/pretrain.py",
        f"cells={cells}",
        f"output={folder / 'run'}",
        f"cache={folder / 'cache'}",
        *PRETRAIN,
    )
    pretrain = (*pretrain, "workers.count=2")
    sweep = ("jobs/scaling_sweep.py", f"cells={cells}", f"output={folder / 'sweep'}", f"tasks=morphometry:{cells}")
    sweep = (*sweep, "variant=smoke", "sweep=size", "sweep.points=[100,200]", "launcher=ray", "max_concurrent=2")
    sweep = (*sweep, f"pretrain.cache={folder / 'cache'}", *(f"pretrain.{word}" for word in PRETRAIN[1:]))

    wrong = cluster.run(*curate, "worker.actors=2")
    expect(wrong.driver_code == 2, f"a wrong key: exit code {wrong.driver_code}", wrong)
    told = wrong.lines("curate")
    expect(len(told) == 1 and "unknown key" in told[0], f"a wrong key: told {told}", wrong)
    seconds["wrong key"] = wrong.seconds
    for stage, words in (("curate", curate), ("pretrain", pretrain), ("scaling_sweep", sweep)):
        at_once = cluster.run_at_once([words, words])
        expect_one_done(at_once, stage)
        again = cluster.run(*words)
        expect(again.driver_code == 0, f"{stage} again: exit code {again.driver_code}", again)
        seconds |= {f"{stage}, twice at once": at_once[0].seconds, f"{stage} again": again.seconds}
        print(f"{stage:<14} {at_once[0].seconds:>5.0f} s, again {again.seconds:>5.0f} s", flush=True)
        if stage == "curate":
            expect(f"{N_SLIDES} of an earlier run" in again.told, "curate again: redid slides", again)
            check_cells(cells)
        if stage == "pretrain":
            check_run(folder / "run", cluster.tracking_uri, steps=20)
            without = check_metrics(cluster, images=20 * 16)
            print(f"queries of the dashboard without an answer: {without or 'none'}", flush=True)
            expect(all("gpus" in each or "gram" in each or "autoscaler" in each for each in without), str(without))
    rows = Store(folder / "sweep").read_table("sweep.parquet").to_pylist()
    expect({row["status"] for row in rows} == {"done"}, f"sweep: {rows}")
    expect(len({row["trial"] for row in rows}) == 2, f"sweep: {rows}")
    return seconds


def main() -> None:
    """Run the drill, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a new folder, by a short path, that is left behind")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if options.keep:
            options.keep.mkdir(parents=True)
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        database = None
        if postgres_programs() is None:
            print("PostgreSQL is not installed: MLflow has SQLite", flush=True)
        else:
            database = stack.enter_context(postgres(folder / "pgpass"))
        start = time.monotonic()
        with local_cluster(folder.absolute(), database=database, prometheus=PROMETHEUS is not None) as cluster:
            up = time.monotonic() - start
            print(f"up in {up:.0f} s", flush=True)
            seconds = {"up": up, **drill(cluster)}
        if database is not None:
            check_backup(folder, database)
    for name, value in seconds.items():
        print(f"{name:<30} {value:>6.1f} s")
    beside = {"postgresql": database is not None, "prometheus": PROMETHEUS is not None}
    record("local_cluster", {"nodes": 3, **beside, "seconds": seconds}, packages=("ray", "mlflow", "torch"))


if __name__ == "__main__":
    main()
