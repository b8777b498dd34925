"""One training of the segmenter, from labelled images to weights on disk: what the job runs on each worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lemon.nuclei.hoverfast import Architecture, HoverFastNet, save_half
from lemon.nuclei.training.blocked import use_blocks
from lemon.nuclei.training.images import Labelled, split
from lemon.nuclei.training.loop import Log, Recipe, SegmenterTrainer
from lemon.nuclei.training.loss import HoverFastLoss, class_weights
from lemon.nuclei.training.targets import make_targets
from lemon.nuclei.training.windows import Bank, draw

WEIGHTS = "segmenter.safetensors"
Checks = Callable[[HoverFastNet], dict[str, dict[str, float]]]
OnPause = Callable[[int, Mapping[str, Mapping[str, float]]], None]


def train(
    images: Sequence[Labelled],
    *,
    recipe: Recipe,
    out: Path,
    device: torch.device | str,
    architecture: Architecture | None = None,
    odds: Mapping[str, float] | None = None,
    held_out_share: float = 0.15,
    pauses: Sequence[float] = (0.5, 0.8, 1.0),
    log: Log | None = None,
    on_pause: OnPause | None = None,
) -> HoverFastNet:
    """Train a network and keep its averaged weights as ``out / WEIGHTS``, anew at each pause.

    The cross-entropy is not weighted by class (see ``HoverFastLoss``).

    Args:
        images: labelled images of any sources.
        recipe: how.
        out: folder, made where absent.
        device: where images and network stay.
        architecture: the published one by default.
        odds: of the sources, see ``Bank.of``.
        held_out_share: see ``split``; images held out are never learned from.
        pauses: shares of the run after which weights are kept and the held-out images looked at, ascending to 1.
        log: of the training loss.
        on_pause: (step, terms of the loss and dice by source of held-out images), called at each pause.

    Raises ValueError for no images, or none with nuclei and background; TrainingStoppedError as ``Trainer.run``.
    """
    device = torch.device(device)
    kept, held_out = split(images, held_out_share=held_out_share)
    bank = Bank.of(kept, device=device, odds=odds)
    criterion = HoverFastLoss(class_weights(bank.nucleus_share()), balanced=False).to(device)
    check = held_out_checks(held_out, criterion=criterion, recipe=recipe, device=device)
    torch.manual_seed(recipe.seed)
    net = HoverFastNet(architecture or Architecture()).to(device)
    trainer = SegmenterTrainer(net, bank, recipe, criterion, log=log)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        use_blocks(net, max_channels=16)
    out.mkdir(parents=True, exist_ok=True)
    for pause in pauses:
        trainer.run(pause=pause)
        _keep(trainer.averaged, out / WEIGHTS)
        if on_pause is not None:
            on_pause(trainer.step, check(trainer.averaged))
    return trainer.averaged.eval()


def _keep(net: HoverFastNet, path: Path) -> None:
    """Weights that are whole at every moment: a run may be cut off while it writes."""
    part = path.with_name(path.name + ".part")
    save_half(net, part)
    part.replace(path)


def held_out_checks(
    images: Sequence[Labelled], *, criterion: HoverFastLoss, recipe: Recipe, device: torch.device
) -> Checks:
    """What measures a network by source: terms of the loss, and ``dice_hard`` of its mask at one half.

    Always of the same windows, one batch a source, upright and as they are.
    """
    generator = torch.Generator(device=device)
    sources = dict.fromkeys(image.source for image in images)
    banks = {s: Bank.of([i for i in images if i.source == s], device=device) for s in sources}
    windows = {
        source: draw(
            bank, batch=recipe.batch, size_px=recipe.window_px, geometry=None, generator=generator.manual_seed(1)
        )
        for source, bank in banks.items()
    }
    targets = {source: make_targets(w) for source, w in windows.items()}

    @torch.no_grad()
    def check(net: HoverFastNet) -> dict[str, dict[str, float]]:
        net.eval()
        rows = {}
        for source, drawn in windows.items():
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                logits, hv_maps = net(drawn.images.contiguous(memory_format=torch.channels_last))
            terms = criterion(logits, hv_maps, targets[source])
            terms["dice_hard"] = _dice(logits.argmax(1).bool(), targets[source].mask.bool())
            rows[source] = {name: float(value) for name, value in terms.items()}
        return rows

    return check


def _dice(found: Tensor, drawn: Tensor) -> Tensor:
    return 2 * (found & drawn).sum() / (found.sum() + drawn.sum()).clamp(min=1)
