"""All of a run's settings that the data and this machine can refute, before anything is written."""

from __future__ import annotations

from typing import Any

from lemon.cells.batches import is_streamed
from lemon.cells.cache import bytes_in_cache, check_cache
from lemon.cells.select import Selection
from lemon.encoders.device import choose_device
from lemon.errors import ConfigError
from lemon.pretrain.assemble import select, with_stain
from lemon.pretrain.config import MIN_CELLS, PretrainConfig
from lemon.pretrain.exclude import without_benchmarks
from lemon.pretrain.online_probe import labelled_task
from lemon.runtime.store import Store


def with_absolute_paths(config: PretrainConfig) -> PretrainConfig:
    """Paths made absolute, because workers run elsewhere. Raises ConfigError where stain statistics are no good."""
    paths: dict[str, Any] = {key: _store(getattr(config, key), key=key).uri for key in ("cells", "output")}
    if (probe := config.probe) is not None:
        given = {key: path for key in ("cells", "labels") if (path := getattr(probe, key)) is not None}
        inside = {key: _store(path, key=f"probe.{key}").uri for key, path in given.items()}
        paths["probe"] = probe.model_copy(update=inside)
    return with_stain(config.model_copy(update=paths))


def check(config: PretrainConfig) -> tuple[PretrainConfig, Selection]:
    """The config with its paths made absolute and without patients of benchmarks, and its cells. Writes nothing.

    Raises:
        ConfigError: cells, statistics, labels, device or folders are not what the run needs.
        StorageError: the cache has no room.
    """
    config = without_benchmarks(with_absolute_paths(config))
    selection = select(config)
    if selection.n_cells < MIN_CELLS:
        raise ConfigError(f"cells: got {selection.n_cells}; expected {MIN_CELLS} at least, and better thousands")
    if config.field_um is not None and is_streamed(selection, cache_gb=config.cache_gb):
        got, needed = config.cache_gb, bytes_in_cache(selection) / 1e9
        raise ConfigError(
            f"cache_gb: got {got:g}; expected {needed:.3g} at least with field_um: fields are cut into the cache, once"
        )
    if config.probe is not None and config.probe.labels is not None:
        labelled_task(config)
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
