"""Weights stored as int8: small, near the originals, and never taken for numbers of another kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lemon.encoders.config import LEMON_MEAN, LEMON_STD, EncoderConfig
from lemon.encoders.export import CellInput, export_encoder, load_exported
from lemon.encoders.int8 import SCALE, dequantise, quantise
from lemon.encoders.vit import build_vit
from lemon.errors import ConfigError

INPUT = CellInput(mean=LEMON_MEAN, std=LEMON_STD)


@given(
    st.integers(2, 9), st.integers(1, 9), st.floats(-12, 12), st.integers(0, 2**31 - 1), st.sampled_from([(), (2, 2)])
)
def test_a_value_is_off_by_half_a_step_of_its_row_at_most(
    rows: int, columns: int, exponent: float, seed: int, tail: tuple[int, ...]
) -> None:
    value = torch.randn(rows, columns, *tail, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    value[0] = 0  # a row of nothing stays one
    back = dequantise(quantise({"w": value}), source="here")["w"]
    step = value.flatten(1).abs().amax(1) / 127
    assert ((back - value).flatten(1).abs().amax(1) <= step * 0.501).all()
    assert not back[0].any()


def test_other_state_dicts_are_as_they_were() -> None:
    weights = {"a": torch.rand(3, 2), "b": torch.arange(4), "c": torch.rand(5, dtype=torch.float16)}
    back = dequantise(weights, source="here")
    assert all(back[name] is value for name, value in weights.items())


@pytest.mark.parametrize("scale", [None, torch.ones(2)])
def test_int8_without_its_scales_is_one_line(scale: torch.Tensor | None) -> None:
    stored = quantise({"w": torch.rand(3, 2)})
    del stored["w" + SCALE]
    if scale is not None:
        stored["w" + SCALE] = scale
    with pytest.raises(ConfigError, match=r"^model: w is int8 without a scale for each row"):
        dequantise(stored, source="model")


def test_an_export_in_int8_has_a_quarter_of_the_size_and_nearly_the_same_embeddings(tmp_path: Path) -> None:
    encoder = build_vit(EncoderConfig(name="tiny", dim=192, depth=3, heads=3)).eval()
    sizes = {}
    for int8 in (False, True):
        export_encoder(encoder, tmp_path / str(int8), cell_input=INPUT, int8=int8)
        sizes[int8] = (tmp_path / str(int8) / "model.safetensors").stat().st_size
    assert sizes[True] < 0.27 * sizes[False]
    opened, cell_input = load_exported(tmp_path / "True")
    assert cell_input == INPUT
    images = torch.randn(8, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        alike = torch.cosine_similarity(opened(images), encoder(images))
    assert alike.min() > 0.999
