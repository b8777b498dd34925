"""Embeds one slide at a time with an encoder on its device. No Ray in here."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace

import pyarrow as pa

from lemon import schema
from lemon.cells.names import shard_name
from lemon.embed.config import EmbedConfig
from lemon.embed.context import Context, Nucleus
from lemon.embed.ledger import EmbedLedger
from lemon.embed.names import embeddings_name
from lemon.embed.stream import PARQUET_OPTIONS, SlideCells, embedding_rows
from lemon.encoders.device import choose_device
from lemon.encoders.open import Encoder, load_encoder
from lemon.errors import ConfigError
from lemon.runtime.metrics import Stopwatch
from lemon.runtime.pool import Worker
from lemon.runtime.shards import ShardError, write_shard
from lemon.runtime.store import Store
from lemon.schema import EmbeddedRow, SlideRow
from lemon.slides.errors import RegionError, SlideError


def open_encoder(model: str, *, key: str = "model", of_cells: bool = True) -> Encoder:
    """The encoder that ``model=``, or another key, names, on the CPU. Raises ConfigError, also for one of fields where
    one ``of_cells`` is needed."""
    try:
        encoder = load_encoder(model)
        if of_cells:
            encoder.check_of_cells()
        return encoder
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from None


def embed_shard(
    slide: SlideCells, *, output: Store, name: str, dtype: str = "float16", context: Context | None = None
) -> str:
    """Write the embeddings of a slide's cells, in the order of its shard, atomically; returns the digest of the table.

    Args:
        slide: the cells, and their encoder.
        output, name: where the table of ``schema.embeddings`` goes.
        dtype: float16 or float32, of the stored vectors.
        context: what of their surroundings vectors hold; None: nothing.

    Raises:
        ShardError: the shard cannot be read, is damaged or has other rows, or a vector does not fit dtype.
        SlideError, RegionError: the tissue around a cell cannot be read.
        OSError, pa.ArrowException: the output cannot be written.
    """
    encoder, context = slide.encoder, context or Nucleus()
    table = schema.embeddings(context.width(encoder.width), dtype=pa.type_for_alias(dtype))
    fingerprint, precision = context.fingerprint(encoder), "bf16" if slide.bf16 else "fp32"
    facts = {"model": encoder.name, "model_fingerprint": fingerprint, "precision": precision}
    if context.facts is not None:
        facts["context"] = json.dumps(context.facts)
    with (
        write_shard(output, name, schema.marked(table, **facts), **PARQUET_OPTIONS) as written,
        contextlib.closing(context.vectors(slide)) as pieces,
    ):
        for batch, vectors in pieces:
            written.write(embedding_rows(batch, vectors, table=table, fingerprint=fingerprint))
    return written.digest


class Embedder(Worker[SlideRow, EmbeddedRow]):
    """Writes the embeddings of one slide at a time.

    Args:
        encoder: the encoder where it is open already; None opens ``config.model``.
        context: what of their surroundings vectors hold, where it is open already; None opens ``config.context``.

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
        context: Context | None = None,
    ) -> None:
        self.config, self.ledger, self.cells = config, ledger, cells
        device = choose_device(config.device)
        self.encoder = (encoder or open_encoder(config.model)).to(device)
        self.context = (context or config.context.open()).to(device)
        if (here := self.context.fingerprint(self.encoder)) != ledger.spec.model_fingerprint:
            raise ConfigError(
                f"model: {config.model} is {here} here; expected {ledger.spec.model_fingerprint}, "
                "as where the job was started"
            )

    def work(self, item: SlideRow) -> EmbeddedRow:
        """Embed and commit a slide; returns its row of the ledger, ``failed`` where its cells cannot be embedded."""
        start, slide_id, device = time.perf_counter(), item.slide_id, Stopwatch()
        try:
            self.ledger.discard(slide_id)
            self.context.check_slide(item)
            cells = SlideCells(
                self.cells,
                shard_name(slide_id),
                item.n_cells,
                self.encoder,
                bf16=self.config.precision == "bf16",
                digest=item.cells_digest,
                path=item.path,
                progress=self.progress,
                device=device,
            )
            name = embeddings_name(slide_id)
            digest = embed_shard(
                cells, output=self.ledger.store, name=name, dtype=self.config.dtype, context=self.context
            )
        except ShardError as error:
            return self.fail(item, str(error))
        except (SlideError, RegionError) as error:
            return self.fail(item, f"context: {item.path or 'the slide'}: {error}")
        finally:
            self.device_s += device.seconds
        seconds = round(time.perf_counter() - start, 3)
        row = EmbeddedRow(slide_id=slide_id, status="done", n_cells=item.n_cells, cells_digest=item.cells_digest)
        return self.ledger.commit(replace(row, embeddings_digest=digest, total_s=seconds))

    def fail(self, item: SlideRow, reason: str) -> EmbeddedRow:
        """Give a slide up."""
        row = EmbeddedRow(slide_id=item.slide_id, status="failed", n_cells=0, cells_digest=item.cells_digest)
        return self.ledger.commit(replace(row, error=" ".join(reason.split())))
