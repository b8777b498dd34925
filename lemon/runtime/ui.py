"""``lemon ui``: MLflow's page of the runs, on this machine alone, with links that open it at the runs.

Without them MLflow (3.17) opens an experiment as one of language models, with traces and token usage.
"""

from __future__ import annotations

import os
import socket
import sys

from pydantic import Field

from lemon.errors import EXIT_OK, ConfigError
from lemon.runtime.config import Frozen, LocalPath
from lemon.runtime.console import stage_logger
from lemon.runtime.secrets import redacted
from lemon.runtime.tracking import UI_HOST, UI_PORT, experiment_ids, sqlite_uri, tracking_uri

QUERY = "workflowType=machine_learning&compareRunsMode=CHART"
"""MLflow's view for models that are trained: the runs beside their curves and scores."""

# No jobs of MLflow's own (evaluations of language models), which take seven processes.
QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}

logger = stage_logger(__name__, "ui")


class UiConfig(Frozen):
    """``lemon ui``: MLflow's page of the runs, on this machine only."""

    database: LocalPath | None = Field(
        None, description="SQLite file of the runs; null: MLFLOW_TRACKING_URI, else mlflow.db in the working folder"
    )
    port: int = Field(UI_PORT, ge=1, le=65535, description="where the page is served, on 127.0.0.1")


def main(config: UiConfig) -> int:
    """Log the links and become MLflow's server; of a server that runs already the links alone.

    Raises ConfigError where there are no runs, MLflow cannot be read, or the port is taken.
    """
    uri = tracking_uri() if config.database is None else sqlite_uri(config.database)
    experiments = experiment_ids(uri)
    if not experiments:
        raise ConfigError(f"database: {redacted(uri)} holds no runs yet; lemon pretrain, probe and sweep make them")
    is_served = uri.startswith("http")
    page = uri.rstrip("/") if is_served else f"http://{UI_HOST}:{config.port}"
    if not is_served:
        check_port(config.port)
    for name, experiment_id in experiments.items():
        logger.info(f"{name}: {page}/#/experiments/{experiment_id}/runs?{QUERY}")
    if is_served:
        return EXIT_OK
    logger.info("the page answers in some seconds; Ctrl-C ends it")
    sys.stdout.flush()
    words = ["-m", "mlflow", "server", "--host", UI_HOST, "--port", str(config.port), "--workers", "1"]
    words += ["--uvicorn-opts", "--log-level warning"]
    # The address by the environment: the arguments of a process are for all to see, and it may hold a password.
    os.execve(sys.executable, [sys.executable, *words], {**QUIET, **os.environ, "MLFLOW_BACKEND_STORE_URI": uri})


def check_port(port: int) -> None:
    """Raise ConfigError for a port of this machine that is taken."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((UI_HOST, port))
        except OSError as error:
            raise ConfigError(f"port: {port} on {UI_HOST}: {error.strerror}; choose another, port={port + 1}") from None
