"""A small probe during training: logistic regression on labelled cells, slides held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from lemon.cells.labels import read_labels
from lemon.cells.shard import images_from_arrow
from lemon.encoders.features import encode_cells
from lemon.errors import ConfigError
from lemon.pretrain.config import OnlineProbeConfig
from lemon.runtime.store import Store
from lemon.views.policy import Policy

FOLDS = 3


@dataclass
class OnlineProbe:
    """Labelled cells: images uint8 [N, 60, 60, 3], labels [N], groups (slides) [N]."""

    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    policy: Policy

    @classmethod
    def open(cls, config: OnlineProbeConfig, *, policy: Policy) -> OnlineProbe:
        """Read the labels and their cells. Raises ConfigError for a missing column, or labels that match no cell."""
        wanted = read_labels(config.labels, key="probe.labels")
        store = Store(config.cells)
        cells = [store.read_table(name, columns=["cell_id", "slide_id", "image"]) for name in store.list("cells")]
        images, labels, groups = [], [], []
        for part in cells:
            ids = part["cell_id"].to_pylist()
            rows = [index for index, cell_id in enumerate(ids) if cell_id in wanted]
            images.append(images_from_arrow(part["image"])[rows])
            labels += [wanted[ids[index]] for index in rows]
            groups += [part["slide_id"][index].as_py() for index in rows]
        if len(set(groups)) < FOLDS or len(set(labels)) < 2:
            got = f"{len(labels)} labelled cells of {len(set(groups))} slides in {len(set(labels))} classes"
            raise ConfigError(f"probe.labels: got {got}; expected {FOLDS} slides and 2 classes at least")
        probe = cls(np.concatenate(images), np.array(labels), np.array(groups), policy)
        if any(len(set(probe.labels[train])) < 2 for train, _ in probe.folds()):
            raise ConfigError(
                "probe.labels: without some slides one class alone is left to learn from; expected classes that are "
                "spread over slides"
            )
        return probe

    def folds(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows to learn from and rows to be scored, slides apart."""
        yield from GroupKFold(FOLDS).split(self.images, groups=self.groups)

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """Balanced accuracy over held-out slides, of a frozen encoder."""
        device = next(encoder.parameters()).device
        crop_px = int(encoder.patch_embed.img_size[0])  # type: ignore[union-attr, index]
        features = encode_cells(
            encoder,
            torch.from_numpy(self.images).to(device),
            mean=self.policy.mean,
            std=self.policy.std,
            crop_px=crop_px,
        )
        values = features.cpu().numpy()
        predicted = np.empty_like(self.labels)
        for train, test in self.folds():
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200, class_weight="balanced"))
            predicted[test] = model.fit(values[train], self.labels[train]).predict(values[test])
        return {"balanced_accuracy": float(balanced_accuracy_score(self.labels, predicted))}
