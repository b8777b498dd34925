"""Vision transformers for 40x40 crops: timm's VisionTransformer, two initialisations, and the released checkpoint.

At 8 px a patch, a crop of 40 px is 5x5 patches and one class token: 26 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from typing_extensions import TypedDict

from lemon.encoders.attention import CellAttention, serves
from lemon.encoders.config import LEMON_MEAN, LEMON_STD, VIT_S8, EncoderConfig
from lemon.encoders.mlp import CellMlp
from lemon.errors import ConfigError
from lemon.runtime.store import parse_json
from lemon.runtime.tensors import read_weights

LEMON_PREFIX = "module.base_encoder."


class CellTransformer(VisionTransformer):
    """timm's VisionTransformer, with the same parameters, for crops of few tokens.

    Where the kernel of ``attention`` serves, the result is the same but for rounding, and

    - the last block computes the class token alone, since nothing reads the others: a fifteenth less arithmetic;
    - the patches are projected by a matrix product, which is faster than a convolution backward;
    - under autocast the residual stream has autocast's type, as in DINOv2's training: half the bytes of all passes
      that are no matrix product.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, attn_layer=CellAttention, mlp_layer=CellMlp)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalised [B, 3, px, px] -> the class token after the last LayerNorm, [B, dim]; or timm's other pooling."""
        if args or kwargs or not self._short(x):
            return super().forward(x, *args, **kwargs)
        if self.global_pool != "token":
            return self.forward_head(self.norm(self._through(self.tokens(x))))
        return self.norm(self._through(self.tokens(x), class_only=True)[:, 0])

    def forward_tokens(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """All tokens after the last LayerNorm, class token first; masked patches are replaced by ``mask_token``.

        Args:
            images: [B, 3, px, px].
            mask: bool [B, P], or None.
            mask_token: [1, dim].

        Returns:
            [B, 1 + P, dim].
        """
        return self.norm(self._through(self.tokens(images, mask, mask_token)))

    def tokens(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """What the first block gets, [B, 1 + P, dim]: class token and patches with positions, masked ones replaced."""
        short = self._short(images)
        patches = self._patches(images) if short else self.patch_embed(images)  # [B, P or (h, w), dim]
        if mask is not None:
            assert mask_token is not None
            masked = mask.reshape(*patches.shape[:-1], 1)
            patches = torch.where(masked, mask_token.to(patches.dtype), patches)
        # timm has no entry point between the patches and the positions, hence the private call.
        tokens = self.norm_pre(self.patch_drop(self._pos_embed(patches)))
        if short and torch.is_autocast_enabled(tokens.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(tokens.device.type))
        return tokens

    def _patches(self, images: Tensor) -> Tensor:
        """``patch_embed`` as a matrix product: [B, P, dim], or [B, h, w, dim] with dynamic sizes."""
        projection, (patch, _) = self.patch_embed.proj, self.patch_embed.patch_size
        cells, channels, height, width = images.shape
        split = images.reshape(cells, channels, height // patch, patch, width // patch, patch)
        rows = split.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, h, w, 3 * patch * patch]
        patches = F.linear(rows, projection.weight.flatten(1), projection.bias)
        return patches.flatten(1, 2) if self.patch_embed.flatten else patches

    def _through(self, tokens: Tensor, *, class_only: bool = False) -> Tensor:
        """All blocks, [B, N, dim] -> [B, N, dim], or [B, 1, dim] of the class token."""
        *blocks, last = cast(list[Block], list(self.blocks))
        for block in blocks:
            tokens = block_of(block, tokens)
        return block_of(last, tokens, class_only=class_only)

    def _short(self, images: Tensor) -> bool:
        patch, first = self.patch_embed.patch_size[0], cast(Block, self.blocks[0])
        tokens = self.num_prefix_tokens + (images.shape[-2] // patch) * (images.shape[-1] // patch)
        return serves(images, tokens=tokens, head_dim=self.embed_dim // cast(CellAttention, first.attn).num_heads)


def block_of(block: Block, tokens: Tensor, *, class_only: bool = False) -> Tensor:
    """``block(tokens)``, [B, N, dim] -> [B, N, dim], in the type of ``tokens``; or its first row alone, [B, 1, dim]."""
    attention = cast(CellAttention, block.attn)
    normed = block.norm1(tokens)
    attended, tokens = (attention.first_row(normed), tokens[:, :1]) if class_only else (attention(normed), tokens)
    tokens = tokens + block.drop_path1(block.ls1(attended)).to(tokens.dtype)
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))).to(tokens.dtype)


def build_vit(
    config: EncoderConfig,
    *,
    init: Literal["mocov3", "dinov2"] = "mocov3",
    heads: int | None = None,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
    dynamic_size: bool = False,
) -> CellTransformer:
    """A VisionTransformer without class head; its output is the class token after the last LayerNorm, [B, dim].

    Args:
        config: sizes.
        init: ``mocov3``: xavier-like, fixed sin-cos positions; ``dinov2``: timm's truncated normal, learned positions.
        heads: overrides ``config.heads``.
        layer_scale: initial LayerScale; None: none.
        drop_path: stochastic depth rate, the same in every block (DINOv2's uniform rate, not timm's linear rule).
        dynamic_size: accept other crop sizes, by interpolated positions.

    Raises:
        ConfigError: sizes that do not divide.
    """
    heads = heads or config.heads
    if config.dim % heads or config.crop_px % config.patch_px:
        raise ConfigError(
            f"encoder {config.name}: got dim={config.dim}, heads={heads}, crop_px={config.crop_px}, "
            f"patch_px={config.patch_px}; expected heads to divide dim and patch_px to divide crop_px"
        )
    vit = CellTransformer(
        img_size=config.crop_px,
        patch_size=config.patch_px,
        num_classes=0,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=heads,
        init_values=layer_scale,
        norm_layer=partial(LayerNorm, eps=1e-6),
        dynamic_img_size=dynamic_size,
        weight_init="moco" if init == "mocov3" else "",
    )
    for block in vit.blocks if drop_path else ():
        block.drop_path1, block.drop_path2 = DropPath(drop_path), DropPath(drop_path)
    if init == "mocov3":
        initialise_patches_and_positions(vit)
    return vit


@torch.no_grad()
def initialise_patches_and_positions(vit: VisionTransformer) -> None:
    """The rest of MoCo v3's initialisation (arXiv 2104.02057, appendix A.2); timm's "moco" leaves the patches out."""
    projection = vit.patch_embed.proj
    limit = math.sqrt(6 / (projection.weight[0].numel() + vit.embed_dim))  # xavier of the patch as a linear layer
    nn.init.uniform_(projection.weight, -limit, limit)
    nn.init.zeros_(projection.bias)
    assert vit.pos_embed is not None
    vit.pos_embed.copy_(sincos_positions(vit.embed_dim, grid=vit.patch_embed.grid_size[0]))
    vit.pos_embed.requires_grad_(False)


def sincos_positions(dim: int, *, grid: int, temperature: float = 1e4) -> Tensor:
    """Fixed 2-D sin-cos positions: [1, 1 + grid * grid, dim], zero for the class token.

    Quarters of a vector: sin and cos of the row, sin and cos of the column (an "ij" meshgrid, as in MoCo v3), at
    dim / 4 frequencies temperature ** (-i / (dim / 4)).
    """
    quarter = dim // 4
    frequency = temperature ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # [dim / 4]
    position = torch.arange(grid, dtype=torch.float64)
    rows, columns = torch.meshgrid(position, position, indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (rows, columns)]  # [grid * grid, dim / 4] each
    patches = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)  # [grid * grid, dim]
    return torch.cat([patches.new_zeros(1, dim), patches])[None].float()


def class_token(vit: CellTransformer, images: Tensor) -> Tensor:
    """The class token after the last LayerNorm, [B, 3, px, px] -> [B, dim]: the encoder as a function to compile."""
    return vit(images)


def forward_tokens(
    vit: CellTransformer, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
) -> Tensor:
    """``vit.forward_tokens`` as a function to compile."""
    return vit.forward_tokens(images, mask, mask_token)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers on the CPU from ``seed`` inside the block, and leave the global state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def load_lemon_checkpoint(
    path: str | Path, *, mean_std: str | Path | None = None, encoder: EncoderConfig = VIT_S8
) -> VisionTransformer:
    """The encoder of a MoCo v3 checkpoint in the layout of the released ``lemon.pth.tar``, in evaluation mode.

    Its ``pretrained_cfg`` (timm's convention) holds mean, std and input size.

    Args:
        path: a file whose ``state_dict`` has the encoder under ``module.base_encoder.``.
        mean_std: ``mean_std.json`` beside it; None: the released values.
        encoder: sizes; the released checkpoint is ViT-S/8 with 12 heads.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no ``state_dict``, or keys or shapes other than those of the encoder.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; download lemon.pth.tar from the hub (aliceblondel/LEMON)")
    content = read_weights(path, label=str(path))
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        got = (
            ", ".join(str(key)[:40] for key in [*content][:5])
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise ConfigError(f"{path}: got {got or 'nothing'}; expected a checkpoint with the key state_dict")
    head = f"{LEMON_PREFIX}head"
    state = {
        key.removeprefix(LEMON_PREFIX): value
        for key, value in content["state_dict"].items()
        if isinstance(key, str) and key.startswith(LEMON_PREFIX) and not key.startswith(head)
    }
    vit = build_vit(encoder)
    load_strictly(vit, state, source=str(path))
    mean, std = read_mean_std(mean_std) if mean_std else (LEMON_MEAN, LEMON_STD)
    vit.pretrained_cfg = {"input_size": (3, encoder.crop_px, encoder.crop_px), "mean": mean, "std": std}  # type: ignore[assignment]
    return vit.eval()


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load a state dict whose keys and shapes must be exactly the model's; ValueError names the first five faults.

    A model on the ``meta`` device takes the tensors themselves: no time for random weights, no second copy.
    """
    expected = model.state_dict()
    if foreign := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise ConfigError(
            f"{source}: {foreign[0]} is no tensor; expected exactly the {len(expected)} tensors of this encoder"
        )
    shapes = [
        f"{key} {list(state[key].shape)}, expected {list(expected[key].shape)}"
        for key in expected
        if key in state and expected[key].shape != state[key].shape
    ]
    faults = {
        "missing keys": [key for key in expected if key not in state],
        "unexpected keys": [key for key in state if key not in expected],
        "wrong shapes": shapes,
    }
    problems = [f"{len(keys)} {kind} ({', '.join(keys[:5])})" for kind, keys in faults.items() if keys]
    if problems:
        raise ConfigError(
            f"{source}: {'; '.join(problems)}; expected exactly the {len(expected)} tensors of this encoder"
        )
    model.load_state_dict(state, assign=any(value.is_meta for value in expected.values()))


class _MeanStd(TypedDict):
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_mean_std(path: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel, in [0, 1], from a JSON object with the keys mean and std."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the mean_std.json of the checkpoint")
    values = parse_json(Path(path).read_bytes(), _MeanStd, label=str(path))
    mean, std = values["mean"], values["std"]
    if not (all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
        raise ConfigError(f"{path}: got mean={mean}, std={std}; expected finite values, std above 0")
    return mean, std
