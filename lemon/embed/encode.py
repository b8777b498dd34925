"""Embeds one slide at a time with an encoder on its device. No Ray in here."""

from __future__ import annotations

import time
from dataclasses import replace

import pyarrow as pa

from lemon.cells.names import shard_name
from lemon.embed.config import EmbedConfig
from lemon.embed.ledger import EmbedLedger
from lemon.embed.names import embeddings_name
from lemon.embed.stream import embed_shard
from lemon.encoders.device import choose_device
from lemon.encoders.open import Encoder, load_encoder
from lemon.errors import ConfigError
from lemon.runtime.metrics import Stopwatch
from lemon.runtime.pool import Worker
from lemon.runtime.shards import ShardError
from lemon.runtime.store import Store
from lemon.schema import EmbeddedRow, SlideRow


def open_encoder(model: str) -> Encoder:
    """The encoder that ``model=`` names, on the CPU. Raises ConfigError."""
    try:
        return load_encoder(model)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"model: {' '.join(str(error).split())}") from None


class Embedder(Worker[SlideRow, EmbeddedRow]):
    """Writes the embeddings of one slide at a time.

    Args:
        encoder: the encoder where it is open already; None opens ``config.model``.

    Raises:
        ConfigError: the device is not there, or ``config.model`` here is not the model of the ledger.
    """

    stage = "embed"
    ledger: EmbedLedger
    fatal = (OSError, pa.ArrowException)

    def __init__(
        self,
        config: EmbedConfig,
        *,
        ledger: EmbedLedger,
        cells: Store,
        encoder: Encoder | None = None,
    ) -> None:
        self.config, self.ledger, self.cells = config, ledger, cells
        device = choose_device(config.device)
        self.encoder = (encoder or open_encoder(config.model)).to(device)
        if self.encoder.fingerprint != ledger.spec.model_fingerprint:
            raise ConfigError(
                f"model: {config.model} is {self.encoder.fingerprint} here; expected {ledger.spec.model_fingerprint}, "
                "as where the job was started"
            )

    def work(self, item: SlideRow) -> EmbeddedRow:
        """Embed and commit a slide; returns its row of the ledger, ``failed`` where its cells cannot be embedded."""
        start, slide_id, device = time.perf_counter(), item.slide_id, Stopwatch()
        try:
            self.ledger.discard(slide_id)
            digest = embed_shard(
                self.cells,
                shard_name(slide_id),
                encoder=self.encoder,
                output=self.ledger.store,
                name=embeddings_name(slide_id),
                n_cells=item.n_cells,
                dtype=self.config.dtype,
                precision=self.config.precision,
                digest=item.cells_digest,
                progress=self.progress,
                device=device,
            )
        except ShardError as error:
            return self.fail(item, str(error))
        finally:
            self.device_s += device.seconds
        seconds = round(time.perf_counter() - start, 3)
        row = EmbeddedRow(slide_id=slide_id, status="done", n_cells=item.n_cells, cells_digest=item.cells_digest)
        return self.ledger.commit(replace(row, embeddings_digest=digest, total_s=seconds))

    def fail(self, item: SlideRow, reason: str) -> EmbeddedRow:
        """Give a slide up."""
        row = EmbeddedRow(slide_id=item.slide_id, status="failed", n_cells=0, cells_digest=item.cells_digest)
        return self.ledger.commit(replace(row, error=" ".join(reason.split())))
