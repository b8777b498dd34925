"""The page of groups: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from PIL import Image

from lemon.cells.morphometry import MEASURES
from lemon.describe.cells import DescribedCells
from lemon.describe.effects import Effect
from lemon.runtime.secrets import redacted
from lemon.runtime.store import Store

if TYPE_CHECKING:
    from lemon.describe.job import Group

SHOWN = 6
"""Measures that are shown of a group; the table at the top has all."""

JPEG_QUALITY = 80

_SIGNS = {"um2": "µm²", "um": "µm", "OD/um": "OD/µm", "1/mm2": "/mm²"}
"""Units as a person writes them; columns have them in ASCII."""

_ASSETS = Path(__file__).resolve().parent / "assets"

# Orange for more and blue for less, as light as the effect is small: told apart without red and green.
_MORE, _LESS = np.array([176, 86, 0]), np.array([33, 102, 172])


def write_page(store: Store, groups: Sequence[Group], cells: DescribedCells, *, title: str) -> int:
    """Write describe.html; returns its size in bytes."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True, trim_blocks=True)
    n_slides = len(cells.selection.parts)
    page = environment.get_template("page.html").render(
        title=redacted(title),
        n_cells=len(cells.groups),
        n_slides=n_slides,
        model=redacted(cells.model),
        notes=cells.notes,
        style=(_ASSETS / "style.css").read_text(encoding="utf-8"),
        groups=[_group(group, len(cells.groups)) for group in groups],
        measures=[
            {
                "measure": measure,
                "unit": _SIGNS.get(measure.unit, measure.unit),
                "cells": _row(measure.column, groups),
            }
            for measure in MEASURES
        ],
    )
    content = page.encode(errors="replace")
    store.write_bytes("describe.html", content)
    return len(content)


def _group(group: Group, total: int) -> dict[str, Any]:
    return {
        "name": group.name,
        "n": group.n_cells,
        "share": group.n_cells / total,
        "images": [_data_uri(image) for image in group.images],
        "effects": [_effect(effect) for effect in group.effects[:SHOWN]],
    }


def _effect(effect: Effect) -> dict[str, Any]:
    side = abs(effect.delta) * 50
    return {
        "measure": effect.measure,
        "unit": _SIGNS.get(effect.measure.unit, effect.measure.unit),
        "delta": effect.delta,
        "left": 50 - side if effect.delta < 0 else 50,
        "width": side,
        "color": _color(np.sign(effect.delta)),
        "median": _number(effect.median),
        "others": _number(effect.others),
        "slides": f"{effect.n_agree} of {effect.n_slides}" if effect.n_slides > 1 else "",
    }


def _row(column: str, groups: Sequence[Group]) -> list[dict[str, Any] | None]:
    """The effects of one measure in all groups."""
    return [
        next(
            (
                {"delta": effect.delta, "ground": _color(effect.delta), "dark": abs(effect.delta) > 0.85}
                for effect in group.effects
                if effect.measure.column == column
            ),
            None,
        )
        for group in groups
    ]


def _color(delta: float) -> str:
    strength = min(abs(float(delta)), 1)
    color = 255 + ((_MORE if delta > 0 else _LESS) - 255) * strength
    return "#{:02x}{:02x}{:02x}".format(*np.round(color).astype(int).tolist())


def _number(value: float) -> str:
    """Three digits, without an exponent for what measures have."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _data_uri(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
