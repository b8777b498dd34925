"""MoCo v3 (arXiv 2104.02057) on single nuclei: the paper's method, with its settings as defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lemon.config import Frozen
from lemon.encoders.vit import EncoderConfig, build_vit, seeded
from lemon.pretrain.heads import ema_update, forward_in_chunks, frozen_copy, moco_mlp
from lemon.pretrain.losses import feature_std, moco_contrastive
from lemon.pretrain.schedules import Curve, Schedules, StepValues, param_group


class MoCoV3Config(Frozen):
    """MoCo v3 for vision transformers; the LEMON paper states no other values."""

    name: Literal["mocov3"] = "mocov3"
    hidden_dim: int = Field(4096, ge=1, description="width of projector and predictor")
    out_dim: int = Field(256, ge=1, description="width of queries and keys")
    temperature: float = Field(0.2, gt=0)
    momentum: float = Field(0.99, ge=0, le=1, description="of the teacher at the start; rises to 1 (cosine)")
    base_lr: float = Field(1.5e-4, gt=0, description="learning rate a 256 cells of batch")
    warmup_epochs: float = Field(40, ge=0, description="linear warmup, then cosine to 0")
    weight_decay: float = Field(0.1, ge=0, description="on all parameters")
    betas: tuple[float, float] = (0.9, 0.999)
    freeze_patch_projection: bool = True
    chunk: int | None = Field(
        None, ge=1, description="crops whose activations are kept at a time: less memory, the same loss; null: all"
    )

    @property
    def label(self) -> str:
        """The row of the paper's Table 5."""
        return "MoCo v3"


class MoCoV3(nn.Module):
    """Student (encoder, projector, predictor) and teacher (encoder, projector); see ``schedules.Method``.

    The teacher's BatchNorm works on the statistics of its batch, as the student's, so it stays in training mode and
    its buffers are no part of the average.
    """

    n_global_views = 2
    n_local_views = 0

    def __init__(self, config: MoCoV3Config, encoder: EncoderConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        projector = [encoder.dim, config.hidden_dim, config.hidden_dim, config.out_dim]
        with seeded(seed):
            self.encoder = build_vit(encoder, init="mocov3")
            self.projector = moco_mlp(projector)
            self.predictor = moco_mlp([config.out_dim, config.hidden_dim, config.out_dim])
            if config.freeze_patch_projection:
                self.encoder.patch_embed.requires_grad_(False)
            self.teacher = frozen_copy(self.encoder, lambda: build_vit(encoder, init="mocov3"))
            self.teacher_projector = frozen_copy(self.projector, lambda: moco_mlp(projector))

    @property
    def exported(self) -> nn.Module:
        """The student's encoder, as released by the paper (``base_encoder``)."""
        return self.encoder

    def forward(
        self,
        views: Sequence[Tensor],
        *,
        values: StepValues,  # noqa: ARG002 - the protocol's
        generator: torch.Generator | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """The symmetric contrastive loss of two views, float [B, 3, px, px] each.

        Both views pass the encoder as one batch, the heads one by one: BatchNorm takes the statistics of a view.
        """
        images = torch.cat(list(views))  # [2B, 3, px, px]
        chunk = self.config.chunk
        features = forward_in_chunks(self.encoder, images, chunk=chunk)  # [2B, dim]
        q1, q2 = (self.predictor(self.projector(view)) for view in features.chunk(2))  # [B, out_dim]
        with torch.no_grad():
            k1, k2 = map(self.teacher_projector, forward_in_chunks(self.teacher, images, chunk=chunk).chunk(2))
        temperature = self.config.temperature
        loss = moco_contrastive(q1, k2, temperature=temperature) + moco_contrastive(q2, k1, temperature=temperature)
        return {"loss": loss, "feature_std": feature_std(features)}

    def param_groups(self) -> list[dict[str, Any]]:
        """One group: weight decay on all parameters."""
        return [param_group(p for p in self.parameters() if p.requires_grad)]

    def schedules(self, *, epochs: float, steps_per_epoch: int, batch: int) -> Schedules:
        """lr = base_lr * batch / 256 after a linear warmup, cosine to 0; momentum by cosine to 1."""
        config = self.config
        lr = config.base_lr * batch / 256
        return Schedules(
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            lr=Curve(lr, 0.0, epochs, warmup_epochs=config.warmup_epochs),
            weight_decay=Curve(config.weight_decay, config.weight_decay, epochs),
            momentum=Curve(config.momentum, 1.0, epochs),
            teacher_temperature=Curve(config.temperature, config.temperature, epochs),
        )

    def clip_gradients(self) -> Tensor | None:
        """MoCo v3 does not clip."""
        return None

    def before_step(self, values: StepValues) -> None:
        """The moving average precedes the keys of the step."""
        self.update_teacher(values.momentum)

    def after_step(self, values: StepValues) -> None:
        """Nothing: see ``before_step``."""

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student: parameters only."""
        ema_update(self.teacher, self.encoder, momentum=momentum)
        ema_update(self.teacher_projector, self.projector, momentum=momentum)
