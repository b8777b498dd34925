from __future__ import annotations

import numpy as np
import pytest
import torch

from lemon.nuclei.training.images import Labelled
from lemon.nuclei.training.loss import HoverFastLoss, class_weights, gradient_kernel
from lemon.nuclei.training.targets import Targets, make_targets
from lemon.nuclei.training.windows import whole
from tests.nuclei.training.made_up import blobs


def perfect(instances: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Outputs that say exactly what the targets say."""
    targets = make_targets(whole(Labelled("", "", np.zeros((*instances.shape, 3), np.uint8), instances)))
    logits = 40.0 * (torch.stack((1 - targets.mask, targets.mask), dim=1) - 0.5)
    return logits, targets.hv_maps.clone(), targets


def test_every_term_vanishes_at_the_targets_and_only_there() -> None:
    logits, hv_maps, targets = perfect(blobs())
    criterion = HoverFastLoss((0.3, 0.7))
    assert all(abs(term.item()) < 1e-4 for term in criterion(logits, hv_maps, targets).values())
    noise = torch.randn(hv_maps.shape, generator=torch.Generator().manual_seed(0))
    worse = criterion(-logits, hv_maps + 0.1 * noise, targets)
    assert all(term.item() > 1e-2 for name, term in worse.items() if name != "gradients")
    assert worse["gradients"].item() > 1e-4


def test_the_maps_of_cut_nuclei_do_not_count() -> None:
    logits, hv_maps, targets = perfect(blobs())
    hv_maps[:, :, targets.map_weight[0] == 0] = 5.0
    assert HoverFastLoss((0.5, 0.5))(logits, hv_maps, targets)["maps"].item() == 0


def test_the_terms_have_the_published_weights() -> None:
    instances = np.zeros((16, 16), np.int32)
    instances[4:12, 4:12] = 1
    _, hv_maps, targets = perfect(instances)
    terms = HoverFastLoss((1.0, 1.0))(torch.zeros(1, 2, 16, 16), hv_maps + 1, targets)
    assert terms["maps"].item() == pytest.approx(14.0)
    edges = targets.edge.float().mean().item()
    assert terms["cross_entropy"].item() == pytest.approx(np.log(2) * (1 + 0.1 * edges))
    overlap, truth, said = 0.5 * 64, 64, 0.5 * 256
    assert terms["dice"].item() == pytest.approx((1 - 2 * overlap / (truth + said)) / 6, rel=1e-4)


def test_the_gradient_kernel_is_odd_along_its_axis() -> None:
    kernel = gradient_kernel(11)
    assert kernel.shape == (11, 11)
    assert torch.equal(kernel.flip(1), -kernel)
    assert torch.equal(kernel.flip(0), kernel)
    assert kernel[5, 6] == 1
    assert kernel[6, 6] == 0.5


def test_class_weights_are_inverse_frequencies() -> None:
    assert class_weights(0.25) == (0.25, 0.75)
    for nothing in (0.0, 1.0):
        with pytest.raises(ValueError, match="nuclei and background"):
            class_weights(nothing)
