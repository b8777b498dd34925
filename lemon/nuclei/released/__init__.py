"""Weights that come with LEMON; each lies beside a card that says what they were trained on and how good they are."""

from __future__ import annotations

from pathlib import Path

_HOVERFAST = Path(__file__).with_name("hoverfast_lemon") / "model.safetensors"


def weights_path(checkpoint: str | None) -> str:
    """The file that ``segmenter.checkpoint`` names; None is HoverFast's network as LEMON trained it."""
    return str(_HOVERFAST) if checkpoint is None else checkpoint
