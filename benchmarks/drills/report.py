"""Rows of drills, and docs/drills.md, which is made of them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from benchmarks.drills.cluster import ROOT
from benchmarks.drills.scene import Scene
from benchmarks.drills.stages import STAGES, Difference
from benchmarks.record import hardware
from lemon.runtime.store import code_version

PAGE = ROOT / "docs" / "drills.md"

INTRODUCTION = """\
# Fault drills

`python -m benchmarks.drills --work FOLDER` disturbs the jobs on a Ray cluster of three nodes of one CPU each (on one
machine, 80 MiB of object store a node) and compares what they leave with what an undisturbed run leaves: every row and
every column but times. Written by that command: {hardware}; commit {commit}; {date}.

- *What happened*: exit code of the job that was struck, workers that Ray began after the fault, the job's last line.
- *Again*: whether the same command had to be given again; nothing else was ever done to mend an output.
- *Recovered*: seconds from the fault until all that was in hand then is done, starting the job again included.
- *Lost*, *doubled*, *changed*: rows beside the undisturbed run ({rows}).
- *Same bits*: whether the weights of all encoders are those of the undisturbed run, bit for bit.

{verdict}
"""

COLUMNS = (
    "fault",
    "what was done",
    "what happened",
    "given again",
    "recovered",
    "lost",
    "doubled",
    "changed",
    "same bits",
)


@dataclass
class Row:
    """The outcome of one fault in one stage."""

    stage: str
    fault: str
    done: str = ""
    happened: str = ""
    again: bool | None = None
    recovered_s: float | None = None
    lost: int | None = None
    doubled: int | None = None
    changed: int | None = None
    same_bits: bool | None = None
    failure: str = ""
    """Why the drill says nothing; or what is wrong beside the tables."""
    not_applicable: str = ""
    commit: str = field(default_factory=code_version)
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).date().isoformat())

    @property
    def name(self) -> str:
        """As ``--only`` takes it."""
        return f"{self.fault}/{self.stage}"

    @property
    def good(self) -> bool:
        """Whether nothing was lost, doubled or changed."""
        return bool(self.not_applicable) or (
            not self.failure and not (self.lost or self.doubled or self.changed) and self.same_bits is not False
        )

    def cells(self) -> list[str]:
        """The row on the page."""
        if self.not_applicable:
            return [self.fault, f"not applicable: {self.not_applicable}", *[""] * (len(COLUMNS) - 2)]
        recovered = "" if self.recovered_s is None else f"{self.recovered_s:.0f} s"
        counts = ["" if count is None else str(count) for count in (self.lost, self.doubled, self.changed)]
        happened = "; ".join(part for part in (self.failure, self.happened) if part)
        return [self.fault, self.done, happened, _yes(self.again), recovered, *counts, _yes(self.same_bits)]


def row_of(scene: Scene, fault: str, difference: Difference) -> Row:
    """What a scene that is over came to."""
    happened = f"exit code {scene.exit_codes[0]}; {scene.workers_begun} workers begun anew; `{scene.told}`"
    failures = [*(["a traceback was printed"] if scene.traceback else [])]
    failures += [f"{len(scene.orphans)} processes outlived the job ({scene.orphans[0]})"] if scene.orphans else []
    return Row(
        stage=scene.stage.name,
        fault=fault,
        done=scene.done,
        happened=happened,
        again=len(scene.exit_codes) > 1,
        recovered_s=scene.recovered_s,
        failure="; ".join(failures),
        **asdict(difference),
    )


def write_page(rows: Sequence[Row]) -> Sequence[Row]:
    """The page of all rows; returns them."""
    bad = [row.name for row in rows if not row.good]
    verdict = f"Not as they should be: {', '.join(bad)}." if bad else "No row was lost, doubled or changed."
    text = INTRODUCTION.format(
        hardware=hardware(),
        commit=", ".join(sorted({row.commit for row in rows})),
        date=max(row.date for row in rows),
        rows="; ".join(f"{stage.name}: {stage.rows}" for stage in STAGES),
        verdict=verdict,
    )
    for stage in STAGES:
        text += f"\n## {stage.name}\n\n{table([row for row in rows if row.stage == stage.name])}\n"
    PAGE.write_text(text)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[value]
