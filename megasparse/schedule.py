"""Learning rate and sparsity as pure functions of the progress: nothing to save, and the same under any layout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megasparse.config import Optimizer, Schedule, SparseAttention, WeightSparsity


def learning_rate(tokens: int, optimizer: Optimizer, schedule: Schedule, total_tokens: int) -> float:
    """The rate of the step that ends with ``tokens`` tokens seen in all, of a run of ``total_tokens``.

    Counting at the step's end, the first step of a warm-up has a rate above zero, the step that completes
    ``warmup_tokens`` has the peak, and the last step has exactly ``min_lr_ratio * lr``. With p the progress from the
    warm-up's end (0) to the run's end (1), the fraction of the way from the least rate to the peak is

        cosine:   (1 + cos(pi p)) / 2        linear:  1 - p        constant:  1
        wsd:      1 until the last ``decay_tokens`` tokens, then linear to 0 (Hu et al. 2024, MiniCPM)

    These are the shapes of Megatron-LM's OptimizerParamScheduler, which counts at the step's start. Past
    ``total_tokens`` the last rate stays.
    """
    peak, warmup = optimizer.lr, schedule.warmup_tokens
    if tokens < warmup:
        return peak * (tokens / warmup)
    after_warmup = min(tokens, total_tokens) - warmup
    progress = after_warmup / (total_tokens - warmup) if total_tokens > warmup else 0.0
    match schedule.type:
        case "constant":
            fraction = 1.0
        case "linear":
            fraction = 1.0 - progress
        case "cosine":
            fraction = (1.0 + math.cos(math.pi * progress)) / 2
        case "wsd":
            remaining = max(total_tokens - tokens, 0)
            fraction = min(1.0, remaining / schedule.decay_tokens) if schedule.decay_tokens else 1.0
    return peak * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * fraction)


def attention_blocks(progress: float, sparse: SparseAttention, all_blocks: int) -> int | None:
    """How many of a sequence's ``all_blocks`` key blocks a query may see at ``progress``, the share of the run's steps
    that are done with this one; None: dense attention. Selectors without a budget ignore the number."""
    if progress <= sparse.dense_start or progress > 1 - sparse.dense_end:
        return None
    blocks = sparse.blocks or all_blocks
    ramped = (progress - sparse.dense_start) / sparse.ramp if sparse.ramp else 1.0
    return round(all_blocks + (blocks - all_blocks) * min(1.0, ramped))


def weights_are_sparse(progress: float, sparsity: WeightSparsity) -> bool:
    """Are weights 2:4 at ``progress``, the share of the run's steps that are done with this one?"""
    return sparsity.dense_start < progress <= 1 - sparsity.dense_end


def mask_decay(progress: float, sparsity: WeightSparsity) -> float:
    """The decay of masked weights at ``progress``: 0 where weights are dense, then it grows over ``ramp``."""
    if sparsity.decay is None or not weights_are_sparse(progress, sparsity):
        return 0.0
    return sparsity.decay * _ramped(progress, sparsity)


def masked_share(progress: float, sparsity: WeightSparsity) -> float:
    """The share of a masked weight that is left in the product: with MdGf it falls from 1 to 0 over ``ramp``."""
    match sparsity.method:
        case "dense":
            return 1.0
        case "mdgf":
            return 1.0 - _ramped(progress, sparsity)
    return 0.0


def n_of_m(progress: float, sparsity: WeightSparsity) -> tuple[int, int]:
    """How many weights of each m are kept. With SdGf, in equal shares of ``ramp``, m - 1, m / 2, m / 4, ... and after
    it n."""
    n, m = sparsity.n_of_m
    if sparsity.method != "sdgf":
        return n, m
    stages = [m - 1]
    while (half := m // 2 ** len(stages)) > n:
        stages.append(half)
    stage = int(_ramped(progress, sparsity) * len(stages))
    return ([*stages, n][stage], m)


def _ramped(progress: float, sparsity: WeightSparsity) -> float:
    """How much of ``ramp`` is over at ``progress``, from 0 to 1."""
    after_start = max(0.0, progress - sparsity.dense_start)
    return min(1.0, after_start / sparsity.ramp) if sparsity.ramp else 1.0
