"""Make the encoder that the package ships of a larger one: its first blocks, as int8.

python -m benchmarks.released LARGE OUTPUT [--blocks 4] [--source WORDS]

LARGE is an encoder of LEMON's (a folder, or a name with its weights). What is kept are the patches' projection, the
positions, the first blocks and the last LayerNorm, which is applied to the mean of the patches in place of the class
token: of earlier blocks the mean says more (docs/probes.md has the scores of each block). Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from lemon.encoders.config import WEIGHTS
from lemon.encoders.export import export_encoder, model_args
from lemon.encoders.open import Encoder, load_encoder
from lemon.encoders.vit import CellTransformer, load_strictly


def main() -> None:
    """Truncate, store, and print what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("large")
    parser.add_argument("output", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--source", default="", help="how the large one was made, for config.json")
    options = parser.parse_args()
    large = load_encoder(options.large)
    facts = {"name": options.output.name, "blocks": options.blocks, "source": options.source or large.name}
    vit = first_blocks(large.model, options.blocks)
    export_encoder(vit, options.output, cell_input=large.cell_input, facts=facts, int8=True)
    small = Encoder(vit, large.cell_input, name=options.output.name)
    size = (options.output / WEIGHTS).stat().st_size
    print(
        json.dumps(
            {**facts, "bytes": size, "width": small.width, "fingerprint": load_encoder(options.output).fingerprint}
        )
    )


def first_blocks(large: Any, blocks: int) -> CellTransformer:
    """The first blocks of a ViT with a class token, whose output is the LayerNorm of the mean of the patches."""
    assert isinstance(large, VisionTransformer)
    vit = CellTransformer(**{**model_args(large), "depth": blocks, "global_pool": "avg"})
    state = {
        key.replace("norm.", "fc_norm.", 1) if key.startswith("norm.") else key: value
        for key, value in large.state_dict().items()
    }
    kept = vit.state_dict().keys()
    load_strictly(vit, {key: value for key, value in state.items() if key in kept}, source="the larger encoder")
    return vit.eval()


if __name__ == "__main__":
    main()
