"""DINOv2: its four terms against the plain losses, masks, the rows of Table 5, degenerate batches, several workers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lemon.encoders.config import EncoderConfig
from lemon.encoders.vit import forward_tokens
from lemon.pretrain import losses
from lemon.pretrain.config import DINOv2Config, PretrainConfig
from lemon.pretrain.dinov2 import DINOv2, block_mask, masked_patches
from lemon.pretrain.heads import DinoHead
from lemon.runtime.config import load, preset_names
from tests.pretrain.test_losses import (
    assert_same_as_one_worker,
    naive_sinkhorn,
    plain_cross_entropy,
    run_workers,
)
from tests.pretrain.test_mocov3 import CELLS, assert_same, crops, gradients, schedules, train

ENCODER = EncoderConfig(name="tiny", dim=32, depth=2, heads=4)
TINY = {"prototypes": 64, "hidden_dim": 48, "bottleneck_dim": 16, "local_crops": 2, "head_dim": 16, "warmup_epochs": 1}


def method(**changes: Any) -> DINOv2:
    return DINOv2(DINOv2Config(**{**TINY, "drop_path": 0.0, **changes}), ENCODER, seed=0)


def spread(model: DINOv2) -> DINOv2:
    """The model some way into training: with LayerScale at 1 its tokens depend on the image."""
    with torch.no_grad():
        for encoder in (model.encoder, model.teacher):
            for name, p in encoder.named_parameters():
                if name.endswith("gamma"):
                    p.fill_(1.0)
        for p in model.teacher.parameters():
            p.mul_(1.1)
    return model


def views_of(model: DINOv2, *, cells: int = CELLS) -> list[Tensor]:
    return crops(cells=cells) + crops(cells=cells, n_views=model.n_local_views, px=24)


def some_mask(cells: int = CELLS) -> Tensor:
    mask = torch.rand(2 * cells, 25, generator=torch.Generator().manual_seed(4)) < 0.3
    mask[::2] = False
    return mask


# --- configs ----------------------------------------------------------------------------------------------------------


def test_the_four_rows_of_table_5_are_four_configs() -> None:
    labels, rest = {}, []
    for name in preset_names("ssl"):
        config = load("pretrain", ["cells=c", "output=o", f"ssl={name}"], PretrainConfig).ssl
        if name == "dinov2_tiny":
            continue
        labels[name] = config.label
        if isinstance(config, DINOv2Config):
            rest.append(config.model_copy(update={"local_to_global": True, "regulariser": "koleo"}))
    assert labels == {
        "mocov3": "MoCo v3",
        "dinov2": "DINOv2",
        "dinov2_no_l2g": "DINOv2, no local-to-global",
        "dinov2_kde": "DINOv2, no local-to-global, KDE",
    }
    assert all(config == DINOv2Config() for config in rest)  # they differ in these two alone


def test_the_defaults_are_the_papers() -> None:
    config = DINOv2Config()
    assert (config.prototypes, config.hidden_dim, config.bottleneck_dim) == (65536, 2048, 256)
    values = method(warmup_epochs=10).schedules(epochs=150, steps_per_epoch=100, batch=4096)
    start, end = values.at(0), values.at(149 * 100 + 99)
    assert values.at(1000).lr == pytest.approx(8e-3)
    assert (start.weight_decay, start.momentum, start.teacher_temperature) == pytest.approx((0.04, 0.992, 0.04))
    assert (end.weight_decay, end.momentum, end.lr) == pytest.approx((0.4, 1.0, 1e-6), rel=1e-3)
    assert values.at(1500).teacher_temperature == pytest.approx(0.055)
    assert start.last_layer_lr == values.at(99).last_layer_lr == 0


def test_layer_wise_learning_rates_and_weight_decay() -> None:
    model = method()
    of = {}
    for group in model.param_groups():
        for p in group["params"]:
            of[id(p)] = (group["lr_scale"], group["wd_scale"], group["last_layer"])
    named = {name: of.pop(id(p)) for name, p in model.named_parameters() if p.requires_grad}
    assert not of
    assert named["encoder.patch_embed.proj.weight"] == pytest.approx((0.9**3 * 0.2, 1.0, False))
    assert named["encoder.pos_embed"] == named["mask_token"] == pytest.approx((0.9**3, 1.0, False))
    assert named["encoder.blocks.0.attn.qkv.weight"] == pytest.approx((0.9**2, 1.0, False))
    assert named["encoder.blocks.1.mlp.fc2.weight"] == pytest.approx((0.9, 1.0, False))
    assert named["encoder.blocks.1.mlp.fc2.bias"] == pytest.approx((0.9, 0.0, False))
    assert named["encoder.blocks.1.ls1.gamma"] == pytest.approx((0.9, 0.0, False))
    assert named["encoder.norm.weight"] == (1.0, 0.0, False)
    assert named["heads.dino.mlp.0.weight"] == (1.0, 1.0, False)
    assert named["heads.dino.last_layer.weight"] == (1.0, 1.0, True)


def test_a_local_crop_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ssl.local_crop_px=20: expected a multiple of encoder.patch_px=8"):
        method(local_crop_px=20)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("separate", [False, True])
def test_every_term_equals_the_plain_losses(centering: str, separate: bool) -> None:
    model = spread(method(centering=centering, separate_ibot_head=separate, chunk_rows=5))
    views, mask, values = views_of(model), some_mask(), schedules(model).at(0)
    model.dino_center.copy_(0.1 * torch.randn(64))
    model.ibot_center.copy_(0.1 * torch.randn(64))
    ibot = "ibot" if separate else "dino"
    with torch.no_grad():
        teacher = forward_tokens(model.teacher, torch.cat(views[:2]))
        class_logits, patch_logits = (
            model.teacher_heads["dino"](teacher[:, 0]),
            model.teacher_heads[ibot](teacher[:, 1:]),
        )
        patches = torch.zeros_like(patch_logits)
        if centering == "sinkhorn":
            p = naive_sinkhorn(class_logits, temperature=0.04, iterations=3).float()
            patches[mask] = naive_sinkhorn(patch_logits[mask], temperature=0.04, iterations=3).float()
        else:
            p = F.softmax((class_logits - model.dino_center) / 0.04, dim=-1)
            patches[mask] = F.softmax((patch_logits[mask] - model.ibot_center) / 0.04, dim=-1)
        tokens = forward_tokens(model.encoder, torch.cat(views[:2]), mask, model.mask_token)
        p1, p2 = p.chunk(2)
        head = model.heads["dino"]
        s1, s2 = (head(z) for z in tokens[:, 0].chunk(2))
        local = [head(model.encoder(view)) for view in views[2:]]

        def term(s: Tensor, t: Tensor) -> Tensor:
            return plain_cross_entropy(s, t).mean()

        want = {
            "dino_global": (term(s1, p2) + term(s2, p1)) / 2,
            "dino_local": sum(term(s, t) for s in local for t in (p1, p2)) / 4,
            "ibot": (plain_cross_entropy(model.heads[ibot](tokens[:, 1:]), patches) * losses.mask_weights(mask)).sum()
            / len(mask),
            "regulariser": sum(losses.koleo(z) for z in tokens[:, 0].chunk(2)),
        }
    got = model(views, values=values, mask=mask)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")
    # Of the 2 * 1 + 2 * 2 pairs of views, 2 are global.
    total = want["dino_global"] * 2 / 6 + want["dino_local"] * 4 / 6 + want["ibot"] + 0.1 * want["regulariser"]
    torch.testing.assert_close(got["loss"], total)


def test_without_local_views_the_global_term_has_its_full_weight() -> None:
    for changes in ({"local_crops": 0}, {"local_to_global": False}):
        model = spread(method(regulariser="none", ibot_weight=0.0, **changes))
        assert model.n_local_views == 0
        parts = model(views_of(model), values=schedules(model).at(0), mask=some_mask())
        torch.testing.assert_close(parts["loss"].detach(), parts["dino_global"])
        assert parts["dino_local"] == 0
    model = spread(method(regulariser="none", ibot_weight=0.0, global_weight=0.5, local_weight=0.25))
    parts = model(views_of(model), values=schedules(model).at(0), mask=some_mask())
    torch.testing.assert_close(parts["loss"].detach(), 0.5 * parts["dino_global"] + 0.25 * parts["dino_local"])


def test_the_regulariser_is_chosen_by_config() -> None:
    found = {}
    for name in ("koleo", "kde", "none"):
        model = spread(method(regulariser=name, local_crops=0))
        found[name] = model(views_of(model), values=schedules(model).at(0), mask=some_mask())
        with torch.no_grad():
            z1, z2 = forward_tokens(model.encoder, torch.cat(crops()), some_mask(), model.mask_token)[:, 0].chunk(2)
    kde = losses.kde(z1, kappa=5.0) + losses.kde(z2, kappa=5.0)
    torch.testing.assert_close(found["kde"]["regulariser"], kde)
    torch.testing.assert_close(found["kde"]["loss"] - found["none"]["loss"], 0.05 * kde)
    assert found["none"]["regulariser"] == 0


def test_stacked_local_views_equal_a_list_of_them_and_a_wrong_number_is_refused() -> None:
    model = spread(method())
    views, values = views_of(model), schedules(model).at(0)
    listed = model(views, values=values, mask=some_mask())["loss"]
    fresh = spread(method())
    torch.testing.assert_close(
        fresh([*views[:2], torch.cat(views[2:])], values=values, mask=some_mask())["loss"], listed
    )
    with pytest.raises(ValueError, match="expected 2 global views and 2 local views"):
        model(views[:3], values=values)


def test_the_head_gives_cosines_with_prototypes_of_norm_one() -> None:
    head = DinoHead(dim=32, hidden_dim=48, bottleneck_dim=16, n_prototypes=64)
    with torch.no_grad():
        head.last_layer.weight.mul_(7)
    x = crops(cells=4)[0].flatten(1)[:, :32]
    want = F.cosine_similarity(head.mlp(x)[:, None], head.last_layer.weight[None], dim=-1)
    torch.testing.assert_close(head(x), want)


def test_the_centres_move_in_training_only() -> None:
    model = spread(method())
    views, values = views_of(model), schedules(model).at(0)
    model.eval()
    model(views, values=values, mask=some_mask())
    assert model.dino_center.abs().max() == 0
    model.train()
    model(views, values=values, mask=some_mask())
    with torch.no_grad():
        logits = model.teacher_heads["dino"](model.teacher(torch.cat(views[:2])))
    torch.testing.assert_close(model.dino_center, 0.1 * logits.mean(dim=0))
    assert model.ibot_center.abs().max() > 0


def test_under_bfloat16_autocast_the_loss_stays_close_and_gradients_are_finite() -> None:
    found = []
    for enabled in (False, True):
        model = spread(method(regulariser="kde"))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            parts = model(views_of(model), values=schedules(model).at(0), mask=some_mask())
        parts["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        found.append(parts["loss"].item())
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[1] != found[0]


# --- masks ------------------------------------------------------------------------------------------------------------


def test_the_mask_has_half_of_the_images_with_10_to_50_percent_of_their_patches() -> None:
    model = method()
    images = torch.zeros(200, 3, 40, 40)
    mask, n_masked = model._draw_mask(images, torch.Generator().manual_seed(0))
    counts = mask.sum(dim=1)
    assert int(mask.sum()) == n_masked
    assert int((counts > 0).sum()) == 100
    assert sorted(set(counts.tolist())) == [0, *range(2, 13)]
    assert counts[:100].count_nonzero() not in (0, 100)  # shuffled over the images
    again, _ = model._draw_mask(images, torch.Generator().manual_seed(0))
    other, _ = model._draw_mask(images, torch.Generator().manual_seed(1))
    assert torch.equal(mask, again)
    assert not torch.equal(mask, other)


def test_masks_are_connected_blocks_of_the_count_asked_for_that_reach_every_patch() -> None:
    counts = torch.tensor([4, 9, 12] * 100)
    mask = block_mask(counts, grid=5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mask.sum(dim=1).sort().values, counts.sort().values)
    assert mask.any(dim=0).all()
    reach = F.max_pool2d(mask.view(-1, 1, 5, 5).float(), 3, stride=1, padding=1).view(-1, 25) > 0
    neighbours = F.avg_pool2d(mask.view(-1, 1, 5, 5).float(), 3, stride=1, padding=1).view(-1, 25) * 9
    assert (neighbours[mask] >= 2).all()  # each masked patch touches another
    assert reach.sum(dim=1).float().mean() < 21  # scattered patches would reach all 25


@pytest.mark.parametrize("n_blocks", [1, 2, 7, 100])
def test_the_host_and_the_device_count_masked_patches_alike(n_blocks: int) -> None:
    on_device = masked_patches(torch.arange(n_blocks), n_blocks=n_blocks, least=2, largest=12)
    assert on_device.tolist() == [masked_patches(i, n_blocks=n_blocks, least=2, largest=12) for i in range(n_blocks)]
    assert int(on_device.min()) >= 2
    assert int(on_device.max()) <= 12


# --- degenerate batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regulariser", ["koleo", "kde", "none"])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("kind", ["no local crops", "no masks", "duplicates", "one cell", "fully masked", "at start"])
def test_degenerate_batches_have_finite_gradients_in_every_parameter(
    kind: str, regulariser: str, centering: str
) -> None:
    changes: dict[str, Any] = {
        "no local crops": {"local_crops": 0},
        "no masks": {"mask_probability": 0.0},
        "fully masked": {"mask_probability": 1.0, "mask_ratio": (1.0, 1.0)},
    }.get(kind, {})
    model = method(regulariser=regulariser, centering=centering, separate_ibot_head=True, **changes)
    model = model if kind == "at start" else spread(model)
    views = views_of(model, cells=1 if kind in ("duplicates", "one cell") else CELLS)
    if kind == "duplicates":
        views = [view.expand(6, -1, -1, -1) for view in views]
    found = gradients(model, views, generator=torch.Generator().manual_seed(0))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() - {"loss"} == trained  # also what DistributedDataParallel needs
    for name, value in found.items():
        assert torch.isfinite(value).all(), name
    if kind == "no masks":
        assert found["mask_token"].abs().max() == 0


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regulariser", ["koleo", "kde"])
def test_training_lowers_the_loss_and_leaves_the_last_layer_for_the_first_epoch(regulariser: str) -> None:
    model = spread(method(regulariser=regulariser))
    start, views = copy.deepcopy(model.state_dict()), views_of(method())
    assert schedules(model).at(1).epoch < 1 <= schedules(model).at(2).epoch
    told = train(model, views, steps=1)
    layer = "heads.dino.last_layer.weight"
    assert torch.equal(model.state_dict()[layer], start[layer])
    told += train(model, views, steps=12, first=2)
    assert not torch.equal(model.state_dict()[layer], start[layer])
    assert min(told[-3:]) < told[0] - 0.2
    for name, p in model.named_parameters():
        assert not torch.equal(p, start[name]), name


def test_the_teacher_follows_after_the_step() -> None:
    model, values = method(), schedules(method()).at(4)
    with torch.no_grad():
        for p in (*model.encoder.parameters(), *model.heads.parameters()):
            p.add_(0.1)
    before = copy.deepcopy(model)
    model.before_step(values)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    model.after_step(values)
    for part in ("teacher", "teacher_heads"):
        student = {"teacher": "encoder", "teacher_heads": "heads"}[part]
        rows = zip(
            *(getattr(m, n).parameters() for m, n in ((model, part), (before, student), (before, part))), strict=True
        )
        for got, s, t in rows:
            torch.testing.assert_close(got, values.momentum * t + (1 - values.momentum) * s, rtol=1e-6, atol=1e-8)
    assert model.exported is model.teacher


def test_gradients_of_backbone_and_heads_are_clipped_apart() -> None:
    model = spread(method(clip_norm=1e-3))
    gradients(model, views_of(model), mask=some_mask())
    norm = model.clip_gradients()
    assert norm is not None
    assert norm > 1e-3
    for params in ([*model.encoder.parameters(), model.mask_token], list(model.heads.parameters())):
        after = torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()
        assert after.item() == pytest.approx(1e-3, rel=1e-3)
    assert method(clip_norm=None).clip_gradients() is None


@pytest.mark.parametrize("chunk", [3, 16])
def test_chunks_change_neither_loss_nor_gradients(chunk: int) -> None:
    found = [
        gradients(spread(method(chunk=chunk)), views_of(method()), mask=some_mask()),
        gradients(spread(method()), views_of(method()), mask=some_mask()),
    ]
    assert_same(*found, rtol=1e-6)


# --- several workers --------------------------------------------------------------------------------------------------

VARIANTS: list[dict[str, Any]] = [
    {"regulariser": "koleo", "centering": "softmax"},
    {"regulariser": "kde", "centering": "sinkhorn", "separate_ibot_head": True},
]


def on_rows(rows: slice) -> dict[str, Tensor]:
    """Loss, gradients and centres of every variant on these cells; every worker has its share of each view's mask."""
    results: dict[str, Tensor] = {}
    for i, variant in enumerate(VARIANTS):
        model = spread(method(**variant))
        views = [view[rows] for view in views_of(model)]
        mask = torch.cat([view[rows] for view in some_mask().chunk(2)])
        found = gradients(model, views, mask=mask) | {
            "dino_center": model.dino_center,
            "ibot_center": model.ibot_center,
        }
        results |= {f"variant {i}: {name}": value for name, value in found.items()}
    return results


def work_on_half(rank: int, folder: Path) -> None:
    torch.save(on_rows(slice(rank * CELLS // 2, (rank + 1) * CELLS // 2)), folder / f"rank{rank}.pt")


@pytest.mark.slow
def test_two_workers_have_the_loss_and_gradients_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    assert_same_as_one_worker(on_rows(slice(0, CELLS)), run_workers(work_on_half, tmp_path), rtol=1e-6)
