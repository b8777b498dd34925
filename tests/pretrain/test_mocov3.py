"""MoCo v3: the order of its steps, what is frozen, chunks, and several workers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lemon.encoders.config import EncoderConfig
from lemon.pretrain.config import MoCoV3Config
from lemon.pretrain.heads import HeadBatchNorm, moco_mlp
from lemon.pretrain.losses import moco_contrastive
from lemon.pretrain.mocov3 import MoCoV3
from lemon.pretrain.schedules import Method, Schedules, set_optimizer
from lemon.runtime.config import read_preset
from tests.pretrain.test_losses import assert_same_as_one_worker, run_workers

ENCODER = EncoderConfig(name="tiny", dim=32, depth=2, heads=4)
CONFIG = MoCoV3Config(hidden_dim=48, out_dim=16, warmup_epochs=1)
CELLS = 8


def method(**changes: Any) -> MoCoV3:
    return MoCoV3(CONFIG.model_copy(update=changes), ENCODER, seed=0)


def schedules(model: Method) -> Schedules:
    return model.schedules(epochs=10, steps_per_epoch=2, batch=256 * 100)


def crops(*, cells: int = CELLS, n_views: int = 2, px: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(cells, 3, px, px, generator=generator) for _ in range(n_views)]


def train(model: Method, views: list[Tensor], *, steps: int, first: int = 1) -> list[float]:
    """The loop of ``lemon.pretrain.schedules``."""
    optimizer = torch.optim.AdamW(model.param_groups(), betas=model.config.betas)
    generator, told = torch.Generator().manual_seed(0), []
    for step in range(first, first + steps):
        values = schedules(model).at(step)
        set_optimizer(optimizer, values)
        model.before_step(values)
        loss = model(views, values=values, generator=generator)["loss"]
        loss.backward()
        model.clip_gradients()
        optimizer.step()
        model.after_step(values)
        optimizer.zero_grad()
        told.append(loss.item())
    return told


def gradients(model: Method, views: list[Tensor], **settings: Any) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter that has one, in float64: some are 0 but for rounding."""
    values = schedules(model).at(3)
    parts = model.double()([view.double() for view in views], values=values, **settings)
    parts["loss"].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": parts["loss"].detach(), **found}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], *, rtol: float) -> None:
    assert got.keys() == want.keys()
    assert_same_as_one_worker(want, [got], rtol=rtol)


def test_the_shipped_config_has_the_papers_values() -> None:
    config = MoCoV3Config.model_validate(read_preset("ssl", "mocov3"))
    assert config == MoCoV3Config()
    assert (config.hidden_dim, config.out_dim, config.temperature, config.momentum) == (4096, 256, 0.2, 0.99)
    with pytest.raises(ValueError, match="temprature"):
        MoCoV3Config.model_validate({"temprature": 0.1})


def test_learning_rate_scales_with_the_batch_and_weight_decay_is_constant() -> None:
    values = MoCoV3(MoCoV3Config(hidden_dim=8, out_dim=8), ENCODER, seed=0).schedules(
        epochs=150, steps_per_epoch=244, batch=4096
    )
    assert values.at(40 * 244).lr == pytest.approx(2.4e-3)
    assert {values.at(step).weight_decay for step in (0, 10000, 36599)} == {0.1}
    assert values.at(0).momentum == pytest.approx(0.99)


def test_heads_have_the_papers_layers() -> None:
    model = method()
    for head, sizes in ((model.projector, [32, 48, 48, 16]), (model.predictor, [16, 48, 16])):
        linears = [layer for layer in head if isinstance(layer, nn.Linear)]
        norms = [layer for layer in head if isinstance(layer, HeadBatchNorm)]
        assert [(m.in_features, m.out_features, m.bias) for m in linears] == [(a, b, None) for a, b in pairwise(sizes)]
        assert [norm.affine for norm in norms] == [True] * (len(norms) - 1) + [False]
        assert isinstance(head[-1], HeadBatchNorm)


def test_the_loss_is_both_directions_of_the_views() -> None:
    model, (a, b) = method(), crops()
    got = model([a, b], values=schedules(model).at(0))["loss"]
    fresh = method()
    q1, q2 = (fresh.predictor(fresh.projector(fresh.encoder(view))) for view in (a, b))
    k1, k2 = (fresh.teacher_projector(fresh.teacher(view)) for view in (a, b))
    want = moco_contrastive(q1, k2, temperature=0.2) + moco_contrastive(q2, k1, temperature=0.2)
    torch.testing.assert_close(got, want)


def test_training_lowers_the_loss_and_every_trained_parameter_moves() -> None:
    model, views = method(), crops()
    before = copy.deepcopy(model.state_dict())
    told = train(model, views, steps=15)
    assert min(told[-3:]) < 0.7 * told[0]
    for name, p in model.named_parameters():
        if p.requires_grad or name.startswith("teacher"):
            frozen = "patch_embed" in name or "pos_embed" in name
            assert torch.equal(p, before[name]) == frozen, name


def test_the_frozen_patch_projection_is_bit_identical_after_training() -> None:
    model = method()
    before = {key: value.clone() for key, value in model.state_dict().items() if "patch_embed" in key}
    assert len(before) == 4  # weight and bias, of student and teacher
    train(model, crops(), steps=5)
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key
    thawed = method(freeze_patch_projection=False)
    start = thawed.encoder.patch_embed.proj.weight.clone()
    train(thawed, crops(), steps=2)
    assert not torch.equal(thawed.encoder.patch_embed.proj.weight, start)


def test_the_average_moves_before_the_keys_and_covers_parameters_only() -> None:
    model = method()
    with torch.no_grad():
        for p in (*model.encoder.parameters(), *model.projector.parameters()):
            p.add_(0.1)
    student, teacher = copy.deepcopy(model.encoder), copy.deepcopy(model.teacher)
    buffers = {name: value.clone() for name, value in model.teacher_projector.named_buffers()}
    values = schedules(model).at(6)
    model.before_step(values)
    for p, s, t in zip(model.teacher.parameters(), student.parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(p, values.momentum * t + (1 - values.momentum) * s, rtol=1e-6, atol=1e-8)
    for name, value in model.teacher_projector.named_buffers():
        assert torch.equal(value, buffers[name])
    after_before = copy.deepcopy(model.state_dict())
    model.after_step(values)
    assert all(torch.equal(value, after_before[key]) for key, value in model.state_dict().items())


def test_weight_decay_is_on_all_trained_parameters_and_the_teacher_has_no_gradient() -> None:
    model = method()
    (group,) = model.param_groups()
    assert group["wd_scale"] == 1
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"encoder", "projector", "predictor"}
    assert model.exported is model.encoder


@pytest.mark.parametrize("chunk", [3, 16])
def test_chunks_change_neither_loss_nor_gradients(chunk: int) -> None:
    assert_same(gradients(method(chunk=chunk), crops()), gradients(method(), crops()), rtol=1e-6)


@pytest.mark.parametrize("kind", ["duplicates", "one cell"])
def test_duplicate_cells_and_a_single_cell_have_finite_gradients(kind: str) -> None:
    views = crops(cells=1)
    if kind == "duplicates":
        views = [view.expand(6, -1, -1, -1) for view in views]
    found = gradients(method(), views)
    assert all(torch.isfinite(value).all() for value in found.values())


def test_a_restart_from_the_state_dict_gives_the_losses_of_never_having_stopped() -> None:
    whole = method()
    optimizer_free = train(whole, crops(), steps=3)
    again = MoCoV3(CONFIG, ENCODER, seed=7)
    again.load_state_dict(method().state_dict(), strict=True)
    assert train(again, crops(), steps=3) == optimizer_free


def test_head_batch_norm_of_one_worker_is_pytorchs() -> None:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs = HeadBatchNorm(8), nn.BatchNorm1d(8)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours(x[:1]).abs().max() == 0  # a single row is its own mean


# --- several workers --------------------------------------------------------------------------------------------------


def on_rows(build: Callable[[], Method], rows: slice, **settings: Any) -> dict[str, Tensor]:
    return gradients(build(), [view[rows] for view in crops()], **settings)


def batch_norm_head(rows: slice) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head, x, target = moco_mlp([16, 12, 8]).double(), torch.randn(CELLS, 16), torch.randn(CELLS, 8)
        x, target = x.double(), target.double()
    loss = (head(x[rows]) - target[rows]).square().mean()
    loss.backward()
    found = {f"head {name}": p.grad for name, p in head.named_parameters() if p.grad is not None}
    buffers = {f"head {name}": value.double() for name, value in head.named_buffers()}
    return {"head loss": loss.detach(), **found, **buffers}


def work_on_half(rank: int, folder: Path) -> None:
    half = slice(rank * CELLS // 2, (rank + 1) * CELLS // 2)
    results = batch_norm_head(half) | on_rows(method, half)
    wrapped = DistributedDataParallel(method(chunk=3).double())
    values = schedules(wrapped.module).at(3)
    wrapped([view[half].double() for view in crops()], values=values)["loss"].backward()
    for name, p in wrapped.module.named_parameters():
        if p.grad is not None:
            results[f"ddp {name}"] = p.grad
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.mark.slow
def test_two_workers_have_the_loss_and_gradients_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    whole = on_rows(method, slice(0, CELLS))
    wrapped = {f"ddp {name}": value for name, value in whole.items() if name != "loss"}
    parts = run_workers(work_on_half, tmp_path)
    assert_same_as_one_worker(whole | wrapped | batch_norm_head(slice(0, CELLS)), parts, rtol=1e-6)
    for name in wrapped:  # DistributedDataParallel leaves every worker with the average
        assert torch.equal(parts[0][name], parts[1][name])
