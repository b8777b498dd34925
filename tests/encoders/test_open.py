"""Paths win over names; cells are cropped, resized and normalised as each encoder expects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import lemon
from lemon.encoders.config import LEMON_MEAN, LEMON_STD, EncoderConfig
from lemon.encoders.export import CellInput, export_encoder, load_exported
from lemon.encoders.features import default_batch, encode_cells, resize
from lemon.encoders.open import RELEASED, Encoder, cell_input_of, load_encoder, untrained_twin
from lemon.encoders.registry import find_entry
from lemon.encoders.vit import build_vit, seeded
from lemon.errors import ConfigError

TINY = EncoderConfig(name="tiny", dim=32, depth=2, heads=4)
INPUT = CellInput(mean=LEMON_MEAN, std=LEMON_STD)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def cells(n: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 60, 60, 3), dtype=torch.uint8, generator=generator)


def exported(folder: Path) -> nn.Module:
    with seeded(0):
        vit = build_vit(TINY).eval()
    export_encoder(vit, folder, cell_input=INPUT)
    return vit


def test_a_run_and_its_encoder_folder_open_by_path(tmp_path: Path) -> None:
    vit = exported(tmp_path / "run" / "encoder")
    opened = lemon.load_encoder(tmp_path / "run")
    assert (opened.name, opened.width) == ("run", 32)
    normalised = (cells()[:, 10:50, 10:50].permute(0, 3, 1, 2) / 255 - column(LEMON_MEAN)) / column(LEMON_STD)
    with torch.inference_mode():
        torch.testing.assert_close(opened.embed(cells()), vit(normalised))
    assert load_encoder(str(tmp_path / "run" / "encoder")).fingerprint == opened.fingerprint


def test_an_untrained_twin_has_the_shape_and_input_and_the_same_random_weights_for_all_of_one_shape(
    tmp_path: Path,
) -> None:
    exported(tmp_path / "run")
    trained = load_encoder(tmp_path / "run")
    with torch.no_grad():
        for weights in trained.model.parameters():
            weights.mul_(1.1)
    twin = untrained_twin(trained)
    assert twin is not None
    assert (twin.name, twin.cell_input) == ("untrained_vit_32x2", INPUT)
    shapes = [{key: value.shape for key, value in each.model.state_dict().items()} for each in (trained, twin)]
    assert shapes[0] == shapes[1]
    assert twin.fingerprint != trained.fingerprint
    with seeded(0):
        expected = build_vit(TINY).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in twin.model.state_dict().items())
    assert untrained_twin(twin) is None  # it is its own
    assert untrained_twin(Encoder(nn.Conv2d(3, 8, 8), INPUT, name="foreign")) is None


def test_a_folder_written_before_encoders_could_resize_still_opens(tmp_path: Path) -> None:
    exported(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["lemon"]["input_px"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_exported(tmp_path)[1] == INPUT


def test_a_path_that_holds_an_encoder_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exported(tmp_path / "untrained_vit_s8")
    assert load_encoder("untrained_vit_s8").width == 32
    (tmp_path / "untrained_vit_tiny8").mkdir()  # as lemon/ in a checkout: a name, but no encoder
    assert load_encoder("untrained_vit_tiny8").width == 192


def test_weights_that_are_not_finite_are_not_opened(tmp_path: Path) -> None:
    exported(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weights["blocks.1.mlp.fc1.weight"][0, 0] = float("inf")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of \d+ tensors hold values that are not finite \(blocks\.1\.mlp"):
        load_encoder(tmp_path)


def test_what_is_no_encoder_is_one_line(tmp_path: Path) -> None:
    for given in (tmp_path, tmp_path / "absent", "resnet19"):
        with pytest.raises(ConfigError, match=r"expected the output of lemon pretrain") as told:
            load_encoder(given)
        assert "\n" not in str(told.value)


def test_an_untrained_encoder_opens_with_the_same_fingerprint_twice() -> None:
    first, second = load_encoder("untrained_vit_tiny8"), load_encoder("untrained_vit_tiny8", device="cpu")
    assert first.fingerprint == second.fingerprint
    assert first.cell_input == INPUT
    assert first.embed(cells().numpy()).shape == (5, 192)


def test_the_fingerprint_changes_with_the_input() -> None:
    vit = build_vit(TINY)
    prints = {Encoder(vit, CellInput(LEMON_MEAN, LEMON_STD, input_px=px), name="x").fingerprint for px in (None, 224)}
    assert len(prints) == 2


def test_each_encoder_states_what_it_sees() -> None:
    assert cell_input_of(find_entry("lemon")).input_px is None
    assert cell_input_of(find_entry("volta")).input_px == 32
    assert cell_input_of(find_entry("uni2-h")).px == 224
    assert cell_input_of(find_entry("h-optimus-1")).mean == (0.707223, 0.578729, 0.703617)
    assert cell_input_of(find_entry("midnight")).std == (0.5, 0.5, 0.5)


# --- resizing and batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("px", [32, 224])
def test_resizing_agrees_with_pillows_bicubic(px: int) -> None:
    image = cells(1)[0, 10:50, 10:50] // 2 + 64  # the cubic stays inside a byte: Pillow clips after either direction
    got = resize(image.permute(2, 0, 1)[None].float() / 255, px=px)[0].permute(1, 2, 0) * 255
    want = np.asarray(Image.fromarray(image.numpy()).resize((px, px), Image.Resampling.BICUBIC), dtype=np.float32)
    # Pillow also rounds after either direction.
    assert np.abs(got.numpy() - want).max() <= 1.5


def test_what_the_cubic_overshoots_is_clipped_as_in_a_byte() -> None:
    checks = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(10, 10).expand(1, 3, 20, 20)
    out = resize(checks, px=60)
    assert (out.min().item(), out.max().item()) == (0.0, 1.0)


class Seen(nn.Module):
    """Passes on what it is given, flat, and remembers the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return x.flatten(1)


def test_the_encoder_sees_the_resized_centre_crop_batch_by_batch() -> None:
    seen = Seen()
    out = encode_cells(seen, cells(), **PLAIN, crop_px=40, input_px=20, batch=2)
    assert seen.shapes == [(2, 3, 20, 20), (2, 3, 20, 20), (1, 3, 20, 20)]
    want = resize(cells()[:, 10:50, 10:50].permute(0, 3, 1, 2).float() / 255, px=20)
    torch.testing.assert_close(out, want.flatten(1))


def test_without_an_input_size_nothing_is_resized() -> None:
    out = encode_cells(Seen(), cells(), **PLAIN, crop_px=40)
    assert torch.equal(out, (cells()[:, 10:50, 10:50].permute(0, 3, 1, 2).float() / 255).flatten(1))


def test_fewer_of_the_larger_images_are_encoded_at_a_time() -> None:
    assert [default_batch(px) for px in (32, 40, 224, 5000)] == [1024, 1024, 32, 1]


def test_bfloat16_is_close_and_the_features_are_float32() -> None:
    encoder = load_encoder("untrained_vit_tiny8")
    exact, rounded = encoder.embed(cells()), encoder.embed(cells(), bf16=True)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert nn.functional.cosine_similarity(exact, rounded).min() > 0.999


def test_an_exported_encoder_may_resize_its_cells(tmp_path: Path) -> None:
    vit = build_vit(TINY.model_copy(update={"crop_px": 80}))
    resized = CellInput(LEMON_MEAN, LEMON_STD, input_px=80)
    export_encoder(vit, tmp_path, cell_input=resized)
    assert load_exported(tmp_path)[1] == resized
    assert load_encoder(tmp_path).embed(cells(2)).shape == (2, 32)
    with pytest.raises(ValueError, match="input_px=64: expected the encoder's input size, 80"):
        export_encoder(vit, tmp_path, cell_input=CellInput(LEMON_MEAN, LEMON_STD, input_px=64))


def column(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


def test_the_bundled_encoder_opens_by_name_and_says_how_it_was_made() -> None:
    encoder = load_encoder("lemon_mini")
    assert encoder.width == 192
    facts = json.loads((RELEASED / "lemon_mini" / "config.json").read_text())["lemon"]
    assert {"ssl": "MoCo v3", "views": "a1_gray", "name": "vit_tiny8"}.items() <= facts.items()
    assert (RELEASED / "lemon_mini" / "model.safetensors").stat().st_size < 8e6
