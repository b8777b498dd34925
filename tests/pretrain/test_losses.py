"""The losses against naive loops, the reference implementations' values, and themselves on several workers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lemon.pretrain import losses
from tests.conftest import shared


@cache
def golden() -> dict[str, Tensor]:
    with np.load(shared("golden/ssl_losses.npz")) as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def assert_value(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=0)


def assert_gradient(got: Tensor | None, want: Tensor) -> None:
    """Within 1e-4 of each element, and of the largest where an element is all but zero."""
    assert got is not None
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(random(*shape, seed=seed), dim=-1)


def softmax_targets(logits: Tensor, center: Tensor, *, temperature: float) -> losses.Targets:
    """Of given logits: prototypes are the axes."""
    return losses.softmax_targets(logits, torch.eye(logits.shape[1]), center, teacher_temperature=temperature)


def sinkhorn(logits: Tensor, *, temperature: float, iterations: int = 3, chunk_rows: int = 2048) -> Tensor:
    """Probabilities [N, K] of given logits."""
    settings: dict[str, Any] = {"iterations": iterations, "chunk_rows": chunk_rows}
    axes = torch.eye(logits.shape[1])
    targets = losses.sinkhorn_targets(logits, axes, teacher_temperature=temperature, **settings)
    return losses.teacher_probabilities(*targets)


def cross_entropy(logits: Tensor, targets: losses.Targets, weights: Tensor | None = None) -> Tensor:
    """Weighted sum over given logits [N, K] of the student, in chunks."""
    axes = torch.eye(logits.shape[1])
    return losses.chunked_cross_entropy(
        logits[None], axes, targets, student_temperature=0.1, weights=weights, chunk_rows=5
    )


def plain_cross_entropy(logits: Tensor, probs: Tensor) -> Tensor:
    """Of each row: [..., K] twice -> [...]."""
    return -(probs * F.log_softmax(logits / 0.1, dim=-1)).sum(dim=-1)


# --- MoCo v3 ----------------------------------------------------------------------------------------------------------


def test_the_moco_loss_and_gradient_are_those_of_the_reference() -> None:
    g = golden()
    q1, temperature = leaf(g["moco_q1"]), float(g["moco_temperature"])
    loss = losses.moco_contrastive(q1, g["moco_k2"], temperature=temperature)
    loss = loss + losses.moco_contrastive(g["moco_q2"], g["moco_k1"], temperature=temperature)
    loss.backward()
    assert_value(loss, g["moco_loss"])
    assert_gradient(q1.grad, g["moco_grad_q1"])


def test_the_moco_loss_equals_a_naive_loop() -> None:
    q, k, temperature = random(5, 8), random(5, 8, seed=1), 0.3
    rows = []
    for i in range(5):
        scores = [math.exp(F.cosine_similarity(q[i], k[j], dim=0).item() / temperature) for j in range(5)]
        rows.append(-math.log(scores[i] / sum(scores)))
    want = 2 * temperature * sum(rows) / 5
    assert losses.moco_contrastive(q, k, temperature=temperature).item() == pytest.approx(want, rel=1e-5)


def test_keys_get_no_gradient() -> None:
    q, k = leaf(random(4, 8)), leaf(random(4, 8, seed=1))
    losses.moco_contrastive(q, k, temperature=0.2).backward()
    assert q.grad is not None
    assert k.grad is None


def test_losses_are_computed_in_float32_under_autocast() -> None:
    q, k = random(64, 32), random(64, 32, seed=1)
    center, tight = torch.zeros(len(k)), {"teacher_temperature": 0.04}
    cases: list[Callable[[], Tensor]] = [
        lambda: losses.moco_contrastive(q, k, temperature=0.2),
        lambda: losses.koleo(q),
        lambda: losses.kde(q, kappa=5.0),
        lambda: losses.chunked_cross_entropy(
            q[None], k, losses.softmax_targets(q, k, center, **tight), student_temperature=0.1, chunk_rows=3
        ),
        lambda: losses.sinkhorn_targets(q, k, **tight, chunk_rows=3).offset,
        lambda: losses.softmax_targets(q, k, center, **tight).features,
        lambda: losses.updated_center(center, q, k, momentum=0.9),
    ]
    for case in cases:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = case()
        assert inside.dtype == torch.float32
        torch.testing.assert_close(inside, case(), rtol=0, atol=0)


# --- DINO and iBOT ----------------------------------------------------------------------------------------------------


def test_the_dino_loss_gradient_and_centre_are_those_of_the_reference() -> None:
    g = golden()
    s1, center, temperature = leaf(g["dino_s1"]), g["dino_center"][0], float(g["dino_teacher_temp"])
    t1, t2 = (softmax_targets(g[t], center, temperature=temperature) for t in ("dino_t1", "dino_t2"))
    probs = losses.teacher_probabilities(*t1)
    torch.testing.assert_close(probs, g["dino_softmax_t1"], rtol=1e-5, atol=1e-12)
    assert g["dino_student_temp"] == 0.1
    loss = (cross_entropy(s1, t2) + cross_entropy(g["dino_s2"], t1)) / len(s1)
    loss.backward()
    assert_value(loss, g["dino_loss_sum_of_two_terms"])
    assert_gradient(s1.grad, g["dino_grad_s1"])
    logits = torch.cat([g["dino_t1"], g["dino_t2"]])
    moved = losses.updated_center(center, logits, torch.eye(len(center)), momentum=0.9)
    torch.testing.assert_close(moved, g["dino_center_after_update"][0], rtol=1e-5, atol=1e-7)


def test_a_centre_stays_where_no_patch_is_masked() -> None:
    center = random(16)
    moved = losses.updated_center(center, torch.zeros(0, 4), random(16, 4), momentum=0.9)
    torch.testing.assert_close(moved, center, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [0, 1, 10])
def test_a_centre_is_the_mean_of_logits_that_need_not_exist(rows: int) -> None:
    features, prototypes, center = unit(rows, 16), unit(40, 16, seed=1), 0.1 * random(40)
    moved = losses.updated_center(center, features, prototypes, momentum=0.9)
    expected = 0.9 * center + 0.1 * (features @ prototypes.T).mean(dim=0) if rows else center
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)


def of_patches(g: dict[str, Tensor]) -> tuple[Tensor, losses.Targets, Tensor]:
    """The mask, the targets of the masked patches and their weights, of the reference."""
    mask = g["ibot_mask"]
    probs = g["ibot_teacher_probs"][mask]
    targets = softmax_targets(probs.clamp(min=1e-37).log(), torch.zeros(probs.shape[1]), temperature=1.0)
    return mask, targets, losses.mask_weights(mask)[mask] / len(mask)


def test_the_ibot_loss_and_gradient_are_those_of_the_reference() -> None:
    g = golden()
    student, (mask, targets, weights) = leaf(g["ibot_student"]), of_patches(g)
    loss = cross_entropy(student[mask], targets, weights)
    loss.backward()
    assert_value(loss, g["ibot_loss"])
    assert_gradient(student.grad, g["ibot_grad"])


CENTERINGS = ("softmax", "sinkhorn")


def targets_in_chunks(features: Tensor, prototypes: Tensor, *, centering: str, chunk_rows: int) -> losses.Targets:
    """Of [T, N, C]."""
    rows, tight = features.flatten(0, 1), {"teacher_temperature": 0.05}
    if centering == "sinkhorn":
        made = losses.sinkhorn_targets(rows, prototypes, **tight, chunk_rows=chunk_rows)
    else:
        made = losses.softmax_targets(rows, prototypes, 0.1 * random(len(prototypes)).to(rows), **tight)
    return made._replace(features=made.features[0].unflatten(0, features.shape[:2]))


def plain_targets(features: Tensor, prototypes: Tensor, *, centering: str) -> Tensor:
    """[T, N, C] -> [T, N, K], of all logits at once."""
    logits = features @ prototypes.T
    if centering == "sinkhorn":
        return naive_sinkhorn(logits.flatten(0, 1), temperature=0.05, iterations=3).view(logits.shape)
    return F.softmax((logits - 0.1 * random(len(prototypes)).to(logits)) / 0.05, dim=-1)


@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("chunk_rows", [1, 3, 5, 10, 100])
@pytest.mark.parametrize(("views", "teachers", "rows"), [(1, 1, 10), (3, 2, 10), (1, 1, 1), (2, 1, 0)])
def test_the_loss_in_chunks_has_the_value_and_gradients_of_the_plain_formula(
    views: int, teachers: int, rows: int, chunk_rows: int, dtype: torch.dtype, rtol: float, centering: str
) -> None:
    wide: list[Tensor] = [
        *(unit(views, rows, 16), unit(40, 16, seed=1)),
        *(unit(teachers, rows, 16, seed=2), unit(40, 16, seed=3), random(rows, seed=4).abs()),
    ]
    x, w, y, v, weights = (made.double() for made in wide)
    x, w = leaf(x), leaf(w)
    probs = plain_targets(y, v, centering=centering)  # [T, N, K]
    want = (plain_cross_entropy((x @ w.T)[:, None], probs) * weights).sum()  # over [V, T, N]
    (0.5 * want).backward()
    student, layer = leaf(x.detach().to(dtype)), leaf(w.detach().to(dtype))
    targets = targets_in_chunks(y.to(dtype), v.to(dtype), centering=centering, chunk_rows=chunk_rows)
    got = losses.chunked_cross_entropy(
        student, layer, targets, student_temperature=0.1, weights=weights.to(dtype), chunk_rows=chunk_rows
    )
    (0.5 * got).backward()
    for found, expected in ((got, want), (student.grad, x.grad), (layer.grad, w.grad)):
        assert found is not None
        assert expected is not None
        assert found.dtype == dtype
        largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * largest)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made inside."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(made) if isinstance(x, Tensor))])
        return made


@pytest.mark.parametrize("centering", CENTERINGS)
def test_no_tensor_of_the_loss_is_larger_than_a_chunk_of_logits(centering: str) -> None:
    x, w, y, v = leaf(unit(2, 101, 4)), leaf(unit(300, 4, seed=1)), unit(2, 101, 4, seed=2), unit(300, 4, seed=3)
    with Largest() as seen:
        targets = targets_in_chunks(y, v, centering=centering, chunk_rows=10)
        losses.updated_center(torch.zeros(300), y[0], v, momentum=0.9)
        losses.chunked_cross_entropy(x, w, targets, student_temperature=0.1, chunk_rows=10).backward()
    assert seen.numel == 10 * 300  # of 101 * 300


# --- Sinkhorn-Knopp ---------------------------------------------------------------------------------------------------


def naive_sinkhorn(logits: Tensor, *, temperature: float, iterations: int) -> Tensor:
    q = torch.exp(logits.double() / temperature)
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def test_sinkhorn_is_that_of_the_reference() -> None:
    g = golden()
    got = sinkhorn(g["ibot_raw_teacher_masked"], temperature=0.07)
    # The reference's float32 has lost all digits below 1e-20.
    torch.testing.assert_close(got, g["ibot_sinkhorn"], rtol=1e-5, atol=1e-20)


@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_sinkhorn_equals_a_naive_loop(iterations: int) -> None:
    logits = random(11, 17)
    got = sinkhorn(logits, temperature=0.1, iterations=iterations, chunk_rows=4)
    want = naive_sinkhorn(logits, temperature=0.1, iterations=iterations)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-12)


def test_rows_of_sinkhorn_sum_to_one_and_prototypes_are_used_equally() -> None:
    logits = random(64, 16)
    probs = sinkhorn(logits, temperature=0.5, iterations=50)
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(probs.sum(dim=0), torch.full((16,), 4.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("logits", [random(16, 32) * 1000, torch.zeros(4, 8), random(1, 8), random(0, 8)])
def test_sinkhorn_is_finite_where_the_exponential_overflows_or_rows_are_few(logits: Tensor) -> None:
    before = logits.clone()
    probs = sinkhorn(logits, temperature=0.04)
    assert probs.shape == logits.shape
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(len(logits)))
    assert torch.equal(logits, before)


def test_sinkhorn_is_finite_where_the_reference_is_not() -> None:
    g = golden()
    assert g["dino_sinkhorn_t1"].isnan().all()
    probs = sinkhorn(g["dino_t1"], temperature=0.04)
    want = naive_sinkhorn(g["dino_t1"], temperature=0.04, iterations=3)
    torch.testing.assert_close(probs.double(), want, rtol=2e-5, atol=1e-12)


def test_sinkhorn_without_an_iteration_is_refused() -> None:
    with pytest.raises(ValueError, match="iterations=0"):
        sinkhorn(random(4, 8), temperature=0.04, iterations=0)


# --- regularisers -----------------------------------------------------------------------------------------------------


def test_koleo_and_its_gradient_are_those_of_the_reference() -> None:
    g = golden()
    z = leaf(g["koleo_z"])
    loss = losses.koleo(z)
    loss.backward()
    assert_value(loss, g["koleo_loss"])
    assert_gradient(z.grad, g["koleo_grad"])


def test_koleo_of_duplicate_cells_has_bounded_gradients() -> None:
    distinct = random(6, 32)
    for noise in (0.0, 1e-9, 1e-6, 1e-4, 1e-2):
        z = leaf(torch.cat([distinct, distinct + noise * random(6, 32, seed=1)]))
        loss = losses.koleo(z, floor=1e-4)
        loss.backward()
        assert torch.isfinite(loss)
        assert z.grad is not None
        # A row is the neighbour of at most a few; 1 / (2 * floor) a pair, 12 rows, norms of about 5.
        assert z.grad.norm(dim=1).max() < 3 * (1 / 2e-4) / 12


def test_koleo_still_pushes_nearly_equal_rows_apart() -> None:
    start = random(1, 32) + 1e-5 * random(8, 32, seed=1)  # DINOv2 at its initialisation
    z = leaf(start)
    losses.koleo(z).backward()
    assert z.grad is not None

    def nearest(x: Tensor) -> Tensor:
        distances = torch.cdist(F.normalize(x.double(), dim=1), F.normalize(x.double(), dim=1))
        return (distances + 10 * torch.eye(len(x))).amin(dim=1).mean()

    assert nearest(z.detach() - 1e-7 * z.grad) > 1.01 * nearest(start)


def test_kde_equals_a_naive_loop() -> None:
    z, kappa = random(5, 8), 5.0
    for exclude_self in (False, True):
        rows = []
        for i in range(5):
            cosines = [F.cosine_similarity(z[i], z[j], dim=0).item() for j in range(5) if not (exclude_self and j == i)]
            rows.append(math.log(sum(math.exp(kappa * c) for c in cosines)))
        got = losses.kde(z, kappa=kappa, exclude_self=exclude_self)
        assert got.item() == pytest.approx(sum(rows) / 5, rel=1e-5)


def test_kde_scores_a_collapsed_batch_higher_than_a_uniform_one() -> None:
    uniform = random(64, 32)
    collapsed = random(1, 32) + 0.01 * uniform
    assert losses.kde(collapsed, kappa=5.0) > losses.kde(uniform, kappa=5.0) + 1


def test_a_step_down_the_kde_lowers_the_mean_cosine_of_a_collapsed_batch() -> None:
    z = leaf(random(1, 32) + 0.1 * random(64, 32, seed=1))

    def mean_cosine() -> float:
        unit = F.normalize(z.detach(), dim=1)
        return (unit @ unit.T).mean().item()

    before = mean_cosine()
    optimizer = torch.optim.SGD([z], lr=10.0)
    losses.kde(z, kappa=5.0).backward()
    optimizer.step()
    assert mean_cosine() < before - 1e-4


@pytest.mark.parametrize("loss", [losses.koleo, lambda z: losses.kde(z, kappa=5.0)])
def test_regularisers_do_not_depend_on_the_scale_of_embeddings(loss: Callable[[Tensor], Tensor]) -> None:
    z = random(16, 8)
    torch.testing.assert_close(loss(z), loss(100 * z))


def test_a_batch_of_one_cell_or_none_has_finite_losses_and_gradients() -> None:
    cases: list[Callable[[Tensor], Tensor]] = [
        losses.koleo,
        lambda z: losses.kde(z, kappa=5.0),
        lambda z: losses.kde(z, kappa=5.0, exclude_self=True),
        lambda z: losses.moco_contrastive(z, z.detach(), temperature=0.2),
    ]
    for case in cases:
        z = leaf(random(1, 8))
        loss = case(z)
        loss.backward()
        assert torch.isfinite(loss)
        assert z.grad is not None
        assert z.grad.abs().max() < 1e-5
    for case in cases[:3]:
        assert case(leaf(random(0, 8))).item() == 0


def test_feature_std_tells_collapse_from_spread() -> None:
    assert losses.feature_std(random(512, 64)).item() == pytest.approx(1.0, abs=0.02)
    assert losses.feature_std(random(1, 64).expand(512, -1)).item() == pytest.approx(0.0, abs=1e-5)


# --- several workers --------------------------------------------------------------------------------------------------


def run_workers(work: Callable[[int, Path], None], folder: Path, *, workers: int = 2) -> list[Any]:
    """Run ``work(rank, folder)`` in ``workers`` gloo processes; returns what each saved as rank<i>.pt."""
    mp.spawn(_join, args=(work, folder, workers), nprocs=workers)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(workers)]


def _join(rank: int, work: Callable[[int, Path], None], folder: Path, workers: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    work(rank, folder)
    dist.destroy_process_group()


def assert_same_as_one_worker(whole: dict[str, Any], parts: list[dict[str, Any]], *, rtol: float = 1e-5) -> None:
    """Mean over workers of each tensor (as DistributedDataParallel averages gradients) against one worker's."""
    for key, want in whole.items():
        mean = torch.stack([part[key] for part in parts]).mean(dim=0)
        atol = rtol * float(want.abs().max()) + 1e-9
        torch.testing.assert_close(mean, want, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


CELLS = 8
OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "moco": lambda x, y: losses.moco_contrastive(x, y, temperature=0.2),
    "koleo": lambda x, y: losses.koleo(x),
    "kde": lambda x, y: losses.kde(x, kappa=5.0),
    "kde without self": lambda x, y: losses.kde(x, kappa=5.0, exclude_self=True),
    "dino with sinkhorn": lambda x, y: (
        cross_entropy(x, losses.sinkhorn_targets(y, torch.eye(16), teacher_temperature=0.04, chunk_rows=3)) / len(x)
    ),
    "centre": lambda x, y: losses.updated_center(torch.ones(16), y, torch.eye(16), momentum=0.9).sum() + 0 * x.sum(),
}


def gradients_of_a_shared_layer(rows: slice) -> dict[str, Tensor]:
    """Loss of every objective on these rows of a fixed batch, and its gradient in a layer that all workers share."""
    results = {}
    for name, objective in OBJECTIVES.items():
        layer = leaf(random(16, 16, seed=5))
        inputs, targets = random(CELLS, 16)[rows], random(CELLS, 16, seed=1)[rows]
        loss = objective(inputs @ layer, targets)
        loss.backward()
        assert layer.grad is not None
        results[name], results[f"{name}, gradient"] = loss.detach(), layer.grad
    return results


def work_on_half(rank: int, folder: Path) -> None:
    half = CELLS // 2
    results = gradients_of_a_shared_layer(slice(rank * half, (rank + 1) * half))
    # Masked patches are split unevenly: 3 rows and none.
    few = sinkhorn(random(3, 16)[: 3 if rank == 0 else 0], temperature=0.04)
    results["uneven"] = F.pad(few, (0, 0, 0, 3 - len(few))) * 2
    none = sinkhorn(random(0, 16), temperature=0.04)
    results["none"] = none.sum()
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.mark.slow
def test_two_workers_have_the_loss_and_gradients_of_one_with_all_rows(tmp_path: Path) -> None:
    whole = gradients_of_a_shared_layer(slice(0, CELLS))
    whole["uneven"] = sinkhorn(random(3, 16), temperature=0.04)
    whole["none"] = torch.zeros(())
    assert_same_as_one_worker(whole, run_workers(work_on_half, tmp_path))
