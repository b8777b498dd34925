"""Limits that the system sets to a process."""

from __future__ import annotations

import resource

_SPARE = 256
"""Open files that a process needs for all else."""


def allow_open_files(count: int) -> int:
    """Raise the number of files that this process may have open, as far as it is allowed; returns how many of
    ``count`` can be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count + _SPARE:
        soft = count + _SPARE if hard == resource.RLIM_INFINITY else min(count + _SPARE, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return count if soft == resource.RLIM_INFINITY else max(0, min(count, soft - _SPARE))
