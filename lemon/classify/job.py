"""Few labels -> a class for every nucleus, what the classes add up to, and which cells to label next."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from lemon.cells.ledger import rows_with_cells
from lemon.cells.names import shard_name
from lemon.cells.sheet import crop_of_cell, draw_sheet, plain, shortened
from lemon.classify.choose import choose_next
from lemon.classify.config import ClassifyConfig
from lemon.classify.export import FILE_OF, colors_of, write_format
from lemon.classify.head import Head, HeldOut, fit_head, score_of
from lemon.classify.labels import UNKNOWN, Labelled, foreign_ids_of, read_labelled
from lemon.classify.spatial import count_rows, neighbour_counts, neighbourhood_rows, tissue_mm2
from lemon.embed.read import Embeddings, cells_of, open_embeddings
from lemon.embed.slide import EmbeddedSlide
from lemon.embed.stream import vectors_of
from lemon.errors import EXIT_OK, ConfigError
from lemon.runtime.console import stage_logger
from lemon.runtime.identifiers import file_stem
from lemon.runtime.lease import hold
from lemon.runtime.shards import ShardError, read_shard
from lemon.runtime.store import CIRCUMSTANCES, Store, fingerprint
from lemon.schema import CELLS, CLASSES, CountRow, NeighbourhoodRow, SlideRow, marked

logger = stage_logger(__name__, "classify")

COUNTS, NEIGHBOURHOOD, SCORE, GIVEN = "counts.csv", "neighbourhood.csv", "score.json", "given.csv"

OUTPUT_NAMES = ("classes", *FILE_OF, COUNTS, NEIGHBOURHOOD, SCORE, GIVEN)
"""What classification writes in its output, but for the sheets in next/, which people fill in."""

POOL = 20_000
"""Cells among which the next to label are sought: a random sample of all slides."""

WHOLE = 0.9
"""Share of a slide's nuclei that its cells must be for densities: crops at the slide's edge are left out."""


@dataclass(frozen=True)
class Source:
    """What is classified: embeddings, and where they are at hand the cells and the slides table's rows."""

    embeddings: Embeddings
    cells: Store | None
    slides: dict[str, SlideRow]


def main(config: ClassifyConfig) -> int:
    """Fit, score, classify, write; returns the exit code. Raises ConfigError."""
    embeddings = open_embeddings(config.embeddings)
    cells = cells_of(embeddings, config.cells)
    wanted = [kind for kind in config.format if kind != "parquet"]
    if cells is None and wanted:
        raise ConfigError(f"format: got {wanted[0]}, which shows nuclei; expected cells=the output of lemon curate")
    source = Source(embeddings, cells, {row.slide_id: row for row in rows_with_cells(cells)} if cells else {})
    paths = [config.labels] if isinstance(config.labels, str) else config.labels
    labelled = read_labelled(paths, embeddings, cells)
    head, held_out = fit_head(
        labelled.vectors,
        labelled.codes,
        groups=labelled.slide_ids,
        n_classes=len(labelled.names),
        seed=config.seed,
        unknown=config.unknown,
    )
    score = describe_score(labelled, held_out, seed=config.seed)
    logger.info(score["line"])
    with hold(config.output, stage="classify", names=OUTPUT_NAMES) as store:
        store.write_json(SCORE, score)
        with store.write(GIVEN) as stream:
            columns = {"cell_id": list(labelled.given), "label": list(labelled.given.values())}
            pyarrow.csv.write_csv(pa.table(columns), stream)
        _classify(source, labelled, head, store, config=config)
        if config.next:
            _write_next(source, labelled, head, store, config=config)
    logger.info(f"{embeddings.n_cells:,} cells of {len(embeddings.rows)} slides classified; {store.uri}")
    return EXIT_OK


def describe_score(labelled: Labelled, held_out: HeldOut, *, seed: int) -> dict[str, Any]:
    """What cross-validation says of the head, with ``line`` for people; clusters are not scored."""
    by_cell = labelled.by_cell[held_out.rows]
    scored = HeldOut(held_out.rows[by_cell], held_out.probability[by_cell], held_out.by_slide)
    counts = {name: int((labelled.codes == code).sum()) for code, name in enumerate(labelled.names)}
    facts: dict[str, Any] = {"labels": counts, "n_scored": len(scored.rows), "held_out": None}
    what = f"{len(labelled.codes):,} labels ({', '.join(f'{plain(name)} {count}' for name, count in counts.items())})"
    if len(np.unique(labelled.codes[scored.rows])) < 2:
        why = "only clusters are named" if not labelled.by_cell.any() else "too few labels of each class"
        return facts | {"line": f"{what}; no score: {why}, label cells to have one"}
    score = score_of(scored, labelled.codes, labelled.slide_ids, seed=seed)
    truth, guess = labelled.codes[scored.rows], scored.probability.argmax(axis=1)
    recall = {
        labelled.names[code]: round(float((guess[truth == code] == code).mean()), 4)
        for code in np.unique(truth).tolist()
    }
    held = "whole slides held out" if held_out.by_slide else "cells of one slide held out, other slides may be worse"
    bounds = "" if np.isnan(score.low) else f" ({score.low:.3f} to {score.high:.3f})"
    return facts | {
        "held_out": "slides" if held_out.by_slide else "cells",
        "balanced_accuracy": round(score.value, 4),
        "interval": None if np.isnan(score.low) else [round(score.low, 4), round(score.high, 4)],
        "recall": recall,
        "line": f"{what}; balanced accuracy {score.value:.3f}{bounds} by cross-validation, {held}",
    }


def classes_name(slide_id: str) -> str:
    """The class of each of a slide's cells."""
    return f"classes/{file_stem(slide_id)}.parquet"


def next_name(n_labels: int) -> str:
    """The sheet of cells to label after so many: each has its own name, so that none that was filled in is lost."""
    return f"next/after_{n_labels}.csv"


def _classify(source: Source, labelled: Labelled, head: Head, store: Store, *, config: ClassifyConfig) -> None:
    """Classes, formats and counts of every slide, one at a time."""
    names = (*labelled.names, UNKNOWN)
    colors = colors_of(labelled.names)
    made_from = _made_from(labelled, config, source)
    counts: list[CountRow] = []
    around: list[NeighbourhoodRow] = []
    sampled = 0
    for slide_id, row in source.embeddings.rows.items():
        name = f"{made_from}{row.embeddings_digest}"
        table = _classes_of(source, slide_id, labelled, head, store, made_from=name)
        codes = pc.index_in(table["label"], pa.array(names)).to_numpy().astype(np.int64)
        place_um = _places_um(source, slide_id)
        sampled += place_um is None and source.cells is not None
        area = None if place_um is None else tissue_mm2(place_um)
        counts += count_rows(slide_id, codes, names, area_mm2=area)
        if place_um is not None:
            pairs = neighbour_counts(
                place_um, codes, n_classes=len(names), neighbours=config.neighbours, radius_um=config.radius_um
            )
            around += neighbourhood_rows(slide_id, pairs, codes, names)
        for kind in set(config.format) & set(FILE_OF):
            if not store.exists(FILE_OF[kind](slide_id)):
                write_format(kind, store, _slide(source, slide_id), table, colors)
    for name, rows in ((COUNTS, CountRow.table(counts)), (NEIGHBOURHOOD, NeighbourhoodRow.table(around))):
        with store.write(name) as stream:
            pyarrow.csv.write_csv(rows, stream)
    if sampled:
        logger.info(f"  {sampled} slides hold a sample of their nuclei: no densities and neighbourhoods of them")
    if source.cells is None:
        logger.info("  no densities and neighbourhoods: cells=the output of lemon curate tells the slides' resolution")


def _made_from(labelled: Labelled, config: ClassifyConfig, source: Source) -> str:
    """Names all that classes depend on besides a slide's own embeddings; with cells they have foreign ids."""
    labels = [labelled.cell_ids, labelled.names, labelled.codes.tolist(), labelled.by_cell.tolist()]
    known = source.cells is not None
    return fingerprint([labels, config.seed, config.unknown, asdict(source.embeddings.spec), CLASSES.names, known])


def _classes_of(
    source: Source, slide_id: str, labelled: Labelled, head: Head, store: Store, *, made_from: str
) -> pa.Table:
    """A slide's classes; those of an earlier run by the same labels stay, else the files made of them go."""
    name = classes_name(slide_id)
    if store.circumstances(name) == made_from:
        return store.read_table(name)
    for name_of in FILE_OF.values():
        store.delete(name_of(slide_id))
    given, done = labelled.given, 0
    foreign = _foreign_ids(source, slide_id)
    parts = []
    for batch in source.embeddings.batches(slide_id, ["cell_id", "embedding"]):
        ids, vectors = batch["cell_id"].to_pylist(), vectors_of(batch["embedding"]).astype(np.float32)
        probability, distance = head.probabilities(vectors), head.distances(vectors)
        likely = [labelled.names[code] for code in probability.argmax(axis=1)]
        far = [False] * len(ids) if head.limit is None else (distance > head.limit).tolist()
        labels = [
            given.get(cell_id) or (UNKNOWN if unlike else name)
            for cell_id, unlike, name in zip(ids, far, likely, strict=True)
        ]
        was_given = [cell_id in given for cell_id in ids]
        columns = [ids, labels, likely, probability.max(axis=1), distance, was_given, foreign[done : done + len(ids)]]
        done += len(ids)
        parts.append(pa.table([pa.array(column) for column in columns], names=CLASSES.names).cast(CLASSES))
    table = pa.concat_tables(parts).replace_schema_metadata(marked(CLASSES, **{CIRCUMSTANCES: made_from}).metadata)
    store.write_table(name, table, compression="zstd")
    return table


def _foreign_ids(source: Source, slide_id: str) -> list[str | None]:
    """The id that each embedded cell had in ``cells_from=``, in their order; None of each without cells at hand."""
    if source.cells is None or slide_id not in source.slides:
        return [None] * source.embeddings.rows[slide_id].n_cells
    ids, foreign = foreign_ids_of(source.cells, slide_id)
    embedded = [each for batch in source.embeddings.batches(slide_id, ["cell_id"]) for each in batch[0].to_pylist()]
    if ids != embedded:
        raise ConfigError(f"cells: {slide_id}: cells and embeddings differ; lemon embed again mends it")
    return foreign


def _places_um(source: Source, slide_id: str) -> np.ndarray | None:
    """Places of a slide's nuclei in um, float [N, 2]; None where they are not known, or are those of a sample."""
    row = source.slides.get(slide_id)
    if source.cells is None or row is None or row.n_cells < WHOLE * (row.n_nuclei or row.n_cells):
        return None
    try:
        cells = next(read_shard(source.cells, shard_name(slide_id), schema=CELLS, columns=["mpp"], batch_rows=16))
    except ShardError as error:
        raise ConfigError(f"cells: {source.cells.uri}/{error}") from None
    axes = ["x_level0_px", "y_level0_px"]
    batches = source.embeddings.batches(slide_id, axes)
    place = np.concatenate([np.stack([batch[axis].to_numpy() for axis in axes], axis=1) for batch in batches])
    return np.asarray(place * cells["mpp"][0].as_py())


def _slide(source: Source, slide_id: str) -> EmbeddedSlide:
    if source.cells is None or slide_id not in source.slides:
        raise ConfigError(f"cells: no cells of {slide_id}; expected the table that was embedded")
    embeddings = source.embeddings
    return EmbeddedSlide(
        slide_id, source.slides[slide_id].path, source.cells, embeddings.store, embeddings.spec, clusters=None
    )


def _write_next(source: Source, labelled: Labelled, head: Head, store: Store, *, config: ClassifyConfig) -> None:
    """The cells to label next, as a sheet to fill in and, with cells, as a picture."""
    sheet = next_name(len(labelled.cell_ids))
    if not store.records.agree(sheet):
        logger.info(f"  {store.uri}/{sheet} was filled in since: it stays, give it by labels= too")
        return
    pool = sample_of(source.embeddings, size=POOL, without=set(labelled.cell_ids))
    vectors = np.concatenate([labelled.vectors, pool.vectors])
    n_labelled = len(labelled.cell_ids)
    probability = head.probabilities(vectors)
    chosen = choose_next(vectors, range(n_labelled), probability, count=config.next, seed=config.seed)
    rows = [number - n_labelled for number in chosen]
    suggested = [labelled.names[code] for code in probability[chosen].argmax(axis=1)]
    confidence = np.round(probability[chosen].max(axis=1), 3).tolist()
    columns = {
        "cell_id": [pool.cell_ids[row] for row in rows],
        "label": [""] * len(rows),
        "suggested": suggested,
        "confidence": confidence,
        "slide_id": [pool.slide_ids[row] for row in rows],
        "x_level0_px": [pool.places[row][0] for row in rows],
        "y_level0_px": [pool.places[row][1] for row in rows],
    }
    with store.write(sheet) as stream:
        pyarrow.csv.write_csv(pa.table(columns), stream)
    if source.cells is not None and rows:
        crops = [
            crop_of_cell(source.cells, pool.slide_ids[row], pool.rows[row], cell_id=pool.cell_ids[row]) for row in rows
        ]
        captions = [
            f"{number}: {sure:.2f}\n{shortened(name)}?\n{shortened(slide)}"
            for number, (name, sure, slide) in enumerate(
                zip(suggested, confidence, columns["slide_id"], strict=True), 1
            )
        ]
        store.write_bytes(f"{sheet.removesuffix('.csv')}.png", draw_sheet(crops, captions))
    logger.info(f"  {len(rows)} cells to label next: fill in label in {store.uri}/{sheet} and give it by labels= too")
    if source.cells is not None and rows:
        logger.info("  or label them by keys, in the page of")
        logger.info(f"  {atlas_command(source, store, sheet, with_labels=bool(labelled.given))}")


def atlas_command(source: Source, store: Store, sheet: str, *, with_labels: bool) -> str:
    """The command that opens the cells of a sheet in the atlas, coloured by the labels so far where there are some."""
    assert source.cells is not None
    words = {"embeddings": source.embeddings.store.uri, "cells": source.cells.uri, "output": f"{store.uri}/atlas"}
    words |= {"labels": f"{store.uri}/{GIVEN}"} if with_labels else {}
    words |= {"show": f"{store.uri}/{sheet}"}
    return shlex.join(["lemon", "atlas", *(f"{key}={value}" for key, value in words.items())])


@dataclass
class Pool:
    """Cells that could be labelled: ids, slides, rows there, places in level-0 px and vectors float32 [N, D]."""

    cell_ids: list[str]
    slide_ids: list[str]
    rows: list[int]
    places: list[tuple[float, float]]
    vectors: np.ndarray


def sample_of(embeddings: Embeddings, *, size: int, without: set[str]) -> Pool:
    """About ``size`` cells, the same share of each slide: its first, as cells lie in random order."""
    share = min(1.0, size / embeddings.n_cells)
    pool = Pool([], [], [], [], np.zeros((0, embeddings.spec.width), np.float32))
    vectors = [pool.vectors]
    for slide_id, row in embeddings.rows.items():
        start, left = 0, max(1, round(share * row.n_cells))
        for batch in embeddings.batches(slide_id, ["cell_id", "x_level0_px", "y_level0_px", "embedding"]):
            some = batch.slice(0, left)
            ids = some["cell_id"].to_pylist()
            free = np.array([number for number, cell_id in enumerate(ids) if cell_id not in without], np.int64)
            pool.cell_ids += [ids[number] for number in free]
            pool.slide_ids += [slide_id] * len(free)
            pool.rows += (start + free).tolist()
            x, y = (some[axis].to_numpy()[free].tolist() for axis in ("x_level0_px", "y_level0_px"))
            pool.places += zip(x, y, strict=True)
            vectors.append(vectors_of(some["embedding"])[free].astype(np.float32))
            start, left = start + len(batch), left - len(some)
            if not left:
                break
    pool.vectors = np.concatenate(vectors)
    return pool
