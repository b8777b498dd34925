"""The demo: every stage on one slide, with settings for two cores."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from pathlib import Path

import shapely

from lemon import curate
from lemon.cells.names import geojson_name, shard_name
from lemon.cells.shard import images_from_arrow
from lemon.config import EXIT_OK, CurateConfig, load
from lemon.embed.config import EmbedConfig
from lemon.pretrain.config import FitStainConfig, PretrainConfig
from lemon.probe.config import ProbeConfig
from lemon.report.pictures import draw_curation
from lemon.slides.reader import SlideReader
from lemon.slides.samples import fetch_real_slide, make_synthetic_slide
from lemon.storage import Store
from lemon.tracking import metric_history

# About a minute on two cores: an encoder of 0.5 M parameters sees each cell a few times. It shows the chain, not skill.
PRETRAIN = (
    "variant=smoke encoder.name=vit_demo encoder.dim=96 encoder.depth=4 encoder.heads=3 ssl.hidden_dim=256 batch=128 "
    "images_per_epoch=2560 epochs=8 log_every=5 checkpoint_every=80"
)


def run(output: Path, *, synthetic: bool = False) -> Path:
    """Run the demo; returns the picture. A rerun goes on where an earlier one stopped."""
    output = output.absolute()
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{output / 'mlflow.db'}")
    slide = _slide(output / "slides", synthetic=synthetic)
    store = Store(output / "cells")
    arguments = [f"slides={slide}", f"output={store.uri}", "cells_per_slide=null", "geojson=true", "workers.actors=1"]
    if curate.main(load("curate", arguments, CurateConfig)) != EXIT_OK:
        raise SystemExit("demo: curation failed, see above")
    picture = _picture(output / "nuclei.png", slide=slide, store=store)
    _gallery(output / "views.png", store=store, slide_id=slide.stem)
    _pretrain(store, output)
    _embed(store, output)
    _probe(store, output)
    return picture


def _gallery(path: Path, *, store: Store, slide_id: str) -> None:
    """Views of six cells under every policy: the paper's Figure 5."""
    import torch

    from lemon.pretrain.assemble import fit_stain
    from lemon.pretrain.gallery import draw_gallery
    from lemon.pretrain.policy import load_policy, policy_names

    policies = []
    for name in policy_names():
        policy = load_policy(name)
        if policy.stain.kind == "gmm":
            fitted, _ = fit_stain(FitStainConfig(cells=store.uri, components=policy.stain.components))
            policy = policy.with_stain_statistics(fitted)
        policies.append(policy)
    images = images_from_arrow(store.read_table(shard_name(slide_id), columns=["image"])["image"])
    draw_gallery(torch.from_numpy(images[:6].copy()), policies=policies, path=path, seed=0)
    print(f"demo: views of every policy in {path}")


def _pretrain(store: Store, output: Path) -> None:
    from lemon.pretrain import launch  # imports torch

    words = [f"cells={store.uri}", f"output={output / 'encoder'}", f"cache={output / 'cache'}", *PRETRAIN.split()]
    if launch.main(load("pretrain", words, PretrainConfig)) != EXIT_OK:
        raise SystemExit("demo: pretraining failed, see above")
    history = metric_history(launch.run_of(Store(output / "encoder")), "loss")
    print(f"demo: loss {history[0][1]:.2f} at step {history[0][0]}, {history[-1][1]:.2f} at step {history[-1][0]}")
    print(f"demo: curves in MLflow: make ui DB={output / 'mlflow.db'}")


def _embed(store: Store, output: Path) -> None:
    """Embeddings, and files that scanpy and QuPath open."""
    from lemon.embed import pipeline

    words = [f"model={output / 'encoder'}", f"cells={store.uri}", f"output={output / 'embeddings'}"]
    if pipeline.main(load("embed", [*words, "format=[h5ad,geojson]"], EmbedConfig)) != EXIT_OK:
        raise SystemExit("demo: embedding failed, see above")


def _probe(store: Store, output: Path) -> None:
    """Do encoders tell size, shape and stain of nuclei: the demo's, the bundled one, one that has learned nothing?"""
    from lemon.probe import run
    from lemon.report.tables import write_table1

    models = f"models=[{output / 'encoder'},lemon_mini,untrained_vit_tiny8]"
    words = [models, f"tasks=['morphometry:{store.uri}']", f"output={output / 'probe'}"]
    if run.main(load("probe", words, ProbeConfig)) != EXIT_OK:
        raise SystemExit("demo: probing failed, see above")
    print(write_table1(output / "probe"))


def _slide(folder: Path, *, synthetic: bool) -> Path:
    if not synthetic:
        try:
            return fetch_real_slide(folder)
        except OSError as error:
            print(f"demo: no real slide ({error}); going on with a synthetic one")
    return make_synthetic_slide(folder)


def _picture(path: Path, *, slide: Path, store: Store) -> Path:
    with gzip.open(store.path(geojson_name(slide.stem))) as stream:
        features = json.load(stream)["features"]
    polygons = [shapely.Polygon(feature["geometry"]["coordinates"][0]) for feature in features]
    with contextlib.closing(SlideReader(slide)) as reader:
        draw_curation(path, slide=reader, polygons=polygons, cells=store.read_table(shard_name(slide.stem)))
    return path
