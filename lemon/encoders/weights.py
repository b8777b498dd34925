"""Weights of the registry's encoders: found in a file, a package or the hub, read as plain tensors, loaded strictly.

A file that the hub's cache has is used as it is, without asking the hub; one that is absent is asked for once, so that
a machine without a connection says so in a second instead of after minutes of retries.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from lemon.encoders.config import CONFIG
from lemon.encoders.registry import RELEASES_FOLDER, EncoderEntry
from lemon.encoders.vit import load_strictly
from lemon.errors import ConfigError
from lemon.runtime.tensors import read_weights

HUB_TIMEOUT_S = 5.0
"""For the first answer of the hub; the download itself keeps the hub client's own limits."""

HUB_CLIENTS = {"httpx", "httpx2", "requests"}
"""Libraries whose errors mean that the hub is out of reach; which one it is depends on huggingface_hub's version."""

CONTAINERS = ("state_dict", "model", "teacher")
PREFIXES = ("module.", "teacher.", "backbone.", "encoder_k.")
HEADS = ("fc.", "head.", "classifier.", "dino_head.", "ibot_head.")
"""What training adds around and on top of an encoder."""


class MissingWeightsError(ConfigError):
    """An encoder cannot be opened here: its weights, or the package that reads them, are absent. A run goes on."""


# --- finding them -----------------------------------------------------------------------------------------------------


def find_weights(entry: EncoderEntry, given: str | Path | None = None) -> Path:
    """The file of an encoder's weights (transformers: the folder with its config.json).

    Args:
        entry: of the registry; not an untrained one.
        given: a file, or a release's folder, that the user names; None: the package's, the hub's, or the one in the
            folder that LEMON_ENCODERS names.

    Raises:
        MissingWeightsError: it is nowhere; the message says how to get it.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.exists():
            raise MissingWeightsError(f"{path}: no such file; expected the weights of {entry.name}: {entry.access}")
        return path.parent if entry.source == "transformers" and path.is_file() else path
    if entry.source == "release":
        folder = Path(os.environ.get(RELEASES_FOLDER, "")) / entry.name
        if not (folder / CONFIG).is_file():
            raise MissingWeightsError(f"{entry.name}: not in the package ({entry.licence}); {entry.access}")
        return folder
    if entry.source == "file":
        raise MissingWeightsError(f"{entry.name}: weights are not shipped ({entry.licence}); {entry.access}")
    if entry.source == "package":
        return package_file(entry)
    path = hub_file(entry, entry.files)
    if entry.source == "transformers":
        hub_file(entry, ("config.json",))
        return path.parent
    return path


def package_file(entry: EncoderEntry) -> Path:
    """The weights inside a Python package."""
    try:
        package = importlib.import_module(entry.where.replace("-", "_"))
    except ImportError:
        raise MissingWeightsError(f"{entry.name}: the package {entry.where} is not installed; {entry.access}") from None
    assert package.__file__ is not None
    return Path(package.__file__).parent / entry.files[0]


def hub_file(entry: EncoderEntry, names: tuple[str, ...]) -> Path:
    """The first of these files that the hub's cache or else the hub has.

    Raises:
        MissingWeightsError: refused, out of reach, or not there; other errors (a full disk) stay what they are.
    """
    for name in names:
        cached = try_to_load_from_cache(entry.where, name)
        if isinstance(cached, str):
            return Path(cached)
    reason = f"it has no {' or '.join(names)}"
    for name in names:
        try:
            # hf_hub_download repeats a failed request for half a minute; this one does not.
            get_hf_file_metadata(hf_hub_url(entry.where, name), timeout=HUB_TIMEOUT_S)
            return Path(hf_hub_download(entry.where, name, etag_timeout=HUB_TIMEOUT_S))
        except Exception as error:
            hub_error = hub_reason(error)
            if hub_error is None:
                raise
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue
            reason = hub_error
            break
    raise MissingWeightsError(f"{entry.name}: no weights from the hub id {entry.where}, {reason}; {entry.access}")


def hub_reason(error: Exception) -> str | None:
    """Why the hub gave nothing, in a few words; None for an error that is not about the hub."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, LocalEntryNotFoundError) or type(error).__module__.split(".")[0] in HUB_CLIENTS:
        return "the hub is out of reach"
    if isinstance(error, RepositoryNotFoundError):  # gated, private and absent alike
        return "the hub refuses access"
    if isinstance(error, HfHubHTTPError | EntryNotFoundError):
        return f"the hub answers: {' '.join(str(error).split())[:100]}"
    return None


# --- reading and loading them -----------------------------------------------------------------------------------------


def load_weights(model: nn.Module, entry: EncoderEntry, path: Path) -> None:
    """Load a file into a network that may have been built on the ``meta`` device; float32 afterwards.

    Raises:
        ValueError: unreadable, or keys or shapes other than those of the network, after the usual prefixes and heads.
    """
    state = encoder_state(read_state(path))
    if entry.architecture == "tf_efficientnet_lite0":
        state = efficientnet_keys(state)
    target: Any = getattr(model, "backbone", model)
    if isinstance(target, VisionTransformer):
        # Renames DINOv2's own layout and resamples positions that were learnt at another size (518 px).
        state = checkpoint_filter_fn(state, target)
    # torchvision's older files lack BatchNorm's count of batches, which evaluation does not use.
    counts = {key: torch.tensor(0) for key in target.state_dict() if key.endswith("num_batches_tracked")}
    state = counts | {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    load_strictly(target, state, source=f"{entry.name}: {path}")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or a torch file by their keys, without running code that is in it.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: not such a file, or no tensors in it.
    """
    content: Any = read_weights(path, label=str(path))
    for key in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        raise ConfigError(f"{path}: got no tensors by name; expected a checkpoint of weights")
    return state


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a training checkpoint: prefixes and heads taken off.

    Where MoCo's key encoder (the teacher) is present, everything else is left out: VOLTA embeds with it.
    """
    teacher = any("encoder_k." in key for key in state)
    kept = {}
    for key, value in state.items():
        if teacher and "encoder_k." not in key:
            continue
        while key.startswith(PREFIXES):
            key = key.partition(".")[2]
        if not key.startswith(HEADS):
            kept[key] = value
    return kept


EFFICIENTNET_STAGES = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each stage of EfficientNet-Lite0."""

STEM_AND_HEAD = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def efficientnet_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's names as timm's for tf_efficientnet_lite0, without the class head; unknown names stay.

    Checked against the package's own network (efficientnet-lite-pytorch 0.1.0): the outputs are equal to the last bit,
    so padding ("same") and the eps of BatchNorm (1e-3) agree; a test holds some of its numbers.
    """
    names = dict(STEM_AND_HEAD)
    block = 0
    for stage, blocks in enumerate(EFFICIENTNET_STAGES):
        for i in range(blocks):
            layers = FIRST_BLOCK if stage == 0 else OTHER_BLOCKS
            names |= {f"_blocks.{block}.{old}": f"blocks.{stage}.{i}.{new}" for old, new in layers.items()}
            block += 1
    renamed = {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        if layer != "_fc":
            renamed[f"{names.get(layer, layer)}.{leaf}"] = value
    return renamed
