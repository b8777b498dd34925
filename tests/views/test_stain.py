"""Stain augmentation against OpenCV, scikit-image, torchstain and the published RandStainNA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lemon.views.colorspace import Space, from_space, to_space
from lemon.views.macenko import draw_perturbations, perturb_stains, stain_matrix
from lemon.views.stain import (
    StainDraw,
    StainStatistics,
    draw_templates,
    fit_stain_statistics,
    image_statistics,
    recolor,
    reinhard,
)
from tests.conftest import shared
from tests.views.stained import CPU, EOSIN, HEMATOXYLIN, seeded, stained_cells, synthetic_cells


def planar(images: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(images.reshape(len(images), -1, 3).swapaxes(1, 2).copy())


@pytest.fixture(scope="module")
def any_colours() -> NDArray[np.uint8]:
    """Cells, noise of every colour, and a ramp of greys with the extremes."""
    noise = np.random.default_rng(0).integers(0, 256, size=(4, 60, 60, 3), dtype=np.uint8)
    greys = np.resize(np.arange(256, dtype=np.uint8), (1, 60, 60))[..., None].repeat(3, axis=3)
    return np.concatenate([stained_cells(4).numpy(), noise, greys])


# --- colour spaces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["lab", "hsv"])
def test_colour_spaces_agree_with_opencv_within_its_rounding(space: Space, any_colours: NDArray[np.uint8]) -> None:
    cv2 = pytest.importorskip("cv2")
    there, back = {
        "lab": (cv2.COLOR_RGB2LAB, cv2.COLOR_LAB2RGB),
        "hsv": (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB),
    }[space]
    expected = np.stack([cv2.cvtColor(image, there) for image in any_colours])
    error = (to_space(planar(any_colours), space=space) - planar(expected)).abs()
    if space == "hsv":
        error[:, 0] = torch.minimum(error[:, 0], 180 - error[:, 0])
    assert error.max() <= 2
    assert error.mean() < 0.12

    expected_rgb = np.stack([cv2.cvtColor(image, back) for image in expected])
    error = (from_space(planar(expected).float(), space=space).float() - planar(expected_rgb)).abs()
    assert error.max() <= 2
    assert error.mean() < 0.25


def test_hed_agrees_with_scikit_image(any_colours: NDArray[np.uint8]) -> None:
    color = pytest.importorskip("skimage.color")
    expected = color.rgb2hed(any_colours)
    torch.testing.assert_close(
        to_space(planar(any_colours), space="hed"), planar(expected).float(), atol=1e-6, rtol=1e-4
    )
    error = from_space(planar(expected).float(), space="hed") - planar(color.hed2rgb(expected) * 255)
    assert error.abs().max() <= 0.51  # rounding to whole grey levels


def test_hue_beyond_a_turn_wraps_around() -> None:
    hsv = torch.tensor([[-10.0, 170.0, 190.0, 10.0, 350.0], [200.0] * 5, [180.0] * 5])[None]  # [1, 3, 5]
    rgb = from_space(hsv, space="hsv")[0].T.tolist()
    assert rgb[0] == rgb[1] == rgb[4]
    assert rgb[2] == rgb[3]
    assert rgb[0] != rgb[2]


# --- Reinhard -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["lab", "hsv"])
def test_reinhard_agrees_with_the_published_randstainna(space: Space) -> None:
    golden = np.load(shared("golden/randstainna.npz"))
    name = space.upper()
    crops = torch.from_numpy(golden["crops_rgb"])
    mean, std = image_statistics(crops, space=space)
    np.testing.assert_allclose(mean, golden[f"{name}_avg"], atol=0.05)
    np.testing.assert_allclose(std, golden[f"{name}_std"], atol=0.05)

    targets = (torch.from_numpy(golden[f"{name}_target_{moment}"]) for moment in ("avg", "std"))
    target_mean, target_std = targets
    result = reinhard(crops, space=space, target_mean=target_mean, target_std=target_std)
    error = np.abs(result.numpy().astype(int) - golden[f"{name}_expected_rgb"].astype(int))
    assert error.mean() < 0.3  # grey levels; rounding of the two conversions
    assert error.mean(axis=(1, 2, 3)).max() < 0.5


@pytest.mark.parametrize("space", ["lab", "hsv", "hed"])
def test_an_image_with_its_own_statistics_as_target_stays_itself(space: Space) -> None:
    cells = stained_cells(12)
    mean, std = image_statistics(cells, space=space)
    result = reinhard(cells, space=space, target_mean=mean, target_std=std)
    assert (result.float() - cells.float()).abs().mean() < 2  # truncation to OpenCV's 8 bit, twice


@pytest.mark.parametrize("space", ["lab", "hed"])
def test_a_recoloured_image_has_the_statistics_of_its_target(space: Space) -> None:
    cells = stained_cells(8)
    mean, std = image_statistics(cells, space=space)
    target_mean, target_std = (mean + mean.roll(1, 0)) / 2, (std + std.roll(1, 0)) / 2
    result = reinhard(cells, space=space, target_mean=target_mean, target_std=target_std)
    got_mean, _ = image_statistics(result, space=space)
    before, after = (mean - target_mean).abs().mean(0), (got_mean - target_mean).abs().mean(0)
    assert (after < 0.35 * before + 0.01 * target_mean.mean(0)).all()


@pytest.mark.parametrize("space", ["lab", "hsv", "hed"])
def test_a_constant_image_is_recoloured_without_infinities(space: Space) -> None:
    flat = torch.stack([torch.full((60, 60, 3), grey, dtype=torch.uint8) for grey in (0, 128, 255)])
    mean, std = image_statistics(stained_cells(3), space=space)
    result = reinhard(flat, space=space, target_mean=mean, target_std=std)
    assert result.dtype == torch.uint8
    assert (result.flatten(1, 2).float().std(dim=1) == 0).all()


def test_samples_outside_the_draw_are_left_alone() -> None:
    cells = stained_cells(6)
    mean, std = image_statistics(cells.roll(1, 0), space="lab")
    chosen = torch.tensor([True, False] * 3)
    result = recolor(cells, [StainDraw(chosen, mean, std)], space="lab")[0]
    assert torch.equal(result[~chosen], cells[~chosen])
    assert (result[chosen] != cells[chosen]).flatten(1).any(dim=1).all()


def test_reinhard_says_what_is_wrong_in_one_line() -> None:
    cells, target = stained_cells(2), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"dtype torch.float32; expected torch.uint8") as error:
        reinhard(cells.float(), space="lab", target_mean=target, target_std=target)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"target_std: got shape \[3\]; expected \[2, 3\]"):
        reinhard(cells, space="lab", target_mean=target, target_std=torch.ones(3))
    with pytest.raises(ValueError, match="space: got 'rgb'; expected one of lab, hsv, hed"):
        reinhard(cells, space="rgb", target_mean=target, target_std=target)  # type: ignore[arg-type]


# --- statistics -----------------------------------------------------------------------------------------------------


def two_stains(count: int) -> torch.Tensor:
    """Cells of two laboratories: as they are, and much paler."""
    cells = synthetic_cells(count, seed=3)
    cells[::2] = 255 - (255 - cells[::2]) // 3
    return torch.from_numpy(cells)


def test_one_gaussian_is_the_mean_and_covariance_of_the_cells() -> None:
    cells = stained_cells(24)
    fitted = fit_stain_statistics(cells, space="hed", components=1, seed=0)
    templates = torch.cat(image_statistics(cells, space="hed"), dim=1).double().numpy()
    np.testing.assert_allclose(fitted.means[0], templates.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(fitted.covariances[0], np.cov(templates.T, bias=True), rtol=1e-3, atol=1e-9)
    assert fitted.weights == pytest.approx([1.0])
    assert fitted.n_cells == 24


def test_a_mixture_finds_the_laboratories() -> None:
    cells = two_stains(60)
    fitted = fit_stain_statistics(cells, space="lab", components=2, seed=0)
    lightness = sorted(mean[0] for mean in fitted.means)
    mean, _ = image_statistics(cells, space="lab")
    np.testing.assert_allclose(lightness, sorted([mean[::2, 0].mean(), mean[1::2, 0].mean()]), rtol=1e-3)
    assert fitted.weights == pytest.approx([0.5, 0.5], abs=1e-3)
    assert fit_stain_statistics(cells, space="lab", components=2, seed=0).fingerprint == fitted.fingerprint


def test_drawn_templates_have_the_moments_of_the_mixture() -> None:
    fitted = fit_stain_statistics(two_stains(60), space="lab", components=2, seed=0)
    draw = draw_templates(fitted, count=20_000, p=0.7, generator=seeded(), device=CPU)
    weights, means = np.array(fitted.weights), np.array(fitted.means)
    spread = np.einsum("k,kij->ij", weights, np.array(fitted.covariances))
    spread += np.cov(means.T, aweights=weights, bias=True)
    sample = torch.cat([draw.shift, draw.scale], dim=1).numpy()
    np.testing.assert_allclose(sample.mean(axis=0), weights @ means, atol=5 * np.sqrt(spread.diagonal() / 20_000).max())
    np.testing.assert_allclose(np.cov(sample.T), spread, rtol=0.1, atol=0.03 * np.abs(spread).max())
    assert draw.apply.float().mean().item() == pytest.approx(0.7, abs=0.02)


def test_no_drawn_standard_deviation_is_negative() -> None:
    wild = StainStatistics("lab", 1, [1.0], [[150.0] * 3 + [5.0] * 3], [(np.eye(6) * 400).tolist()], 1)
    draw = draw_templates(wild, count=2000, p=1.0, generator=seeded(), device=CPU)
    assert draw.scale.min() >= 0.5
    assert draw.scale.std() > 1


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    fitted = fit_stain_statistics(stained_cells(24), space="hsv", components=2, seed=1)
    path = tmp_path / fitted.file_name
    fitted.save(path)
    loaded = StainStatistics.load(path)
    assert path.name == "stain_hsv_gmm2.json"
    assert vars(loaded) == vars(fitted)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [path.name]


def test_a_bad_statistics_file_is_told_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    fitted = fit_stain_statistics(stained_cells(24), space="lab", components=1, seed=0)
    altered, broken = tmp_path / "altered.json", tmp_path / "broken.json"
    fitted.save(altered)
    fields = json.loads(altered.read_text())
    altered.write_text(json.dumps(fields | {"n_cells": 99}))
    broken.write_text("{")
    for path, fault in (
        (tmp_path / "no.json", "no such file"),
        (broken, "not a statistics file"),
        (altered, "altered"),
    ):
        with pytest.raises(ValueError, match=fault) as error:
            StainStatistics.load(path)
        assert "lemon fit-stain" in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="components: got 10 for 24 cells"):
        fit_stain_statistics(stained_cells(24), space="lab", components=10, seed=0)


# --- Macenko --------------------------------------------------------------------------------------------------------


def test_the_stain_matrix_agrees_with_torchstain() -> None:
    normalizers = pytest.importorskip("torchstain.torch.normalizers")
    cells = torch.cat([stained_cells(12), torch.from_numpy(synthetic_cells(4, seed=5))])
    vectors, found = stain_matrix(cells)
    assert found.all()
    for cell, matrix in zip(cells, vectors, strict=True):
        reference = normalizers.TorchMacenkoNormalizer()
        reference.fit(cell.permute(2, 0, 1))
        torch.testing.assert_close(matrix, reference.HERef, atol=2e-4, rtol=0)


def test_the_stains_that_made_an_image_are_found() -> None:
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.05, 1.2, size=(1, 60, 60, 2)) * (rng.random((1, 60, 60, 1)) < [0.6, 0.6])
    density = amounts[..., :1] * HEMATOXYLIN + (amounts[..., 1:] + 0.15) * EOSIN + 0.0
    image = torch.from_numpy(np.clip(240 * np.exp(-density) - 1, 0, 255).round().astype(np.uint8))
    vectors, _ = stain_matrix(image)
    truth = torch.tensor([HEMATOXYLIN, EOSIN]).T
    cosine = (vectors[0] * (truth / truth.norm(dim=0))).sum(dim=0)
    assert (cosine > 0.97).all()


def test_unchanged_concentrations_give_the_image_back() -> None:
    cells = stained_cells(8)
    neutral = StainDraw(torch.ones(8, dtype=torch.bool), torch.zeros(8, 2), torch.ones(8, 2))
    assert torch.equal(perturb_stains(cells, [neutral])[0], cells)


def test_more_stain_is_darker_and_each_sample_has_its_own_draw() -> None:
    cells = stained_cells(8)
    everywhere, none = torch.ones(8, dtype=torch.bool), torch.zeros(8, 2)
    darker, paler = perturb_stains(cells, [StainDraw(everywhere, none, torch.full((8, 2), f)) for f in (1.2, 0.8)])
    grey = [images.float().mean(dim=(1, 2, 3)) for images in (darker, cells, paler)]
    assert (grey[0] < grey[1]).all()
    assert (grey[1] < grey[2]).all()
    draw = draw_perturbations(count=64, p=0.5, scale=(0.8, 1.2), shift=(-0.1, 0.1), generator=seeded(), device=CPU)
    assert draw.scale.std(dim=0).min() > 0.05
    assert draw.shift.std(dim=0).min() > 0.02
    assert 0.8 <= draw.scale.min() <= draw.scale.max() <= 1.2
    assert 0.2 < draw.apply.float().mean() < 0.8


def test_white_and_constant_crops_come_back_unchanged() -> None:
    crops = torch.stack([torch.full((60, 60, 3), grey, dtype=torch.uint8) for grey in (0, 90, 200, 255)])
    crops = torch.cat([crops, crops[3:].clone(), crops[3:].clone()])
    crops[4, 20:24, 20:24] = torch.tensor([90, 40, 120], dtype=torch.uint8)  # too few stained pixels
    crops[5, :30] = torch.tensor([150, 80, 160], dtype=torch.uint8)  # one colour on white
    draw = draw_perturbations(count=6, p=1.0, scale=(0.8, 1.2), shift=(-0.1, 0.1), generator=seeded(), device=CPU)
    vectors, found = stain_matrix(crops)
    assert not found.any()
    assert vectors.isfinite().all()
    assert torch.equal(perturb_stains(crops, [draw])[0], crops)
