"""Embeds one slide at a time with an encoder on its device. No Ray in here."""

from __future__ import annotations

import time
from typing import Any

import pyarrow as pa

from lemon.cells.names import shard_name
from lemon.embed.config import EmbedConfig
from lemon.embed.ledger import EmbedLedger
from lemon.embed.names import embeddings_name
from lemon.embed.stream import embed_shard
from lemon.encoders.device import choose_device
from lemon.encoders.open import Encoder, load_encoder
from lemon.errors import ConfigError
from lemon.runtime.pool import Worker
from lemon.runtime.shards import ShardError
from lemon.runtime.store import Store


def open_encoder(model: str) -> Encoder:
    """The encoder that ``model=`` names, on the CPU. Raises ConfigError."""
    try:
        return load_encoder(model)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"model: {' '.join(str(error).split())}") from None


class Embedder(Worker):
    """Writes the embeddings of one slide at a time.

    Args:
        encoder: the encoder where it is open already; None opens ``config.model``.

    Raises:
        ConfigError: the device is not there, or ``config.model`` here is not the model of the ledger.
    """

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
        if self.encoder.fingerprint != ledger.made.model_fingerprint:
            raise ConfigError(
                f"model: {config.model} is {self.encoder.fingerprint} here; expected {ledger.made.model_fingerprint}, "
                "as where the job was started"
            )

    def work(self, job: dict[str, Any]) -> dict[str, Any]:
        """Embed and commit a slide; returns its row of the ledger, ``failed`` where its cells cannot be embedded."""
        start, slide_id = time.perf_counter(), job["slide_id"]
        try:
            self.ledger.discard(slide_id)
            digest = embed_shard(
                self.cells,
                shard_name(slide_id),
                encoder=self.encoder,
                output=self.ledger.store,
                name=embeddings_name(slide_id),
                n_cells=job["n_cells"],
                dtype=self.config.dtype,
                precision=self.config.precision,
                digest=job["cells_digest"],
                progress=self.progress,
            )
        except ShardError as error:
            return self.fail(job, str(error))
        seconds = round(time.perf_counter() - start, 3)
        return self.ledger.commit(job | {"status": "done", "embeddings_digest": digest, "total_s": seconds})

    def fail(self, job: dict[str, Any], reason: str) -> dict[str, Any]:
        """Give a slide up."""
        return self.ledger.commit(job | {"status": "failed", "n_cells": 0, "error": " ".join(reason.split())})
