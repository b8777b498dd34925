"""Uniform random selection by rank: a stable hash of an id, so that sampling is a filter and samples are nested."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def rank_of(ids: Iterable[str]) -> np.ndarray:
    """Rank of each id, float64 [N] in [0, 1): uniform over ids, the same on every machine and in every run.

    The first 53 bits of BLAKE2b, which is all that a float64 holds.
    """
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in ids)
    return np.array([int.from_bytes(digest, "big") >> 11 for digest in digests], np.float64) / (1 << 53)
