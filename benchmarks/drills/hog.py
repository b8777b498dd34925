"""Fills the object store of every node that has a CPU, when told to by a line on stdin, until stdin ends."""

from __future__ import annotations

import sys

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks.drills.cluster import OBJECT_STORE_BYTES

BLOCK_BYTES = 4 << 20


@ray.remote(num_cpus=0)
class Hog:
    """Holds blocks of its node's store."""

    def __init__(self) -> None:
        self.views: list[np.ndarray] = []
        self.references: list[ray.ObjectRef] = []

    def fill(self) -> int:
        """Put blocks that are in use, so that Ray can neither drop nor spill them; returns their bytes."""
        while sum(view.nbytes for view in self.views) < OBJECT_STORE_BYTES:
            reference = ray.put(np.zeros(BLOCK_BYTES, np.uint8))
            self.references.append(reference)
            self.views.append(ray.get(reference))
        return sum(view.nbytes for view in self.views)


def main() -> None:
    """One hog a node; a line tells that they are ready, another that the stores are full."""
    ray.init(log_to_driver=False)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    hogs = [
        Hog.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    ]
    ray.get([hog.__ray_ready__.remote() for hog in hogs])
    print("ready", flush=True)
    sys.stdin.readline()
    print(min(ray.get([hog.fill.remote() for hog in hogs])), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
