"""Self-supervised objectives as functions of tensors, and the sums over workers that they need.

Every loss is computed in float32 (float64 where the input is), whatever autocast says: temperatures of 0.04 to 0.2
magnify the rounding of bfloat16. Under torch.distributed each worker passes its own rows. The mean of the workers'
losses, and the mean of their gradients as DistributedDataParallel takes it, then equal the loss and gradient of one
process that has all rows, provided that every worker has equally many rows.

Shapes: N rows (cells of a view), n rows of a chunk, C channels, K prototypes, V views of the student and T of the
teacher, B images, P patches of an image, W workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FunctionWrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes of a function the one that is called, such as the compiled one."""


# --- across workers ---------------------------------------------------------------------------------------------------


def world_size() -> int:
    """Number of workers; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This worker's number; 0 where torch.distributed is not initialised."""
    return dist.get_rank() if world_size() > 1 else 0


class _SumOverWorkers(torch.autograd.Function):
    # The backward sums too: each worker's loss depends on this worker's input. torch.distributed.nn.functional held
    # the same function, and is deprecated without a public successor (torch 2.15).
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_workers(x: Tensor) -> Tensor:
    """Elementwise sum over workers, with gradient; x itself where there is one worker."""
    return x if world_size() == 1 else _SumOverWorkers.apply(x)


def gather_rows(x: Tensor) -> Tensor:
    """All workers' rows in the order of rank, with gradient: [N, C] -> [W * N, C].

    Every worker must have equally many rows. Rows travel as a sum of zero-padded blocks, so that one collective
    serves every backend.
    """
    workers = world_size()
    if workers == 1:
        return x
    before, after = rank() * len(x), (workers - 1 - rank()) * len(x)
    return sum_over_workers(F.pad(x, (0, 0, before, after)))  # [W * N, C]


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """Switch autocast off for the device of ``x``."""
    with torch.autocast(device_type=x.device.type, enabled=False):
        yield


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself: ``FunctionWrapper`` without compilation."""
    return function


# --- MoCo v3 ----------------------------------------------------------------------------------------------------------


def moco_contrastive(q: Tensor, k: Tensor, *, temperature: float) -> Tensor:
    """One direction of MoCo v3's loss (arXiv 2104.02057, algorithm 1): row i of q against row i of k.

    Cross-entropy of the cosines / temperature, times 2 * temperature. The method sums two directions. Keys are
    gathered from all workers, get no gradient, and are the negatives of each other.

    Args:
        q: queries [N, C], any scale.
        k: keys [N, C] of the other view of the same cells, any scale.
        temperature: 0.2 for vision transformers.

    Returns:
        A scalar: the mean over this worker's rows.
    """
    with full_precision(q):
        queries = F.normalize(at_least_float32(q), dim=1)  # [N, C]
        keys = gather_rows(F.normalize(at_least_float32(k.detach()), dim=1))  # [W * N, C]
        cosines = queries @ keys.T  # [N, W * N]
        positives = torch.arange(len(q), device=q.device) + rank() * len(q)  # [N]
        return F.cross_entropy(cosines / temperature, positives) * (2 * temperature)


# --- DINO and iBOT: the teacher's targets -----------------------------------------------------------------------------


class Targets(NamedTuple):
    """The teacher's probabilities by what they are made of: softmax(features @ prototypes.T + offset), [N, K].

    So they need not exist whole: at batch 4096 those of 65,536 prototypes would take 2 GB for the class tokens and
    7.5 GB for the masked patches.
    """

    features: Tensor
    """[T, N, C] of T views of the same rows, whose probabilities add up: the bottleneck, divided by the temperature."""
    prototypes: Tensor
    """[K, C], L2-normalised."""
    offset: Tensor
    """[K]."""


@torch.no_grad()
def softmax_targets(features: Tensor, prototypes: Tensor, center: Tensor, *, teacher_temperature: float) -> Targets:
    """Softmax of the centred logits, softmax((features @ prototypes.T - center) / temperature).

    Args:
        features: [N, C], the teacher head's bottleneck, L2-normalised.
        prototypes: [K, C], L2-normalised, float32.
        center: [K].
        teacher_temperature: 0.04 to 0.07 in DINOv2.
    """
    return Targets(at_least_float32(features)[None] / teacher_temperature, prototypes, -center / teacher_temperature)


@torch.no_grad()
def updated_center(center: Tensor, features: Tensor, prototypes: Tensor, *, momentum: float) -> Tensor:
    """The running mean of the teacher's logits after this batch.

    The sum of the logits is that of the features times the prototypes, so that no logits are needed.

    Args:
        center: [K].
        features: [N, C] of this worker, the head's bottleneck. Without a single row on any worker (no masked patch) the
            centre stays.
        prototypes: [K, C].
        momentum: share of the old centre.

    Returns:
        [K].
    """
    with full_precision(features):
        # Not a matrix product, which TensorFloat-32 would round.
        summed = (prototypes * at_least_float32(features).sum(dim=0)).sum(dim=1)  # [K]
        summed = sum_over_workers(torch.cat([summed, summed.new_full((1,), len(features))]))  # [K + 1]
        count = summed[-1]
        mean = summed[:-1] / count.clamp(min=1)
        return torch.where(count > 0, torch.lerp(mean, center, momentum), center)


def _logsumexp_over_workers(local: Tensor) -> Tensor:
    if world_size() == 1:
        return local
    highest = local.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return highest + sum_over_workers(torch.exp(local - highest)).log()


def _log_use(features: Tensor, prototypes: Tensor, offset: Tensor, *, normalised: bool) -> Tensor:
    logits = torch.addmm(offset, features, prototypes.T)  # [n, K]
    return torch.logsumexp(F.log_softmax(logits, dim=1) if normalised else logits, dim=0)  # [K]


@torch.no_grad()
def sinkhorn_targets(
    features: Tensor,
    prototypes: Tensor,
    *,
    teacher_temperature: float,
    iterations: int = 3,
    chunk_rows: int = 2048,
    run: FunctionWrapper = as_it_is,
) -> Targets:
    """Sinkhorn-Knopp (SwAV, arXiv 2006.09882): prototypes are used equally over the batch.

    The scale of a row is what softmax divides by, so the scales of the prototypes are all that is kept, as the offset.
    Each iteration forms the logits again, a chunk at a time. Computed on logarithms, because exp(logit / 0.04)
    overflows float32 from logits of 3.6 on; so the result is finite for any finite logits. The batch is all workers'
    rows (their number may differ, and may be 0).

    Args:
        features: [N, C], the teacher head's bottleneck, L2-normalised.
        prototypes: [K, C], L2-normalised, float32.
        teacher_temperature: 0.04 to 0.07 in DINOv2.
        iterations: normalisations of the prototypes, each followed by one of the rows; at least 1, 3 in DINOv2.
        chunk_rows: rows a chunk.
        run: how a chunk is computed, as ``Method.run``.

    Raises:
        ValueError: iterations below 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: expected at least 1, as 3")
    with full_precision(features):
        rows = at_least_float32(features) / teacher_temperature  # [N, C]
        offset = prototypes.new_zeros(len(prototypes))
        for iteration in range(iterations):
            used = torch.full_like(offset, float("-inf"))
            for start in range(0, len(rows), chunk_rows):
                chunk = rows[start : start + chunk_rows]
                used = torch.logaddexp(used, run(_log_use)(chunk, prototypes, offset, normalised=iteration > 0))
            offset = offset - _logsumexp_over_workers(used)
            # A constant changes no probability, and float32 has more digits of small numbers.
            offset = offset - offset.mean()
        return Targets(rows[None], prototypes, offset)


def teacher_probabilities(features: Tensor, prototypes: Tensor, offset: Tensor) -> Tensor:
    """Those of ``Targets``, whole: [n, K]."""
    views = [F.softmax(torch.addmm(offset, view, prototypes.T), dim=-1) for view in features]
    return reduce(torch.add, views)


# --- DINO and iBOT: the cross-entropy ---------------------------------------------------------------------------------


def mask_weights(mask: Tensor) -> Tensor:
    """Weight of each masked patch, 1 / (masked patches of its image); 0 elsewhere. bool [B, P] -> float32 [B, P]."""
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _loss_and_gradients(
    features: Tensor, prototypes: Tensor, probs: Tensor, weights: Tensor, temperature: float, of_prototypes: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and gradient [n, C] of features [n, C]; that of the prototypes is added to ``of_prototypes`` [K, C]."""
    scaled = features / temperature
    log_probs = F.log_softmax(scaled @ prototypes.T, dim=-1)  # [n, K]
    loss = -((probs * log_probs).sum(dim=-1) * weights).sum()
    of_logits = log_probs.exp_().mul_(probs.sum(dim=-1, keepdim=True)).sub_(probs).mul_(weights[:, None])  # [n, K]
    torch.addmm(of_prototypes, of_logits.T, scaled, out=of_prototypes)
    return loss, of_logits @ prototypes / temperature


class _ChunkedCrossEntropy(torch.autograd.Function):
    # The forward computes the gradients too, so that of a chunk nothing else is kept or computed again.
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        prototypes: Tensor,
        targets: Targets,
        weights: Tensor,
        temperature: float,
        chunk_rows: int,
        run: FunctionWrapper,
    ) -> Tensor:
        loss = prototypes.new_zeros(())
        of_features, of_prototypes = torch.empty_like(features), torch.zeros_like(prototypes)
        for start in range(0, len(weights), chunk_rows):
            rows = slice(start, start + chunk_rows)
            probs = run(teacher_probabilities)(targets.features[:, rows], targets.prototypes, targets.offset)
            for view, of_view in zip(features[:, rows], of_features[:, rows], strict=True):
                given = (view, prototypes, probs, weights[rows], temperature, of_prototypes)
                part, gradient = run(_loss_and_gradients)(*given)
                of_view.copy_(gradient)
                loss += part
        ctx.save_for_backward(of_features, of_prototypes)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_features, of_prototypes = ctx.saved_tensors
        return gradients[0] * of_features, gradients[0] * of_prototypes, None, None, None, None, None


def chunked_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    targets: Targets,
    *,
    student_temperature: float,
    weights: Tensor | None = None,
    chunk_rows: int = 2048,
    run: FunctionWrapper = as_it_is,
) -> Tensor:
    """Cross-entropy of softmax(features @ prototypes.T / temperature) against the teacher, in chunks of rows.

    The loss of DINO (arXiv 2104.14294) and iBOT (arXiv 2111.07832): a weighted sum over rows and over all pairs of a
    student's and a teacher's view. Logits and probabilities exist for one chunk at a time, in the forward alone, which
    computes the gradients too. Zero rows give 0 with zero gradients.

    Args:
        features: [V, N, C], the head's bottleneck of V views of the same cells, L2-normalised.
        prototypes: [K, C], L2-normalised, float32.
        targets: the teacher's of T views; no gradient flows to them.
        student_temperature: 0.1 in DINOv2.
        weights: [N]; None: 1.
        chunk_rows: rows a chunk.
        run: how the functions of a chunk are called, as ``Method.run``.
    """
    if weights is None:
        weights = features.new_ones(features.shape[1], dtype=torch.float32)
    with full_precision(features):
        given = (targets, weights, student_temperature, chunk_rows, run)
        return _ChunkedCrossEntropy.apply(at_least_float32(features), prototypes, *given)


# --- regularisers of the embedding ------------------------------------------------------------------------------------


def _unit_rows(z: Tensor, *, gather: bool) -> tuple[Tensor, Tensor, int]:
    rows = F.normalize(at_least_float32(z), dim=1)  # [N, C]
    return rows, gather_rows(rows) if gather else rows, rank() * len(z) if gather else 0


def koleo(z: Tensor, *, floor: float = 1e-4, gather: bool = True) -> Tensor:
    """Kozachenko-Leonenko regulariser (arXiv 1806.03198): mean of -log(distance to the nearest other row).

    DEVIATION: the distance is sqrt(d^2 + floor^2). DINOv2 adds 1e-8 instead, so that a pair of duplicate cells gives
    gradients of 1e6, which gradient clipping then turns into a lost step. Here the gradient of a pair is at most
    1 / (2 * floor), and 0 for exact duplicates. A hard clamp would also give 0 at DINOv2's initialisation, where
    LayerScale makes all class tokens alike.
    DEVIATION: neighbours are searched over all workers (DINOv2: within one GPU), so that the loss does not depend on
    their number; ``gather=False`` restores it.

    Args:
        z: [N, C], any scale; L2-normalised here.
        floor: smallest distance, above 0.
        gather: neighbours among the rows of all workers.

    Returns:
        A scalar; 0 with zero gradients where there is no other row.
    """
    with full_precision(z):
        rows, others, first = _unit_rows(z, gather=gather)
        if len(others) < 2:
            return (rows * 0).sum()
        with torch.no_grad():
            cosines = rows @ others.T  # [N, W * N]
            cosines.diagonal(first).fill_(-2.0)  # below any cosine: a row is no neighbour of itself
            nearest = cosines.argmax(dim=1)  # [N]
        squared = (rows - others[nearest]).square().sum(dim=1)  # [N]
        return -0.5 * (squared + floor**2).log().mean()


def kde(z: Tensor, *, kappa: float, exclude_self: bool = False, gather: bool = True) -> Tensor:
    """Kernel density regulariser (Virchow2, arXiv 2408.00738): mean_i log sum_j exp(kappa * cos(z_i, z_j)).

    It is the log density of the batch at its own points under a von Mises-Fisher kernel, so minimising it, with a
    positive weight, pushes embeddings apart.

    Args:
        z: [N, C], any scale; L2-normalised here.
        kappa: concentration of the kernel; 5 in the LEMON paper.
        exclude_self: leave j = i out of the sum.
        gather: j runs over the rows of all workers.

    Returns:
        A scalar; 0 with zero gradients where exclude_self leaves nothing.
    """
    with full_precision(z):
        rows, others, first = _unit_rows(z, gather=gather)
        if len(rows) == 0 or (exclude_self and len(others) < 2):
            return (rows * 0).sum()
        scores = kappa * (rows @ others.T)  # [N, W * N]
        if exclude_self:
            itself = torch.zeros_like(scores, dtype=torch.bool)
            itself.diagonal(first).fill_(True)
            scores = scores.masked_fill(itself, float("-inf"))
        return torch.logsumexp(scores, dim=1).mean()


@torch.no_grad()
def feature_std(z: Tensor) -> Tensor:
    """A sign of collapse: standard deviation over rows, mean over channels, of L2-normalised z [N, C], times sqrt(C).

    About 1 for directions spread evenly over the sphere, 0 where all rows point the same way. This worker's rows.
    """
    with full_precision(z):
        rows = F.normalize(at_least_float32(z), dim=1)  # [N, C]
        return rows.std(dim=0, correction=0).mean() * rows.shape[1] ** 0.5
