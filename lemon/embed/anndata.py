"""A slide as AnnData, for scanpy, squidpy, napari and TissUUmaps: one .h5ad file a slide."""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from lemon.embed.names import h5ad_name
from lemon.embed.slide import EmbeddedSlide
from lemon.schema import FOCUS, FOREIGN, MORPHOMETRICS

EMBEDDING = "X_lemon"
_COLUMNS = ("slide_id", "organ", "x_level0_px", "y_level0_px", "mpp", *MORPHOMETRICS, FOCUS, *FOREIGN)


def write_h5ad(slide: EmbeddedSlide) -> None:
    """Write ``h5ad/<slide>.h5ad``, atomically.

    Embeddings are added to the finished file a batch at a time; all else is in memory, under 1 kB a cell (measured by
    benchmarks/embed.py). Raises ShardError when a table cannot be read, OSError when the file cannot be written.
    """
    with slide.store.write_path(h5ad_name(slide.slide_id)) as path:
        annotated = annotate(slide)
        annotated.write_h5ad(path)
        with h5py.File(path, "r+") as file:
            shape = (annotated.n_obs, slide.spec.width)
            # Contiguous and not compressed: backed readers map it. The attributes are anndata's, for a plain array.
            target = file["obsm"].create_dataset(EMBEDDING, shape, np.float32)
            target.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            done = 0
            for vectors in slide.vectors():
                target[done : done + len(vectors)] = vectors
                done += len(vectors)


def annotate(slide: EmbeddedSlide) -> anndata.AnnData:
    """All but the embeddings. X has no columns, because some viewers make it dense. Raises ShardError."""
    rows = slide.table(*_COLUMNS)
    obs = rows.select(list(MORPHOMETRICS)).to_pandas()
    obs.index = pd.Index(rows["cell_id"].to_pylist(), dtype=object, name="cell_id")
    for column in ("slide_id", "organ"):
        obs[column] = rows[column].combine_chunks().dictionary_encode().to_pandas().array  # categories
    for column in (name for name in (FOCUS, *FOREIGN) if rows[name].null_count < len(rows)):
        values = rows[column].combine_chunks()
        obs[column] = (values.dictionary_encode() if column == "foreign_class" else values).to_pandas().array
    if (measured := slide.morphometry()) is not None:
        obs = obs.join(measured.to_pandas().set_axis(obs.index))
    uns: dict[str, object] = {"lemon": slide.facts(mpp=float(rows["mpp"][0].as_py()) if len(rows) else float("nan"))}
    codes = slide.cluster_codes()
    if slide.clusters is not None and codes is not None:
        names = [str(index) for index in range(len(slide.clusters.centres))]
        obs["cluster"] = pd.Categorical.from_codes(codes, names)
        uns["cluster_colors"] = np.array(slide.clusters.hex_colors, object)
    spatial = np.stack([rows["x_level0_px"].to_numpy(), rows["y_level0_px"].to_numpy()], axis=1)  # [N, 2]
    empty = sparse.csr_matrix((len(rows), 0), dtype=np.float32)
    return anndata.AnnData(empty, obs=obs, obsm={"spatial": spatial}, uns=uns)
