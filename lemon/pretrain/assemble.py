"""From a config to a worker that trains: cells, method, views and checkpoints put together. No Ray in here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import torch

from lemon.cells.batches import Feed, is_streamed, open_images
from lemon.cells.images import read_images, sample_images
from lemon.cells.select import Selection, select_cells
from lemon.encoders.export import CellInput, NotFiniteError, export_encoder
from lemon.errors import ConfigError
from lemon.pretrain.checkpoint import Checkpoints
from lemon.pretrain.config import FitStainConfig, PretrainConfig
from lemon.pretrain.loop import Log, Trainer, TrainingStoppedError
from lemon.pretrain.online_probe import OnlineProbe
from lemon.runtime.store import Store, code_version, fingerprint, path_exists
from lemon.schema import CELL_BYTES, CELL_MPP, VIEW_PX
from lemon.views.make import statistics_of
from lemon.views.stain import fit_stain_statistics, statistics_name

WATCHED_CELLS = 512  # cells on which the effective rank is taken
EXPORT = "encoder"
_RESIDENT_SHARE = 0.4  # of the device's free memory that images may take


def select(config: PretrainConfig) -> Selection:
    """The cells that a config names, with the images that it asks for. Raises ConfigError."""
    selection = select_cells(Store(config.cells), **config.select.model_dump())
    if config.field_um is None:
        return selection
    from lemon.cells.fields import with_fields  # opens slides, which training without fields does not need

    return with_fields(selection, um=config.field_um)


def fit_stain(config: FitStainConfig) -> tuple[str, int]:
    """Fit stain statistics to a table; returns the file that holds them and the number of cells that were looked at.

    Raises ConfigError.
    """
    selection = select_cells(Store(config.cells), n_cells=config.n_cells)
    images = torch.from_numpy(read_images(selection))
    try:
        statistics = fit_stain_statistics(images, space=config.space, components=config.components, seed=config.seed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    path = f"{selection.store.uri}/{statistics.file_name}"
    replace(statistics, cells=select_cells(selection.store).fingerprint).save(path)
    return path, len(images)


def with_stain(config: PretrainConfig) -> PretrainConfig:
    """The config with the statistics that its views need: those beside the cells, unless it names a file.

    Raises ConfigError where they are missing, damaged, of another mixture, or of cells that the table had before.
    """
    stain, cells = config.views.stain, Store(config.cells)
    if stain.kind != "gmm":
        return config
    path = stain.statistics or f"{cells.uri}/{statistics_name(stain.space, stain.components)}"
    remedy = f"lemon fit-stain cells={config.cells} space={stain.space} components={stain.components}"
    if not path_exists(path):
        raise ConfigError(f"views.stain.statistics: {path} not found; make it with: {remedy}")
    located = config.views.with_stain_statistics(path)
    try:
        statistics = statistics_of(located.stain)
    except ValueError as error:
        raise ConfigError(f"views.{error}") from None
    if stain.statistics is None and statistics.cells not in ("", select_cells(cells).fingerprint):
        raise ConfigError(f"views.stain.statistics: {path} is of other cells than the table has now; again: {remedy}")
    return config.model_copy(update={"views": located})


def build_trainer(
    config: PretrainConfig, *, device: torch.device, rank: int = 0, world: int = 1, log: Log | None = None
) -> Trainer:
    """One worker, at the start of its run (``resume`` takes it to its newest checkpoint)."""
    selection = select(config)
    images, order = open_images(
        selection, cache=config.cache, cache_gb=config.cache_gb, seed=config.seed, batch=config.batch
    )
    method = config.ssl.build(config.encoder, seed=config.seed).to(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # what stays float32 (prototypes) may use TF32
    resident = not is_streamed(selection, cache_gb=config.cache_gb) and _fits(selection, device)
    feed = Feed(images, order, batch=config.batch, device=device, rank=rank, world=world, resident=resident)
    return Trainer(
        method=method,
        feed=feed,
        policy=config.views,
        schedules=method.schedules(epochs=config.epochs, steps_per_epoch=config.steps_per_epoch, batch=config.batch),
        seed=config.seed,
        checkpoints=Checkpoints(Store(config.output), keep=config.keep_checkpoints),
        config=config.model_dump(mode="json"),
        log=log,
        probe=OnlineProbe.open(config) if rank == 0 else None,
        watched=sample_images(selection, count=WATCHED_CELLS),
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        bf16=config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda"),
        compiled=config.compile if config.compile is not None else device.type == "cuda",
    )


def train(
    config: PretrainConfig,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    log: Log | None = None,
    on_checkpoint: Callable[[int], None] | None = None,
) -> None:
    """Train to the end, from the newest checkpoint where there is one, and export the encoder.

    Raises TrainingStoppedError, also where the cache, checkpoints or the encoder cannot be written, and ConfigError.
    """
    step = 0
    try:
        trainer = build_trainer(config, device=device, rank=rank, world=world, log=log)
        with closing(trainer.feed):
            step = trainer.resume()
            try:
                trainer.run(on_checkpoint=on_checkpoint)
                if rank == 0:
                    export(trainer, config)
            finally:
                step = trainer.step
    except OSError as error:
        raise TrainingStoppedError(f"storage failed at step {step}: {error}; rerun goes on") from None
    except NotFiniteError as error:
        raise TrainingStoppedError(f"nothing is exported: {error}") from None


def export(trainer: Trainer, config: PretrainConfig) -> None:
    """Write the encoder to ``<output>/encoder`` in timm's layout."""
    settings = config.result_settings()
    facts = {
        "name": config.encoder.name,
        "ssl": config.ssl.label,
        "views": config.views.name,
        "steps": trainer.step,
        "config_fingerprint": fingerprint(settings),
        "code_version": code_version(),
    }
    views = config.views
    um_per_px = CELL_MPP if config.field_um is None else config.field_um / VIEW_PX
    cell_input = CellInput(mean=views.mean, std=views.std, um_per_px=um_per_px, crop_px=config.encoder.crop_px)
    folder = f"{trainer.checkpoints.store.uri}/{EXPORT}"
    export_encoder(trainer.method.exported, folder, cell_input=cell_input, facts=facts)


def _fits(selection: Selection, device: torch.device) -> bool:
    """Whether all images can stay on a GPU; to a CPU they come from the cache as fast."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return selection.n_cells * CELL_BYTES < _RESIDENT_SHARE * free
