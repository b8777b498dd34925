"""Cells to the statistics that the stain augmentation draws from."""

from __future__ import annotations

from lemon.errors import EXIT_OK
from lemon.pretrain.assemble import fit_stain
from lemon.pretrain.config import FitStainConfig
from lemon.runtime.console import stage_logger

logger = stage_logger(__name__, "fit_stain")


def main(config: FitStainConfig) -> int:
    """Fit, and log where the statistics are. Raises ConfigError."""
    path, count = fit_stain(config)
    logger.info(f"{config.components} components in {config.space} of {count:,} cells in {path}")
    return EXIT_OK
