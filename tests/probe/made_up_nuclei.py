"""Embedded nuclei of three hospitals with known shares of class, hospital and slide in their embeddings."""

from __future__ import annotations

import numpy as np

from lemon.probe.nuclei import Nuclei


def nuclei(
    n: int = 900,
    *,
    of_class: float = 0,
    of_batch: float = 0,
    of_slide: float = 0,
    mimicry: float = 0,
    slides: int = 12,
    width: int = 8,
    seed: int = 0,
) -> Nuclei:
    """Two classes, three hospitals; each strength is how far apart, in standard deviations of the noise, they lie.

    ``mimicry``: at the second hospital every nucleus looks more like the second class, as by its stain.
    """
    generator = np.random.default_rng(seed)
    labels, slide = generator.integers(0, 2, n), generator.integers(0, slides, n)
    hospital = slide % 3
    embedding = generator.normal(size=(n, width))
    embedding[:, 0] += of_class * labels + mimicry * (hospital == 1)
    embedding[:, 1:5] += of_batch * hospital[:, None]
    embedding += of_slide * generator.normal(size=(slides, width))[slide]
    return Nuclei(embedding.astype(np.float32), labels, np.array(["h0", "h1", "h2"])[hospital], slide.astype(str))
