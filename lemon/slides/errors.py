"""What can be wrong with a slide."""

from __future__ import annotations


class SlideError(Exception):
    """A slide cannot be used; the message is the reason that its row in the ledger gives."""


class RegionError(Exception):
    """One region cannot be read, also after the slide was opened anew."""
