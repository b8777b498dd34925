"""What the tests of views share: cells (real crops where the reference data is there, else synthetic) and draws."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lemon.schema import VIEW_PX
from lemon.views.draws import ViewParameters, draw_view_parameters
from lemon.views.policy import ViewRecipe
from tests.conftest import SHARED

HEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)
GOLDEN = SHARED / "golden" / "randstainna.npz"
CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def draw(recipe: ViewRecipe, count: int, *, seed: int = 0, size_px: int = VIEW_PX) -> ViewParameters:
    """Parameters of ``count`` views on the CPU."""
    return draw_view_parameters(recipe, count=count, size_px=size_px, generator=seeded(seed), device=CPU)


def stained_cells(count: int) -> torch.Tensor:
    """[count, 60, 60, 3] uint8 crops of H&E."""
    if GOLDEN.exists():
        crops = np.load(GOLDEN)["crops_rgb"]
        return torch.from_numpy(crops[np.arange(count) % len(crops)])
    return torch.from_numpy(synthetic_cells(count, seed=0))


def synthetic_cells(count: int, *, seed: int) -> NDArray[np.uint8]:
    """Dark elliptic nuclei on an eosin background with texture, by the law of Beer and Lambert."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:60, :60] - 29.5
    cells = np.empty((count, 60, 60, 3), dtype=np.uint8)
    for cell in cells:
        radius = rng.uniform(9, 16, size=2)
        inside = 1 / (1 + np.exp(4 * (np.hypot(x / radius[0], y / radius[1]) - 1)))
        texture = rng.normal(1, 0.15, size=(60, 60))
        hematoxylin = (0.1 + rng.uniform(0.8, 1.4) * inside) * texture
        eosin = rng.uniform(0.3, 0.6) * rng.normal(1, 0.1, size=(60, 60))
        density = hematoxylin[..., None] * HEMATOXYLIN + eosin[..., None] * EOSIN
        cell[:] = np.clip(240 * np.exp(-np.clip(density, 0, None)), 0, 255).round()
    return cells
