"""Properties of whole policies: draws, both views, local crops, files, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision.transforms import RandomErasing, RandomResizedCrop

from lemon.views.gallery import draw_gallery
from lemon.views.make import load_policy, make_local_views, make_views, policy_names
from lemon.views.policy import Blur, Crop, Jitter, Policy, ViewRecipe
from lemon.views.stain import fit_stain_statistics
from tests.views.stained import draw, seeded, stained_cells

NAMES = ["a0", "a1", "a1_gmm1", "a1_gmm10", "a1_gray", "a1_gray_blur1", "a1_macenko", "moco_asymmetric"]


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("stain")
    cells = stained_cells(120)
    found = {}
    for components in (1, 10):
        fitted = fit_stain_statistics(cells, space="lab", components=components, seed=0)
        found[components] = folder / fitted.file_name
        fitted.save(found[components])
    return found


@pytest.fixture(params=NAMES)
def policy(request: pytest.FixtureRequest, statistics: dict[int, Path]) -> Policy:
    loaded = load_policy(request.param)
    return loaded.with_stain_statistics(statistics[loaded.stain.components]) if loaded.stain.kind == "gmm" else loaded


# --- draws ----------------------------------------------------------------------------------------------------------


def test_the_shares_of_samples_meet_their_probabilities() -> None:
    count = 20_000
    for name in ("a1_gray", "moco_asymmetric"):
        for recipe in load_policy(name).recipes:
            p = draw(recipe, count)
            shares = [
                (p.flip, recipe.flip_p),
                (p.hue != 0, recipe.jitter.p),
                (p.grayscale, recipe.grayscale_p),
                (p.blur_sigma > 0, recipe.blur.p),
                (p.solarize_from <= 1, recipe.solarize.p),
                (p.erase[:, 2] > 0, recipe.erasing.p),
            ]
            for happened, probability in shares:
                tolerance = 5 * (probability * (1 - probability) / count) ** 0.5
                assert happened.float().mean().item() == pytest.approx(probability, abs=tolerance)


def test_every_order_of_the_colours_is_equally_likely() -> None:
    order = draw(load_policy("a1").view_a, 24_000).order
    codes = (order * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    counts = codes.unique(return_counts=True)[1]
    assert len(counts) == 24
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


def test_parameters_stay_in_their_ranges_and_differ_between_samples() -> None:
    recipe = load_policy("a1_gray").view_a
    p = draw(recipe, 4000)
    jittered = p.hue != 0
    for values, low, high in (
        (p.angle, 0, 360),
        (p.brightness[jittered], 0.4, 1.6),
        (p.contrast[jittered], 0.3, 1.7),
        (p.saturation[jittered], 0.5, 1.5),
        (p.hue[jittered], -0.2, 0.2),
        (p.blur_sigma[p.blur_sigma > 0], 0.1, 2.0),
    ):
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high
        assert values.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.1)  # uniform
    assert (p.brightness[~jittered] == 1).all()


def torchvision_boxes(transform: RandomResizedCrop | RandomErasing, count: int) -> torch.Tensor:
    image = torch.zeros(3, 40, 40)
    if isinstance(transform, RandomResizedCrop):
        return torch.tensor(
            [transform.get_params(image, transform.scale, transform.ratio) for _ in range(count)]
        ).float()
    return torch.tensor(
        [transform.get_params(image, transform.scale, transform.ratio, [0.0])[:4] for _ in range(count)]
    )


@pytest.mark.parametrize("kind", ["crop a0", "crop a1", "crop beyond", "erasing"])
def test_boxes_are_distributed_as_torchvisions(kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "erasing":
            reference = torchvision_boxes(RandomErasing(1.0, (0.1, 0.3), (0.8, 1.2)), 3000).float()
        else:
            scale, ratio = {"a0": ((0.08, 1.0), (3 / 4, 4 / 3)), "a1": ((0.32, 1.0), (3 / 4, 4 / 3))}.get(
                kind.split()[1], ((0.9, 1.0), (1.5, 2.0))
            )
            reference = torchvision_boxes(RandomResizedCrop(40, scale, ratio), 3000)
    if kind == "erasing":
        recipe = load_policy("a1").view_a
        boxes = draw(recipe.model_copy(update={"erasing": recipe.erasing.model_copy(update={"p": 1.0})}), 30_000).erase
    else:
        boxes = draw(ViewRecipe(crop=Crop(scale=scale, ratio=ratio)), 30_000).crop
    assert (boxes >= 0).all()
    assert (boxes == boxes.round()).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 40).all()
    measures = [lambda b, i=i: b[:, i] for i in range(4)] + [lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3]]
    for measure in measures:
        ours, theirs = measure(boxes), measure(reference)
        tolerance = 5 * theirs.std().item() / 3000**0.5 + 1e-6
        assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=tolerance)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1, abs=1e-6)


# --- policies -------------------------------------------------------------------------------------------------------


def test_two_finite_different_views_come_out_of_every_policy(policy: Policy) -> None:
    cells = stained_cells(20)
    view_a, view_b = make_views(cells, policy=policy, generator=seeded())
    for view in (view_a, view_b):
        assert view.shape == (20, 3, 40, 40)
        assert view.dtype == torch.float32
        assert view.is_contiguous()
        assert view.isfinite().all()
    assert ((view_a - view_b).abs().flatten(1).mean(dim=1) > 0.01).all()


def test_the_same_seed_gives_the_same_views_and_another_seed_others(policy: Policy) -> None:
    cells = stained_cells(10)
    first, again, other = (make_views(cells, policy=policy, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_equal_cells_get_unequal_views(policy: Policy) -> None:
    same = stained_cells(1).expand(32, -1, -1, -1)
    view, _ = make_views(same, policy=policy, generator=seeded())
    assert len({tuple(v.flatten()[:200].tolist()) for v in view}) == 32


def test_input_is_neither_changed_nor_needs_to_be_contiguous(policy: Policy) -> None:
    cells = stained_cells(12)
    kept = cells.clone()
    strided = cells.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)[::2]
    assert not strided.is_contiguous()
    got = make_views(strided, policy=policy, generator=seeded())
    expected = make_views(cells[::2].contiguous(), policy=policy, generator=seeded())
    torch.testing.assert_close(got, expected)
    assert torch.equal(cells, kept)


def test_one_cell_is_a_batch(policy: Policy) -> None:
    for seed in range(8):
        view_a, view_b = make_views(stained_cells(1), policy=policy, generator=seeded(seed))
        assert view_a.shape == view_b.shape == (1, 3, 40, 40)


def test_chunks_on_the_cpu_do_not_show(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = stained_cells(50)
    whole = make_views(cells, policy=policy, generator=seeded())
    monkeypatch.setattr("lemon.views.render.CPU_CHUNK", 16)
    monkeypatch.setattr("lemon.views.make.CPU_CHUNK", 16)
    torch.testing.assert_close(make_views(cells, policy=policy, generator=seeded()), whole, atol=1e-4, rtol=0)


def test_policies_with_the_same_seed_share_their_geometry() -> None:
    cells = stained_cells(16)
    plain, gray = (load_policy(name) for name in ("a1", "a1_gray"))
    colour, grey = (make_views(cells, policy=p, generator=seeded())[0] for p in (plain, gray))
    kept = draw(gray.view_a, 16).grayscale.logical_not()
    assert 0 < kept.sum() < 16
    torch.testing.assert_close(colour[kept], grey[kept])
    assert (colour[~kept] != grey[~kept]).flatten(1).any(dim=1).all()


def test_the_asymmetric_policy_blurs_one_view_and_solarizes_the_other() -> None:
    view_a, view_b = load_policy("moco_asymmetric").recipes
    assert (view_a.blur.p, view_a.solarize.p) == (1.0, 0.0)
    assert (view_b.blur.p, view_b.solarize.p) == (0.1, 0.2)
    edges = [
        view.diff(dim=3).abs().mean()
        for view in make_views(stained_cells(200), policy=load_policy("moco_asymmetric"), generator=seeded())
    ]
    assert edges[0] < 0.8 * edges[1]


def test_stain_policies_recolour_the_cells(statistics: dict[int, Path]) -> None:
    cells, plain = stained_cells(16), load_policy("a1")
    before = make_views(cells, policy=plain, generator=seeded())
    for name in ("a1_gmm1", "a1_gmm10", "a1_macenko"):
        stained = load_policy(name)
        if stained.stain.kind == "gmm":
            stained = stained.with_stain_statistics(statistics[stained.stain.components])
        after = make_views(cells, policy=stained, generator=seeded())
        changed = [(a - b).abs().flatten(1).mean(dim=1) > 0.02 for a, b in zip(before, after, strict=True)]
        assert all(share.float().mean() > 0.8 for share in changed)


def test_missing_or_foreign_stain_statistics_are_told_with_the_remedy(statistics: dict[int, Path]) -> None:
    ten = load_policy("a1_gmm10")
    for policy, fault in (
        (ten, "missing"),
        (ten.with_stain_statistics("nowhere/stain.json"), "no such file"),
        (ten.with_stain_statistics(statistics[1]), "holds space=lab components=1"),
    ):
        with pytest.raises(ValueError, match=fault) as error:
            make_views(stained_cells(2), policy=policy, generator=seeded())
        assert "lemon fit-stain cells=" in str(error.value)
        assert "\n" not in str(error.value)


def test_wrong_images_and_generators_are_told_in_one_line() -> None:
    policy, cells = load_policy("a1"), stained_cells(2)
    for wrong, fault in (
        (cells.float(), "dtype torch.float32; expected torch.uint8"),
        (cells[0], r"shape \[60, 60, 3\]; expected \[B, 60, 60, 3\]"),
        (cells.permute(0, 3, 1, 2), r"shape \[2, 3, 60, 60\]"),
        (cells[:, 10:50, 10:50], r"shape \[2, 40, 40, 3\]"),
        (cells[:0], "B >= 1"),
        (cells.numpy(), "got ndarray"),
    ):
        with pytest.raises(ValueError, match=fault) as error:
            make_views(wrong, policy=policy, generator=seeded())  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="generator: got one on cpu for images on meta"):
        make_views(cells.to("meta"), policy=policy, generator=seeded())


# --- local crops ----------------------------------------------------------------------------------------------------


def test_local_crops_come_crop_by_crop() -> None:
    cells = stained_cells(6)
    policy = load_policy("a1")
    locals_ = make_local_views(cells, policy=policy, generator=seeded(), count=4)
    assert locals_.shape == (24, 3, 24, 24)
    still = Policy(name="still", view_a=ViewRecipe(), local={"scale": (1.0, 1.0), "blur_p": 0.0})
    crops = make_local_views(cells, policy=still, generator=seeded(), count=3, size_px=40).unflatten(0, (3, 6))
    torch.testing.assert_close(crops[0], crops[2])
    expected = TF.normalize(TF.center_crop(cells.permute(0, 3, 1, 2) / 255, [40, 40]), still.mean, still.std)
    torch.testing.assert_close(crops[1], expected, atol=1e-4, rtol=1e-4)


def test_local_crops_see_less_of_the_cell() -> None:
    policy = load_policy("a1")
    crop = draw(policy.local_recipe, 2000, size_px=24).crop
    share = crop[:, 2] * crop[:, 3] / 1600
    assert 0.03 < share.min() < 0.06
    assert 0.3 < share.max() < 0.35
    assert load_policy("moco_asymmetric").local_recipe.blur.p == 0.5


def test_impossible_local_crops_are_refused() -> None:
    options = {"policy": load_policy("a1"), "generator": seeded()}
    with pytest.raises(ValueError, match="size_px: got 20; expected a multiple of the patch, 8 px"):
        make_local_views(stained_cells(1), count=2, size_px=20, **options)
    with pytest.raises(ValueError, match="count: got 0"):
        make_local_views(stained_cells(1), count=0, **options)


# --- policy files ---------------------------------------------------------------------------------------------------


def test_every_policy_file_is_valid_and_named_after_itself() -> None:
    assert policy_names() == NAMES
    assert [load_policy(name).name for name in NAMES] == NAMES


def test_blur_is_a_choice_in_one_policy_and_of_every_view_in_another() -> None:
    chosen, literal = load_policy("a1_gray"), load_policy("a1_gray_blur1")
    assert (chosen.view_a.blur.p, literal.view_a.blur.p) == (0.5, 1.0)
    assert (chosen.local.blur_p, literal.local.blur_p) == (0.5, 1.0)
    assert literal.view_a.model_copy(update={"blur": chosen.view_a.blur}) == chosen.view_a


def test_the_papers_numbers_are_in_the_policies() -> None:
    a0, a1, gray = (load_policy(name).view_a for name in ("a0", "a1", "a1_gray"))
    assert (a0.rotation_degrees, a0.crop.scale, a0.erasing.p) == (0, (0.08, 1.0), 0)
    assert a0.jitter == Jitter(p=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    assert (a1.rotation_degrees, a1.crop.scale, a1.grayscale_p) == (360, (0.32, 1.0), 0)
    assert a1.jitter == Jitter(p=0.8, brightness=0.6, contrast=0.7, saturation=0.5, hue=0.2)
    assert (a1.erasing.p, a1.erasing.scale, a1.erasing.ratio) == (0.3, (0.1, 0.3), (0.8, 1.2))
    assert gray == a1.model_copy(update={"grayscale_p": 0.2})
    assert a0.blur == a1.blur == Blur(p=0.5, sigma=(0.1, 2.0), kernel_px=9)


def test_an_unknown_policy_or_field_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'a1_grey'; expected one of a0, a1, .*did you mean a1_gray"):
        load_policy("a1_grey")
    path = tmp_path / "mine.yaml"
    for text, fault in (
        ("name: mine\nview_a: {flip: 0.5}", "view_a.flip: unknown key; did you mean flip_p"),
        ("name: mine\nview_a: {flip_p: 1.5}", "view_a.flip_p: got 1.5"),
        ("name: mine\nview_a: {blur: {kernel_px: 8}}", "expected an odd number"),
        ("name: mine\nview_a: {crop: {scale: [0.9, 0.1]}}", "low <= high"),
        ("name: [", "not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=fault) as error:
            load_policy(path)
        assert "\n" not in str(error.value)
    path.write_text("name: mine\nview_a: {flip_p: 0.25}")
    assert load_policy(path).recipes[1].flip_p == 0.25


def test_a_policy_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_policy("a1").name = "other"  # type: ignore[misc]


def test_the_gallery_is_a_picture_with_a_row_a_policy(tmp_path: Path) -> None:
    from PIL import Image

    policies = [load_policy(name) for name in ("a0", "a1")]
    heights = []
    for rows in (1, 2):
        path = tmp_path / "figures" / f"gallery{rows}.png"
        draw_gallery(stained_cells(2), policies=policies[:rows], path=path, seed=0, dpi=60)
        with Image.open(path) as picture:
            heights.append(picture.height)
    assert heights[1] > heights[0]
    with pytest.raises(ValueError, match="policies: got none"):
        draw_gallery(stained_cells(2), policies=[], path=tmp_path / "no.png", seed=0)
