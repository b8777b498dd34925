"""Segmenters of others, by the file of their network: InstanSeg (TorchScript), CellViT and StarDist (ONNX).

Both formats hold a graph and its weights. Opening one runs no Python and unpickles nothing by Python's means.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import shapely
import torch

from lemon.errors import ConfigError
from lemon.extras import missing_package_line
from lemon.nuclei.hoverfast_device import hv_gradients
from lemon.nuclei.instances import HVPrediction, Nucleus, polygons_from_labels
from lemon.nuclei.levels import postprocess_by_level
from lemon.nuclei.segmenter import Postprocess
from lemon.runtime.store import local_copy

REGION_MPP = 0.25
_STARDIST_PROBABILITY = 0.692478  # thresholds of 2D_versatile_he
_STARDIST_OVERLAP = 0.3


class _Foreign:
    """What they share: nothing about a slide is calibrated, and regions go through the network one by one."""

    min_area_px: float

    def calibrate(self, samples: Sequence[np.ndarray]) -> None:
        """None: each network normalises a region by itself, as its authors do."""

    def predict(self, regions: np.ndarray) -> list[Any]:
        """A prediction for each region of uint8 [B, H, W, 3]. Raises ValueError for another kind of array."""
        if regions.ndim != 4 or regions.shape[-1] != 3 or regions.dtype != np.uint8:
            raise ValueError(f"regions: got {regions.dtype} {regions.shape}, expected uint8 [B, H, W, 3]")
        return [self._predict(region) for region in regions]

    def _predict(self, region: np.ndarray) -> Any:
        raise NotImplementedError


class InstanSeg(_Foreign):
    """A TorchScript of InstanSeg (10.48550/arXiv.2408.15954), as ``brightfield_nuclei``: an image in, labels out.

    Args:
        checkpoint: the file.
        device: auto, cpu, cuda or cuda:N.
        mpp: um/px that it was trained at.
        min_area_um2: smaller nuclei are dropped.

    Raises ConfigError for a file that is absent or no TorchScript.
    """

    def __init__(self, checkpoint: str, *, device: str = "auto", mpp: float = 0.5, min_area_um2: float = 5.0) -> None:
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device, self.mpp, self.min_area_px = torch.device(chosen), mpp, min_area_um2 / REGION_MPP**2
        try:
            with local_copy(checkpoint) as file:
                self.net = torch.jit.load(str(file), map_location=self.device).eval()
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(_no_network(checkpoint, "TorchScript", error)) from None

    @torch.inference_mode()
    def _predict(self, region: np.ndarray) -> np.ndarray:
        """Labels int32 [H, W]."""
        size = tuple(round(side * REGION_MPP / self.mpp) for side in region.shape[1::-1])
        small = cv2.resize(region, size, interpolation=cv2.INTER_AREA)
        pixels = torch.from_numpy(_stretched(small, 0.1, 99.9)).permute(2, 0, 1)[None].to(self.device)
        labels = self.net(pixels)[0, 0].to(torch.int32).cpu().numpy()
        return cv2.resize(labels.astype(np.float32), region.shape[1::-1], interpolation=cv2.INTER_NEAREST).astype(
            np.int32
        )

    @property
    def postprocess(self) -> Postprocess:
        """(region, labels, None) -> nuclei; picklable."""
        return functools.partial(_outlines, min_area_px=self.min_area_px)


class _Onnx(_Foreign):
    """A network that ONNX Runtime runs. Raises ConfigError without that package, and for a file that is none."""

    def __init__(self, checkpoint: str, *, device: str = "auto", min_area_um2: float = 5.0) -> None:
        try:
            runtime: Any = importlib.import_module("onnxruntime")
        except ModuleNotFoundError as error:
            raise ConfigError(missing_package_line(error) or str(error)) from None
        self.min_area_px = min_area_um2 / REGION_MPP**2
        offered = runtime.get_available_providers()
        wanted = ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            with local_copy(checkpoint) as file:
                providers = [name for name in wanted if name in offered]
                self.session = runtime.InferenceSession(str(file), options, providers=providers)
        except Exception as error:  # ONNX Runtime has an exception of its own for each fault  # noqa: BLE001
            raise ConfigError(_no_network(checkpoint, "ONNX", error)) from None
        (self.input,) = self.session.get_inputs()

    def _run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name for float32 pixels of one region."""
        sides = [side for side in self.input.shape if isinstance(side, int) and side > 3]
        if any(side not in pixels.shape for side in sides):
            raise ValueError(f"the network takes {sides[0]} px, the region is {list(pixels.shape)}; set region_px")
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {self.input.name: pixels}), strict=True))


class CellViT(_Onnx):
    """An ONNX of CellViT (10.1016/j.media.2024.103143): ``nuclei_binary_map`` and ``hv_map``, [B, 2, H, W] both.

    Its maps are of the kind of HoverFast's; ``lemon.nuclei.levels`` divides them.
    """

    def _predict(self, region: np.ndarray) -> HVPrediction:
        pixels = (region.astype(np.float32) / 255 - 0.5) / 0.5
        outputs = self._run(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]))
        missing = {"nuclei_binary_map", "hv_map"} - outputs.keys()
        if missing:
            raise ValueError(f"the network has outputs {sorted(outputs)}; expected {', '.join(sorted(missing))} too")
        background, nucleus = outputs["nuclei_binary_map"][0]
        gradients = hv_gradients(torch.from_numpy(outputs["hv_map"]))[0].numpy()
        return HVPrediction(255 * (nucleus > background).view(np.uint8), gradients)

    @property
    def postprocess(self) -> Postprocess:
        """(region, HVPrediction, None) -> nuclei; picklable."""
        return functools.partial(postprocess_by_level, min_area_px=self.min_area_px)


class StarDist(_Onnx):
    """An ONNX of StarDist (10.1007/978-3-030-00934-2_30), as of ``2D_versatile_he``: probability and distances.

    The network takes [B, H, W, 3] and gives [B, h, w, 1] and [B, h, w, rays], or both as one.
    """

    def _predict(self, region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Outlines float32 [N, rays, 2] (x, y), and their probabilities [N], of all points above the threshold."""
        outputs = list(self._run(_stretched(region, 1.0, 99.8)[None]).values())
        joined = np.concatenate(sorted(outputs, key=lambda output: output.shape[-1]), axis=-1)[0]  # [h, w, 1 + rays]
        y, x = np.nonzero(joined[..., 0] > _STARDIST_PROBABILITY)
        distance = joined[y, x, 1:]
        angle = 2 * np.pi * np.arange(distance.shape[1]) / distance.shape[1]
        grid = region.shape[0] / joined.shape[0]
        corners = np.stack((np.cos(angle), np.sin(angle)), axis=-1) * distance[..., None]
        return (corners + grid * np.stack((x, y), axis=-1)[:, None]).astype(np.float32), joined[y, x, 0]

    @property
    def postprocess(self) -> Postprocess:
        """(region, outlines and probabilities, None) -> nuclei; picklable."""
        return functools.partial(_most_probable, min_area_px=self.min_area_px)


def _no_network(checkpoint: str, kind: str, error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0][:120]
    return f"segmenter.checkpoint: {checkpoint} cannot be opened as {kind}: {first}"


def _stretched(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Each channel of [H, W, 3] with its percentiles at 0 and 1, float32."""
    ends = np.percentile(image.reshape(-1, 3), (low, high), axis=0)
    return ((image - ends[0]) / np.maximum(ends[1] - ends[0], 1e-3)).astype(np.float32)


def _outlines(region: np.ndarray, labels: np.ndarray, calibration: None, *, min_area_px: float) -> list[Nucleus]:  # noqa: ARG001
    return polygons_from_labels(labels, min_area_px=min_area_px)


def _most_probable(
    region: np.ndarray,  # noqa: ARG001
    prediction: tuple[np.ndarray, np.ndarray],
    calibration: None,  # noqa: ARG001
    *,
    min_area_px: float,
) -> list[Nucleus]:
    """Of outlines that overlap by more than StarDist allows, as a share of the smaller one, the most probable."""
    corners, probability = prediction
    shapes = shapely.make_valid(shapely.polygons(corners)) if len(corners) else np.empty(0, object)
    areas, tree = shapely.area(shapes), shapely.STRtree(shapes)
    dropped = areas < min_area_px
    nuclei = []
    for best in np.argsort(-probability, kind="stable"):
        if dropped[best]:
            continue
        near = tree.query(shapes[best], predicate="intersects")
        shared = shapely.area(shapely.intersection(shapes[near], shapes[best])) / np.minimum(areas[near], areas[best])
        dropped[near[shared > _STARDIST_OVERLAP]] = True
        centre = shapely.centroid(shapes[best])
        nuclei.append(Nucleus(corners[best], (float(centre.x), float(centre.y))))
    return nuclei
