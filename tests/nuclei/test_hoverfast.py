from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from lemon.nuclei.config import HoverFastConfig
from lemon.nuclei.hoverfast import (
    Architecture,
    HoverFast,
    HoverFastNet,
    fold_batch_norm,
    load_checkpoint,
    optimise,
    save_checkpoint,
    save_half,
)
from lemon.nuclei.hoverfast_cpu import RowwiseUNet, toom_cook
from lemon.nuclei.hoverfast_device import hv_gradients, probability_of
from lemon.nuclei.instances import GRADIENT_SCALE, HALF, HVLimits, HVPrediction
from tests.conftest import shared

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Architecture(depth=2, wf=2)
VARIANTS = [
    TINY,
    Architecture(depth=3, wf=3, up_mode="upsample"),
    Architecture(depth=2, wf=3, conv_block="unet"),
    Architecture(depth=3, wf=2, batch_norm=False, conv_block="unet", up_mode="upsample"),
    Architecture(depth=2, wf=3, batch_norm=False),
    Architecture(depth=1, wf=3),
]


def random_net(architecture: Architecture, *, seed: int = 0) -> HoverFastNet:
    """Random weights and batch-norm statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    net = HoverFastNet(architecture).eval()
    for name, tensor in net.state_dict().items():
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 4:
            values *= (2 / tensor[0].numel()) ** 0.5
        tensor.copy_(
            values.abs() + 0.5
            if name.endswith(("running_var", "1.weight", "4.weight")) and tensor.ndim == 1
            else values
        )
    return net


def random_image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def written(net: HoverFastNet, path: Path, **changes: Any) -> Path:
    """A checkpoint file with some entries replaced; None takes an entry away."""
    save_checkpoint(net, path)
    stored = torch.load(path, weights_only=True) | changes
    torch.save({key: value for key, value in stored.items() if value is not None}, path)
    return path


@pytest.mark.slow
def test_outputs_agree_with_the_original() -> None:
    net = load_checkpoint(shared("golden/hoverfast_random_weights.pth"))
    golden = np.load(shared("golden/hoverfast_forward.npz"))
    image = torch.from_numpy(golden["image"]).permute(2, 0, 1)[None].float() / 255
    for form in (net, optimise(net, device="cpu", dtype=torch.float32)):
        with torch.inference_mode():
            logits, maps = form(image)
        assert np.abs(logits[0].numpy() - golden["logits"]).max() < 1e-4
        assert np.abs(maps[0].numpy() - golden["hv"]).max() < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("architecture", VARIANTS, ids=str)
def test_the_optimised_network_is_the_same_function(architecture: Architecture) -> None:
    net = random_net(architecture)
    fast = optimise(net, device="cpu", dtype=torch.float32)
    assert isinstance(fast, RowwiseUNet) == (architecture.conv_block == "msunet")
    for shape in ((2, 3, 64, 48), (1, 3, 37, 101), (1, 3, 5, 3)):
        image = random_image(*shape)
        for got, expected in zip(fast(image), net(image), strict=True):
            assert got.shape == expected.shape == (shape[0], 2, *shape[2:])
            assert (got - expected).abs().max() < 1e-3 * max(1.0, float(expected.std()))


@torch.inference_mode()
def test_folded_batch_norm_is_the_same_function_and_leaves_the_network_alone() -> None:
    net, image = random_net(TINY), random_image(1, 3, 40, 40)
    before = [output.clone() for output in net(image)]
    folded = fold_batch_norm(net)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    for got, expected, again in zip(folded(image), before, net(image), strict=True):
        assert torch.allclose(got, expected, atol=1e-4)
        assert torch.equal(again, expected)


@torch.inference_mode()
def test_one_thread_and_several_give_the_same() -> None:
    folded = fold_batch_norm(random_net(Architecture(depth=3, wf=3)))
    image = random_image(1, 3, 200, 96)
    threads = torch.get_num_threads()
    one, three = RowwiseUNet(folded, threads=1)(image), RowwiseUNet(folded, threads=3)(image)
    assert torch.get_num_threads() == threads
    for a, b in zip(one, three, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.std()


@torch.inference_mode()
def test_what_an_image_gives_does_not_depend_on_the_image_before() -> None:
    fast = optimise(random_net(TINY), device="cpu", dtype=torch.float32)
    image = random_image(1, 3, 50, 70)
    first = [output.clone() for output in fast(image)]
    fast(100 * random_image(2, 3, 50, 70, seed=1))
    fast(random_image(1, 3, 32, 32, seed=2))
    fast(100 * random_image(1, 3, 50, 69, seed=3))
    for again, expected in zip(fast(image), first, strict=True):
        assert torch.equal(again, expected)


def test_toom_cook_is_a_correlation() -> None:
    rng = np.random.default_rng(0)
    for outputs, taps, points in ((2, 3, [0, 1, -1]), (3, 2, [0, 1, -1]), (4, 3, [0, 1, -1, 2, -2])):
        A, B, G = toom_cook(points, outputs=outputs, taps=taps)
        x, kernel = rng.standard_normal(outputs + taps - 1), rng.standard_normal(taps)
        assert np.allclose(A @ ((G @ kernel) * (B @ x)), np.correlate(x, kernel, mode="valid"))


def test_toom_cook_needs_distinct_points() -> None:
    with pytest.raises(ValueError, match="distinct"):
        toom_cook([0, 1, 1], outputs=2, taps=3)


@pytest.mark.parametrize("architecture", VARIANTS, ids=str)
def test_a_written_checkpoint_opens_as_the_same_network(architecture: Architecture, tmp_path: Path) -> None:
    net = random_net(architecture)
    save_checkpoint(net, tmp_path / "net.pth", epoch=3)
    loaded = load_checkpoint(tmp_path / "net.pth")
    assert loaded.architecture == architecture
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name])


@pytest.mark.parametrize("architecture", VARIANTS, ids=str)
def test_weights_in_half_precision_open_as_the_same_network(architecture: Architecture, tmp_path: Path) -> None:
    net = random_net(architecture)
    save_half(net, tmp_path / "net.safetensors")
    loaded = load_checkpoint(tmp_path / "net.safetensors")
    assert loaded.architecture == architecture
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == net.state_dict()[name].dtype
        assert torch.allclose(tensor, net.state_dict()[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        ({}, "lacks n_classes"),
        ({"architecture": "{"}, "no JSON"),
        ({"architecture": "[3]"}, "expected an object"),
        ({"architecture": json.dumps(asdict(TINY) | {"depth": 1000})}, "depth: got 1000"),
        ({"architecture": json.dumps(asdict(TINY) | {"conv_block": ["unet"]})}, "conv_block: got"),
        ({"architecture": json.dumps(asdict(TINY) | {"wf": 3})}, "misshapen"),
        ({"architecture": json.dumps(asdict(TINY) | {"model_dict": {}})}, "lacks weights: last"),
    ],
)
def test_safetensors_that_do_not_fit_are_named_in_one_line(notes: dict[str, str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    state = random_net(TINY).state_dict()
    if "model_dict" in notes.get("architecture", ""):  # what the notes call weights is none
        state = {name: value for name, value in state.items() if not name.startswith("last")}
    safetensors.torch.save_file(state, str(path), metadata=notes)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    assert said in one_line(caught.value)
    assert str(path) in str(caught.value)


def test_the_loss_that_the_original_stores_as_an_array_does_not_stop_loading(tmp_path: Path) -> None:
    path = written(random_net(TINY), tmp_path / "net.pth", best_loss_on_test=np.array(0.5, np.float32))
    assert load_checkpoint(path).architecture == TINY


def test_an_absent_checkpoint_says_where_weights_come_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="hoverfast_crosstissue_best_model") as caught:
        load_checkpoint(tmp_path / "nothing.pth")
    assert "github.com/choosehappy/HoverFast" in str(caught.value)


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": None}, "lacks depth"),
        ({"model_dict": None}, "lacks model_dict"),
        ({"conv_block": "resnet"}, "conv_block: got 'resnet'"),
        ({"up_mode": "shuffle"}, "up_mode: got 'shuffle'"),
        ({"padding": False}, "padding"),
        ({"depth": 3}, "lacks weights"),
        ({"batch_norm": False}, "weights"),
        ({"wf": 3}, "misshapen"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_in_one_line(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = written(random_net(TINY), tmp_path / "net.pth", **changes)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    assert said in one_line(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", pickle.dumps({"a": 1}, protocol=2), pickle.dumps(Path("x"), protocol=2)]
)
@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(content: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    assert str(path) in one_line(caught.value)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"model_dict": {}, "trap": print}, path)
    with pytest.raises(ValueError, match="expected a file of plain tensors"):
        load_checkpoint(path)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> HoverFast:
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    save_checkpoint(random_net(TINY), path)
    return HoverFast(str(path), device="cpu", batch=2, markers="range")


def test_the_segmenter_predicts_calibrates_and_finds_nuclei_across_a_pickle(segmenter: HoverFast) -> None:
    regions = np.random.default_rng(0).integers(0, 256, (3, 64, 80, 3), np.uint8)
    predictions = segmenter.predict(regions)
    assert [p.mask.shape for p in predictions] == [(64, 80)] * 3
    assert all(p.gradients.shape == (2, 64, 80) and p.gradients.dtype == np.int16 for p in predictions)
    calibration = segmenter.calibrate(list(regions))
    assert isinstance(calibration, HVLimits)
    job = pickle.loads(pickle.dumps((segmenter.postprocess, regions[0], predictions[0], calibration)))  # noqa: S301
    found = job[0](*job[1:])
    expected = segmenter.postprocess(regions[0], predictions[0], calibration)
    assert [n.contour_px.tolist() for n in found] == [n.contour_px.tolist() for n in expected]


def test_predictions_do_not_depend_on_the_batch(segmenter: HoverFast) -> None:
    regions = np.random.default_rng(1).integers(0, 256, (3, 48, 48, 3), np.uint8)
    together = segmenter.predict(regions)
    for region, prediction in zip(regions, together, strict=True):
        (alone,) = segmenter.predict(region[None])
        assert np.array_equal(alone.probability, prediction.probability)
        assert np.array_equal(alone.gradients, prediction.gradients)


def test_the_segmenter_says_what_the_network_says(segmenter: HoverFast) -> None:
    regions = np.random.default_rng(2).integers(0, 256, (1, 48, 48, 3), np.uint8)
    (prediction,) = segmenter.predict(regions)
    with torch.inference_mode():
        logits, maps = random_net(TINY)(torch.from_numpy(regions).permute(0, 3, 1, 2).float() / 255)
    clear = (logits[0, 1] - logits[0, 0]).abs().numpy() > 1e-2
    assert np.array_equal(prediction.mask[clear], logits[0].argmax(0).bool().numpy()[clear])
    assert np.abs(prediction.gradients.astype(int) - hv_gradients(maps)[0].numpy()).max() <= GRADIENT_SCALE / 10


def test_no_samples_give_no_calibration(segmenter: HoverFast) -> None:
    assert segmenter.calibrate([]) is None


def test_the_least_area_follows_the_resolution(segmenter: HoverFast) -> None:
    assert segmenter.min_area_px == 80


def test_regions_must_be_rgb_bytes(segmenter: HoverFast) -> None:
    with pytest.raises(ValueError, match="uint8"):
        segmenter.predict(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="\\[B, H, W, 3\\]"):
        segmenter.predict(np.zeros((8, 8, 3), np.uint8))


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    save_checkpoint(random_net(TINY), tmp_path / "net.pth")
    with pytest.raises(ValueError, match="precision"):
        HoverFast(str(tmp_path / "net.pth"), device="cpu", precision="fp8", batch=1)
    with pytest.raises(ValueError, match="batch"):
        HoverFast(str(tmp_path / "net.pth"), device="cpu", batch=0)


def test_sixteen_bits_on_a_cpu_give_nearly_the_same_mask(tmp_path: Path, segmenter: HoverFast) -> None:
    save_checkpoint(random_net(TINY), tmp_path / "net.pth")
    regions = np.random.default_rng(3).integers(0, 256, (1, 64, 64, 3), np.uint8)
    half = HoverFast(str(tmp_path / "net.pth"), device="cpu", precision="bf16", batch=1).predict(regions)[0]
    assert (half.mask == segmenter.predict(regions)[0].mask).mean() > 0.95


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_nearly_the_same_mask_and_maps() -> None:
    path = str(shared("golden/hoverfast_random_weights.pth"))
    image = np.load(shared("golden/hoverfast_forward.npz"))["image"][None]
    cpu = HoverFast(path, device="cpu", batch=1).predict(image)[0]
    gpu = HoverFast(path, device="cuda", batch=1).predict(image)[0]
    assert (cpu.mask == gpu.mask).mean() > 0.98
    assert np.abs(cpu.gradients.astype(int) - gpu.gradients).mean() < 0.1 * GRADIENT_SCALE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_gpu_takes_regions_in_parts_and_gives_them_back_in_their_order(batch: int, tmp_path: Path) -> None:
    save_checkpoint(random_net(TINY), tmp_path / "net.pth")
    regions = np.random.default_rng(4).integers(0, 256, (11, 48, 56, 3), np.uint8)
    expected = HoverFast(str(tmp_path / "net.pth"), device="cpu", batch=1).predict(regions)
    gpu = HoverFast(str(tmp_path / "net.pth"), device="cuda", precision="fp32", batch=batch)
    for _ in range(2):  # the second time with buffers that are there already
        got = gpu.predict(regions)
        assert len(got) == len(expected)
        for ours, theirs, another in zip(got, expected, [*expected[1:], expected[0]], strict=True):
            assert (ours.mask == theirs.mask).mean() > 0.98
            assert distance(ours, theirs) < 0.1 * distance(theirs, another)  # the card rounds to TensorFloat-32


def distance(one: HVPrediction, other: HVPrediction) -> float:
    return float(np.abs(one.gradients.astype(int) - other.gradients).mean())


def test_a_pixel_is_nucleus_exactly_where_another_class_is_above_the_background() -> None:
    logits = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    logits[0, 1] = logits[0, 0] + 1e-4 * torch.randn(40, 40, generator=torch.Generator().manual_seed(1))
    probability = probability_of(logits)
    assert torch.equal(probability > HALF, logits.argmax(1) > 0)
    two = logits[:, :2]
    assert (probability_of(two) / 255 - two.softmax(1)[:, 1]).abs().max() < 0.005


@pytest.mark.parametrize(("markers", "least_um2"), [("level", 2), ("range", 5)])
def test_the_least_area_is_that_of_the_rule_that_divides(markers: str, least_um2: float, tmp_path: Path) -> None:
    save_checkpoint(random_net(TINY), tmp_path / "net.pth")
    config = HoverFastConfig(checkpoint=str(tmp_path / "net.pth"), device="cpu", markers=markers)
    built = config.build()
    assert isinstance(built, HoverFast)
    assert built.min_area_px == least_um2 * 16
    assert config.result_settings()["min_area_um2"] == least_um2


def test_a_region_without_a_class_above_the_background_has_an_empty_mask(segmenter: HoverFast) -> None:
    logits = torch.zeros(1, 2, 4, 4)  # equal: the first class, the background, wins
    maps = torch.zeros(1, 2, 4, 4)
    network, segmenter.net = segmenter.net, lambda images: (logits, maps)
    try:
        (prediction,) = segmenter.predict(np.zeros((1, 4, 4, 3), np.uint8))
    finally:
        segmenter.net = network
    assert not prediction.mask.any()


@pytest.mark.parametrize("name", ["depth", "wf", "n_classes", "in_channels"])
@pytest.mark.parametrize("value", [1000, -1, "3", None])
def test_an_architecture_that_would_take_any_memory_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: got {value!r}, expected"):
        Architecture(**{name: value})  # type: ignore[arg-type]
