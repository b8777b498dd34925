"""The code that MLflow runs to open an encoder of its registry: weights from safetensors, no pickle.

Nothing imports this file: ``lemon.runtime.tracking`` names it, and MLflow keeps a copy with each model and
executes that.
"""

from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

import lemon
from lemon.encoders.device import choose_device


class ServedEncoder(PythonModel):
    """uint8 [N, 60, 60, 3] at 0.25 um/px -> float32 [N, D], as ``lemon.load_encoder(...).embed`` gives it."""

    def load_context(self, context: Any) -> None:
        """Open the exported folder, on a GPU where there is one."""
        self._encoder = lemon.load_encoder(context.artifacts["encoder"], device=choose_device("auto"))

    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> np.ndarray:  # noqa: ARG002
        """Embeddings; MLflow has held the input against the model's signature."""
        return self._encoder.embed(model_input).cpu().numpy()


set_model(ServedEncoder())
