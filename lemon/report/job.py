"""The report: one page that opens without a network, and each of its tables and figures as a file beside it."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lemon.errors import EXIT_FAILURES, EXIT_OK, ConfigError
from lemon.report.blocks import Section
from lemon.report.config import ReportConfig
from lemon.report.paper import ARTEFACTS, SHIPPED, SOURCE, PaperNumbers, read_paper
from lemon.report.pasted import atlas_section, views_section
from lemon.report.provenance import FILE, provenance_section
from lemon.report.sections import STUDIES, figure2_section, study_section, table1_section
from lemon.report.sentences import probe_sentences, study_sentences
from lemon.report.sources import OutputTable, Sources, find_sources
from lemon.runtime.console import stage_logger
from lemon.runtime.lease import hold
from lemon.runtime.secrets import redacted
from lemon.runtime.store import Store, code_version
from lemon.schema import SweepRow

logger = stage_logger(__name__, "report")

NAME = "index.html"

OUTPUT_NAMES = (NAME, FILE)
"""What a report writes in its output, whatever it shows; more is written by sections."""

COMMANDS = {
    "table1": "lemon probe models=... tasks=... data=...",
    "figure2": "lemon probe models=... tasks=... data=...",
    **{key: f"lemon sweep sweep={study} cells=... tasks=... output=..." for study, key in STUDIES.items()},
    "figure4": "lemon atlas embeddings=... cells=... output=atlas/, then atlas=atlas/",
    "figure5": "views=picture.png; make demo draws one as demo/views.png",
}
"""Where each artefact comes from."""

CAVEAT = (
    "Intervals over seeds cover the chance of training, those over slides that of the labelled nuclei; neither covers "
    "both. The best was chosen after the scores were seen, and no interval is corrected for the number of comparisons. "
    "With two or three seeds intervals are wide."
)

_ASSETS = Path(__file__).resolve().parent / "assets"


def main(config: ReportConfig) -> int:
    """Write the page and tell where it is; returns the exit code: 3 where something that was named is missing.

    Raises ConfigError where there is nothing to show, or where it cannot be written.
    """
    with hold(config.output, stage="report", names=OUTPUT_NAMES) as store:
        return _write(config, store)


def _write(config: ReportConfig, store: Store) -> int:
    numbers = PaperNumbers(read_paper(config.paper) if config.paper else ())
    sources = find_sources(config)
    pasted = {
        "figure4": config.atlas and atlas_section(config.atlas, sources, store),
        "figure5": config.views and views_section(config.views, sources, store),
    }
    ready = {key: section for key, section in pasted.items() if section}
    if not (sources.sweeps or sources.probes or ready):
        known = ", ".join(config.experiment)
        raise ConfigError(
            f"experiment: no outputs of runs in {known}; run lemon sweep or lemon probe first, set "
            "MLFLOW_TRACKING_URI, or name folders: sweeps=..., probes=..."
        )
    sections = [*_sections(sources, numbers, store, ready=ready), provenance_section(sources, store)]
    sentences = [text for probe in sources.probes for text in probe_sentences(probe)]
    sentences += [text for sweep in sources.sweeps for text in study_sentences(sweep)]
    html = render(config, sections, sentences=sentences, missing=sources.missing)
    store.write_bytes(NAME, html.encode(errors="replace"))
    for sentence in sentences:
        logger.info(sentence)
    logger.info(f"{len(sources.sweeps)} sweeps, {len(sources.probes)} outputs of probes; look at {store.uri}/{NAME}")
    return EXIT_FAILURES if sources.requested_missing else EXIT_OK


def render(config: ReportConfig, sections: list[Section], *, sentences: list[str], missing: list[str]) -> str:
    """The page; whatever is put in is escaped by the template."""
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_redact,
    )
    return environment.get_template("report.html").render(
        title=config.title,
        subtitle=f"Made {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC by lemon {code_version()}",
        about=list(about(config)),
        missing=missing,
        sentences=sentences,
        caveat=CAVEAT,
        sections=sections,
    )


def _redact(value: Any) -> Any:
    """What the template puts in, without secrets; pictures, which are long, and markup, made of such, pass as are."""
    is_safe = isinstance(value, Markup) or not isinstance(value, str) or value.startswith("data:")
    return value if is_safe else redacted(value)


def about(config: ReportConfig) -> Iterator[str]:
    """What the page is and how to read it."""
    yield (
        "LEMON cuts images of single nuclei out of whole-slide images, pretrains vision transformers on them, and "
        "scores these encoders on labelled nuclei, after the LEMON paper (arXiv 2603.25802). Here are its Tables 1, 2 "
        "and 5 and its Figures 2 to 5, made anew from runs of this project. Every number of ours is read from MLflow "
        "or from the tables that runs left."
    )
    yield (
        "The paper's recipe is given beside ours, since most runs here are far smaller: "
        "look at what was used before comparing."
    )
    if config.paper == SHIPPED:
        yield f'Scores labelled "paper" are printed in {SOURCE}: its authors measured them, with their own training.'
    elif config.paper:
        yield f'Scores labelled "paper" are the paper\'s, as typed into {config.paper}; they were not checked.'
    yield (
        'Splits: "paper" are the paper\'s as far as it says; "leak-free" never divide a slide, a patient or a hospital '
        "between training and test. Where both exist, sentences and figures use the second."
    )


def _sections(sources: Sources, numbers: PaperNumbers, store: Store, *, ready: dict[str, Section]) -> Iterator[Section]:
    """In the order of the paper, then studies of one's own; what was not made says how to make it."""
    by_study: dict[str, list[OutputTable[SweepRow]]] = {}
    for sweep in sources.sweeps:
        by_study.setdefault(sweep.rows[0].study, []).append(sweep)
    studies = {key: by_study.pop(study, []) for study, key in STUDIES.items()}
    for key, artefact in ARTEFACTS.items():
        outputs = sources.probes if key in ("table1", "figure2") else studies.get(key, [])
        for stem, output in _stems(key, outputs):
            if key in studies:
                section = study_section(output, numbers, sources.runs, store, stem=stem)
            else:
                make = table1_section if key == "table1" else figure2_section
                section = make(output, numbers, store, stem=stem)
            yield _with_output_name(section, output, among=outputs)
        if key in ready:
            yield ready[key]
        elif not outputs:
            yield Section(key, artefact.name, artefact, notes=[f"Not made yet: {COMMANDS[key]}"])
    for number, outputs in enumerate(by_study.values(), 1):
        for stem, output in _stems(f"study{number}", outputs):
            yield _with_output_name(
                study_section(output, numbers, sources.runs, store, stem=stem), output, among=outputs
            )


def _stems(key: str, outputs: list[OutputTable]) -> Iterator[tuple[str, OutputTable]]:
    """What the files of each output are called: table2, table2_2, ..."""
    for number, output in enumerate(outputs, 1):
        yield (key if number == 1 else f"{key}_{number}"), output


def _with_output_name(section: Section, output: OutputTable, *, among: list[OutputTable]) -> Section:
    if len(among) > 1:
        section.title += f" ({output.name})"
    return section
