"""Each operation of the views against torchvision's on the same parameters, and the whole chain against its chain."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.functional as TF
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import InterpolationMode

from lemon.views import color, geometry, render
from lemon.views.draws import NO_SOLARIZE
from lemon.views.make import (
    ViewParameters,
    constants_of,
    draw_view_parameters,
    load_policy,
    make_views,
    plan_of,
    render_views,
)
from lemon.views.policy import Crop, Jitter, Policy, Solarize, ViewRecipe
from tests.views.stained import CPU, draw, seeded, stained_cells


def unit_images(count: int, side: int = 40) -> torch.Tensor:
    """Cells and noise of every colour with black, white and grey, [count, 3, side, side] in [0, 1]."""
    images = torch.rand(count, 3, side, side, generator=seeded(7))
    cells = stained_cells(count)[: count // 2, :side, :side].permute(0, 3, 1, 2) / 255
    images[: count // 2] = cells
    images[-1, :, :5], images[-1, :, 5:10], images[-1, :, 10:15] = 0.0, 1.0, 0.4
    return images


# --- each operation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue"])
def test_a_colour_operation_agrees_with_torchvision(operation: str) -> None:
    images = unit_images(16)
    low, high = (-0.5, 0.5) if operation == "hue" else (0.2, 1.8)
    factors = torch.linspace(low, high, 16)
    got = getattr(color, f"adjust_{operation}")(images.flatten(2), factors).view_as(images)
    expected = [getattr(TF, f"adjust_{operation}")(i, f) for i, f in zip(images, factors.tolist(), strict=True)]
    torch.testing.assert_close(got, torch.stack(expected), atol=2e-5 if operation == "hue" else 1e-6, rtol=0)


def jittered_by_torchvision(image: torch.Tensor, parameters: ViewParameters, row: int) -> torch.Tensor:
    names = ("brightness", "contrast", "saturation", "hue")
    for operation in parameters.order[row].tolist():
        factor = getattr(parameters, names[operation])[row].item()
        image = getattr(TF, f"adjust_{names[operation]}")(image, factor)
    return image


def test_colour_jitter_follows_each_samples_own_order() -> None:
    images = unit_images(96)
    parameters = draw(ViewRecipe(jitter=Jitter(p=0.8, brightness=0.6, contrast=0.7, saturation=0.5, hue=0.2)), 96)
    assert len({tuple(order) for order in parameters.order.tolist()}) > 18  # of 24
    colours = parameters._asdict()
    fields = {name: colours[name] for name in ("order", "brightness", "contrast", "saturation", "hue")}
    got = color.jitter_(images.flatten(2).clone(), **fields).view_as(images)
    expected = torch.stack([jittered_by_torchvision(image, parameters, row) for row, image in enumerate(images)])
    # Hue of an almost grey pixel amplifies rounding, and a later contrast amplifies that.
    assert (got - expected).abs().max() < 1e-3
    assert (got - expected).abs().mean() < 1e-6


def test_grayscale_solarize_and_erase_agree_with_torchvision() -> None:
    images = unit_images(12)
    chosen = torch.arange(12) % 3 == 0
    got = color.grayscale_(images.flatten(2).clone(), chosen).view_as(images)
    expected = torch.where(chosen[:, None, None, None], TF.rgb_to_grayscale(images, num_output_channels=3), images)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)

    thresholds = torch.where(chosen, 128 / 255, NO_SOLARIZE)
    expected = torch.where(chosen[:, None, None, None], TF.solarize(images, 128 / 255), images)
    assert torch.equal(color.solarize_(images.clone(), threshold=thresholds), expected)

    boxes = torch.stack([torch.arange(12), 24 - 2 * torch.arange(12), torch.arange(12), torch.full((12,), 15)], 1)
    expected = torch.stack([TF.erase(i, *box, v=torch.zeros(1)) for i, box in zip(images, boxes.tolist(), strict=True)])
    assert torch.equal(color.erase_(images.clone(), box=boxes.float()), expected)


@pytest.mark.parametrize(("kernel_px", "side_px"), [(3, 40), (9, 40), (23, 40), (9, 24)])
def test_blur_agrees_with_torchvision_up_to_the_border(kernel_px: int, side_px: int) -> None:
    images = unit_images(10, side_px)
    sigmas = torch.tensor([0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.3, 1.7, 2.0, 0.0])
    basis = color.blur_basis(kernel_px=kernel_px, side_px=side_px)
    got = color.gaussian_blur_(images.clone(), sigma=sigmas, basis=basis)
    sharp = sigmas == 0
    expected = [TF.gaussian_blur(i, kernel_px, s) for i, s in zip(images[~sharp], sigmas[~sharp].tolist(), strict=True)]
    torch.testing.assert_close(got[~sharp], torch.stack(expected), atol=2e-6, rtol=0)
    assert torch.equal(got[sharp], images[sharp])


def test_rotation_crop_agrees_with_torchvision() -> None:
    images = unit_images(24, side=60)
    angles = torch.linspace(-180, 360, 24)
    got = geometry.rotate_crop(images, angle=angles)
    for image, angle, view in zip(images, angles.tolist(), got, strict=True):
        rotated = TF.rotate(image, angle, interpolation=InterpolationMode.BILINEAR)
        torch.testing.assert_close(view, TF.center_crop(rotated, [40, 40]), atol=2e-4, rtol=0)


@pytest.mark.parametrize("size_px", [40, 24])
def test_resized_crop_agrees_with_torchvision(size_px: int) -> None:
    images = unit_images(32)
    scale = (0.08, 1.0) if size_px == 40 else (0.05, 0.32)
    crops = draw(ViewRecipe(crop=Crop(scale=scale)), 32).crop
    got = geometry.resized_crop(images, crop=crops, size_px=size_px)
    for image, box, view in zip(images, crops.int().tolist(), got, strict=True):
        shrinks = max(box[2:]) > size_px  # a local crop of 25 or 26 px, where torchvision's antialiasing sets in
        expected = TF.resized_crop(image, *box, [size_px, size_px], InterpolationMode.BILINEAR, antialias=True)
        torch.testing.assert_close(view, expected, atol=0.15 if shrinks else 1e-4, rtol=0)


def test_the_single_resampling_of_an_upright_crop_is_torchvisions_away_from_the_border() -> None:
    cells = stained_cells(24).permute(0, 3, 1, 2) / 255
    parameters = draw(ViewRecipe(crop=Crop(scale=(0.08, 1.0)), flip_p=0.5), 24)
    upright = {"angle": torch.zeros(24), "crop": parameters.crop, "flip": parameters.flip}
    got = geometry.sample_views(cells, **upright, size_px=40).unflatten(2, (40, 40))
    for cell, box, flip, view in zip(cells, parameters.crop.int().tolist(), parameters.flip, got, strict=True):
        expected = TF.resized_crop(TF.center_crop(cell, [40, 40]), *box, [40, 40], antialias=True)
        expected = TF.hflip(expected) if flip else expected
        margin = 3  # half a pixel of the smallest crop (about 10 px) is 2 px of the view
        torch.testing.assert_close(view[:, margin:-margin, margin:-margin], expected[:, margin:-margin, margin:-margin])


# --- the whole chain ------------------------------------------------------------------------------------------------


def torchvision_view(cell: torch.Tensor, p: ViewParameters, row: int, policy: Policy, kernel_px: int) -> torch.Tensor:
    """The paper's order of operations with torchvision's functions on one cell, uint8 [60, 60, 3]."""
    image = jittered_by_torchvision(cell.permute(2, 0, 1) / 255, p, row)
    if p.grayscale[row]:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    image = TF.center_crop(TF.rotate(image, p.angle[row].item(), InterpolationMode.BILINEAR), [40, 40])
    image = TF.resized_crop(image, *p.crop[row].int().tolist(), [40, 40], antialias=True)
    image = TF.hflip(image) if p.flip[row] else image
    if p.blur_sigma[row] > 0:
        image = TF.gaussian_blur(image, kernel_px, p.blur_sigma[row].item())
    if p.solarize_from[row] <= 1:
        image = TF.solarize(image, p.solarize_from[row].item())
    if p.erase[row, 2] > 0:
        image = TF.erase(image, *p.erase[row].int().tolist(), v=torch.zeros(1))
    return TF.normalize(image, policy.mean, policy.std)


@pytest.mark.parametrize("name", ["a0", "a1_gray", "moco_asymmetric"])
def test_the_reference_path_is_torchvisions_chain(name: str) -> None:
    policy, cells = load_policy(name), stained_cells(64)
    recipe = policy.recipes[1]
    parameters = draw(recipe, 64)
    constants = constants_of(policy, kernel_px=recipe.blur.kernel_px, size_px=40, device=CPU)
    got = render_views(cells, parameters, plan=plan_of(recipe, size_px=40, reference=True), constants=constants)
    rows = enumerate(cells)
    expected = torch.stack([torchvision_view(c, parameters, r, policy, recipe.blur.kernel_px) for r, c in rows])
    # A value at the threshold of solarisation may fall to either side, so single pixels may differ.
    error = (got - expected).abs().mul(torch.tensor(policy.std)[:, None, None]).mul(255)  # grey levels
    assert error.mean() < 1e-3
    assert (error > 0.1).float().mean() < 1e-4


@pytest.mark.parametrize(("name", "limit"), [("a0", 0.6), ("a1", 1.2), ("a1_gray", 1.2)])
def test_the_fused_path_stays_near_the_reference(name: str, limit: float) -> None:
    policy, cells = load_policy(name), stained_cells(96)
    recipe = policy.view_a
    parameters = draw(recipe, 96)
    constants = constants_of(policy, kernel_px=recipe.blur.kernel_px, size_px=40, device=CPU)
    fused, reference = (
        render_views(cells, parameters, plan=plan_of(recipe, size_px=40, reference=r), constants=constants)
        for r in (False, True)
    )
    levels = (fused - reference).mul(torch.tensor(policy.std)[:, None, None]).mul(255)
    assert levels.abs().mean() < limit  # grey levels; measured 0.29 for a0 and 0.74 for a1 on real crops
    assert levels.mean(dim=(1, 2, 3)).abs().max() < 3  # no sample is lighter or darker as a whole


@pytest.mark.parametrize("reference", [False, True])
def test_no_angle_leaves_a_black_corner(reference: bool) -> None:
    white = torch.full((360, 60, 60, 3), 255, dtype=torch.uint8)
    recipe, policy = ViewRecipe(rotation_degrees=360), load_policy("a1")
    parameters = draw(recipe, 360)._replace(angle=torch.arange(360.0))
    constants = constants_of(policy, kernel_px=9, size_px=40, device=CPU)
    view = render_views(white, parameters, plan=plan_of(recipe, size_px=40, reference=reference), constants=constants)
    expected = (1 - torch.tensor(policy.mean)) / torch.tensor(policy.std)
    torch.testing.assert_close(view, expected[:, None, None].expand_as(view), atol=1e-4, rtol=0)


def test_every_corner_of_a_crop_stays_inside_the_cell_at_every_angle() -> None:
    whole = torch.tensor([0.0, 0.0, 40.0, 40.0]).expand(720, 4)
    angle = torch.arange(0, 360, 0.5)
    grid = geometry._view_grid(angle=angle, crop=whole, flip=angle > 180, size_px=40)
    assert grid.abs().max() <= 1 - 1 / 60  # the centres of the outermost pixels


EVERYTHING = load_policy("a1_gray").view_a.model_copy(update={"solarize": Solarize(p=0.5)})


@pytest.mark.slow
def test_one_graph_without_branches_makes_the_same_views() -> None:
    """Under torch.compile (and on a GPU) all samples are computed and the result is selected; a CPU computes a few."""
    torch.compiler.reset()
    policy, cells, parameters = load_policy("a1_gray"), stained_cells(24), draw(EVERYTHING, 24)
    constants = constants_of(policy, kernel_px=9, size_px=40, device=CPU)
    plan = plan_of(EVERYTHING, size_px=40)
    graph = torch.compile(render_views, backend="eager", fullgraph=True)
    whole = graph(cells, parameters, plan=plan, constants=constants)
    torch.testing.assert_close(render_views(cells, parameters, plan=plan, constants=constants), whole)


def test_on_a_gpu_nothing_asks_the_host_for_a_value() -> None:
    """Fake CUDA tensors have no values: any .item(), nonzero or move to the host raises."""
    device = torch.device("cuda")
    constants = constants_of(load_policy("a1_gray"), kernel_px=9, size_px=40, device=CPU)
    with FakeTensorMode():
        there = render.Constants(*(torch.empty(tensor.shape, device=device) for tensor in constants))
        cells = torch.empty(8, 60, 60, 3, dtype=torch.uint8, device=device)
        parameters = draw_view_parameters(EVERYTHING, count=8, size_px=40, generator=None, device=device)
        view = render_views(cells, parameters, plan=plan_of(EVERYTHING, size_px=40), constants=there)
        assert (view.device.type, tuple(view.shape)) == ("cuda", (8, 3, 40, 40))


# --- GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_views_of_the_same_parameters_without_waiting() -> None:
    cells, device = stained_cells(64), torch.device("cuda")
    for name in ("a1_gray", "moco_asymmetric"):
        policy = load_policy(name)
        recipe = policy.recipes[1]
        parameters, plan = draw(recipe, 64), plan_of(recipe, size_px=40)
        expected = render_views(
            cells, parameters, plan=plan, constants=constants_of(policy, kernel_px=9, size_px=40, device=CPU)
        )
        there = ViewParameters(*(field.to(device) for field in parameters))
        constants = constants_of(policy, kernel_px=9, size_px=40, device=device)
        got = render_views(cells.to(device), there, plan=plan, constants=constants)
        assert (got.cpu() - expected).abs().mean() < 1e-3
        generator, on_gpu = torch.Generator(device=device).manual_seed(0), cells.to(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            view_a, _ = make_views(on_gpu, policy=policy, generator=generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert view_a.device.type == "cuda"
