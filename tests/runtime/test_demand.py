"""What is asked of a cluster, against what it has."""

from __future__ import annotations

import pytest

from lemon.errors import ConfigError
from lemon.runtime.demand import Demand, Node, n_workers_that_fit, plan_allocation

SMALL: list[Node] = [{"CPU": 1.0}]
TWO: list[Node] = [{"CPU": 2.0}]
FOUR_SMALL: list[Node] = [{"CPU": 1.0}] * 4
GPU_NODE: list[Node] = [{"CPU": 0.0}, {"CPU": 8.0, "GPU": 2.0}]
HEAD_ONLY: list[Node] = [{"memory": 1e9}]


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "expected"),
    [
        (TWO, 2, 0, 1),
        (FOUR_SMALL, 1, 0, 4),
        (FOUR_SMALL, 2, 0, 0),  # four CPUs in all, on no node two
        (GPU_NODE, 2, 1, 2),
        (GPU_NODE, 2, 0.5, 4),
        (GPU_NODE, 1, 0.3, 6),  # three to a device
        (GPU_NODE, 1, 0.1, 8),  # CPUs are fewer than shares
        (GPU_NODE, 1, 2, 1),
        (HEAD_ONLY, 1, 0, 0),
        ([], 1, 0, 0),
    ],
)
def test_workers_fit_on_nodes_and_shares_on_devices(nodes: list[Node], cpus: int, gpus: float, expected: int) -> None:
    assert n_workers_that_fit(nodes, cpus=cpus, gpus=gpus) == expected


@pytest.mark.parametrize(
    ("demand", "nodes", "expected"),
    [
        (Demand(2), TWO, (2, 0, 1)),
        (Demand(2, may_shrink=True), SMALL, (1, 0, 1)),
        (Demand(4, may_shrink=True), [*TWO, *SMALL], (2, 0, 1)),
        (Demand(2, gpus=None), TWO, (2, 0, 1)),
        (Demand(2, gpus=None), GPU_NODE, (2, 1, 2)),
        (Demand(2, gpus=0.5), GPU_NODE, (2, 0.5, 4)),
        (Demand(2, gpus=None, shares_gpus=True), TWO, (2, 0, 1)),
        (Demand(2, gpus=None, shares_gpus=True), GPU_NODE, (2, 0.5, 4)),
        (Demand(3, gpus=None, shares_gpus=True), GPU_NODE, (3, 1, 2)),  # CPUs for two workers, two devices
        (Demand(8, gpus=None, shares_gpus=True), GPU_NODE, (8, 1, 1)),
        (Demand(2, gpus=None, shares_gpus=True), [{"CPU": 16.0, "GPU": 1.0}, {"CPU": 64.0}], (2, 0.125, 8)),
        (Demand(1, min_workers=2), TWO, (1, 0, 2)),
        (Demand(1, min_workers=2, wanted_workers=8), TWO, (1, 0, 2)),
    ],
)
def test_what_a_fixed_cluster_has_is_granted(
    demand: Demand, nodes: list[Node], expected: tuple[int, float, int]
) -> None:
    granted = plan_allocation(demand, nodes=nodes, addable=(), place="this machine")
    assert (granted.cpus, granted.gpus, granted.max_workers) == expected
    assert not granted.waits


@pytest.mark.parametrize(
    ("demand", "nodes", "line"),
    [
        (Demand(2), SMALL, "workers.cpus: got 2; no node of it has more than 1: "),
        (Demand(2), FOUR_SMALL, "workers.cpus: got 2; no node of it has more than 1: "),
        (Demand(1), HEAD_ONLY, "workers.cpus: got 1; no node of it has more than 0: "),
        (Demand(1), [], "workers.cpus: got 1; no node of it has more than 0: "),
        (Demand(2, gpus=1), TWO, "workers.gpus: got 1; it has no GPU: workers.gpus=0, or "),
        (Demand(2, gpus=0.5), TWO, "workers.gpus: got 0.5; it has no GPU: "),
        (Demand(2, gpus=1, may_shrink=True), TWO, "workers.gpus: got 1; it has no GPU: "),
        (Demand(2, gpus=4), GPU_NODE, "workers.gpus: got 4; no node of it has more than 2: "),
        (Demand(2, gpus=1.5), GPU_NODE, "workers.gpus: got 1.5; expected a share of one GPU or a whole number"),
        (Demand(1, min_workers=8), TWO, "workers.count: got 8, of 1 CPUs each; it has room for 2: "),
        (
            Demand(1, gpus=1, min_workers=4),
            GPU_NODE,
            "workers.count: got 4, of 1 CPUs and 1 GPUs each; it has room for 2: ",
        ),
        (
            Demand(4, gpus=1),
            [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 8.0}],
            "workers.count: got 1, of 4 CPUs and 1 GPUs each; it has room for 0: ",
        ),
        (Demand(9, key="pretrain.workers"), TWO, "pretrain.workers.cpus: got 9; "),
    ],
)
def test_what_a_fixed_cluster_never_has_is_refused_in_a_line(demand: Demand, nodes: list[Node], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_allocation(demand, nodes=nodes, addable=(), place="it")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("demand", "nodes", "coming", "waits"),
    [
        (Demand(4), SMALL, [{"CPU": 4.0}], True),
        (Demand(4), SMALL, None, True),  # an autoscaler that does not tell
        (Demand(1, min_workers=8), TWO, [{"CPU": 2.0}] * 3, True),
        (Demand(1), TWO, None, False),
        (Demand(2, gpus=1), HEAD_ONLY, [{"CPU": 8.0, "GPU": 1.0}], True),
        (Demand(4, may_shrink=True), SMALL, [{"CPU": 4.0}], True),  # what comes is enough: nothing shrinks
    ],
)
def test_where_nodes_may_come_a_job_waits_for_them(
    demand: Demand, nodes: list[Node], coming: list[Node] | None, waits: bool
) -> None:
    granted = plan_allocation(demand, nodes=nodes, addable=coming, place="the cluster")
    assert (granted.cpus, granted.waits, granted.notes) == (demand.cpus, waits, ())


def test_a_cluster_that_grows_only_by_too_small_nodes_refuses() -> None:
    with pytest.raises(ConfigError, match=r"workers.cpus: got 4; no node of the cluster has more than 2"):
        plan_allocation(Demand(4), nodes=SMALL, addable=TWO, place="the cluster")


def test_a_default_shrinks_at_once_where_it_is_unknown_what_comes() -> None:
    assert plan_allocation(Demand(2, may_shrink=True), nodes=SMALL, addable=None, place="the cluster").cpus == 1


def test_what_becomes_smaller_is_told() -> None:
    granted = plan_allocation(
        Demand(2, wanted_workers=8, may_shrink=True, count_key="workers.actors"),
        nodes=SMALL,
        addable=(),
        place="this machine",
    )
    assert granted.notes == (
        "workers.cpus: 1 instead of 2, as no node of this machine has more",
        "workers.actors: got 8; this machine has room for 1, which it goes on with",
    )
