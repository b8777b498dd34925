"""One worker's training of the segmenter, from labelled images to weights and their card. No Ray in here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lemon.errors import ConfigError
from lemon.nuclei.hoverfast import Architecture, HoverFastNet, load_checkpoint, save_half
from lemon.nuclei.open import load_segmenter, segment
from lemon.nuclei.scores import labels_of
from lemon.nuclei.training.blocked import use_blocks
from lemon.nuclei.training.check import Check, check, middles, picture
from lemon.nuclei.training.images import IMAGE_SUFFIXES, Labelled, split
from lemon.nuclei.training.layouts import read_folder
from lemon.nuclei.training.loop import Log, Recipe, SegmenterTrainer, TrainingStoppedError
from lemon.nuclei.training.loss import HoverFastLoss, class_weights
from lemon.nuclei.training.windows import Bank
from lemon.pretrain.checkpoint import Checkpoints
from lemon.runtime.store import Store, code_version, file_fingerprint
from lemon.slides.images import read_image
from lemon.train_segmenter.config import TrainSegmenterConfig

WEIGHTS, CARD = "segmenter.safetensors", "README.md"
LogFile = Callable[[str, bytes], None]


def read_images(config: TrainSegmenterConfig) -> list[Labelled]:
    """All images of a config, at 0.25 um/px. Raises ConfigError, one line, for what cannot be read."""
    try:
        if config.teacher is not None:
            return [image for folder in config.data for image in _taught(Path(folder), config.teacher)]
        return [
            image
            for folder in config.data
            for image in read_folder(folder, mpp=config.mpp.get(Path(folder).name, 0.25))
        ]
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None


def _taught(folder: Path, teacher: str) -> list[Labelled]:
    """Images of a folder with what another segmenter finds in them."""
    segmenter = load_segmenter(teacher)
    images: list[Labelled] = []
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES):
        pixels = read_image(file)
        found = segment(pixels, segmenter=segmenter)
        images.append(Labelled(folder.name, file.stem, pixels, labels_of(found, shape=pixels.shape[:2])))
    return images


def digest_of(images: Sequence[Labelled]) -> str:
    """What tells one set of labelled images from another."""
    content = hashlib.sha256()
    for image in images:
        content.update(f"{image.source}/{image.name}/{image.instances.shape}".encode())
        content.update(image.image.tobytes() + image.instances.tobytes())
    return content.hexdigest()[:16]


def train(
    config: TrainSegmenterConfig,
    images: Sequence[Labelled],
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    log: Log | None = None,
    log_file: LogFile | None = None,
) -> None:
    """Train to the end, from the newest checkpoint where there is one; write weights and card.

    Raises TrainingStoppedError, also where the output cannot be written, and ConfigError for images without nuclei.
    """
    kept, held_out = split(images, held_out_share=config.held_out_share)
    shown = middles(held_out, side_px=config.checked_px)
    trainer = _trainer(config, kept, device=device, rank=rank, world=world, log=log)
    store = Store(config.output)
    checkpoints = Checkpoints(store, keep=config.keep_checkpoints)
    state, _ = checkpoints.newest(device=device)
    if state is not None:
        trainer.load_state(state)
    try:
        while trainer.step < config.steps:
            trainer.run(until=min(config.steps, (trainer.step // config.check_every + 1) * config.check_every))
            if rank == 0:
                checkpoints.save(trainer.state(), step=trainer.step)
                _tell(check(trainer.averaged.eval(), shown), trainer.step, log=log, log_file=log_file)
        if rank == 0:
            _export(trainer.averaged.eval(), config, store, kept=kept, checked=check(trainer.averaged, shown))
    except OSError as error:
        raise TrainingStoppedError(f"storage failed at step {trainer.step}: {error}; rerun goes on") from None


def _trainer(
    config: TrainSegmenterConfig,
    images: Sequence[Labelled],
    *,
    device: torch.device,
    rank: int,
    world: int,
    log: Log | None,
) -> SegmenterTrainer:
    try:
        bank = Bank.of(images, device=device, odds=config.odds)
        criterion = HoverFastLoss(class_weights(bank.nucleus_share()), balanced=False).to(device)
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None
    torch.manual_seed(config.seed)
    net = HoverFastNet(Architecture(wf=config.width.bit_length() - 1))
    if config.start is not None:
        try:
            net = load_checkpoint(config.start)
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(f"start: {error}") from None
    net = net.to(device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        use_blocks(net, max_channels=16)
    recipe = Recipe(
        steps=config.steps,
        batch=config.batch // world,
        window_px=config.window_px,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        average=config.average,
        bf16=config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda"),
        seed=config.seed,
    )
    return SegmenterTrainer(net, bank, recipe, criterion, rank=rank, world=world, log=log, log_every=config.log_every)


def _tell(checked: Check, step: int, *, log: Log | None, log_file: LogFile | None) -> None:
    if log is not None and checked.figures:
        log({f"{name}/{s}": value for s, row in checked.figures.items() for name, value in row.items()}, step)
    if log_file is not None and checked.worst:
        log_file(f"worst/step-{step:08d}.png", picture(checked.worst))


def _export(
    net: HoverFastNet, config: TrainSegmenterConfig, store: Store, *, kept: Sequence[Labelled], checked: Check
) -> None:
    with store.write_path(WEIGHTS) as path:
        save_half(net, path)
        digest = file_fingerprint(path)
    sources = dict.fromkeys(image.source for image in kept)
    rows = [
        f"| {source} | {sum(image.source == source for image in kept)} | {config.odds.get(source, 1.0):g} | "
        + " | ".join(
            f"{checked.figures[source][name]:.3f}" if source in checked.figures else "" for name in ("f1", "pq")
        )
        + " |"
        for source in sources
    ]
    settings = "\n".join(f"- {key}: {value}" for key, value in config.result_settings().items())
    card = f"""# HoverFast's network, trained by `lemon train-segmenter`

`segmenter=hoverfast segmenter.checkpoint={WEIGHTS}`; fingerprint `{digest}`; code {code_version()}.

The terms of the images hold for the weights too: write down here which they are before passing them on.

| source | images learned from | odds of a window | F1 within 3 um, held out | PQ, held out |
|---|---|---|---|---|
{chr(10).join(rows)}

Held-out images: share {config.held_out_share:g} of each source, their middle of {config.checked_px} px.

{settings}
"""
    store.write_bytes(CARD, card.encode())
