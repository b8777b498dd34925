"""Every encoder of the registry builds with the width, size and pooling that its card states."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lemon.encoders import architectures
from lemon.encoders.architectures import TokenPool, build
from lemon.encoders.preact import PreActResNet
from lemon.encoders.registry import describe, encoder_names, find_entry, split_name
from lemon.encoders.vit import seeded
from lemon.encoders.weights import MissingWeightsError
from lemon.errors import ConfigError

MILLION_PARAMETERS = {
    "lemon": 21.4,
    "resnet18": 11.2,
    "resnet50": 23.5,
    "dinov2_g": 1134.8,
    "uni": 303.4,
    "uni2-h": 681.4,
    "virchow2": 631.2,
    "h-optimus-0": 1134.8,
    "h0-mini": 85.7,
    "prov-gigapath": 1135.0,
    "phikon-v2": 303.4,
    "midnight": 1134.8,
}
"""As their cards and papers say, where they do."""


def images(px: int, n: int = 2) -> Tensor:
    return torch.randn(n, 3, px, px, generator=torch.Generator().manual_seed(0))


def shallow(name: str) -> nn.Module:
    """An encoder of the registry with one block, so that a giant computes in a test."""
    entry = find_entry(name)
    depth = "num_hidden_layers" if entry.source == "transformers" else "depth"
    with seeded(0):
        return build(replace(entry, args={**entry.args, depth: 1}))


@pytest.mark.slow
@pytest.mark.parametrize("name", encoder_names())
def test_each_architecture_embeds_its_input_in_its_width(name: str) -> None:
    if find_entry(name).source == "transformers":
        pytest.importorskip("transformers")
    entry = find_entry(name)
    model = build(entry, device="meta")
    with torch.no_grad():
        out = model(torch.empty(2, 3, entry.input_px, entry.input_px, device="meta"))
    assert out.shape == (2, entry.width)
    assert not model.training
    if name in MILLION_PARAMETERS:
        parameters = sum(weights.numel() for weights in model.parameters()) / 1e6
        assert parameters == pytest.approx(MILLION_PARAMETERS[name], abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uni2-h", "h-optimus-0", "h0-mini", "prov-gigapath", "virchow2", "midnight"])
def test_a_giant_of_one_block_computes(name: str) -> None:
    if name == "midnight":
        pytest.importorskip("transformers")
    with torch.inference_mode():
        out = shallow(name)(images(224, n=1))
    assert out.shape == (1, find_entry(name).width)
    assert torch.isfinite(out).all()


def test_virchow2_joins_the_class_token_and_the_mean_of_the_patches_behind_four_registers() -> None:
    model = shallow("virchow2")
    assert isinstance(model, TokenPool)
    with torch.inference_mode():
        tokens = model.backbone(images(224, n=1))
        out = model(images(224, n=1))
    assert tokens.shape == (1, 1 + 4 + 256, 1280)
    torch.testing.assert_close(out, torch.cat([tokens[:, 0], tokens[:, 5:].mean(dim=1)], dim=1))


def test_registers_and_positions_are_those_of_the_cards() -> None:
    shapes = {
        "uni2-h": ([1, 8, 1536], [1, 256, 1536]),
        "virchow2": ([1, 4, 1280], [1, 261, 1280]),
        "h-optimus-0": ([1, 4, 1536], [1, 256, 1536]),
        "h0-mini": ([1, 4, 768], [1, 256, 768]),
    }
    for name, (registers, positions) in shapes.items():
        state = build(find_entry(name), device="meta").state_dict()
        prefix = "backbone." if name == "virchow2" else ""
        assert list(state[f"{prefix}reg_token"].shape) == registers
        assert list(state[f"{prefix}pos_embed"].shape) == positions
    gigapath = build(find_entry("prov-gigapath"), device="meta").state_dict()
    assert list(gigapath["patch_embed.proj.weight"].shape) == [1536, 3, 16, 16]


def test_the_untrained_encoders_are_the_same_every_time_and_leave_the_global_state() -> None:
    state = torch.get_rng_state()
    first, second = (build(find_entry("untrained_vit_tiny8")).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_preactivation_resnet_is_the_papers() -> None:
    with seeded(0):
        model = PreActResNet().eval()
    block = model.layer2[0]
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(1))
    active = torch.relu(block.bn1(x))
    want = block.conv2(torch.relu(block.bn2(block.conv1(active)))) + block.shortcut(active)
    torch.testing.assert_close(block(x), want)
    assert model.layer1[0].shortcut is None
    assert model.conv1(images(32)).shape == (2, 64, 32, 32)
    assert model(images(32)).shape == (2, 512)


def test_the_table_has_a_row_per_encoder() -> None:
    lines = describe().splitlines()
    assert len(lines) == 2 + len(encoder_names())
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "`uni`" in describe()


def test_an_unknown_name_is_told_with_the_closest_ones_and_all_of_them() -> None:
    with pytest.raises(ConfigError, match=r"untrained_vit_s9: no such file.*did you mean untrained_vit_s8") as told:
        find_entry("untrained_vit_s9")
    assert "\n" not in str(told.value)
    assert all(name in str(told.value) for name in encoder_names())


def test_names_hub_ids_and_paths_of_weights_are_told_apart() -> None:
    assert split_name("uni") == (find_entry("uni"), None)
    assert split_name("MahmoodLab/UNI") == (find_entry("uni"), None)
    assert split_name("volta:C:/a.pth") == (find_entry("volta"), "C:/a.pth")
    with pytest.raises(ConfigError, match="no such file"):
        split_name("s3://bucket/model")


def test_without_transformers_the_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingWeightsError, match=r"phikon-v2: .*pip install 'lemon-nuclei\[transformers\]'"):
        architectures.import_transformers(find_entry("phikon-v2"))


def test_the_registry_is_read_without_torch() -> None:
    code = "import sys, lemon.encoders.registry; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
