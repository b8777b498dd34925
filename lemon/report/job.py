"""The report: one page that opens without a network, and each of its tables and figures as a file beside it."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lemon.errors import EXIT_FAILURES, EXIT_OK, ConfigError
from lemon.report.blocks import Picture, Section
from lemon.report.config import ReportConfig
from lemon.report.encoders import cost_sections, encoder_sections
from lemon.report.paper import ARTEFACTS, SHIPPED, SOURCE, PaperNumbers, read_paper
from lemon.report.pasted import atlas_sections, views_sections
from lemon.report.provenance import FILE, provenance_sections
from lemon.report.robustness import robustness_sections
from lemon.report.sources import Report, find_sources
from lemon.report.studies import STUDIES, study_sections
from lemon.runtime.console import stage_logger
from lemon.runtime.lease import hold
from lemon.runtime.secrets import redacted
from lemon.runtime.store import Store, code_version

logger = stage_logger(__name__, "report")

NAME = "index.html"

OUTPUT_NAMES = (NAME, FILE)
"""What a report writes in its output, whatever it shows; more is written by sections."""

SECTIONS: tuple[Callable[[Report], Iterator[Section]], ...] = (
    encoder_sections,
    cost_sections,
    robustness_sections,
    study_sections,
    atlas_sections,
    views_sections,
    provenance_sections,
)
"""The parts of the page, in its order; each yields as many sections as there are outputs for it."""

PROBED = ("table1", "figure2")
"""What is made of outputs of probes."""

COMMANDS = {
    **dict.fromkeys(PROBED, "lemon probe models=... tasks=... data=..."),
    **{key: f"lemon sweep sweep={study} cells=... tasks=... output=..." for study, key in STUDIES.items()},
    "figure4": "lemon atlas embeddings=... cells=... output=atlas/, then lemon report atlas=atlas/",
    "figure5": "make demo draws demo/views.png, then lemon report views=demo/views.png",
}
"""Where each artefact comes from."""

SENTENCES = 3
"""Of what was found, on the first screen."""

CAVEAT = (
    "Intervals over seeds cover the chance of training, those over slides that of the labelled nuclei; neither covers "
    "both. The best was chosen after the scores were seen, and no interval is corrected for the number of comparisons. "
    "With two or three seeds intervals are wide."
)

_ASSETS = Path(__file__).resolve().parent / "assets"


class FirstScreen(NamedTuple):
    """What the page begins with."""

    sentences: list[str]
    pictures: list[Picture]


def main(config: ReportConfig) -> int:
    """Write the page and tell where it is; returns the exit code: 3 where something that was named is missing.

    Raises ConfigError where there is nothing to show, or where it cannot be written.
    """
    with hold(config.output, stage="report", names=OUTPUT_NAMES) as store:
        return _write(config, store)


def _write(config: ReportConfig, store: Store) -> int:
    numbers = PaperNumbers(read_paper(config.paper) if config.paper else ())
    report = Report(config, find_sources(config), numbers, store)
    sources = report.sources
    sections = [section for make in SECTIONS for section in make(report)]
    if not sections:
        known = ", ".join(config.experiment)
        raise ConfigError(
            f"experiment: no outputs of runs in {known}; run lemon sweep or lemon probe first, set "
            "MLFLOW_TRACKING_URI, or name folders: sweeps=..., probes=..."
        )
    store.write_bytes(NAME, render(config, sections, missing=sources.missing).encode(errors="replace"))
    for sentence in chain.from_iterable(section.found for section in sections):
        logger.info(sentence)
    logger.info(f"{len(sources.sweeps)} sweeps, {len(sources.probes)} outputs of probes; look at {store.uri}/{NAME}")
    return EXIT_FAILURES if sources.requested_missing else EXIT_OK


def render(config: ReportConfig, sections: Sequence[Section], *, missing: Sequence[str]) -> str:
    """The page; whatever is put in is escaped by the template."""
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_redact,
    )
    script = (_ASSETS / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        title=config.title,
        subtitle=f"Made {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC by lemon {code_version()}",
        about=list(about(config)),
        first=first_screen(sections),
        sections=sections,
        missing=missing,
        not_made=list(not_made(sections, config)),
        script=Markup(script),  # a file of this package
        script_hash=f"sha256-{digest}",  # no other script runs, whatever a name may hold
    )


def _redact(value: Any) -> Any:
    """What the template puts in, without secrets; pictures, which are long, and markup, made of such, pass as are."""
    is_safe = isinstance(value, Markup) or not isinstance(value, str) or value.startswith("data:")
    return value if is_safe else redacted(value)


def first_screen(sections: Sequence[Section]) -> FirstScreen:
    """The first sentence of each section, then the second ones, until there are enough; the first figure, the atlas."""
    in_turn = chain.from_iterable(zip_longest(*(section.found for section in sections)))
    figure = [section.pictures[0] for section in sections if section.pictures and section.key not in FIGURES_OF_CELLS]
    atlas = [section.pictures[0] for section in sections if section.key == "figure4"]
    return FirstScreen([text for text in in_turn if text][:SENTENCES], [*figure[:1], *atlas])


FIGURES_OF_CELLS = ("figure4", "figure5")
"""Sections that show cells, not scores."""


def not_made(sections: Sequence[Section], config: ReportConfig) -> Iterator[tuple[str, str]]:
    """(name, command) of what of the paper the page lacks; not of sweeps or probes where none are wanted."""
    made = {section.artefact.key for section in sections if section.artefact}
    unwanted = {*(STUDIES.values() if config.sweeps == [] else ()), *(PROBED if config.probes == [] else ())}
    for key, artefact in ARTEFACTS.items():
        if key not in made | unwanted:
            yield artefact.name, COMMANDS[key]


def about(config: ReportConfig) -> Iterator[str]:
    """What the page is and how to read it."""
    yield (
        "LEMON cuts images of single nuclei out of whole-slide images, pretrains vision transformers on them, and "
        "scores these encoders on labelled nuclei, after the LEMON paper (arXiv 2603.25802). Its tables and figures "
        "are made anew here from runs of this project: every number of ours is read from MLflow or from the tables "
        "that runs left. Most runs are far smaller than the paper's: look at what was used before comparing."
    )
    yield (
        'Splits: "paper" are the paper\'s as far as it says; "leak-free" never divide a slide, a patient or a hospital '
        "between training and test. Where both exist, sentences and figures use the second."
    )
    yield (
        "A score is the mean over folds, its s.d. in brackets; below it stands the 95 % interval of this mean, by a "
        "bootstrap of whole slides. Bold is the best of a column with all that it cannot be told apart from: whose "
        "paired difference has an interval that holds 0. Nothing is bold where that is everybody."
    )
    yield CAVEAT
    if config.paper == SHIPPED:
        yield (
            f"The paper's scores are printed in {SOURCE}: its authors measured them, with their own training. "
            "Where \u2260 stands above them, they do not compare."
        )
    elif config.paper:
        yield f"The paper's scores are those of {config.paper}. Where \u2260 stands above them, they do not compare."
