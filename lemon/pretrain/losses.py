"""Self-supervised objectives as functions of tensors, and the sums over workers that they need.

Every loss is computed in float32 (float64 where the input is), whatever autocast says: temperatures of 0.04 to 0.2
magnify the rounding of bfloat16. Under torch.distributed each worker passes its own rows. The mean of the workers'
losses, and the mean of their gradients as DistributedDataParallel takes it, then equal the loss and gradient of one
process that has all rows, provided that every worker has equally many rows.

Shapes: N rows (cells of a view), C channels, K prototypes, B images, P patches of an image, W workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

FunctionWrapper = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
"""Makes of a function the one that is called, such as the compiled one."""

SPLIT_ELEMENTS = 2**26
"""Elements of the temporary copies that Sinkhorn-Knopp makes of its logits: 256 MiB in float32."""


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


def as_it_is(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
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


# --- DINO and iBOT ----------------------------------------------------------------------------------------------------


def _cross_entropy_rows(student_logits: Tensor, teacher_probs: Tensor, *, student_temperature: float) -> Tensor:
    log_probs = F.log_softmax(at_least_float32(student_logits) / student_temperature, dim=-1)  # [..., K]
    return -(teacher_probs.detach() * log_probs).sum(dim=-1)  # [...]


def dino_cross_entropy(student_logits: Tensor, teacher_probs: Tensor, *, student_temperature: float) -> Tensor:
    """Cross-entropy of the student's softmax against the teacher's probabilities, mean over rows (arXiv 2104.14294).

    Args:
        student_logits: [N, K].
        teacher_probs: [N, K], of another view of the same cells; no gradient flows to them.
        student_temperature: 0.1 in DINOv2.

    Returns:
        A scalar: one term (one student view, one teacher view). The method weights and sums terms.
    """
    with full_precision(student_logits):
        rows = _cross_entropy_rows(student_logits, teacher_probs, student_temperature=student_temperature)
        return rows.mean()


def mask_weights(mask: Tensor) -> Tensor:
    """Weight of each masked patch, 1 / (masked patches of its image); 0 elsewhere. bool [B, P] -> float32 [B, P]."""
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1)


def ibot_cross_entropy(
    student_logits: Tensor, teacher_probs: Tensor, mask: Tensor, *, student_temperature: float
) -> Tensor:
    """Masked patch prediction (arXiv 2111.07832): mean over the masked patches of an image, then over all images.

    An image without masked patches counts as 0 in the mean, as in DINOv2.

    Args:
        student_logits: [B, P, K].
        teacher_probs: [B, P, K]; no gradient flows to them.
        mask: bool [B, P], True where the student saw the mask token.
        student_temperature: 0.1 in DINOv2.
    """
    with full_precision(student_logits):
        rows = _cross_entropy_rows(student_logits, teacher_probs, student_temperature=student_temperature)  # [B, P]
        return (rows * mask_weights(mask)).sum() / max(len(mask), 1)


def _chunk_cross_entropy(
    features: Tensor, prototypes: Tensor, teacher_probs: Tensor, weights: Tensor, student_temperature: float
) -> Tensor:
    logits = features @ prototypes.T  # [n, K]
    rows = _cross_entropy_rows(logits, teacher_probs, student_temperature=student_temperature)  # [n]
    return (rows * weights).sum()


def chunked_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    teacher_probs: Tensor,
    *,
    student_temperature: float,
    weights: Tensor | None = None,
    chunk_rows: int = 2048,
    run: FunctionWrapper = as_it_is,
) -> Tensor:
    """Weighted sum over rows of the cross-entropy of softmax(features @ prototypes.T / temperature), in chunks of rows.

    The student's logits of one chunk exist at a time; the backward computes them again. At batch 4096 the logits of
    65,536 prototypes would take 9 GB in float32. Zero rows give 0 with zero gradients.

    Args:
        features: [N, C], the head's bottleneck, L2-normalised.
        prototypes: [K, C], L2-normalised, float32.
        teacher_probs: [N, K]; no gradient flows to them. A row may sum to more than 1 (several teacher views).
        student_temperature: 0.1 in DINOv2.
        weights: [N]; None: 1.
        chunk_rows: rows a chunk.
        run: how the term of a chunk is called, as ``Method.run``.
    """
    term = run(_chunk_cross_entropy)

    def in_full_precision(rows: Tensor, *given: Any) -> Tensor:
        # Around the compiled function, not within it: its backward would compute in the type that autocast has here.
        with full_precision(rows):
            return term(at_least_float32(rows), *given)

    if weights is None:
        weights = features.new_ones(len(features), dtype=torch.float32)
    total = prototypes.new_zeros(())
    parts = zip(*(x.split(chunk_rows) for x in (features, teacher_probs, weights)), strict=True)
    for rows, probs, row_weights in parts:
        total = total + checkpoint(
            in_full_precision,
            *(rows, prototypes, probs, row_weights, student_temperature),
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total


# --- the teacher's targets --------------------------------------------------------------------------------------------


@torch.no_grad()
def softmax_center(teacher_logits: Tensor, center: Tensor, *, teacher_temperature: float | Tensor) -> Tensor:
    """Teacher probabilities: softmax of the centred logits. [..., K], center [K] -> [..., K]."""
    with full_precision(teacher_logits):
        return _softmax_center(at_least_float32(teacher_logits), center, teacher_temperature)


def _softmax_center(teacher_logits: Tensor, center: Tensor, temperature: float | Tensor) -> Tensor:
    return F.softmax((teacher_logits - center) / temperature, dim=-1)


def _fill_softmax_center(
    probs: Tensor, features: Tensor, prototypes: Tensor, center: Tensor, temperature: float | Tensor
) -> Tensor:
    return probs.copy_(_softmax_center(features @ prototypes.T, center, temperature))


@torch.no_grad()
def chunked_softmax_center(
    features: Tensor,
    prototypes: Tensor,
    center: Tensor,
    *,
    teacher_temperature: float | Tensor,
    chunk_rows: int = 2048,
    run: FunctionWrapper = as_it_is,
) -> Tensor:
    """``softmax_center(features @ prototypes.T, ...)``; the logits of one chunk of rows exist at a time.

    Args:
        features: [N, C], the teacher head's bottleneck, L2-normalised.
        prototypes: [K, C], L2-normalised, float32.
        center: [K].
        teacher_temperature: 0.04 to 0.07 in DINOv2; may be a tensor, a scalar: of a number that changes, each value
            would be compiled anew.
        chunk_rows: rows a chunk.
        run: how a chunk is computed, as ``Method.run``.

    Returns:
        [N, K].
    """
    with full_precision(features):
        rows = at_least_float32(features)
        probs = prototypes.new_empty(len(rows), len(prototypes))
        for part, out in zip(rows.split(chunk_rows), probs.split(chunk_rows), strict=True):
            run(_fill_softmax_center)(out, part, prototypes, center, teacher_temperature)
    return probs


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


def _logsumexp(logits: Tensor, offset: Tensor, *, over: int) -> Tensor:
    """logsumexp of logits [N, K] + offset over dimension ``over``, widened part by part to the offset's type."""
    if logits.shape[over] == 0:  # no masked patch on this worker
        return offset.new_full((1, logits.shape[1]) if over == 0 else (len(logits), 1), float("-inf"))
    along = 1 - over
    step = max(1, SPLIT_ELEMENTS // logits.shape[over])
    parts = logits.split(step, dim=along)
    return torch.cat([torch.logsumexp(part + offset, dim=over, keepdim=True) for part in parts], dim=along)


def _logsumexp_over_workers(local: Tensor) -> Tensor:
    if world_size() == 1:
        return local
    highest = local.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return highest + sum_over_workers(torch.exp(local - highest)).log()


@torch.no_grad()
def sinkhorn_knopp(teacher_logits: Tensor, *, teacher_temperature: float, iterations: int = 3) -> Tensor:
    """Teacher probabilities by Sinkhorn-Knopp (SwAV, arXiv 2006.09882): prototypes are used equally over the batch.

    Computed on logarithms, because exp(logit / 0.04) overflows float32 from logits of 3.6 on; so the result is finite
    for any finite logits. The iterations update a scale per row and per prototype, never the matrix. The batch is all
    workers' rows (their number may differ, and may be 0).

    Args:
        teacher_logits: [N, K].
        teacher_temperature: 0.04 to 0.07 in DINOv2.
        iterations: normalisations of the prototypes, each followed by one of the rows; at least 1, 3 in DINOv2.

    Returns:
        [N, K]; each row sums to 1.

    Raises:
        ValueError: iterations below 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: expected at least 1, as 3")
    with full_precision(teacher_logits):
        logits = at_least_float32(teacher_logits) / teacher_temperature  # [N, K]
        # Scales of 1e25 and 1e-25 multiply to a probability: float32 would lose a digit of it. MPS has no float64.
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        row_scale = logits.new_zeros(len(logits), 1, dtype=wide)  # [N, 1]
        for _ in range(iterations):
            prototype_scale = -_logsumexp_over_workers(_logsumexp(logits, row_scale, over=0))  # [1, K]
            row_scale = -_logsumexp(logits, prototype_scale, over=1)  # [N, 1]
        step = max(1, SPLIT_ELEMENTS // logits.shape[1])
        for rows, scale in zip(logits.split(step), row_scale.split(step), strict=True):
            rows.copy_((rows + prototype_scale + scale).exp_())
        return logits


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
