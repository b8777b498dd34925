"""How often work on an item began in a run without coming to an end, as when it kills its worker each time."""

from __future__ import annotations

from lemon.runtime.records import OWN
from lemon.runtime.store import Store

FOLDER = f"{OWN}/attempts"


def begin_attempt(store: Store, stem: str, *, run_id: str) -> int:
    """Leave a mark that work on an item begins; returns how many marks of this run were there.

    Attempts of other runs do not count: that a whole job was killed says nothing against the item.
    """
    earlier = sum(f"/{run_id}-" in name for name in store.list(f"{FOLDER}/{stem}"))
    store.write_own(f"{FOLDER}/{stem}/{run_id}-{earlier}", b"")
    return earlier


def end_attempts(store: Store, stem: str) -> None:
    """Forget the attempts of an item, whose row is committed."""
    store.delete(f"{FOLDER}/{stem}")
