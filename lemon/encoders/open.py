"""Encoders ready to use: a run's folder, an exported folder, a checkpoint file, or a name of the registry."""

from __future__ import annotations

import hashlib
import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lemon.encoders.architectures import LEMON_SIZES, build, import_transformers, pool
from lemon.encoders.config import CONFIG
from lemon.encoders.export import CellInput, check_finite, load_exported, untrained_vit
from lemon.encoders.features import encode_cells, encode_images
from lemon.encoders.registry import ENCODERS, MODEL_REGISTRY, NO_ENCODER, EncoderEntry, encoder_folder, split_name
from lemon.encoders.vit import CellTransformer, load_lemon_checkpoint, seeded
from lemon.encoders.weights import MissingWeightsError, find_weights, hub_file, load_weights
from lemon.errors import ConfigError
from lemon.extras import missing_package_line
from lemon.runtime.scratch import scratch_folder
from lemon.runtime.store import is_uri, local_copy, locate
from lemon.runtime.tensors import read_or_damaged_error
from lemon.schema import CELL_MPP, CELL_PX

RELEASED = Path(__file__).parent / "released"
"""Encoders that come with the package, in the layout of an export."""

_SMALL = 50_000_000  # parameters


class Encoder(nn.Module):
    """A frozen encoder with what it expects of its input, and the name that it has in tables.

    ``embed`` takes images of cells; ``width`` is D, the values of an embedding; ``fingerprint`` tells weights apart.
    """

    def __init__(self, model: nn.Module, cell_input: CellInput, *, name: str) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.cell_input = cell_input
        self.name = name

    def __repr__(self) -> str:
        """Two lines: what it is, and what ``embed`` takes and gives."""
        count = sum(each.numel() for each in self.parameters())
        # One cell shows the width; for a network that takes seconds for it, it is shown once it is known.
        width = self.width if count < _SMALL or "width" in vars(self) else "D"
        place = next((each.device for each in self.parameters()), "cpu")
        takes = f"embed(uint8 [N, {CELL_PX}, {CELL_PX}, 3], RGB at {CELL_MPP} um/px)"
        if self.field_um is not None:
            takes = f"embed_fields(uint8 [N, S, S, 3], RGB, S px being {self.field_um:g} um)"
        size = f"{count / 1e6:.1f} M parameters on {place}"
        return f"Encoder {self.name!r}: {size}\n  {takes} -> torch.float32 [N, {width}]"

    @property
    def field_um(self) -> float | None:
        """Side of the fields of tissue that it was trained on; None of an encoder of cells."""
        of = self.cell_input
        return None if math.isclose(of.um_per_px, CELL_MPP) else of.crop_px * of.um_per_px

    def check_of_cells(self) -> None:
        """Raises ConfigError for an encoder of fields: it would see cells at another scale than its own."""
        if self.field_um is not None:
            raise ConfigError(
                f"{self.name} was trained on fields of {self.field_um:g} um and does not take images of nuclei; "
                f"expected an encoder of cells, and this one as context=field context.model=... of lemon embed"
            )

    @cached_property
    def width(self) -> int:
        """Values of an embedding."""
        return self.embed_fields(np.zeros((1, self.cell_input.px, self.cell_input.px, 3), np.uint8)).shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the weights and of what the encoder expects: equal for equal embeddings."""
        digest = hashlib.sha256(repr(self.cell_input).encode())
        for key, value in self.model.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised float [B, 3, px, px] -> features [B, D]; px is ``cell_input.px``. Raises ValueError for others."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            got, px = f"{images.dtype} {list(images.shape)}", self.cell_input.px
            raise ValueError(f"images: got {got}; expected normalised floats [B, 3, {px}, {px}], or embed(cells)")
        return self.model(images)

    @torch.inference_mode()
    def embed(self, images: Any, *, batch: int | None = None, bf16: bool = False) -> torch.Tensor:
        """Embeddings of cells at 0.25 um/px, 60 x 60 px, as the cells table holds them and ``lemon.crop`` cuts them.

        Args:
            images: uint8 [N, 60, 60, 3] on any device (a batch at a time goes to the encoder's), or anything that can
                mean nothing else: one image, channels first, floats in [0, 1]; ``images.cell_images`` lists it all.
            batch: images at a time; None: fewer where the encoder sees larger images.
            bf16: compute in bfloat16, for GPUs.

        Returns:
            A torch tensor float32 [N, D], on the encoder's device and without gradient: row i is of cell i, D is
            ``width``; ``.cpu().numpy()`` makes it an array.

        Raises:
            ValueError: other images, with what was got and what is expected.
            ConfigError: it is an encoder of fields, ``check_of_cells``.
        """
        self.check_of_cells()
        of = self.cell_input
        return encode_cells(
            self.model,
            images,
            mean=of.mean,
            std=of.std,
            crop_px=of.crop_px,
            input_px=of.input_px,
            batch=batch,
            bf16=bf16,
        )

    @torch.inference_mode()
    def embed_fields(self, fields: np.ndarray, *, bf16: bool = False) -> torch.Tensor:
        """Embeddings float32 [N, D] of wider crops of tissue uint8 [N, S, S, 3], resized to what the network sees.

        Their scale is the caller's: an encoder of cells was trained on ``cell_input.crop_px * um_per_px`` um.
        """
        of = self.cell_input
        return encode_images(self.model, torch.from_numpy(fields), mean=of.mean, std=of.std, px=of.px, bf16=bf16)


def load_encoder(name_or_path: str | Path, *, device: str | torch.device = "cpu") -> Encoder:
    """Open an encoder by its path or by its name.

    Args:
        name_or_path: a path that exists wins, local or at s3://: the output of ``lemon pretrain``, its ``encoder``
            folder, or the released ``lemon.pth.tar`` (with its ``mean_std.json`` beside it, if that was downloaded);
            else a name of ``registry.encoder_names()``, its hub id, or ``name:path`` for weights that lie in a file, as
            ``volta:checkpoint.pth.tar`` or ``uni:pytorch_model.bin``; or ``models:/NAME/VERSION`` (``@ALIAS``) of the
            MLflow registry that MLFLOW_TRACKING_URI names, where ``lemon pretrain`` puts encoders.
        device: where it computes.

    Raises:
        MissingWeightsError: the weights are gated or absent; the message says how to get them.
        ConfigError: no such path or name, what is there is no encoder, or the registry cannot be used.
        ValueError: its weights are not finite.
    """
    encoder = _open(name_or_path)
    check_finite(encoder.model.state_dict(), source=str(name_or_path))
    return encoder.to(device)


def _open(name_or_path: str | Path) -> Encoder:
    text = str(name_or_path)
    if not text.strip():
        raise ConfigError(f"encoder: got {text!r}, which names nothing; expected a path or a name")
    if text.startswith(MODEL_REGISTRY):
        return load_registered(text)
    if is_uri(text) and text.partition(":")[0] not in ENCODERS:
        return load_uri(text)
    path = Path(text).expanduser()
    # A folder that only happens to have an encoder's name, such as lemon/ in a checkout, is no encoder.
    if path.is_file() or encoder_folder(path) or (path.exists() and text not in ENCODERS):
        return load_path(path)
    entry, weights = split_name(text)
    return load_entry(entry, weights)


def untrained_twin(encoder: Encoder) -> Encoder | None:
    """An encoder of the same shape and input with the random weights of MoCo v3's initialisation, seed 0.

    Its name tells its width and depth; the same weights for every encoder of one shape. None for networks that are not
    LEMON's own, and for one that has these weights itself.
    """
    if not isinstance(encoder.model, CellTransformer):
        return None
    with seeded(0):
        model = untrained_vit(encoder.model)
    shape = (model.embed_dim, len(model.blocks))
    known = (size.name for size in LEMON_SIZES.values() if (size.dim, size.depth) == shape)
    name = next(known, f"vit_{shape[0]}x{shape[1]}")
    twin = Encoder(model, encoder.cell_input, name=f"untrained_{name}")
    return None if twin.fingerprint == encoder.fingerprint else twin


def load_registered(uri: str) -> Encoder:
    """Open what MLflow's registry has under ``models:/NAME/VERSION``; its name is then ``NAME-VERSION``.

    Raises ConfigError: there is none, it is no encoder of LEMON's, or MLflow is not installed or cannot be used.
    """
    try:
        from lemon.runtime.tracking import download_encoder

        with scratch_folder() as scratch:
            exported = load_exported(download_encoder(uri, scratch / "model"))
    except ModuleNotFoundError as error:
        raise ConfigError(f"encoder: {uri}: {missing_package_line(error) or error}") from None
    return Encoder(*exported, name=re.sub(r"[/@]", "-", uri.removeprefix(MODEL_REGISTRY)))


def load_uri(uri: str) -> Encoder:
    """Open what lies at s3://, as ``load_path`` does. Of a run only the encoder is fetched, not the checkpoints."""
    store, name = locate(uri)
    if store.exists(f"{name}/{CONFIG}"):
        wanted = name
    elif store.exists(f"{name}/encoder/{CONFIG}"):
        wanted = f"{name}/encoder"
    elif name.endswith((".tar", ".pth", ".pt")) and store.exists(name):
        wanted = name
    else:
        raise ConfigError(f"{uri}: {NO_ENCODER}")
    with scratch_folder() as scratch:
        path = scratch / name
        store.download(wanted, path)
        if path.is_file() and store.exists("mean_std.json"):
            store.download("mean_std.json", path.with_name("mean_std.json"))
        return load_path(path)


def load_path(path: Path) -> Encoder:
    """Open a file or a folder that exists."""
    if path.is_file():
        return load_lemon(path, name=path.name)
    if folder := encoder_folder(path):
        return Encoder(*load_exported(folder), name=path.name)
    raise ConfigError(f"{path}: {NO_ENCODER}")


def load_lemon(path: Path, *, name: str) -> Encoder:
    """Open a checkpoint in the layout of the released one, with the normalisation of a ``mean_std.json`` beside it."""
    beside = path.with_name("mean_std.json")
    model = load_lemon_checkpoint(path, mean_std=beside if beside.is_file() else None)
    known: Any = model.pretrained_cfg
    return Encoder(model, CellInput(mean=known["mean"], std=known["std"]), name=name)


def load_entry(entry: EncoderEntry, weights: str | Path | None = None) -> Encoder:
    """Open an encoder of the registry, with the weights of a file if one is given."""
    if entry.source == "untrained":
        return Encoder(build(entry), cell_input_of(entry), name=entry.name)
    if entry.source == "bundled" and weights is None:
        return Encoder(*load_exported(RELEASED / entry.name), name=entry.name)
    if entry.source == "release":
        opened = load_uri(str(weights)) if is_uri(weights or "") else load_path(find_weights(entry, weights))
        return Encoder(opened.model, opened.cell_input, name=entry.name)
    if entry.source == "transformers":
        import_transformers(entry)  # its absence is reported before gigabytes are downloaded
    if weights is not None and is_uri(weights):
        with local_copy(weights) as copy:
            return load_entry(entry, copy)
    path = find_weights(entry, weights)
    if entry.architecture in LEMON_SIZES:
        if weights is None:
            hub_file(entry, ("mean_std.json",))
        return load_lemon(path, name=entry.name)
    if entry.source == "transformers":
        model = load_transformers(entry, path)
    else:
        model = build(entry, device="meta")
        load_weights(model, entry, path)
    return Encoder(model, cell_input_of(entry), name=entry.name)


def load_transformers(entry: EncoderEntry, folder: Path) -> nn.Module:
    """A model of transformers from a folder with its config.json and model.safetensors; every weight must be there.

    Raises:
        MissingWeightsError: the folder has no config.json.
        ValueError: weights are missing or left over.
    """
    if not (folder / CONFIG).is_file():
        raise MissingWeightsError(f"{folder}: no {CONFIG}; expected the files of {entry.page}")
    library = import_transformers(entry)
    backbone, loading_info = read_or_damaged_error(
        lambda: library.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        ),
        label=f"{entry.name}: {folder}",
    )
    faults = {
        kind: [key for key in loading_info[kind] if "mask_token" not in key]
        for kind in ("missing_keys", "unexpected_keys")
    }
    if any(faults.values()):
        raise ConfigError(f"{entry.name}: {folder}: {faults}; expected exactly the weights that its {CONFIG} describes")
    return pool(backbone.float().eval(), entry)


def cell_input_of(entry: EncoderEntry) -> CellInput:
    """What an encoder of the registry expects: the centre crop of 40 px, resized to its input."""
    return CellInput(entry.mean, entry.std, input_px=None if entry.input_px == CellInput.crop_px else entry.input_px)
