"""The demo: every stage on one slide, with settings for two cores."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from pathlib import Path

import shapely

from lemon.atlas.config import AtlasConfig
from lemon.cells.ledger import rows_with_cells
from lemon.cells.names import geojson_name, shard_name
from lemon.curate import job as curate
from lemon.curate.config import CurateConfig
from lemon.demo.config import DemoConfig
from lemon.demo.slide import fetch_real_slide, make_synthetic_slide
from lemon.embed.config import EmbedConfig
from lemon.errors import EXIT_OK, FatalError
from lemon.pretrain.config import FitStainConfig, PretrainConfig
from lemon.probe.config import ProbeConfig
from lemon.report.config import ReportConfig
from lemon.report.pictures import draw_curation, ordinary_cells
from lemon.runtime.config import load
from lemon.runtime.console import stage_logger
from lemon.runtime.store import Store
from lemon.runtime.tracking import metric_history, run_of, tracking_uri
from lemon.slides.reader import SlideReader
from lemon.sweep.config import SweepConfig

logger = stage_logger(__name__, "demo")

# An encoder of 0.5 M parameters: it shows the chain, not skill.
TINY = (
    "variant=smoke encoder.name=vit_demo encoder.dim=96 encoder.depth=4 encoder.heads=3 ssl.hidden_dim=256 batch=128 "
    "log_every=5"
)
# About a minute on two cores: each cell is seen a few times.
PRETRAIN = f"{TINY} images_per_epoch=2560 epochs=8 checkpoint_every=80"
# A trial of the sweep takes some seconds; each sees the same number of images.
TRIAL = f"{TINY} images_per_epoch=1280 epochs=2 checkpoint_every=20"
SHARES = (16, 4, 1)  # points of the sweep: a sixteenth of the cells, a quarter, all


def main(config: DemoConfig) -> int:
    """Run the demo and log where its page is; returns the exit code."""
    logger.info(f"the report is {run(Path(config.output), synthetic=config.synthetic)}")
    return EXIT_OK


def run(output: Path, *, synthetic: bool = False) -> Path:
    """Run the demo; returns the report's page. A rerun goes on where an earlier one stopped."""
    output = output.absolute()
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{output / 'mlflow.db'}")
    slide = _slide(output / "slides", synthetic=synthetic)
    store, pictures = Store(output / "cells"), Store(output)
    _curate(slide, store)
    _picture(pictures, slide=slide, store=store)
    _gallery(pictures, store=store, slide_id=slide.stem)
    _pretrain(store, output)
    _embed(store, output)
    _probe(store, output)
    _sweep(store, output)
    _atlas(store, output)
    return _report(output)


def _curate(slide: Path, store: Store) -> None:
    """All nuclei of the slide."""
    words = [f"slides={slide}", f"output={store.uri}", "cells_per_slide=null", "geojson=true", "workers.actors=1"]
    _check("curation", curate.main(load("curate", words, CurateConfig)))


def _gallery(pictures: Store, *, store: Store, slide_id: str) -> None:
    """Views of six nuclei under every policy: the paper's Figure 5."""
    import torch

    from lemon.pretrain.assemble import fit_stain
    from lemon.views.gallery import draw_gallery
    from lemon.views.policy import load_policy, policy_names

    policies = []
    for name in policy_names():
        policy = load_policy(name)
        if policy.stain.kind == "gmm":
            fitted, _ = fit_stain(FitStainConfig(cells=store.uri, components=policy.stain.components))
            policy = policy.with_stain_statistics(fitted)
        policies.append(policy)
    images = ordinary_cells(store.read_table(shard_name(slide_id)), count=6)
    with pictures.write_path("views.png") as unnamed:
        draw_gallery(torch.from_numpy(images), policies=policies, path=unnamed, seed=0)
    logger.info(f"views of every policy in {pictures.uri}/views.png")


def _pretrain(store: Store, output: Path) -> None:
    from lemon.pretrain import job as pretraining  # imports torch

    words = [f"cells={store.uri}", f"output={output / 'encoder'}", f"cache={output / 'cache'}", *PRETRAIN.split()]
    _check("pretraining", pretraining.main(load("pretrain", words, PretrainConfig)))
    run = run_of(Store(output / "encoder"), uri=tracking_uri())
    assert run is not None  # it has just ended
    history = metric_history(run, "loss")
    logger.info(f"loss {history[0][1]:.2f} at step {history[0][0]}, {history[-1][1]:.2f} at step {history[-1][0]}")
    logger.info(f"curves and scores in MLflow: lemon ui database={output / 'mlflow.db'}")


def _embed(store: Store, output: Path) -> None:
    """Embeddings, and files that scanpy and QuPath open."""
    from lemon.embed import job as embedding

    words = [f"model={output / 'encoder'}", f"cells={store.uri}", f"output={output / 'embeddings'}"]
    _check("embedding", embedding.main(load("embed", [*words, "format=[h5ad,geojson]"], EmbedConfig)))


def _probe(store: Store, output: Path) -> None:
    """Do the demo's encoder and the bundled one tell size, shape and stain of nuclei better than untrained ones?"""
    from lemon.report import probe_page as probing

    models = f"models=[{output / 'encoder'},lemon_mini]"
    words = [models, f"tasks=['morphometry:{store.uri}']", f"output={output / 'probe'}"]
    _check("probing", probing.main(load("probe", words, ProbeConfig)))


def _sweep(store: Store, output: Path) -> None:
    """Do more cells make a better encoder? The paper's Figure 3 in miniature: three points, two seeds."""
    from lemon.sweep import job as sweep

    n_cells = sum(row.n_cells for row in rows_with_cells(store))
    places = [f"cells={store.uri}", f"output={output / 'sweep'}", f"pretrain.cache={output / 'cache'}"]
    study = ["variant=smoke", "sweep=size", f"sweep.points={[n_cells // share for share in SHARES]}", "seeds=[0,1]"]
    trial = [f"pretrain.{word}" for word in TRIAL.split()]
    words = [*study, *places, f"tasks=['morphometry:{store.uri}']", *trial]
    _check("the sweep", sweep.main(load("scaling_sweep", words, SweepConfig)))


def _atlas(store: Store, output: Path) -> None:
    """A map of the cells by their embeddings: the paper's Figure 4."""
    from lemon.atlas import job as atlas

    words = [f"embeddings={output / 'embeddings'}", f"cells={store.uri}", f"output={output / 'atlas'}", "n_cells=4000"]
    _check("the atlas", atlas.main(load("atlas", [*words, "title=Cells of the demo"], AtlasConfig)))


def _report(output: Path) -> Path:
    """One page with what all stages found."""
    from lemon.report import job as report

    shown = {"sweeps": "sweep", "probes": "probe", "atlas": "atlas", "views": "views.png", "output": "report"}
    words = [f"{key}={output / name}" for key, name in shown.items()]
    words += ["experiment=[pretrain,scaling_sweep,probe]", "title=LEMON: the demo"]
    _check("the report", report.main(load("report", words, ReportConfig)))
    return output / "report" / "index.html"


def _check(stage: str, code: int) -> None:
    """Raises FatalError where a stage did not end well; it has said why."""
    if code != EXIT_OK:
        raise FatalError(f"{stage} failed, see above")


def _slide(folder: Path, *, synthetic: bool) -> Path:
    if not synthetic:
        try:
            return fetch_real_slide(folder)
        except OSError as error:
            logger.info(f"no real slide ({error}); going on with a synthetic one")
    return make_synthetic_slide(folder)


def _picture(pictures: Store, *, slide: Path, store: Store) -> None:
    """The slide with its nuclei, and some cells."""
    with gzip.open(store.path(geojson_name(slide.stem))) as stream:
        features = json.load(stream)["features"]
    polygons = [shapely.Polygon(feature["geometry"]["coordinates"][0]) for feature in features]
    with contextlib.closing(SlideReader(slide)) as reader:
        cells = store.read_table(shard_name(slide.stem))
        with pictures.write_path("nuclei.png") as unnamed:
            draw_curation(unnamed, slide=reader, polygons=polygons, cells=cells)
    logger.info(f"nuclei in {pictures.uri}/nuclei.png")
