"""LEMON: from whole-slide images to a foundation model of single-nucleus morphology.

``import lemon`` is light: it pulls in no torch, no Ray and no MLflow.
"""

__version__ = "0.1.0"
