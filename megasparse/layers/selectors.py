"""Which key blocks a query sees: fixed patterns, and scores by which ``choose`` picks the best blocks.

A list may depend on tokens up to its (first) query only: a query's own block is always on, and scores are of whole
blocks before it, computed from queries that are not later than the first of the list. ``Grid`` holds the sizes. With
query_block_size=1 a query scores blocks itself; with blocks of queries the mean query of the block before does.

Patterns, each a BlockMask:
local      a window and the first blocks (StreamingLLM, arXiv 2309.17453)
strided    a window and every n-th block, shifted by head (S2-Attention, arXiv 2407.17678)

Scores of blocks, each a ``Score``:
pooled      product of query and mean key (MoBA, arXiv 2502.13189), one list a group (InfLLM-V2, 2509.24663)
product     product of learned queries and keys (layers/gate.py)
clusters    keys of the query's cluster (Routing Transformer, arXiv 2003.05997)
compressed  attention to compressed keys (NSA, arXiv 2502.11089; layers/nsa.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.ops.block_sparse import BlockMask

CHUNK = 2**22  # scores in memory at once

Score = Callable[[slice], Tensor]
"""Some query blocks -> float32 [batch, kv_heads, len(part), k_blocks]; scores of blocks that a query reaches into or
that come later are not read."""


@dataclass(frozen=True)
class Grid:
    """Sizes of blocks, and the blocks that are always on."""

    block_size: int
    query_block_size: int
    local_blocks: int = 1  # the own block and those right before it
    sink_blocks: int = 1  # the first blocks of the sequence

    def blocks(self, keys: int) -> int:
        """Key blocks of so many keys."""
        return math.ceil(keys / self.block_size)

    def own(self, queries: int, offset: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first and last key block that each query block reaches into, [q_blocks] each, a ragged last one as if it
        were whole: what a query sees does not depend on how many follow. ``offset``: position of the first query."""
        blocks = torch.arange(math.ceil(queries / self.query_block_size), device=device)
        first = blocks * self.query_block_size + offset
        return first // self.block_size, (first + self.query_block_size - 1) // self.block_size

    def always(self, first: Tensor, last: Tensor, blocks: Tensor) -> Tensor:
        """bool [q_blocks, k_blocks]: the own, local and first ones."""
        first, last = first.unsqueeze(1), last.unsqueeze(1)
        return (blocks <= last) & ((blocks > first - self.local_blocks) | (blocks < self.sink_blocks))


def local(grid: Grid, q: Tensor, k: Tensor) -> BlockMask:
    """The always-on blocks alone."""
    batch, seq, kv_heads, _ = k.shape
    first, last = grid.own(q.shape[1], seq - q.shape[1], k.device)
    farthest, nearest = grid.local_blocks - 1, int((first - last).min())
    near = first.unsqueeze(1) - torch.arange(farthest, nearest - 1, -1, device=k.device)
    sinks = torch.arange(grid.sink_blocks, device=k.device).expand(len(first), -1)
    index = torch.cat([sinks, near], 1)
    keep = (index <= last.unsqueeze(1).clamp(max=grid.blocks(seq) - 1)) & (index >= 0)
    keep[:, grid.sink_blocks :] &= near >= grid.sink_blocks
    index, keep = (x.expand(batch, kv_heads, -1, -1) for x in (index, keep))
    return BlockMask.from_index(index, keep, grid.blocks(seq), grid.block_size, grid.query_block_size)


def strided(
    grid: Grid, q: Tensor, k: Tensor, stride: int, first_head: int = 0, all_heads: int | None = None
) -> BlockMask:
    """Besides the always-on ones every block j with (j + head * step) % stride == 0, step = max(1, stride // heads).

    With tensor parallelism ``k`` has the heads from ``first_head`` on of the layer's ``all_heads``.
    """
    batch, seq, kv_heads, _ = k.shape
    first, last = grid.own(q.shape[1], seq - q.shape[1], k.device)
    blocks = torch.arange(grid.blocks(seq), device=k.device)
    step = max(1, stride // (all_heads or kv_heads))
    shifted = blocks + (first_head + torch.arange(kv_heads, device=k.device)).unsqueeze(1) * step
    dense = grid.always(first, last, blocks) | (
        (shifted % stride == 0).unsqueeze(1) & (blocks <= last.unsqueeze(1)).unsqueeze(0)
    )
    return BlockMask.from_dense(dense.expand(batch, -1, -1, -1), grid.block_size, grid.query_block_size)


def pooled(grid: Grid, q: Tensor, k: Tensor, before: Tensor | None = None) -> Score:
    """score(t, j) = sum over the group's heads of <q_t, mean of block j's keys> / sqrt(head_dim).

    q [batch, seq, heads, head_dim], k [batch, keys, kv_heads, head_dim]; before: see choosers.
    """
    queries = choosers(grid, q, k.shape[2], before) / math.sqrt(q.shape[-1])
    return product(queries, mean_by_block(k, grid.block_size))


def product(queries: Tensor, keys: Tensor) -> Score:
    """score(t, j) = <queries_t, keys_j>: float32 [batch, kv_heads, seq, dim] and [batch, kv_heads, k_blocks, dim]."""
    return lambda part: torch.einsum("bhqd,bhkd->bhqk", queries[:, :, part], keys)


def clusters(grid: Grid, q: Tensor, k: Tensor, centroids: Tensor, before: Tensor | None = None) -> Score:
    """score(t, j) = keys of block j whose nearest centroid is the query's. centroids: [kv_heads, clusters, head_dim] of
    length 1, nearest in angle."""
    queries = choosers(grid, q, k.shape[2], before)
    assigned = nearest(k.transpose(1, 2), centroids)  # [batch, kv_heads, keys]
    members = F.one_hot(assigned, centroids.shape[1]).float().transpose(1, 2)
    counts = mean_by_block(members, grid.block_size)
    wanted = nearest(queries, centroids)

    def score(part: slice) -> Tensor:
        chosen = F.one_hot(wanted[:, :, part], centroids.shape[1]).float()
        return torch.einsum("bhqc,bhkc->bhqk", chosen, counts)

    return score


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """x [batch, kv_heads, n, head_dim] -> int64 [batch, kv_heads, n]"""
    return torch.einsum("bhnd,hcd->bhnc", x.float(), centroids).argmax(-1)


@torch.no_grad()
def choosers(grid: Grid, q: Tensor, kv_heads: int, before: Tensor | None = None) -> Tensor:
    """Who scores for each query block: [batch, seq, heads, head_dim] -> float32 [batch, kv_heads, q_blocks, head_dim].

    The query itself, or the mean query of the block before, summed over the group's heads. The first block of queries
    has ``before`` [batch, kv_heads, head_dim], the mean of those right before q; None: zeros.
    """
    means = mean_queries(grid, q, kv_heads)
    if grid.query_block_size == 1:
        return means
    first = torch.zeros_like(means[:, :, 0]) if before is None else before
    return torch.cat([first.unsqueeze(2), means[:, :, :-1]], 2)


@torch.no_grad()
def mean_queries(grid: Grid, q: Tensor, kv_heads: int) -> Tensor:
    """Of each query block, summed over the group's heads: float32 [batch, kv_heads, q_blocks, head_dim]."""
    return mean_by_block(q.float().unflatten(2, (kv_heads, -1)).sum(3), grid.query_block_size)


@torch.no_grad()
def mean_by_block(x: Tensor, size: int) -> Tensor:
    """[batch, seq, heads, dim] -> float32 [batch, heads, blocks, dim]; a ragged last block, which no score is of, is
    filled up with zeros."""
    return F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size)).mean(2).transpose(1, 2)


@torch.no_grad()
def choose(grid: Grid, score: Score, q: Tensor, k: Tensor, budget: int, mass: float | None = None) -> BlockMask:
    """The always-on blocks and the best others, ``budget`` in all; the earlier block wins a tie, and one whose score is
    -inf is never chosen.

    mass: of the others only the fewest whose softmax adds up to it (FlexPrefill's cumulative budget, arXiv 2502.20766),
    within the budget. Of q and k only the shapes are read.
    """
    batch, seq, kv_heads, _ = k.shape
    first, last = grid.own(q.shape[1], seq - q.shape[1], k.device)
    existing = grid.blocks(seq)
    missing = -q.shape[1] % grid.query_block_size  # queries of the last block that are not there
    blocks = torch.arange(grid.blocks(seq + missing), device=k.device)
    width, step = min(budget, len(blocks)), max(1, CHUNK // (batch * kv_heads * len(blocks)))
    indices, keeps = [], []
    for start in range(0, len(first), step):
        part = slice(start, start + step)
        always = grid.always(first[part], last[part], blocks)
        others = (blocks < first[part].unsqueeze(1)) & ~always
        scores = F.pad(score(part), (0, len(blocks) - existing)).masked_fill(~others, -torch.inf)
        best = torch.sort(scores.masked_fill(always, torch.inf), dim=-1, descending=True, stable=True)
        index = best.indices[..., :width]
        keep = (best.values[..., :width] > -torch.inf) & (index < existing)
        if mass is not None:
            weights = scores.softmax(-1).nan_to_num().gather(-1, index)  # of the always-on ones zero
            keep &= weights.cumsum(-1) - weights < mass
        indices.append(index)
        keeps.append(keep)
    return BlockMask.from_index(
        torch.cat(indices, 2), torch.cat(keeps, 2), existing, grid.block_size, grid.query_block_size
    )


@torch.no_grad()
def entropy(grid: Grid, score: Score, q: Tensor, k: Tensor, part: slice) -> Tensor:
    """Of the softmax over the blocks that ``choose`` may pick, in nats: [batch, kv_heads, len(part)]; 0 where there are
    none. Large: the selector sees no difference between them."""
    first, last = (x[part] for x in grid.own(q.shape[1], k.shape[1] - q.shape[1], k.device))
    blocks = torch.arange(grid.blocks(k.shape[1]), device=k.device)
    others = (blocks < first.unsqueeze(1)) & ~grid.always(first, last, blocks)
    weights = score(part).masked_fill(~others, -torch.inf).softmax(-1).nan_to_num()
    return torch.special.entr(weights).sum(-1)
