"""What the server that jobs are forked from imports: all that jobs need and that takes seconds."""

import mlflow  # noqa: F401
import ray.data
import ray.train
import ray.tune  # noqa: F401
import sklearn.linear_model  # noqa: F401

from lemon.cli import STAGES, _find

for stage in STAGES:
    _find(stage.config), _find(stage.job)
