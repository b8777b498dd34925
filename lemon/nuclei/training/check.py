"""What a network finds in held-out images: scores by source, and the images that it does worst on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from lemon.nuclei.hoverfast import HoverFastNet
from lemon.nuclei.hoverfast_device import hv_gradients, probability_of
from lemon.nuclei.levels import MIN_AREA_UM2, find_nuclei_by_level
from lemon.nuclei.scores import labels_of, scores
from lemon.nuclei.training.images import Labelled

MIN_AREA_PX = 16 * MIN_AREA_UM2["level"]  # at 0.25 um/px
SHOWN = ("f1", "pq")
IMAGES_A_SOURCE = 16
"""Of more, those that come first are looked at."""


@dataclass(frozen=True)
class Check:
    """Figures by source, means over its images, and of each source the image of lowest F1 with what was found."""

    figures: dict[str, dict[str, float]]
    worst: dict[str, tuple[Labelled, np.ndarray]]


def middles(images: Sequence[Labelled], *, side_px: int) -> list[Labelled]:
    """The middle of each image, up to ``IMAGES_A_SOURCE`` of each source."""
    chosen = []
    for source in dict.fromkeys(image.source for image in images):
        for image in [i for i in images if i.source == source][:IMAGES_A_SOURCE]:
            y, x = (max(0, (side - side_px) // 2) for side in image.instances.shape)
            box = slice(y, y + side_px), slice(x, x + side_px)
            chosen.append(Labelled(source, image.name, image.image[box], image.instances[box]))
    return chosen


def check(net: HoverFastNet, images: Sequence[Labelled]) -> Check:
    """Score a network, in evaluation mode, on images that it has not seen."""
    rows: dict[str, list[dict[str, float]]] = {}
    worst: dict[str, tuple[float, Labelled, np.ndarray]] = {}
    for image in images:
        found = found_by(net, image.image)
        row = scores(found, image.instances)
        rows.setdefault(image.source, []).append(row)
        if image.source not in worst or row["f1"] < worst[image.source][0]:
            worst[image.source] = row["f1"], image, found
    figures = {s: {name: float(np.mean([r[name] for r in of])) for name in SHOWN} for s, of in rows.items()}
    return Check(figures, {source: (image, found) for source, (_, image, found) in worst.items()})


@torch.inference_mode()
def found_by(net: HoverFastNet, image: np.ndarray) -> np.ndarray:
    """Instance map int32 [H, W] that a network gives for an image uint8 [H, W, 3], on the network's device."""
    device = next(net.parameters()).device
    pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)[None] / 255
    logits, maps = net(pixels)
    probability, gradients = probability_of(logits)[0].cpu().numpy(), hv_gradients(maps)[0].cpu().numpy()
    nuclei = find_nuclei_by_level(probability, gradients, min_area_px=MIN_AREA_PX)
    return labels_of(nuclei, shape=probability.shape)


def picture(worst: dict[str, tuple[Labelled, np.ndarray]]) -> bytes:
    """PNG of images one below the other: as they are, and with outlines, drawn nuclei green and found ones red."""
    rows = []
    for source, (image, found) in worst.items():
        outlined = image.image.copy()
        for labels, colour in ((image.instances, (0, 200, 0)), (found, (255, 0, 0))):
            inner = cv2.erode(labels.astype(np.float32), np.ones((3, 3), np.uint8))
            outlined[(labels > 0) & (inner != labels)] = colour
        pair = np.hstack([image.image, outlined])
        cv2.putText(pair, f"{source} {image.name}", (5, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1)
        rows.append(pair)
    widest = max(row.shape[1] for row in rows)
    filled = [np.pad(row, ((0, 4), (0, widest - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return cv2.imencode(".png", np.vstack(filled)[..., ::-1])[1].tobytes()
