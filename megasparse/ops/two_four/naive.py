"""2:4 sparsity as it is defined, for tests: float64 where sums are compared, one plain step after the other.

Every function takes groups of four in the last but one dimension, [outer, n, inner], but ``transposable_mask``, which
takes matrices [matrices, rows, columns].
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

PAIRS = list(itertools.combinations(range(4), 2))  # the two kept of four, in lexicographic order


def prune_mask(score: Tensor) -> Tensor:
    """See ``two_four.prune_24``."""
    groups = _magnitude(score).unflatten(1, (-1, 4))
    order = groups.sort(dim=2, descending=True, stable=True).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[:, :, :2], True)
    return mask.flatten(1, 2)


@functools.cache
def transposable_patterns() -> Tensor:
    """The 90 patterns with two in each row and column of four, bool [90, 4, 4].

    They are ordered as a search finds them that goes through what the upper two rows leave to the lower two: by the
    first appearance of the upper rows' column sums, then by upper rows, then by lower rows.
    """
    rows = torch.zeros(6, 4, dtype=torch.long)
    for i, pair in enumerate(PAIRS):
        rows[i, list(pair)] = 1
    halves: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for a, b in itertools.product(range(6), repeat=2):
        halves.setdefault(tuple((rows[a] + rows[b]).tolist()), []).append((a, b))
    patterns = [
        [*upper, *lower]
        for sums, uppers in halves.items()
        for upper, lower in itertools.product(uppers, halves.get(tuple(2 - s for s in sums), []))
    ]
    return rows[torch.tensor(patterns)].bool()


def transposable_mask(w: Tensor, method: str) -> Tensor:
    """See ``two_four.transposable_mask``."""
    matrices, rows, columns = w.shape
    blocks = _magnitude(w).view(matrices, rows // 4, 4, columns // 4, 4).transpose(2, 3)
    mask = _best_pattern(blocks) if method == "exact" else _greedy(blocks)
    return mask.transpose(2, 3).reshape(w.shape)


def _best_pattern(blocks: Tensor) -> Tensor:
    patterns = transposable_patterns().to(blocks.device)
    # Chosen and summed, not multiplied by zeros and ones: 0 * inf would be NaN.
    kept = torch.stack([blocks[..., pattern].double().sum(-1) for pattern in patterns], dim=-1)
    return patterns[kept.argmax(-1)]


def _greedy(blocks: Tensor) -> Tensor:
    """The largest of sixteen first, each where its row and its column have room."""
    flat = blocks.reshape(-1, 16)
    order = flat.sort(dim=1, descending=True, stable=True).indices
    rows, columns = flat.new_zeros(len(flat), 4), flat.new_zeros(len(flat), 4)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    block = torch.arange(len(flat), device=flat.device)
    for place in order.unbind(1):
        row, column = place // 4, place % 4
        free = (rows[block, row] < 2) & (columns[block, column] < 2)
        mask[block, place] = free
        rows[block, row] += free
        columns[block, column] += free
    return mask.view(blocks.shape)


def soft_threshold(w: Tensor) -> Tensor:
    """See ``two_four.soft_threshold_24``."""
    groups = w.unflatten(1, (-1, 4))
    threshold = groups.abs().sort(dim=2).values[:, :, 1:2]
    return (groups.sign() * (groups.abs() - threshold).clamp(min=0)).flatten(1, 2)


def mvue(g: Tensor, method: str, seed: int, start: tuple[int, int]) -> Tensor:
    """See ``two_four.mvue_24``. Arithmetic is that of the other backends, step by step, in float32 at least."""
    outer, n, inner = g.shape
    x = g.to(torch.promote_types(g.dtype, torch.float32)).unflatten(1, (-1, 4))
    group = start[0] + torch.arange(n // 4).view(1, -1, 1)
    column = start[1] + torch.arange(outer * inner).view(outer, 1, inner)
    first, second, *_ = philox(seed, *torch.broadcast_tensors(group, column))
    u, v = (uniform(word).to(g.device, x.dtype) for word in (first, second))
    values = _exact(x.abs(), u) if method == "exact" else _approx(x.abs(), u, v)
    estimate = torch.where(values > 0, torch.copysign(values, x), 0.0)
    finite = x.abs().sum(2, keepdim=True) < torch.inf
    marked = torch.tensor([torch.nan, torch.nan, 0.0, 0.0], dtype=x.dtype, device=x.device).view(1, 1, 4, 1)
    return torch.where(finite, estimate, marked).flatten(1, 2).to(g.dtype)


def _exact(a: Tensor, u: Tensor) -> Tensor:
    """Magnitudes [outer, groups, 4, inner] and one draw [outer, groups, inner] -> magnitudes of the estimate."""
    ordered, order = a.sort(dim=2, stable=True)
    a1, a2, a3, a4 = ordered.unbind(2)
    three = (a1 + a2) + a3
    total = three + a4
    # No a is above the others together: each is kept with probability 2 a / total, as total / 2. The pairs' widths in
    # [0, 2 total): the third and the fourth have what the others leave, the first and the second nothing.
    near = 2 * a1 + a3 > a4
    width13 = torch.where(near, (2 * a1 + a3) - a4, 0.0)
    width14 = torch.where(near, 2 * a1 + (a4 - a3), 4 * a1)
    width23 = torch.where(near, (2 * a2 + a3) - a4, 2 * (three - a4))
    width24 = torch.where(near, 2 * a2 + (a4 - a3), 2 * ((a2 - a1) + (a4 - a3)))
    draw = u * (2 * total)
    upto14 = width13 + width14
    upto23 = upto14 + width23
    upto24 = upto23 + width24
    lower = torch.where(draw < upto14, 0, torch.where(draw < upto24, 1, 2))
    upper = torch.where(draw < width13, 2, torch.where((draw >= upto14) & (draw < upto23), 2, 3))
    # One is: it stays as it is, and one of the others stands for the three.
    alone = a4 > three
    draw = u * three
    lower = torch.where(alone, torch.where(draw < a1, 0, torch.where(draw < a1 + a2, 1, 2)), lower)
    upper = torch.where(alone, 3, upper)
    largest = torch.where(alone, a4, total / 2)
    values = torch.zeros_like(a).scatter_(2, upper.unsqueeze(2), largest.unsqueeze(2))
    values.scatter_(2, lower.unsqueeze(2), torch.where(alone, three, total / 2).unsqueeze(2))
    return torch.zeros_like(a).scatter_(2, order, values) * (a > 0)


def _approx(a: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """As ``_exact``, with two draws: one in proportion to the magnitudes, then one of the others likewise, each over
    its probability to be kept, a / total * (1 + sum over the others of their a / (total - their a))."""
    first = _drawn(a, u)
    second = _drawn(a.scatter(2, first, 0.0), v)
    total = a.sum(2)
    odds = []
    for i, magnitude in enumerate(a.unbind(2)):
        others = sum(a[:, :, j] for j in range(4) if j != i)
        odds.append(torch.where(magnitude > 0, magnitude / others, 0.0))
    values = torch.stack([total / (1 + sum(odds[j] for j in range(4) if j != i)) for i in range(4)], dim=2)
    kept = torch.zeros_like(a, dtype=torch.bool).scatter_(2, first, True).scatter_(2, second, True)
    return torch.where(kept & (a > 0), values, 0.0)


def _drawn(a: Tensor, u: Tensor) -> Tensor:
    """Which of four, in proportion to ``a``: [outer, groups, 1, inner]."""
    a0, a1, a2, a3 = a.unbind(2)
    draw = u * (((a0 + a1) + a2) + a3)
    edges = (a0, a0 + a1, (a0 + a1) + a2)
    return torch.stack([draw >= edge for edge in edges]).sum(0).unsqueeze(2)


def philox(seed: int, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) of the counter (c0, c1, 0, 0) and the key ``seed``: four words of 32 bits,
    int64. Triton's ``tl.philox`` is the same function."""
    low = 0xFFFFFFFF
    key0, key1 = seed & low, (seed >> 32) & low
    words = [c0 & low, c1 & low, torch.zeros_like(c0), torch.zeros_like(c0)]
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(words[0], 0xD2511F53), _product(words[2], 0xCD9E8D57)
        words = [high1 ^ words[1] ^ key0, low1, high0 ^ words[3] ^ key1, low0]
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return words[0], words[1], words[2], words[3]


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a product of 32-bit words."""
    lower, upper = (a & 0xFFFF) * b, (a >> 16) * b
    upper = upper + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


def uniform(word: Tensor) -> Tensor:
    """The upper 24 of 32 bits as a number in [0, 1)."""
    return (word >> 8).float() * 2.0**-24


def pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """See ``two_four.pack_24``; w is [rows, columns]."""
    groups = w.unflatten(1, (-1, 4))
    # Two places of each group in ascending order: those that are not zero, then the first of the others.
    order = groups.float().ne(0).sort(dim=2, descending=True, stable=True).indices[:, :, :2].sort(dim=2).values
    stored = groups.view(torch.uint8) if w.dtype.itemsize == 1 else groups  # torch gathers no float8
    values = stored.gather(2, order).view(w.dtype).flatten(1)
    nibbles = order[:, :, 0] | order[:, :, 1] << 2
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return values, (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)


def unpack(values: Tensor, metadata: Tensor) -> Tensor:
    """See ``two_four.unpack_24``; values is [rows, columns / 2]."""
    pairs = values.unflatten(1, (-1, 2))
    codes = torch.stack([metadata & 15, metadata >> 4], dim=2).flatten(1)[:, : pairs.shape[1]].long()
    order = torch.stack([codes & 3, codes >> 2], dim=2)
    stored = pairs.view(torch.uint8) if values.dtype.itemsize == 1 else pairs
    groups = stored.new_zeros(*pairs.shape[:2], 4).scatter_(2, order, stored)
    return groups.view(values.dtype).flatten(1)


def _magnitude(w: Tensor) -> Tensor:
    """|w|, and infinity for NaN: it is kept, so that it is seen."""
    return torch.where(w.isnan(), torch.inf, w.abs())
