"""How long pretraining takes and what a checkpoint holds, before anything is built. Imports no torch.

``rates.csv`` beside this file has the rates that were measured, each with its device, date and source; a checkpoint's
size and the rates of other encoders are arithmetic.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lemon.encoders.config import VIT_B8, VIT_MINI8, VIT_S8, VIT_TINY8, EncoderConfig
from lemon.pretrain.config import METHODS, MethodConfig, PretrainConfig

ENCODERS = {each.name: each for each in (VIT_B8, VIT_MINI8, VIT_S8, VIT_TINY8)}


class Rate(NamedTuple):
    """Images a second of one process on one device."""

    device: str
    images_per_s: float
    basis: str
    """What was measured, and whether arithmetic led from there to here."""

    def hours(self, images: int) -> float:
        """Of one such device."""
        return images / self.images_per_s / 3600


def rates_of(config: PretrainConfig) -> Iterator[Rate]:
    """A rate for each device on which the method was measured, with the encoder nearest in arithmetic."""
    method, local_views = config.ssl.name, _has_local_views(config.ssl)
    rows = [row for row in _rows() if (row["method"], row["local_views"] == "yes") == (method, local_views)]
    cost = image_flop(config.encoder, config.ssl)
    for device in dict.fromkeys(row["device"] for row in rows):
        ratios = {index: _row_flop(row) / cost for index, row in enumerate(rows) if row["device"] == device}
        nearest = min(ratios, key=lambda index: max(ratios[index], 1 / ratios[index]))
        row, ratio = rows[nearest], ratios[nearest]
        views = " with local views" if local_views else ""
        how = f"{row['encoder']}, {method}{views}, batch {row['batch']}, {row['date']}, {row['source']}"
        if row["encoder"] != config.encoder.name:
            how = f"arithmetic, {1 / ratio:.2g} times the work of {how}"
            # What is smaller than what was measured keeps a device less busy, so no gain is promised.
            ratio = min(ratio, 1.0)
        yield Rate(device, float(row["images_per_s"]) * ratio, how)


def image_flop(encoder: EncoderConfig, method: MethodConfig) -> float:
    """Arithmetic of two global views: student forward and backward (three forwards), teacher forward, and heads.

    A multiply-add is two. ViT-S/8 with MoCo v3 has 9.3 GFLOP.
    """
    tokens = _tokens(encoder)
    block = 2 * tokens * 12 * encoder.dim**2 + 4 * tokens**2 * encoder.dim
    student, teacher = method.head_weights(encoder)
    return 2 * (4 * encoder.depth * block + 2 * (3 * student + teacher))


def checkpoint_bytes(config: PretrainConfig) -> int:
    """Size of a checkpoint in float32: student with AdamW's two moments, and teacher."""
    encoder = config.encoder
    block = 12 * encoder.dim**2 + 13 * encoder.dim
    weights = encoder.depth * block + (3 * encoder.patch_px**2 + _tokens(encoder) + 4) * encoder.dim
    student, teacher = config.ssl.head_weights(encoder)
    return 4 * (3 * (weights + student) + weights + teacher)


def _tokens(encoder: EncoderConfig) -> int:
    return (encoder.crop_px // encoder.patch_px) ** 2 + 1


def _has_local_views(method: MethodConfig) -> bool:
    return bool(getattr(method, "local_to_global", False))


def _row_flop(row: dict[str, str]) -> float:
    method: MethodConfig = METHODS.load(row["method"])(name=row["method"])
    return image_flop(ENCODERS[row["encoder"]], method)


@cache
def _rows() -> list[dict[str, str]]:
    with Path(__file__).with_name("rates.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))
