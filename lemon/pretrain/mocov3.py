"""MoCo v3 (arXiv 2104.02057) on single nuclei: the paper's method, with its settings as defaults."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lemon.encoders.config import EncoderConfig
from lemon.encoders.vit import CellTransformer, build_vit, class_token, seeded
from lemon.pretrain.config import MoCoV3Config
from lemon.pretrain.heads import ema_update, forward_in_chunks, frozen_copy, moco_mlp
from lemon.pretrain.losses import feature_std, moco_contrastive
from lemon.pretrain.schedules import Curve, Method, Schedules, StepValues, param_group


class MoCoV3(Method):
    """Student (encoder, projector, predictor) and teacher (encoder, projector).

    The teacher's BatchNorm works on the statistics of its batch, as the student's, so it stays in training mode and
    its buffers are no part of the average.
    """

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
    def exported(self) -> CellTransformer:
        """The student's encoder, as released by the paper (``base_encoder``)."""
        return self.encoder

    def forward(
        self,
        views: Sequence[Tensor],
        *,
        values: StepValues,  # noqa: ARG002
        generator: torch.Generator | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """The symmetric contrastive loss of two views, float [B, 3, px, px] each.

        Both views pass the encoder as one batch, the heads one by one: BatchNorm takes the statistics of a view.
        """
        images = torch.cat(list(views))  # [2B, 3, px, px]
        chunk = self.config.chunk
        encode = self.run(class_token)
        features = forward_in_chunks(partial(encode, self.encoder), images, chunk=chunk)  # [2B, dim]
        q1, q2 = (self.predictor(self.projector(view)) for view in features.chunk(2))  # [B, out_dim]
        with torch.no_grad():
            targets = forward_in_chunks(partial(encode, self.teacher), images, chunk=chunk)  # [2B, dim]
            k1, k2 = map(self.teacher_projector, targets.chunk(2))
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

    def before_step(self, values: StepValues) -> None:
        """The moving average precedes the keys of the step."""
        self.update_teacher(values.momentum)

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student: parameters only."""
        ema_update(self.teacher, self.encoder, momentum=momentum)
        ema_update(self.teacher_projector, self.projector, momentum=momentum)
