"""An exported encoder opens in timm, with the same output and what it expects of its input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from lemon.encoders.config import LEMON_MEAN, LEMON_STD, VIT_S8, EncoderConfig
from lemon.encoders.export import CellInput, export_encoder, load_exported, model_args
from lemon.encoders.vit import CellTransformer, build_vit

TINY = EncoderConfig(name="tiny", dim=32, depth=2, heads=4)
INPUT = CellInput(mean=LEMON_MEAN, std=LEMON_STD)


def images(px: int = 40) -> Tensor:
    return torch.rand(3, 3, px, px, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [TINY, VIT_S8])
@pytest.mark.parametrize("method", ["mocov3", "dinov2"])
def test_timm_opens_an_export_with_the_output_of_the_source(config: EncoderConfig, method: str, tmp_path: Path) -> None:
    if method == "mocov3":
        encoder = build_vit(config)
    else:
        encoder = build_vit(config, init="dinov2", heads=2, layer_scale=1e-5, drop_path=0.3, dynamic_size=True)
        torch.nn.init.normal_(encoder.blocks[0].ls1.gamma)
    export_encoder(encoder, tmp_path / "model", cell_input=INPUT)
    opened = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(opened(images()), encoder.eval()(images()))


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_an_export_opens_as_what_computes_by_the_kernels(layer_scale: float | None, tmp_path: Path) -> None:
    encoder = build_vit(TINY, layer_scale=layer_scale).eval()
    export_encoder(encoder, tmp_path, cell_input=INPUT)
    opened, _ = load_exported(tmp_path)
    assert isinstance(opened, CellTransformer)
    assert tuple(opened.pretrained_cfg["mean"]) == LEMON_MEAN
    assert torch.equal(opened(images()), encoder(images()))


def test_an_export_of_the_mean_of_patches_opens_in_timm_and_as_what_computes_by_the_kernels(tmp_path: Path) -> None:
    encoder = CellTransformer(**(model_args(build_vit(TINY)) | {"global_pool": "avg"})).eval()
    export_encoder(encoder, tmp_path, cell_input=INPUT)
    opened, _ = load_exported(tmp_path)
    assert isinstance(opened, CellTransformer)
    timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(opened(images()), encoder(images()))
    assert torch.equal(timms(images()), encoder(images()))


def test_an_export_with_settings_that_lemon_does_not_write_opens_as_timms(tmp_path: Path) -> None:
    export_encoder(build_vit(TINY), tmp_path, cell_input=INPUT)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["act_layer"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened, _ = load_exported(tmp_path)
    assert type(opened) is timm.models.vision_transformer.VisionTransformer
    timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(opened(images()), timms(images()))


def test_the_config_holds_scale_crop_and_normalisation(tmp_path: Path) -> None:
    export_encoder(build_vit(TINY), tmp_path, cell_input=INPUT, facts={"run": "abc", "licence": "MIT"})
    kept = json.loads((tmp_path / "config.json").read_text())["lemon"]
    assert kept["um_per_px"] == 0.25
    assert kept["crop_px"] == 40
    assert kept["run"] == "abc"
    model, cell_input = load_exported(tmp_path)
    assert cell_input == INPUT
    assert not model.training
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["config.json", "model.safetensors"]


def test_timms_own_transform_crops_a_stored_cell_without_resizing_it(tmp_path: Path) -> None:
    from PIL import Image

    export_encoder(build_vit(TINY), tmp_path, cell_input=INPUT)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    stored = (images(px=60)[0] * 255).to(torch.uint8)  # [3, 60, 60]
    got = transform(Image.fromarray(stored.permute(1, 2, 0).numpy()))
    mean, std = torch.tensor(LEMON_MEAN), torch.tensor(LEMON_STD)
    want = (stored[:, 10:50, 10:50] / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(got, want)


def test_a_crop_size_other_than_the_encoders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="crop_px=48: expected the encoder's input size, 40"):
        export_encoder(build_vit(TINY), tmp_path, cell_input=CellInput(LEMON_MEAN, LEMON_STD, crop_px=48))


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_exported(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_small_patch8_224"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no section lemon"):
        load_exported(tmp_path)
