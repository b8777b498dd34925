"""The picture of every policy on the same cells (the paper's Figure 5)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from lemon.schema import CELL_PX, VIEW_PX
from lemon.views.make import make_views
from lemon.views.policy import Policy


def draw_gallery(
    images_u8: torch.Tensor, *, policies: Sequence[Policy], path: str | os.PathLike[str], seed: int, dpi: int = 150
) -> None:
    """Draw one row a policy: for each cell the crop that the encoder sees without augmentation, view A and view B.

    All policies start from the same seed, so operations that they share get the same parameters.

    Args:
        images_u8: [N, 60, 60, 3] uint8 RGB; about 4 to 8 cells fit a page.
        policies: the rows, from top to bottom; gmm policies with their statistics.
        path: the picture, by its ending PNG, PDF or SVG; folders are made.
        seed: of every row's generator.
        dpi: dots per inch of a PNG.

    Raises:
        ValueError: for no policies, and as ``make_views``.
    """
    from matplotlib.figure import Figure

    if not policies:
        raise ValueError("policies: got none; expected at least one view policy")
    cells, rows = len(images_u8), len(policies)
    figure = Figure(figsize=(1.1 + 1.75 * cells, 0.5 + 0.62 * rows), dpi=dpi)
    grid = figure.add_gridspec(rows, 4 * cells, width_ratios=[1, 1, 1, 0.15] * cells, wspace=0.03, hspace=0.06)
    for row, policy in enumerate(policies):
        generator = torch.Generator(device=images_u8.device).manual_seed(seed)
        views = make_views(images_u8, policy=policy, generator=generator)
        pictures = [_centre(images_u8), *(_shown(view, policy=policy) for view in views)]
        for cell in range(cells):
            for column, (title, picture) in enumerate(zip(("cell", "A", "B"), pictures, strict=True)):
                axes = figure.add_subplot(grid[row, 4 * cell + column])
                axes.imshow(picture[cell].numpy(), interpolation="nearest")
                axes.set(xticks=[], yticks=[], title=title if row == 0 else None)
                axes.title.set_fontsize(7)
                axes.spines[:].set_linewidth(0.3)
                if cell == column == 0:
                    axes.set_ylabel(policy.name, rotation=0, ha="right", va="center", fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")


def _centre(images_u8: torch.Tensor) -> torch.Tensor:
    margin = (CELL_PX - VIEW_PX) // 2
    return images_u8[:, margin:-margin, margin:-margin].cpu()


def _shown(view: torch.Tensor, *, policy: Policy) -> torch.Tensor:
    """A normalised view as a picture: [N, 3, s, s] float -> [N, s, s, 3] in [0, 1]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (policy.mean, policy.std))
    return (view.cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
