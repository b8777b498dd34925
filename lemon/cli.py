"""The command ``lemon``: one subcommand a stage. The table of stages is here, and ``jobs/*.py`` use it too.

Only the standard library is imported until a stage is known, and neither torch nor Ray until its config is.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lemon.errors import EXIT_BAD_CONFIG, EXIT_OK
from lemon.version import __version__


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Args:
        command: the subcommand.
        name: of its folder in ``conf/`` and of its file in ``jobs/``; begins its lines.
        config: where its pydantic model is, ``module:class``.
        job: where its ``main(config) -> exit code`` is, ``module:function``; imported when the config is valid.
        purpose: one line for ``lemon --help``.
    """

    command: str
    name: str
    config: str
    job: str
    purpose: str


STAGES = (
    Stage("fetch", "fetch_tcga", "lemon.fetch.config:FetchConfig", "lemon.fetch.job:main", "slides of TCGA"),
    Stage(
        "curate", "curate", "lemon.curate.config:CurateConfig", "lemon.curate.job:main", "slides to images of nuclei"
    ),
    Stage(
        "train-segmenter",
        "train_segmenter",
        "lemon.train_segmenter.config:TrainSegmenterConfig",
        "lemon.train_segmenter.job:main",
        "images with drawn nuclei to weights of the segmenter",
    ),
    Stage(
        "fit-stain",
        "fit_stain",
        "lemon.pretrain.config:FitStainConfig",
        "lemon.pretrain.stain_job:main",
        "statistics of stains, for views=a1_gmm1 and a1_gmm10",
    ),
    Stage(
        "pretrain",
        "pretrain",
        "lemon.pretrain.config:PretrainConfig",
        "lemon.pretrain.job:main",
        "images of nuclei to an encoder, without labels",
    ),
    Stage(
        "embed",
        "embed",
        "lemon.embed.config:EmbedConfig",
        "lemon.embed.job:main",
        "a vector for every nucleus; files for scanpy and QuPath",
    ),
    Stage(
        "probe",
        "probe",
        "lemon.probe.config:ProbeConfig",
        "lemon.report.probe_page:main",
        "encoders scored on labelled nuclei",
    ),
    Stage(
        "sweep",
        "scaling_sweep",
        "lemon.sweep.config:SweepConfig",
        "lemon.sweep.start:main",
        "studies of many pretrainings and their scores",
    ),
    Stage(
        "atlas", "atlas", "lemon.atlas.config:AtlasConfig", "lemon.atlas.job:main", "a map of nuclei by their vectors"
    ),
    Stage("find", "find", "lemon.find.config:FindConfig", "lemon.find.job:main", "the nuclei most like a nucleus"),
    Stage(
        "classify",
        "classify",
        "lemon.classify.config:ClassifyConfig",
        "lemon.classify.job:main",
        "a few labels to a class for every nucleus",
    ),
    Stage(
        "describe",
        "describe",
        "lemon.describe.config:DescribeConfig",
        "lemon.describe.job:main",
        "what is different about each cluster or class",
    ),
    Stage(
        "report", "report", "lemon.report.config:ReportConfig", "lemon.report.job:main", "one page of what was found"
    ),
    Stage("ui", "ui", "lemon.runtime.ui:UiConfig", "lemon.runtime.ui:main", "MLflow's page of all runs"),
    Stage("demo", "demo", "lemon.demo.config:DemoConfig", "lemon.demo.job:main", "all of these on one slide"),
    Stage(
        "verify",
        "verify",
        "lemon.runtime.verify:VerifyConfig",
        "lemon.runtime.verify:main",
        "whether an output is still as it was written",
    ),
)
"""In the order of the pipeline."""

DOCTOR = "doctor"
"""The one subcommand that is no stage: it has options, and needs no package to be installed."""

_DOCTOR_PURPOSE = "whether this machine is fit for LEMON, and how to mend it"


def main(arguments: Sequence[str] | None = None) -> int:
    """``lemon COMMAND key=value ...``; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not {"-h", "--help", "--version"} & {*arguments}:
        return _run(arguments)
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has read enough, as in lemon --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports it when it ends
        return EXIT_OK
    return code


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_OK if arguments else EXIT_BAD_CONFIG
    command, *rest = arguments
    if command == "--version":
        print(f"lemon {__version__}")
        return EXIT_OK
    if command == DOCTOR:
        from lemon import doctor

        doctor.script(rest, prog="lemon doctor")
    # The names of files in jobs/ are taken too: whoever knows them need not learn others.
    by_name = {stage.name: stage for stage in STAGES} | {stage.command: stage for stage in STAGES}
    if command not in by_name:
        print(f"lemon: {_unknown(command, sorted([*by_name, DOCTOR]))}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    return run_stage(by_name[command].name, rest)


def run_stage(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run the stage of that name with the words of the command line; returns the exit code."""
    from lemon.runtime.job import run_job

    (stage,) = (stage for stage in STAGES if stage.name == name)

    def start(config: Any) -> int:
        return int(_find(stage.job)(config))

    return run_job(stage.name, _find(stage.config), start, arguments, command=stage.command)


def usage() -> str:
    """The text of ``lemon --help``."""
    rows = [*((stage.command, stage.purpose) for stage in STAGES), (DOCTOR, _DOCTOR_PURPOSE)]
    return "\n".join(
        [
            "usage: lemon COMMAND key=value ...",
            "From whole-slide images to a foundation model of single-nucleus morphology.",
            "",
            "In the order of the pipeline:",
            *(f"  {command:<15} {purpose}" for command, purpose in rows),
            "",
            "lemon COMMAND --help lists its keys; lemon --version tells the version.",
        ]
    )


def _unknown(command: str, known: Sequence[str]) -> str:
    """One line for a command that there is not."""
    close = difflib.get_close_matches(command.lower(), known, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]}?" if close else "lemon --help lists them"
    return f"{command[:80]!r}: no such command; {meant}"


def _find(place: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


if __name__ == "__main__":
    sys.exit(main())
