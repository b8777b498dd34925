"""PostgreSQL and Prometheus for the drill of a cluster, where this machine has them (Debian has both)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

from benchmarks.processes import free_ports

PROMETHEUS = shutil.which("prometheus")
GRAFANA = Path(__file__).resolve().parents[1] / "cluster" / "grafana" / "lemon.json"


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's programs; Debian keeps ``initdb`` out of PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@dataclass(frozen=True)
class Database:
    """A PostgreSQL of this machine: its port, and the file with its password."""

    port: int
    passwords: Path
    programs: Path

    def uri(self, name: str = "mlflow") -> str:
        """As MLflow takes it: without the password."""
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/{name}"

    def run(self, program: str, *words: str) -> str:
        """One of PostgreSQL's client programs, as the user mlflow; returns what it printed."""
        where = ["--host=127.0.0.1", f"--port={self.port}", "--username=mlflow", "--no-password"]
        environment = {**os.environ, "PGPASSFILE": str(self.passwords)}
        command = [str(self.programs / program), *where, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@contextlib.contextmanager
def postgres(passwords: Path) -> Iterator[Database]:
    """A PostgreSQL with an empty database ``mlflow`` while the block runs; its password goes into a file."""
    programs = postgres_programs()
    assert programs is not None
    (port,) = free_ports(1)
    own = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it refuses to run as root
    password = secrets.token_hex(16)
    passwords.touch(mode=0o600)
    passwords.write_text(f"127.0.0.1:{port}:*:mlflow:{password}\n")
    folder = Path(tempfile.mkdtemp(prefix="lemon-postgres-"))
    try:
        (folder / "password").write_text(password)
        if own:
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres")
        data, log = str(folder / "data"), str(folder / "log")
        options = ["--auth=scram-sha-256", "--username=mlflow", f"--pwfile={folder / 'password'}", "--no-sync"]
        quiet: Any = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder}
        subprocess.run([*own, str(programs / "initdb"), "-D", data, *options], **quiet)
        settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
        subprocess.run([*own, str(programs / "pg_ctl"), "-D", data, "-l", log, "-o", settings, "-w", "start"], **quiet)
        try:
            database = Database(port, passwords, programs)
            database.run("createdb", "mlflow")
            yield database
        finally:
            subprocess.run([*own, str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prometheus_settings(folder: Path, *, ray_folder: Path) -> Path:
    """cluster/prometheus/prometheus.yml for a Ray with another temporary folder, and scraped often."""
    source = GRAFANA.parents[1] / "prometheus"
    text = (source / "prometheus.yml").read_text()
    text = text.replace("/tmp/ray/", f"{ray_folder}/").replace("alerts.yml", str(source / "alerts.yml"))
    path = folder / "prometheus.yml"
    path.write_text(re.sub("(scrape|refresh)_interval: [0-9]+s", r"\1_interval: 2s", text))
    return path


def ask_prometheus(address: str, expression: str) -> list[dict[str, Any]]:
    """The series of an expression now. Raises HTTPError for one that is none."""
    with urlopen(f"http://{address}/api/v1/query?query={quote(expression)}", timeout=30) as answer:
        return json.load(answer)["data"]["result"]


def dashboard_expressions() -> list[str]:
    """Every query of the dashboard, over the window that is chosen first."""
    board = json.loads(GRAFANA.read_text())
    (window,) = (each["current"]["value"] for each in board["templating"]["list"] if each["name"] == "window")
    targets = [target for panel in board["panels"] for target in panel.get("targets", [])]
    return [target["expr"].replace("$window", window) for target in targets]
