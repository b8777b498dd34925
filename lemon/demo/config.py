"""Settings of the demo."""

from __future__ import annotations

from pydantic import Field

from lemon.runtime.config import Frozen, LocalPath


class DemoConfig(Frozen):
    """``lemon demo``: every stage on one slide."""

    output: LocalPath = Field("demo", description="folder of all that the demo makes")
    synthetic: bool = Field(False, description="use a made-up slide, as where pip reaches no package index")
