"""LEMON: from whole-slide images to a foundation model of single-nucleus morphology.

What a program may use is ``__all__``, kept from version to version; everything else may change. A slide's nuclei and
their vectors:

    slide = lemon.open_slide("slide.svs")
    image = slide.region(20_000, 10_000, width_px=1024, height_px=1024)  # uint8 [1024, 1024, 3] at 0.25 um/px
    nuclei = lemon.segment(image)
    cells = lemon.crop(image, nuclei)  # uint8 [N, 60, 60, 3]
    vectors = lemon.load_encoder("lemon_mini").embed(cells)  # torch.float32 [N, 192]

``import lemon`` is light: each name is imported when it is used, and with it torch where it needs that. Whole cohorts
go through the command ``lemon``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lemon.version import __version__

if TYPE_CHECKING:
    from lemon.cells.crop import crop_nuclei as crop
    from lemon.cells.crop import measure
    from lemon.cells.shard import images_from_arrow
    from lemon.embed.join import join_embeddings
    from lemon.encoders.open import Encoder, load_encoder
    from lemon.encoders.registry import encoder_names
    from lemon.encoders.weights import MissingWeightsError
    from lemon.errors import ConfigError
    from lemon.find.job import find_neighbours
    from lemon.nuclei.instances import Nucleus
    from lemon.nuclei.open import load_segmenter, segment
    from lemon.pretrain import losses
    from lemon.probe import linear as probes
    from lemon.slides.errors import RegionError, SlideError
    from lemon.slides.reader import SlideReader
    from lemon.slides.tissue import find_tissue
    from lemon.views.make import make_local_views, make_views
    from lemon.views.policy import load_policy, policy_names

    open_slide = SlideReader

_PLACES = {
    # slides
    "SlideReader": "lemon.slides.reader:SlideReader",
    "open_slide": "lemon.slides.reader:SlideReader",
    "find_tissue": "lemon.slides.tissue:find_tissue",
    "SlideError": "lemon.slides.errors:SlideError",
    "RegionError": "lemon.slides.errors:RegionError",
    # nuclei
    "segment": "lemon.nuclei.open:segment",
    "load_segmenter": "lemon.nuclei.open:load_segmenter",
    "Nucleus": "lemon.nuclei.instances:Nucleus",
    # cells
    "crop": "lemon.cells.crop:crop_nuclei",
    "measure": "lemon.cells.crop:measure",
    "images_from_arrow": "lemon.cells.shard:images_from_arrow",
    # results under the ids that another program gave its nuclei; needs the extra "pipeline"
    "join_embeddings": "lemon.embed.join:join_embeddings",
    # views and losses of self-supervised training
    "load_policy": "lemon.views.policy:load_policy",
    "policy_names": "lemon.views.policy:policy_names",
    "make_views": "lemon.views.make:make_views",
    "make_local_views": "lemon.views.make:make_local_views",
    "losses": "lemon.pretrain.losses",
    # encoders
    "load_encoder": "lemon.encoders.open:load_encoder",
    "encoder_names": "lemon.encoders.registry:encoder_names",
    "Encoder": "lemon.encoders.open:Encoder",
    "MissingWeightsError": "lemon.encoders.weights:MissingWeightsError",
    # the nuclei most like one; needs the extra "find"
    "find_neighbours": "lemon.find.job:find_neighbours",
    # linear probes of embeddings; they need the extra "probe"
    "probes": "lemon.probe.linear",
    "ConfigError": "lemon.errors:ConfigError",
}
"""Where each public name is: ``module:attribute``, or a module."""

__all__ = [
    "ConfigError",
    "Encoder",
    "MissingWeightsError",
    "Nucleus",
    "RegionError",
    "SlideError",
    "SlideReader",
    "__version__",
    "crop",
    "encoder_names",
    "find_neighbours",
    "find_tissue",
    "images_from_arrow",
    "join_embeddings",
    "load_encoder",
    "load_policy",
    "load_segmenter",
    "losses",
    "make_local_views",
    "make_views",
    "measure",
    "open_slide",
    "policy_names",
    "probes",
    "segment",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'lemon' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as error:
        from lemon.extras import missing_package_line

        raise ModuleNotFoundError(f"lemon.{name}: {missing_package_line(error) or error}", name=error.name) from None
    globals()[name] = value = getattr(loaded, attribute) if attribute else loaded
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
