"""What became of every slide in an output of embedding, and the model that the output was made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lemon.cells.names import geojson_name
from lemon.embed.names import (
    CENTRES,
    FOLDERS,
    SETTINGS,
    clusters_name,
    embeddings_name,
    h5ad_name,
    morphometry_name,
    spatialdata_name,
)
from lemon.runtime.ledger import Ledger
from lemon.runtime.store import Store
from lemon.schema import EmbeddedRow, SlideRow


@dataclass(frozen=True)
class EmbeddingSpec:
    """What all embeddings of an output have in common.

    ``context`` is what of their surroundings vectors hold, as its settings say it; None: nothing. The fingerprint is
    of the encoder and of these.
    """

    model: str
    model_fingerprint: str
    width: int
    dtype: str
    precision: str
    context: dict[str, Any] | None = None

    @property
    def context_name(self) -> str:
        """As ``context=`` has it."""
        return "nucleus" if self.context is None else str(self.context["name"])

    @property
    def title(self) -> str:
        """The model, with its context where it has one."""
        return self.model if self.context is None else f"{self.model}, context={self.context_name}"


class EmbedLedger(Ledger[EmbeddedRow]):
    """The ledger of one output, whose embeddings are all of one model."""

    def __init__(self, store: Store, spec: EmbeddingSpec) -> None:
        facts = {"model": spec.model, "model_fingerprint": spec.model_fingerprint}
        super().__init__(store, EmbeddedRow, facts=facts)
        self.spec = spec

    def discard(self, slide_id: str) -> None:
        """Forget a slide, its embeddings and what was made from them, because they are about to be replaced."""
        self.forget(slide_id)
        for name in (embeddings_name, morphometry_name, clusters_name, h5ad_name, geojson_name, spatialdata_name):
            self.store.delete(name(slide_id))

    def without_embeddings(self, slides: Sequence[SlideRow]) -> list[SlideRow]:
        """The slides whose cells, of this digest, are not embedded yet."""
        rows, lost = self.rows(), self.without_file((slide.slide_id for slide in slides), embeddings_name)
        return [
            each for each in slides if each.slide_id in lost or not self._is_up_to_date(rows.get(each.slide_id), each)
        ]

    def _is_up_to_date(self, row: EmbeddedRow | None, slide: SlideRow) -> bool:
        return (
            row is not None
            and row.status != "failed"
            and row.model_fingerprint == self.spec.model_fingerprint
            and (row.n_cells, row.cells_digest) == (slide.n_cells, slide.cells_digest)
        )


def _known_model_name(earlier: dict[str, str], spec: EmbeddingSpec) -> str | None:
    """What the model of an output was called, where it has the same weights."""
    return earlier["model"] if earlier.get("model_fingerprint") == spec.model_fingerprint else None


def open_ledger(store: Store, spec: EmbeddingSpec, *, overwrite: bool) -> EmbedLedger:
    """The ledger of an output; raises ConfigError when the output was begun with another model or other numbers."""
    earlier = {} if overwrite or not store.exists(SETTINGS) else store.read_json(SETTINGS, dict)
    if known := _known_model_name(earlier, spec):
        spec = replace(spec, model=known)  # the same weights from another folder
    ledger = EmbedLedger(store, spec)
    ledger.prepare_output(SETTINGS, asdict(spec), folders=(*FOLDERS, CENTRES), overwrite=overwrite)
    return ledger
