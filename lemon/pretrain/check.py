"""All of a run's settings that the data and this machine can refute, before anything is written."""

from __future__ import annotations

from lemon.cells.batches import is_streamed
from lemon.cells.cache import check_cache
from lemon.cells.select import Selection
from lemon.encoders.device import choose_device
from lemon.errors import ConfigError
from lemon.pretrain.assemble import select, with_stain
from lemon.pretrain.config import MIN_CELLS, PretrainConfig
from lemon.pretrain.online_probe import OnlineProbe
from lemon.runtime.store import Store


def with_absolute_paths(config: PretrainConfig) -> PretrainConfig:
    """Paths made absolute, because workers run elsewhere. Raises ConfigError where stain statistics are no good."""
    cells, output = _store(config.cells, key="cells"), _store(config.output, key="output")
    return with_stain(config.model_copy(update={"cells": cells.uri, "output": output.uri}))


def check(config: PretrainConfig) -> tuple[PretrainConfig, Selection]:
    """The config with its paths made absolute, and its cells. Writes nothing.

    Raises:
        ConfigError: cells, statistics, labels, device or folders are not what the run needs.
        StorageError: the cache has no room.
    """
    config = with_absolute_paths(config)
    selection = select(config)
    if selection.n_cells < MIN_CELLS:
        raise ConfigError(f"cells: got {selection.n_cells}; expected {MIN_CELLS} at least, and better thousands")
    if config.probe is not None:
        OnlineProbe.open(config.probe, policy=config.views)
    if config.workers.in_process:  # others are on other machines, and report it themselves
        choose_device(config.device)
        if not is_streamed(selection, cache_gb=config.cache_gb):
            check_cache(selection, cache=config.cache, cache_gb=config.cache_gb)
    return config, selection


def _store(uri: str, *, key: str) -> Store:
    try:
        return Store(uri)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
