"""DINOv2 (arXiv 2304.07193) on single nuclei, and the variants of the LEMON paper's Table 5.

Terms of the loss:

- global: the class token of each global view against the teacher's of the other global view;
- local: the class token of each local view against the teacher's of both global views (``local_to_global``);
- iBOT: masked patches of the global views against the teacher's tokens of the same patches;
- regulariser: KoLeo or KDE on the student's class tokens of each global view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lemon.encoders.config import EncoderConfig
from lemon.encoders.vit import CellTransformer, build_vit, class_token, forward_tokens, seeded
from lemon.errors import ConfigError
from lemon.pretrain.config import DINOv2Config
from lemon.pretrain.heads import DinoHead, ema_update, forward_in_chunks, frozen_copy
from lemon.pretrain.losses import (
    Targets,
    chunked_cross_entropy,
    feature_std,
    kde,
    koleo,
    mask_weights,
    sinkhorn_targets,
    softmax_targets,
    updated_center,
)
from lemon.pretrain.schedules import Curve, Method, Schedules, StepValues, param_group


class DINOv2(Method):
    """Student (encoder, heads, mask token) and teacher (encoder, heads, centres)."""

    dino_center: Tensor
    ibot_center: Tensor

    def __init__(self, config: DINOv2Config, encoder: EncoderConfig, *, seed: int) -> None:
        super().__init__()
        if config.local_to_global and config.local_crop_px % encoder.patch_px:
            raise ConfigError(
                f"ssl.local_crop_px={config.local_crop_px}: expected a multiple of encoder.patch_px="
                f"{encoder.patch_px}, as {3 * encoder.patch_px}"
            )
        self.config = config
        n_heads = config.heads(encoder)

        def backbone(drop_path: float) -> CellTransformer:
            return build_vit(
                encoder,
                init="dinov2",
                heads=n_heads,
                layer_scale=config.layer_scale,
                drop_path=drop_path,
                dynamic_size=True,
            )

        def head() -> DinoHead:
            return DinoHead(
                dim=encoder.dim,
                hidden_dim=config.hidden_dim,
                bottleneck_dim=config.bottleneck_dim,
                n_prototypes=config.prototypes,
            )

        with seeded(seed):
            self.encoder = backbone(config.drop_path)
            self.mask_token = nn.Parameter(torch.zeros(1, encoder.dim))
            kinds = ("dino", "ibot") if config.separate_ibot_head else ("dino",)
            heads = {kind: head() for kind in kinds}
            self.teacher = frozen_copy(self.encoder, lambda: backbone(0.0))
            self.heads = nn.ModuleDict(heads)
            self.teacher_heads = nn.ModuleDict({kind: frozen_copy(heads[kind], head) for kind in kinds})
        self.register_buffer("dino_center", torch.zeros(config.prototypes))
        self.register_buffer("ibot_center", torch.zeros(config.prototypes))

    @property
    def exported(self) -> CellTransformer:
        """The teacher's encoder."""
        return self.teacher

    @property
    def n_local_views(self) -> int:
        """None without the local-to-global term: no other term uses them."""
        return self.config.local_crops if self.config.local_to_global else 0

    def forward(
        self,
        views: Sequence[Tensor],
        *,
        values: StepValues,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its parts; in training mode the centres move on.

        Args:
            views: 2 global views [B, 3, px, px], then ``n_local_views`` local ones, also stacked: [L * B, 3, px, px].
            values: the schedules at this step.
            generator: draws the mask.
            mask: bool [2B, P], view 1 before view 2; replaces the one drawn.
        """
        config, n_cells = self.config, len(views[0])
        if sum(map(len, views[2:])) != self.n_local_views * n_cells:
            got = [len(view) for view in views]
            raise ValueError(f"views of {got} crops: expected 2 global views and {self.n_local_views} local views")
        images = torch.cat(list(views[:2]))  # [2B, 3, px, px]
        if mask is None:
            mask, n_masked = self._draw_mask(images, generator)
        else:
            n_masked = int(mask.sum())
        # Masked patches first, in their order; their number is known, so nothing waits for the device.
        masked = (~mask.flatten()).to(torch.uint8).argsort(stable=True)[:n_masked]  # [M]
        class_targets, patch_targets = self._targets(images, masked, values.teacher_temperature)  # of 2B, of M

        tokens = forward_in_chunks(self._encode, images, mask, chunk=config.chunk)  # [2B, 1 + P, dim]
        embeddings = tokens[:, 0]  # [2B, dim]
        pooled = [embeddings]
        if self.n_local_views:
            crops = torch.cat(list(views[2:]))  # [L * B, 3, px, px]
            encode = partial(self.run(class_token), self.encoder)
            pooled.append(forward_in_chunks(encode, crops, chunk=config.chunk))  # [L * B, dim]
        parts = self._class_terms(torch.cat(pooled), class_targets)
        weights = mask_weights(mask).flatten()[masked] / len(images)  # [M]
        parts["ibot"] = self._ibot(tokens[:, 1:].flatten(0, 1)[masked], patch_targets, weights)
        parts["regulariser"] = self._regulariser(embeddings)
        loss = torch.stack([self._weights()[name] * part for name, part in parts.items()]).sum()
        detached = {name: part.detach() for name, part in parts.items()}
        return {"loss": loss, **detached, "feature_std": feature_std(embeddings)}

    def _weights(self) -> dict[str, float]:
        config = self.config
        # DINOv2 averages over view pairs, and divides by one pair too many where there are no local views.
        pairs = {"global": 2, "local": 2 * self.n_local_views}
        share = {name: count / sum(pairs.values()) for name, count in pairs.items()}
        return {
            "dino_global": share["global"] if config.global_weight is None else config.global_weight,
            "dino_local": share["local"] if config.local_weight is None else config.local_weight,
            "ibot": config.ibot_weight,
            "regulariser": {"koleo": config.koleo_weight, "kde": config.kde_weight, "none": 0.0}[config.regulariser],
        }

    def _draw_mask(self, images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, int]:
        config, grid = self.config, self.encoder.patch_embed.grid_size[0]
        least, largest = (round(grid * grid * share) for share in config.mask_ratio)
        n_blocks = round(len(images) * config.mask_probability)
        counts = [masked_patches(i, n_blocks=n_blocks, least=least, largest=largest) for i in range(n_blocks)]
        home = images.device if generator is None else generator.device
        image = torch.arange(len(images), device=home)
        on_device = masked_patches(image, n_blocks=max(n_blocks, 1), least=least, largest=largest)
        mask = block_mask(torch.where(image < n_blocks, on_device, 0), grid=grid, generator=generator)
        return mask.to(images.device), sum(counts)

    def _encode(self, images: Tensor, mask: Tensor) -> Tensor:
        return self.run(forward_tokens)(self.encoder, images, mask, self.mask_token)

    @torch.no_grad()
    def _targets(self, images: Tensor, masked: Tensor, temperature: float) -> tuple[Targets, Targets]:
        encode = partial(self.run(forward_tokens), self.teacher)
        tokens = forward_in_chunks(encode, images, chunk=self.config.chunk)  # [2B, 1 + P, dim]
        patches = tokens[:, 1:].flatten(0, 1)[masked]  # [M, dim]
        class_targets = self._targets_of("dino", tokens[:, 0], self.dino_center, temperature)
        return class_targets, self._targets_of("ibot", patches, self.ibot_center, temperature)

    def _targets_of(self, kind: Literal["dino", "ibot"], tokens: Tensor, center: Tensor, temperature: float) -> Targets:
        """The teacher's of tokens [N, dim]; the centre moves on in training."""
        config, head = self.config, head_of(self.teacher_heads, kind)
        features, prototypes = head.bottleneck(tokens), head.prototypes()
        if config.centering == "sinkhorn":
            return sinkhorn_targets(
                features,
                prototypes,
                teacher_temperature=temperature,
                iterations=config.sinkhorn_iterations,
                chunk_rows=config.chunk_rows,
                run=self.run,
            )
        targets = softmax_targets(features, prototypes, center, teacher_temperature=temperature)
        if self.training:
            center.copy_(updated_center(center, features, prototypes, momentum=config.center_momentum))
        return targets

    def _class_terms(self, embeddings: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Mean over the pairs of a student view and a teacher view, globals (never the same view) and locals apart."""
        head, teachers = head_of(self.heads, "dino"), targets.features[0].unflatten(0, (2, -1))  # [2, B, C]
        prototypes, n_cells = head.prototypes(), teachers.shape[1]
        students = head.bottleneck(embeddings).unflatten(0, (-1, n_cells))  # [2 + L, B, C]
        both, local = students[:2].flatten(0, 1)[None], students[2:]  # [1, 2B, C], [L, B, C]
        other = targets._replace(features=teachers.flip(0).flatten(0, 1)[None])
        terms = {
            "dino_global": self._cross_entropy(both, prototypes, other) / (2 * n_cells),
            "dino_local": prototypes.new_zeros(()),
        }
        if len(local):
            total = self._cross_entropy(local, prototypes, targets._replace(features=teachers))
            terms["dino_local"] = total / (2 * len(local) * n_cells)
        return terms

    def _ibot(self, tokens: Tensor, targets: Targets, weights: Tensor) -> Tensor:
        """Mean over the masked patches of an image, then over all images, of which one without any counts as 0."""
        head = head_of(self.heads, "ibot")
        return self._cross_entropy(head.bottleneck(tokens)[None], head.prototypes(), targets, weights)

    def _cross_entropy(
        self, features: Tensor, prototypes: Tensor, targets: Targets, weights: Tensor | None = None
    ) -> Tensor:
        return chunked_cross_entropy(
            features,
            prototypes,
            targets,
            student_temperature=self.config.student_temperature,
            weights=weights,
            chunk_rows=self.config.chunk_rows,
            run=self.run,
        )

    def _regulariser(self, embeddings: Tensor) -> Tensor:
        """Sum over the global views, as DINOv2 does."""
        config, (first, second) = self.config, embeddings.chunk(2)
        if config.regulariser == "koleo":
            return koleo(first) + koleo(second)
        if config.regulariser == "kde":
            return kde(first, kappa=config.kde_kappa) + kde(second, kappa=config.kde_kappa)
        return embeddings.new_zeros((), dtype=torch.float32)

    def param_groups(self) -> list[dict[str, Any]]:
        """Layer-wise learning rates; no weight decay on biases, norms and LayerScale; the prototypes apart."""
        groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                wd_scale = 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0
                key = (self._lr_scale(name), wd_scale, "last_layer" in name)
                groups.setdefault(key, []).append(parameter)
        return [
            param_group(params, lr_scale=lr_scale, wd_scale=wd_scale, last_layer=last_layer)
            for (lr_scale, wd_scale, last_layer), params in groups.items()
        ]

    def _lr_scale(self, name: str) -> float:
        top = len(self.encoder.blocks) + 1
        if name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith(("encoder.patch_embed.", "encoder.pos_embed", "encoder.cls_token", "mask_token")):
            layer = 0
        else:
            layer = top
        patches = self.config.patch_embed_lr if "patch_embed" in name else 1.0
        return self.config.layer_decay ** (top - layer) * patches

    def schedules(self, *, epochs: float, steps_per_epoch: int, batch: int) -> Schedules:
        """lr = base_lr * sqrt(batch / 1024) after a linear warmup, cosine to min_lr."""
        config = self.config
        (cold, warm), (light, heavy) = config.teacher_temperature, config.weight_decay
        return Schedules(
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            lr=Curve(
                config.base_lr * math.sqrt(batch / 1024), config.min_lr, epochs, warmup_epochs=config.warmup_epochs
            ),
            weight_decay=Curve(light, heavy, epochs),
            momentum=Curve(config.momentum, 1.0, epochs),
            teacher_temperature=Curve(cold, warm, config.teacher_temperature_epochs, shape="linear"),
            freeze_last_layer_epochs=config.freeze_last_layer_epochs,
        )

    def clip_gradients(self) -> Tensor | None:
        """Clip the backbone (with the mask token) and the heads, each to ``clip_norm``; returns the norm of both."""
        if self.config.clip_norm is None:
            return None
        modules = ([*self.encoder.parameters(), self.mask_token], list(self.heads.parameters()))
        return torch.stack([nn.utils.clip_grad_norm_(params, self.config.clip_norm) for params in modules]).norm()

    def after_step(self, values: StepValues) -> None:
        """The moving average follows the optimiser."""
        self.update_teacher(values.momentum)

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student."""
        ema_update(self.teacher, self.encoder, momentum=momentum)
        ema_update(self.teacher_heads, self.heads, momentum=momentum)


def head_of(heads: nn.ModuleDict, kind: Literal["dino", "ibot"]) -> DinoHead:
    """The head for class tokens or patches: one for both, unless iBOT has its own."""
    head = heads[kind if kind in heads else "dino"]
    assert isinstance(head, DinoHead)
    return head


IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


def masked_patches(i: IntOrTensor, *, n_blocks: int, least: int, largest: int) -> IntOrTensor:
    """Masked patches of the i-th of ``n_blocks`` masked images: ``least`` to ``largest``, spread evenly.

    DEVIATION: DINOv2 draws the share of each image within its stratum. Here each stratum has its number, in integers,
    so that the host knows how many tokens of a batch are masked without waiting for the device.
    """
    return least + (2 * i + 1) * (largest - least + 1) // (2 * n_blocks)


def block_mask(counts: Tensor, *, grid: int, generator: torch.Generator | None = None) -> Tensor:
    """A block of masked patches in each image: counts int [B] -> bool [B, grid * grid]; the counts are shuffled.

    DEVIATION: DINOv2 draws rectangles until enough patches are masked; on a 5x5 grid that stops at 10 of them and at
    times at none. Here the patches nearest to a random centre are masked, by a distance with a random aspect ratio
    (0.3 to 1 / 0.3, as DINOv2's rectangles), so the count is met exactly.
    """
    n, device = len(counts), counts.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    stretch = torch.exp((draw(n, 1) - 0.5) * math.log(1 / 0.3))  # [B, 1], square root of the aspect ratio
    center_y, center_x = draw(n, 1) * grid - 0.5, draw(n, 1) * grid - 0.5  # [B, 1]
    cell = torch.arange(grid * grid, device=device)  # [P]
    y, x = cell // grid, cell % grid
    distance = torch.maximum((y - center_y).abs() * stretch, (x - center_x).abs() / stretch)  # [B, P]
    order = distance.argsort(dim=1).argsort(dim=1)  # [B, P], 0 is the nearest patch
    return order < counts[draw(n).argsort()][:, None]
