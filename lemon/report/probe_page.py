"""What ``lemon probe`` does: scores, and the page of what they say, in the same folder."""

from __future__ import annotations

from lemon.probe import job as probing
from lemon.probe.config import ProbeConfig
from lemon.report import job as report
from lemon.report.config import ReportConfig


def main(config: ProbeConfig) -> int:
    """Score every encoder on every task and write ``index.html`` beside the scores; returns the exit code of probing.

    The page is the report of this one output. Raises ConfigError.
    """
    code = probing.main(config)
    report.main(
        ReportConfig(
            experiment=["probe"], sweeps=[], probes=[config.output], output=config.output, title="LEMON: encoders"
        )
    )
    return code
