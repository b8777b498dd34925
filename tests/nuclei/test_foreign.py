"""Networks of others, by files of the same form that are made here."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lemon.errors import ConfigError
from lemon.nuclei.open import load_segmenter, segment
from lemon.nuclei.scores import labels_of, scores
from lemon.nuclei.training.targets import make_targets
from lemon.nuclei.training.windows import whole
from tests.nuclei.training.made_up import labelled

IMAGE = labelled(size_px=128)


class DarkSquares(nn.Module):
    """Labels [B, 1, H, W] of an image: number 1 where it is dark on the left, 2 on the right."""

    def forward(self, x: Tensor) -> Tensor:
        dark = (x.mean(1, keepdim=True) < 0.5).float()
        side = torch.ones_like(dark)
        side[..., side.shape[-1] // 2 :] = 2
        return dark * side


@pytest.fixture
def squares() -> np.ndarray:
    image = np.full((96, 128, 3), 230, np.uint8)
    image[20:60, 10:40], image[30:70, 80:120] = 60, 60
    return image


def test_labels_of_a_torchscript_become_nuclei_at_the_resolution_of_the_region(
    squares: np.ndarray, tmp_path: Path
) -> None:
    torch.jit.script(DarkSquares()).save(str(tmp_path / "net.pt"))
    segmenter = load_segmenter("instanseg", checkpoint=str(tmp_path / "net.pt"), device="cpu")
    left, right = sorted(segment(squares, segmenter=segmenter), key=lambda nucleus: nucleus.centroid_px)
    assert left.centroid_px == pytest.approx((24.5, 39.5), abs=1)
    assert right.centroid_px == pytest.approx((99.5, 49.5), abs=1)
    (prediction,) = segmenter.predict(squares[None])
    again = pickle.loads(pickle.dumps(segmenter.postprocess))(squares, prediction, None)  # noqa: S301
    assert len(again) == 2


def test_a_file_that_is_no_torchscript_is_a_line_and_runs_nothing(tmp_path: Path) -> None:
    torch.save({"trap": print}, tmp_path / "net.pt")
    with pytest.raises(ConfigError, match="cannot be opened as TorchScript") as told:
        load_segmenter("instanseg", checkpoint=str(tmp_path / "net.pt"), device="cpu")
    assert len(str(told.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="cannot be opened as TorchScript"):
        load_segmenter("instanseg", checkpoint=str(tmp_path / "absent.pt"), device="cpu")
    with pytest.raises(ConfigError, match="checkpoint"):
        load_segmenter("instanseg")


def constants(path: Path, outputs: dict[str, np.ndarray], *, shape: list[Any]) -> str:
    """An ONNX that says the same of every image of a shape."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper = onnx.helper
    nodes = [
        helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value.astype(np.float32)))
        for name, value in outputs.items()
    ]
    told = [helper.make_tensor_value_info(name, 1, value.shape) for name, value in outputs.items()]
    graph = helper.make_graph(nodes, "net", [helper.make_tensor_value_info("input", 1, shape)], told)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return str(path)


def test_maps_of_cellvit_are_divided_into_the_nuclei_that_they_are_of(tmp_path: Path) -> None:
    targets = make_targets(whole(IMAGE))
    mask = targets.mask[0].numpy()
    outputs = {
        "tissue_types": np.zeros((1, 19)),
        "nuclei_binary_map": np.stack((1.0 - mask, mask))[None],
        "hv_map": targets.hv_maps.numpy(),
    }
    file = constants(tmp_path / "net.onnx", outputs, shape=["batch", 3, 128, 128])
    segmenter = load_segmenter("cellvit", checkpoint=file, device="cpu")
    found = labels_of(segment(IMAGE.image, segmenter=segmenter), shape=IMAGE.instances.shape)
    assert scores(found[16:-16, 16:-16], IMAGE.instances[16:-16, 16:-16])["pq"] > 0.7
    with pytest.raises(ValueError, match=r"takes 128 px.*set region_px"):
        segmenter.predict(np.zeros((1, 64, 64, 3), np.uint8))


@pytest.mark.parametrize("joined", [False, True])
def test_of_rays_of_stardist_that_overlap_the_most_probable_stay(joined: bool, tmp_path: Path) -> None:
    probability, distance = np.zeros((1, 64, 64, 1)), np.full((1, 64, 64, 32), 12.0)
    probability[0, 20, 20], probability[0, 20, 21], probability[0, 40, 30], probability[0, 5, 60] = 0.9, 0.95, 0.8, 0.5
    outputs = {"prob": probability, "dist": distance}
    if joined:
        outputs = {"out": np.concatenate((probability, distance), axis=-1)}
    file = constants(tmp_path / "net.onnx", outputs, shape=["n", "h", "w", 3])
    segmenter = load_segmenter("stardist", checkpoint=file, device="cpu")
    first, second = segment(IMAGE.image, segmenter=segmenter)
    assert first.centroid_px == pytest.approx((42, 40), abs=0.1)
    assert second.centroid_px == pytest.approx((60, 80), abs=0.1)
    assert np.linalg.norm(first.contour_px - np.array([42, 40]), axis=1) == pytest.approx(12, abs=1e-3)


def test_without_onnx_runtime_a_line_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime is not installed; expected pip install 'lemon-nuclei\[onnx\]'"):
        load_segmenter("stardist", checkpoint=str(tmp_path / "net.onnx"), device="cpu")


def test_a_file_that_is_no_onnx_is_a_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "net.onnx").write_bytes(b"no network")
    with pytest.raises(ConfigError, match="cannot be opened as ONNX") as told:
        load_segmenter("cellvit", checkpoint=str(tmp_path / "net.onnx"), device="cpu")
    assert len(str(told.value).splitlines()) == 1
