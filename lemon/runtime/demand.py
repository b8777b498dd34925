"""What a job asks of a cluster, compared with what is there or can come, before anything is written.

Ray itself would wait without end, and without a line, for a node that there never will be.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lemon.errors import ConfigError
from lemon.runtime import cluster
from lemon.runtime.store import Store

logger = logging.getLogger(__name__)

NOTICE_S = 30.0
"""How often a job that waits for the cluster says so."""

_POLL_S = 1

_logged_notes: set[str] = set()

Node = Mapping[str, float]
"""Resources of a node by name, as Ray reports them: ``CPU``, ``GPU`` and others."""


@dataclass(frozen=True)
class Demand:
    """Workers, each of which has to fit on one node.

    Attributes:
        cpus: of a worker.
        gpus: of a worker, a share or a whole number; None: one, where the cluster has any.
        shares_gpus: with ``gpus`` None, a share of one, so that as many workers use it as the CPUs beside it allow.
        min_workers: workers that have to be there at the same time.
        wanted_workers: workers that were requested; fewer is logged, and the job goes on.
        may_shrink: fewer CPUs a worker will do, as for a default that nobody asked for.
        key: of the settings that say what a worker takes.
        count_key: of the setting that says how many.
    """

    cpus: int
    gpus: float | None = 0.0
    shares_gpus: bool = False
    min_workers: int = 1
    wanted_workers: int = 1
    may_shrink: bool = False
    key: str = "workers"
    count_key: str = "workers.count"


@dataclass(frozen=True)
class Allocation:
    """What a job gets.

    Attributes:
        cpus: of a worker.
        gpus: of a worker.
        max_workers: workers that the present nodes hold at the same time, at least one.
        waits: the present nodes do not hold them; others may come.
        notes: lines for the user.
    """

    cpus: int
    gpus: float
    max_workers: int
    waits: bool = False
    notes: tuple[str, ...] = ()


def n_workers_that_fit(nodes: Sequence[Node], *, cpus: int, gpus: float = 0.0) -> int:
    """Workers that nodes hold at the same time."""
    return sum(_n_on_node(node, cpus=cpus, gpus=gpus) for node in nodes)


def _n_on_node(node: Node, *, cpus: int, gpus: float) -> int:
    held = int(node.get("CPU", 0) // cpus)
    if not gpus:
        return held
    devices = int(node.get("GPU", 0))  # a share lies on one device
    return min(held, int(devices // gpus) if gpus >= 1 else devices * math.floor(1 / gpus + 1e-9))


def gpus_of_worker(demand: Demand, *, nodes: Sequence[Node]) -> float:
    """GPUs of a worker; where none are asked for, by what the nodes have. Ray hides the GPUs from one that has none."""
    if demand.gpus is not None:
        return demand.gpus
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    if not with_gpus or not demand.shares_gpus:
        return 1.0 if with_gpus else 0.0
    workers_a_gpu = min(node.get("CPU", 0) // demand.cpus / int(node["GPU"]) for node in with_gpus)
    return 1 / max(1, math.ceil(workers_a_gpu))


def plan_allocation(demand: Demand, *, nodes: Sequence[Node], addable: Sequence[Node] | None, place: str) -> Allocation:
    """What a cluster of these nodes has for a job.

    Args:
        demand: what is asked.
        nodes: those that are there.
        addable: nodes that an autoscaler may add; None: it may add some, of unknown size.
        place: the cluster, in words.

    Raises:
        ConfigError: never will there be room.
    """
    gpus = gpus_of_worker(demand, nodes=[*nodes, *(addable or ())])
    if gpus > 1 and gpus != int(gpus):
        raise ConfigError(f"{demand.key}.gpus: got {gpus:g}; expected a share of one GPU or a whole number")
    holds = n_workers_that_fit(nodes, cpus=demand.cpus, gpus=gpus)
    if holds >= demand.min_workers:
        return Allocation(
            demand.cpus, gpus, holds, notes=_fewer_workers_note(demand, holds, place=place, final=addable == ())
        )
    if addable and holds + n_workers_that_fit(addable, cpus=demand.cpus, gpus=gpus) >= demand.min_workers:
        return Allocation(demand.cpus, gpus, max(1, holds), waits=True)
    for cpus in range(demand.cpus - 1, 0, -1) if demand.may_shrink else ():
        if (holds := n_workers_that_fit(nodes, cpus=cpus, gpus=gpus)) >= demand.min_workers:
            note = f"{demand.key}.cpus: {cpus} instead of {demand.cpus}, as no node of {place} has more"
            return Allocation(
                cpus, gpus, holds, notes=(note, *_fewer_workers_note(demand, holds, place=place, final=addable == ()))
            )
    if addable is None:
        return Allocation(demand.cpus, gpus, max(1, holds), waits=True)
    raise ConfigError(_refusal(demand, gpus=gpus, nodes=[*nodes, *addable], place=place))


def _fewer_workers_note(demand: Demand, holds: int, *, place: str, final: bool) -> tuple[str, ...]:
    if holds >= demand.wanted_workers or not final:
        return ()
    return (f"{demand.count_key}: got {demand.wanted_workers}; {place} has room for {holds}, which it goes on with",)


def _refusal(demand: Demand, *, gpus: float, nodes: Sequence[Node], place: str) -> str:
    """The key that asks for too much, what was got, what there is, how to repair it."""
    most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in ("CPU", "GPU")}
    remedy = "ask for less, or set RAY_ADDRESS to a cluster that has it"
    if gpus and not most["GPU"]:
        return f"{demand.key}.gpus: got {gpus:g}; {place} has no GPU: {demand.key}.gpus=0, or {remedy}"
    if gpus > most["GPU"]:
        return f"{demand.key}.gpus: got {gpus:g}; no node of {place} has more than {most['GPU']:g}: {remedy}"
    if demand.cpus > most["CPU"]:
        return f"{demand.key}.cpus: got {demand.cpus}; no node of {place} has more than {most['CPU']:g}: {remedy}"
    each = f"{demand.cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    holds = n_workers_that_fit(nodes, cpus=demand.cpus, gpus=gpus)
    return f"{demand.count_key}: got {demand.min_workers}, of {each} each; {place} has room for {holds}: {remedy}"


def is_new_output(output: str, *, table: str) -> bool:
    """Whether an output that can be written has no rows in a table yet; where it cannot, opening it raises the error.

    A job with a new output has work to do, so it asks for the cluster before it writes anything.
    """
    try:
        store = Store(output)
        if store.is_local:
            nearest = next(path for path in (Path(store.root), *Path(store.root).parents) if path.exists())
            if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
                return False
        return not store.list(table)
    except (OSError, ValueError):
        return False


def has_gpus() -> bool:
    """Whether a node has a GPU, or one that may be added; joins or starts Ray. Raises ConfigError where it cannot."""
    cluster.start_ray()
    addable = () if cluster.ray_address() is None else cluster.autoscaler_nodes() or ()
    return any(node.get("GPU", 0) >= 1 for node in (*cluster.nodes(), *addable))


def allocate(demand: Demand, *, stage: str) -> Allocation:
    """Join or start Ray, and return what it has for a job; waits, with a line now and then, where nodes may come.

    Raises ConfigError, one line: what keeps Ray from starting, or that there never will be room.
    """
    cluster.start_ray()
    here = cluster.ray_address() is None
    place = "this machine" if here else "the cluster"
    allocation = plan_allocation(
        demand, nodes=cluster.nodes(), addable=() if here else cluster.autoscaler_nodes(), place=place
    )
    for note in allocation.notes:
        if note not in _logged_notes:
            logger.warning(note, extra={"stage": stage})
            _logged_notes.add(note)
    if demand.gpus is None and allocation.gpus:
        logger.info(f"{allocation.gpus:.3g} of a GPU for each worker ({demand.key}.gpus)", extra={"stage": stage})
    if here:
        return allocation
    _wait(demand, allocation, stage=stage)
    return replace(
        allocation,
        max_workers=max(1, n_workers_that_fit(cluster.nodes(), cpus=allocation.cpus, gpus=allocation.gpus)),
        waits=False,
    )


def _wait(demand: Demand, allocation: Allocation, *, stage: str) -> None:
    """Wait until the cluster has the workers free. A placement group of theirs also shows an autoscaler what to add."""
    from ray.util.placement_group import placement_group, remove_placement_group

    each = {"CPU": float(allocation.cpus)} | ({"GPU": allocation.gpus} if allocation.gpus else {})
    held = placement_group([each] * demand.min_workers)
    start = last_notice = time.monotonic()
    try:
        while not held.wait(_POLL_S):  # short, because no signal interrupts it
            if time.monotonic() - last_notice > NOTICE_S:
                last_notice = time.monotonic()
                what = ", ".join(f"{value:g} {name}" for name, value in each.items())
                logger.warning(
                    f"waits for {demand.min_workers} x {what} of the cluster, for {last_notice - start:.0f} s now; "
                    f"{cluster.describe_nodes()}; Ctrl-C ends it",
                    extra={"stage": stage},
                )
    finally:
        remove_placement_group(held)
