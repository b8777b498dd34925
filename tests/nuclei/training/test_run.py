from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lemon.nuclei.hoverfast import Architecture
from lemon.nuclei.training.images import split
from lemon.nuclei.training.loop import Recipe
from lemon.nuclei.training.run import WEIGHTS, train
from tests.nuclei.training.made_up import labelled

TINY = Architecture(depth=2, wf=2)
IMAGES = [labelled(size_px=128, seed=seed, source=source) for seed, source in enumerate("aaaabbb")]


@pytest.mark.slow
def test_held_out_images_are_met_better_after_training_and_the_weights_are_on_disk(tmp_path: Path) -> None:
    recipe = Recipe(steps=60, batch=2, window_px=64, warmup_steps=3, learning_rate=1e-2, average=0.9)
    told: list[tuple[int, Mapping[str, Mapping[str, float]]]] = []
    net = train(
        IMAGES,
        recipe=recipe,
        out=tmp_path / "new",
        device="cpu",
        architecture=TINY,
        held_out_share=0.25,
        pauses=(0.05, 1.0),
        on_pause=lambda step, rows: told.append((step, rows)),
    )
    assert [step for step, _ in told] == [3, 60]
    before, after = (rows for _, rows in told)
    assert set(after) == {image.source for image in split(IMAGES, held_out_share=0.25)[1]} == {"a", "b"}
    assert all(after[source]["maps"] < before[source]["maps"] for source in after)
    assert all(after[source]["dice_hard"] > 0.7 for source in after)
    assert [file.name for file in (tmp_path / "new").iterdir()] == [WEIGHTS]
    with safe_open(tmp_path / "new" / WEIGHTS, "pt") as stored:
        assert Architecture(**json.loads(stored.metadata()["architecture"])) == TINY
        for name, value in net.state_dict().items():
            assert torch.allclose(stored.get_tensor(name).to(value), value, rtol=1e-3, atol=1e-4), name
