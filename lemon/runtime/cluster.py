"""Joining a Ray cluster, or starting Ray on this machine."""

from __future__ import annotations

import logging
import os
from typing import Any


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names, else start Ray on this machine, quietly."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # Ray Data's own; others may have added theirs
            handler.setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": 512 << 20}
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)


def quiet_ray_data() -> None:
    """Settings of Ray Data for jobs whose rows are slides: no bars but the job's, no limit of time, no lost rows."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the jobs' own bars count slides and cells
    context.execution_options.preserve_order = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = -1  # a large slide may take hours
    context.max_errored_blocks = 0


def ray_version() -> str:
    """The version of Ray that is installed."""
    import ray

    return f"ray {ray.__version__}"


def try_ray() -> str:
    """Join or start Ray, run a task, and leave it; returns what the cluster has, in words."""
    import ray

    start_ray()
    try:
        ray.get(ray.remote(num_cpus=0)(ray_version).remote(), timeout=100)
        nodes, has = sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources()
    finally:
        ray.shutdown()
    return f"ran a task; {nodes} nodes with {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
