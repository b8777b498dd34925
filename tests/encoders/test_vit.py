"""The vision transformer's sizes and initialisation, and strict loading of the released layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lemon.encoders import attention, vit
from lemon.encoders.config import LEMON_MEAN, LEMON_STD, VIT_B8, VIT_S8, VIT_TINY8, EncoderConfig
from lemon.encoders.export import model_args
from lemon.encoders.vit import (
    CellTransformer,
    build_vit,
    forward_tokens,
    load_lemon_checkpoint,
    seeded,
    sincos_positions,
)
from lemon.runtime.config import read_preset

TINY = EncoderConfig(name="tiny", dim=32, depth=2, heads=4)


def images(n: int = 3, px: int = 40) -> Tensor:
    return torch.randn(n, 3, px, px, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [VIT_S8, VIT_B8, VIT_TINY8])
def test_the_shipped_encoders_are_those_of_the_code(config: EncoderConfig) -> None:
    values = read_preset("encoder", config.name)
    assert EncoderConfig.model_validate(values) == config


def test_vit_s8_has_26_positions_12_heads_and_a_class_token_of_384() -> None:
    vit = build_vit(VIT_S8)
    assert vit.pos_embed is not None
    assert vit.pos_embed.shape == (1, 26, 384)
    assert vit.patch_embed.proj.weight.shape == (384, 3, 8, 8)
    assert {block.attn.num_heads for block in vit.blocks} == {12}
    assert vit(images(2)).shape == (2, 384)
    # A token's 4 * dim^2 of attention and 8 * dim^2 of MLP, the patches: the paper's 0.55 G multiply-accumulates.
    macs = sum(m.weight.numel() for m in vit.blocks.modules() if isinstance(m, torch.nn.Linear)) * 26
    macs += vit.patch_embed.proj.weight.numel() * 25
    assert macs / 1e9 == pytest.approx(0.55, abs=0.01)


def test_the_output_is_the_class_token_after_the_last_norm() -> None:
    vit = build_vit(TINY).eval()
    tokens = forward_tokens(vit, images())
    assert tokens.shape == (3, 26, 32)
    torch.testing.assert_close(vit(images()), tokens[:, 0])
    torch.testing.assert_close(tokens.mean(dim=-1), torch.zeros(3, 26), rtol=0, atol=1e-5)


def by_torch(qkv: Tensor, *, heads: int) -> Tensor:
    """What ``attend`` gives, on any device."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network does where the kernels serve, with torch's attention in place of the kernel."""
    monkeypatch.setattr(vit, "serves", lambda *args, **kwargs: True)
    monkeypatch.setattr(attention, "serves", lambda *args, **kwargs: True)
    monkeypatch.setattr(attention, "attend", by_torch)


OF_DINOV2 = {"init": "dinov2", "layer_scale": 0.5, "dynamic_size": True}


@pytest.mark.parametrize("options", [{}, OF_DINOV2], ids=["mocov3", "dinov2"])
@pytest.mark.parametrize("px", [40, 24])
@pytest.mark.parametrize("whole", [False, True], ids=["class token", "all tokens"])
def test_where_kernels_serve_the_network_is_the_same_function(
    options: dict[str, Any], px: int, whole: bool, request: pytest.FixtureRequest
) -> None:
    if px != 40 and not options:
        pytest.skip("MoCo v3's encoder takes one size")
    network = build_vit(TINY, **options).double()
    mask = torch.rand(3, (px // 8) ** 2, generator=torch.Generator().manual_seed(1)) < 0.3

    def run() -> list[Tensor]:
        network.zero_grad()
        x = images(px=px).double().requires_grad_()
        out = network.forward_tokens(x, mask, torch.ones(1, 32)) if whole else network(x)
        out.square().mul(torch.linspace(0, 1, 32)).sum().backward()
        gradients = [p.grad for p in network.parameters() if p.requires_grad]
        return [out.detach(), x.grad, *gradients]

    plain = run()
    request.getfixturevalue("as_on_a_gpu")
    for got, expected in zip(run(), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_where_kernels_serve_the_mean_of_the_patches_is_the_same_function(request: pytest.FixtureRequest) -> None:
    network = CellTransformer(**(model_args(build_vit(TINY)) | {"global_pool": "avg"})).double().eval()
    torch.nn.init.normal_(network.fc_norm.weight)
    plain = network(images().double())
    request.getfixturevalue("as_on_a_gpu")
    torch.testing.assert_close(network(images().double()), plain, rtol=1e-9, atol=1e-9)


def test_where_kernels_serve_the_last_block_computes_the_class_token_alone(as_on_a_gpu: None) -> None:
    network, seen = build_vit(TINY).eval(), []
    for block in network.blocks:
        block.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    network(images())
    network.forward_tokens(images())
    assert seen == [26, 1, 26, 26]


def test_where_kernels_serve_the_residual_stream_has_autocasts_type(as_on_a_gpu: None) -> None:
    network = build_vit(TINY).eval()
    plain = network(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert network.tokens(images()).dtype == torch.bfloat16
        got = network(images())
    torch.testing.assert_close(got.float(), plain, rtol=0, atol=0.1)


@pytest.mark.parametrize(("flatten", "options"), [(True, {}), (False, OF_DINOV2)])
def test_patches_as_a_product_are_the_convolution(flatten: bool, options: dict[str, Any]) -> None:
    network = build_vit(TINY, **options)
    got, expected = network._patches(images()), network.patch_embed(images())
    assert got.shape == expected.shape == ((3, 25, 32) if flatten else (3, 5, 5, 32))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_positions_are_fixed_sines_of_row_and_column() -> None:
    positions = sincos_positions(32, grid=5)
    assert positions.shape == (1, 26, 32)
    assert positions[0, 0].abs().max() == 0
    row, column, quarter = 3, 1, 8
    vector = positions[0, 1 + row * 5 + column]
    for i in range(quarter):
        frequency = 10000 ** (-i / quarter)
        want = [math.sin(row * frequency), math.cos(row * frequency)]
        want += [math.sin(column * frequency), math.cos(column * frequency)]
        assert vector[i::quarter].tolist() == pytest.approx(want, abs=1e-6)
    vit = build_vit(TINY, init="mocov3")
    assert vit.pos_embed is not None
    assert not vit.pos_embed.requires_grad
    torch.testing.assert_close(vit.pos_embed.detach(), positions)


def test_the_moco_initialisation_has_the_papers_limits() -> None:
    vit = build_vit(VIT_TINY8, init="mocov3")
    limits = {
        "patch_embed.proj.weight": math.sqrt(6 / (3 * 8 * 8 + 192)),
        "blocks.0.attn.qkv.weight": math.sqrt(6 / (192 + 192)),  # three square matrices, not one of 192 x 576
        "blocks.0.mlp.fc1.weight": math.sqrt(6 / (192 + 768)),
    }
    for name, limit in limits.items():
        largest = vit.get_parameter(name).abs().max().item()
        assert 0.99 * limit < largest <= limit
    assert vit.cls_token is not None
    assert vit.cls_token.std().item() == pytest.approx(1e-6, rel=0.3)
    biases = [p.abs().max() for name, p in vit.named_parameters() if name.endswith("bias")]
    assert max(biases) == 0


def test_the_dinov2_initialisation_learns_positions_and_drops_paths_alike_in_every_block() -> None:
    vit = build_vit(TINY, init="dinov2", heads=2, layer_scale=1e-5, drop_path=0.3, dynamic_size=True)
    assert vit.pos_embed is not None
    assert vit.pos_embed.requires_grad
    assert [block.drop_path1.drop_prob for block in vit.blocks] == [0.3, 0.3]
    assert [block.drop_path2.drop_prob for block in vit.blocks] == [0.3, 0.3]
    assert vit.blocks[0].ls1.gamma.detach().tolist() == pytest.approx([1e-5] * 32)
    assert vit.blocks[0].attn.num_heads == 2
    assert vit(images(px=24)).shape == (3, 32)  # 3x3 patches


def test_masked_patches_are_replaced_and_the_others_kept() -> None:
    for dynamic_size in (False, True):
        vit = build_vit(TINY, init="dinov2", dynamic_size=dynamic_size).eval()
        mask = torch.zeros(3, 25, dtype=torch.bool)
        token = torch.full((1, 32), 0.5)
        torch.testing.assert_close(forward_tokens(vit, images(), mask, token), forward_tokens(vit, images()))
        mask[1, 7] = True  # row 1, column 2
        changed = images()
        changed[1, :, 8:16, 16:24] = 9.0
        torch.testing.assert_close(
            forward_tokens(vit, images(), mask, token), forward_tokens(vit, changed, mask, token)
        )
        assert not torch.allclose(forward_tokens(vit, images(), mask, token)[1], forward_tokens(vit, images())[1])


def test_the_same_seed_gives_the_same_encoder_and_leaves_the_global_state() -> None:
    state = torch.get_rng_state()
    weights = []
    for seed in (1, 1, 2):
        with seeded(seed):
            weights.append(build_vit(TINY).blocks[0].attn.qkv.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("change", "got"), [({"heads": 5}, "heads=5"), ({"patch_px": 7}, "patch_px=7")])
def test_sizes_that_do_not_divide_are_refused(change: dict[str, int], got: str) -> None:
    with pytest.raises(ValueError, match=got):
        build_vit(TINY.model_copy(update=change))


# --- the released checkpoint ------------------------------------------------------------------------------------------


def released_layout(config: EncoderConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights under the keys of the released file: base encoder with its head, momentum encoder, predictor."""
    with seeded(0):
        vit = {key: torch.randn_like(value) * 0.05 for key, value in build_vit(config).state_dict().items()}
    state = {f"module.base_encoder.{key}": value for key, value in vit.items()}
    state |= {f"module.momentum_encoder.{key}": value + 1 for key, value in vit.items()}
    for name in ("base_encoder.head.0.weight", "base_encoder.head.1.running_mean", "predictor.0.weight"):
        state[f"module.{name}"] = torch.zeros(4)
    return vit, state


def save(state: object, folder: Path) -> Path:
    path = folder / "lemon.pth.tar"
    torch.save({"epoch": 150, "arch": "vit_small", "state_dict": state}, path)
    return path


def test_a_checkpoint_of_the_released_layout_loads_with_every_weight(tmp_path: Path) -> None:
    vit, state = released_layout(VIT_S8)
    assert len(vit) == 150
    loaded = load_lemon_checkpoint(save(state, tmp_path))
    assert not loaded.training
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, vit[key]), key
    assert {block.attn.num_heads for block in loaded.blocks} == {12}
    assert loaded.pretrained_cfg == {"input_size": (3, 40, 40), "mean": LEMON_MEAN, "std": LEMON_STD}


def test_missing_and_unexpected_keys_are_named(tmp_path: Path) -> None:
    _, state = released_layout(TINY)
    for i in range(6):
        state[f"module.base_encoder.extra{i}"] = torch.zeros(1)
    del state["module.base_encoder.norm.weight"]
    with pytest.raises(ValueError) as error:  # the message is looked at below
        load_lemon_checkpoint(save(state, tmp_path), encoder=TINY)
    told = str(error.value)
    assert "1 missing keys (norm.weight)" in told
    assert "6 unexpected keys (extra0, extra1, extra2, extra3, extra4)" in told
    assert str(tmp_path) in told


def test_a_checkpoint_of_another_size_is_refused_with_both_shapes(tmp_path: Path) -> None:
    _, state = released_layout(TINY)
    with pytest.raises(ValueError, match=r"wrong shapes \(cls_token \[1, 1, 32\], expected \[1, 1, 64\]"):
        load_lemon_checkpoint(save(state, tmp_path), encoder=TINY.model_copy(update={"dim": 64}))


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="got model; expected a checkpoint with the key state_dict"):
        load_lemon_checkpoint(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        load_lemon_checkpoint(tmp_path / "absent.pth")


def test_mean_and_std_come_from_the_file_beside_the_checkpoint(tmp_path: Path) -> None:
    _, state = released_layout(TINY)
    path, mean_std = save(state, tmp_path), tmp_path / "mean_std.json"
    mean_std.write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}))
    loaded = load_lemon_checkpoint(path, mean_std=mean_std, encoder=TINY)
    assert loaded.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert loaded.pretrained_cfg["std"] == (0.4, 0.5, 0.6)
    mean_std.write_text(json.dumps({"mean": [0.1, 0.2]}))
    with pytest.raises(ValueError, match=r"mean_std\.json: "):
        load_lemon_checkpoint(path, mean_std=mean_std, encoder=TINY)
