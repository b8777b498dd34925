"""A simulation of curation: 1,000 slides of 0.1 to 1,000 mm2 on 8 cards with 64 to 256 cores, by several designs.

python -m benchmarks.fleet [--cores 64 128 256] [--device-ms 7] [--cpu-ms 90] [--open-s 8] [--seed 0]

Nothing is run: slides are numbers of tiles, and time passes from one end of a slide's stage to the next.
``--device-ms`` and ``--cpu-ms`` are what a tile of 1024 px takes of a card and of one core (reading, instances, crops),
``--open-s`` what opening takes of one core before the first tile; give those of the machine in question. Each card has
its share of the cores. A slide's tiles go as fast as its cores and the card allow; slides that share a card slow each
other down where they ask for more than it has.

Designs:

- listed: one slide an actor of two cores, as many actors as the cores allow, in the order of a listing;
- largest first: the same, by size;
- strips: the same, and a slide of more than ``--strip-mm2`` is cut into strips that actors take like slides;
- pooled: one process a card computes for all its slides, and their cores serve whichever of them has work;
- pooled strips: both.

Printed for each: the time of the last slide, the least possible time (cards or cores all busy), the share of time in
which cards computed, over all and until 95 % of the tiles were done.
"""

from __future__ import annotations

import argparse
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.record import record

TILE_MM2 = 0.050
"""Tissue that a tile of 1024 px with an overlap of 128 px adds."""
CARDS = 8
ACTOR_CORES = 2


@dataclass(frozen=True)
class Costs:
    """Seconds that a tile takes of a card and of a core, and that opening takes of a core."""

    device_s: float
    cpu_s: float
    open_s: float


@dataclass(frozen=True)
class Design:
    """How slides are given out."""

    largest_first: bool = True
    strips: bool = False
    pooled: bool = False


DESIGNS = {
    "listed": Design(largest_first=False),
    "largest first": Design(),
    "strips": Design(strips=True),
    "pooled": Design(pooled=True),
    "pooled strips": Design(strips=True, pooled=True),
}


@dataclass
class Work:
    """A slide or a strip of one that an actor is at."""

    tiles: float
    open_s: float


@dataclass
class Card:
    """A card with its cores and the slides that are worked on beside it."""

    cores: float
    work: list[Work] = field(default_factory=list)

    def rates(self, costs: Costs, *, pooled: bool) -> list[float]:
        """Tiles a second of each slide; 0 while it is opened."""
        ready = [one.open_s <= 0 for one in self.work]
        if not any(ready):
            return [0.0] * len(ready)
        free = self.cores - (len(ready) - sum(ready))  # opening takes a core each
        cores = max(free, 0.0) / sum(ready) if pooled else ACTOR_CORES
        rate = cores / costs.cpu_s
        asked = rate * sum(ready) * costs.device_s
        return [rate / max(1.0, asked) * on for on in ready]


def areas_mm2(count: int, *, seed: int) -> np.ndarray:
    """Tissue of slides: biopsies about 8, resections about 150, a few very large; within 0.1 and 1,000 mm2."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, size=count, p=[0.35, 0.6, 0.05])
    median, spread = np.array([8.0, 150.0, 600.0])[kind], np.array([1.2, 0.6, 0.3])[kind]
    return np.clip(median * np.exp(spread * rng.standard_normal(count)), 0.1, 1000)


def simulate(areas: np.ndarray, costs: Costs, design: Design, *, cores: int, strip_mm2: float) -> dict[str, float]:
    """Seconds until the last slide and shares of time in which cards computed."""
    parts = _parts(areas, strip_mm2=strip_mm2 if design.strips else np.inf)
    order = sorted(parts, reverse=True) if design.largest_first else parts
    waiting = deque(Work(area / TILE_MM2, costs.open_s) for area in order)
    cards = [Card(cores / CARDS) for _ in range(CARDS)]
    actors = max(1, int(cores / CARDS) // ACTOR_CORES)
    total, done, now, busy, early = sum(one.tiles for one in waiting), 0.0, 0.0, 0.0, (0.0, 0.0)
    while True:
        while waiting and (card := min(cards, key=lambda one: len(one.work))) and len(card.work) < actors:
            card.work.append(waiting.popleft())
        rates = [(card, card.rates(costs, pooled=design.pooled)) for card in cards]
        steps = [
            one.open_s if one.open_s > 0 else one.tiles / rate
            for card, each in rates
            for one, rate in zip(card.work, each, strict=True)
            if one.open_s > 0 or rate > 0
        ]
        if not steps:
            break
        step = min(steps)
        for card, each in rates:
            for one, rate in zip(card.work, each, strict=True):
                one.open_s, one.tiles = max(0.0, one.open_s - step), one.tiles - rate * step
                done, busy = done + rate * step, busy + rate * step * costs.device_s
            card.work = [one for one in card.work if one.open_s > 1e-9 or one.tiles > 1e-6]
            for one in card.work:
                one.open_s = one.open_s if one.open_s > 1e-9 else 0.0
        now += step
        if done <= 0.95 * total:
            early = (now, busy)
    least = max(total * costs.device_s / CARDS, (total * costs.cpu_s + len(areas) * costs.open_s) / cores)
    return {
        "last_slide_s": round(now),
        "least_s": round(least),
        "busy": round(busy / now / CARDS, 3),
        "busy_until_95": round(early[1] / max(early[0], 1e-9) / CARDS, 3),
    }


def _parts(areas: np.ndarray, *, strip_mm2: float) -> list[float]:
    """Areas of slides, or of their strips of about equal size."""
    counts = np.maximum(1, np.ceil(areas / strip_mm2)).astype(int)
    return np.repeat(areas / counts, counts).tolist()


def main() -> None:
    """Simulate, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=1000)
    parser.add_argument("--cores", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--device-ms", type=float, default=7.0)
    parser.add_argument("--cpu-ms", type=float, default=90.0)
    parser.add_argument("--open-s", type=float, default=8.0)
    parser.add_argument("--strip-mm2", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    costs = Costs(options.device_ms / 1e3, options.cpu_ms / 1e3, options.open_s)
    areas = areas_mm2(options.slides, seed=options.seed)
    print(f"{len(areas)} slides, {areas.sum():,.0f} mm2, median {np.median(areas):.0f}, {CARDS} cards")
    rows: list[dict[str, Any]] = []
    for cores in options.cores:
        for name, design in DESIGNS.items():
            figures = simulate(areas, costs, design, cores=cores, strip_mm2=options.strip_mm2)
            rows.append({"cores": cores, "design": name, **figures})
            print(
                f"{cores:4} cores, {name:<14} last slide {figures['last_slide_s']:7,} s "
                f"(least {figures['least_s']:,}), cards busy {figures['busy']:.0%}, "
                f"until 95 % of the tiles {figures['busy_until_95']:.0%}",
                flush=True,
            )
    record("fleet", {**vars(options), "rows": rows}, packages=("numpy",))


if __name__ == "__main__":
    main()
