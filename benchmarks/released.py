"""Store an encoder as the package ships it: its matrices as int8, a quarter of the size.

python -m benchmarks.released WEIGHTS OUTPUT [--source WORDS]

WEIGHTS is a folder with config.json and model.safetensors or, as float16, model.half.safetensors. Prints the size, the
fingerprint, and the least cosine between the vectors of both for 1,000 random images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.robustness import exported_one
from lemon.encoders.config import CONFIG, WEIGHTS
from lemon.encoders.export import export_encoder
from lemon.encoders.open import load_encoder


def main() -> None:
    """Store, and print what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--source", required=True, help="how it was made, for config.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole = load_encoder(exported_one(options.weights, Path(folder)))
    told = json.loads((options.weights / CONFIG).read_text())["lemon"]
    facts = {key: value for key, value in told.items() if key not in asdict(whole.cell_input)}
    facts["source"] = options.source
    export_encoder(whole.model, options.output, cell_input=whole.cell_input, facts=facts, int8=True)
    stored = load_encoder(options.output)
    images = torch.randint(0, 256, (1000, 60, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cosine = torch.cosine_similarity(whole.embed(images.numpy()), stored.embed(images.numpy())).min()
    size = (options.output / WEIGHTS).stat().st_size
    print(json.dumps({"bytes": size, "fingerprint": stored.fingerprint, "least_cosine": round(float(cosine), 6)}))


if __name__ == "__main__":
    main()
