"""Block-sparse attention on CPU, one key block after the other with all the queries that list it.

A tile is a key block with up to ROWS rows of queries (the heads of a group are rows of their own): one matmul of a size
that the BLAS likes, whether lists belong to blocks of queries or to single ones, and what it needs stays in cache. The
forward keeps a running maximum and sum for every row (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018), the backward computes the tile again from the log-sum-exp (FlashAttention). Memory is linear in the
sequence. Arithmetic is float32 at least: torch's bf16 matmul on CPU would round the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.ops.block_sparse.blocks import BlockMask

ROWS = 4096  # of a tile: with 128 keys its logits are 2 MiB
LOWEST = -1e30  # a running maximum before the first key: finite, so that exp(-inf - LOWEST) is zero


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    causal: bool,
    scale: float,
    document_ids: Tensor | None,
    block_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See ``block_sparse.block_sparse_attention``; and the log-sum-exp [batch, seq, heads]."""
    return _Attend.apply(q, k, v, block_bias, mask, causal, scale, document_ids)  # type: ignore[no-any-return]


@dataclass
class _Tile:
    """Some of the query blocks that list a key block."""

    head: tuple[int, int]  # batch, kv_head
    block: int  # the key block
    keys: slice  # its positions
    queries: Tensor  # [n] int64, ascending
    hidden: Tensor | None  # bool [n or fewer, query_block_size, 1, keys]: what the first query blocks do not see


class _Tiles:
    """The tiles of a mask, in the order of key blocks."""

    def __init__(
        self, mask: BlockMask, queries: int, keys: int, group: int, causal: bool, document_ids: Tensor | None
    ) -> None:
        self.inverse = mask.transpose()
        self.size, self.block_size = mask.query_block_size, mask.block_size
        self.queries, self.keys, self.causal, self.documents = queries, keys, causal, document_ids
        self.most = max(1, ROWS // (self.size * group))

    def __iter__(self) -> Iterator[_Tile]:
        counts, index = self.inverse.count.numpy(), self.inverse.index.numpy().astype(np.int64)
        for batch, head, block in np.argwhere(counts > 0).tolist():
            listed = index[batch, head, block, : counts[batch, head, block]]
            keys = slice(block * self.block_size, min((block + 1) * self.block_size, self.keys))
            for start in range(0, len(listed), self.most):
                queries = torch.from_numpy(listed[start : start + self.most])
                yield _Tile((batch, head), block, keys, queries, self._hidden(batch, keys, queries))

    def _hidden(self, batch: int, keys: slice, queries: Tensor) -> Tensor | None:
        offset = self.keys - self.queries
        if self.documents is None:
            if not self.causal:
                return None
            whole = -(-(keys.stop - 1 - offset) // self.size)  # the first query block that sees all of the keys
            queries = queries[: int(torch.searchsorted(queries, whole))]
        if not len(queries):
            return None
        positions = queries.unsqueeze(1) * self.size + torch.arange(self.size) + offset
        hidden = torch.zeros(len(queries), self.size, keys.stop - keys.start, dtype=torch.bool)
        if self.causal:
            hidden |= positions.unsqueeze(2) < torch.arange(keys.start, keys.stop)
        if self.documents is not None:
            own = self.documents[batch, positions.clamp(max=self.keys - 1)]
            hidden |= own.unsqueeze(2) != self.documents[batch, keys]
        return hidden.unsqueeze(2) if hidden.any() else None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_bias: Tensor | None,
        mask: BlockMask,
        causal: bool,
        scale: float,
        document_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        group = q.shape[2] // k.shape[2]
        tiles = _Tiles(mask, q.shape[1], k.shape[1], group, causal, document_ids)
        queries, keys, values = _by_block(q * scale, mask, group), _by_head(k), _by_head(v)
        output = torch.zeros_like(queries)
        highest, total = queries.new_full(queries.shape[:-1], LOWEST), queries.new_zeros(queries.shape[:-1])
        for tile in tiles:
            at, chosen = tile.head, tile.queries
            p = _logits(tile, queries[at][chosen], keys[at], block_bias)
            old, sums, rows = highest[at][chosen], total[at][chosen], output[at][chosen]
            new = torch.maximum(old, p.amax(1).view_as(old))
            p.sub_(new.view(-1, 1)).exp_()
            shrink = old.sub_(new).exp_()
            rows.mul_(shrink.unsqueeze(2)).flatten(0, 1).addmm_(p, values[at][tile.keys])
            sums.mul_(shrink).add_(p.sum(1).view_as(sums))
            for running, updated in ((highest, new), (total, sums), (output, rows)):
                running[at].index_copy_(0, chosen, updated)
        empty = total == 0
        output /= total.masked_fill(empty, 1.0).unsqueeze(-1)
        lse = (highest + total.log()).masked_fill(empty, -torch.inf)
        result = _by_token(output, q, group).to(q.dtype)
        ctx.save_for_backward(q, k, v, block_bias, result, lse)
        ctx.tiles, ctx.mask, ctx.scale = tiles, mask, scale
        return result, _by_token(lse.unsqueeze(-1), q, group).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, doutput: Tensor, dlse: Tensor):
        q, k, v, block_bias, output, lse = ctx.saved_tensors
        group = q.shape[2] // k.shape[2]
        queries, keys, values = _by_block(q * ctx.scale, ctx.mask, group), _by_head(k), _by_head(v)
        doutput = doutput.to(queries.dtype)
        delta = (doutput * output).sum(-1, keepdim=True) - dlse.unsqueeze(-1)
        dy, delta = _by_block(doutput, ctx.mask, group), _by_block(delta, ctx.mask, group).squeeze(-1)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # no key: exp(logit - inf) = 0
        dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        dbias = None if block_bias is None else torch.zeros_like(block_bias, dtype=queries.dtype)
        for tile in ctx.tiles:
            at, chosen, span = tile.head, tile.queries, tile.keys
            rows, drows = queries[at][chosen], dy[at][chosen].flatten(0, 1)
            p = _logits(tile, rows, keys[at], block_bias).sub_(lse[at][chosen].view(-1, 1)).exp_()
            dv[at][span].addmm_(p.t(), drows)
            dp = drows @ values[at][span].t()
            ds = dp.sub_(delta[at][chosen].view(-1, 1)).mul_(p)
            dk[at][span].addmm_(ds.t(), rows.flatten(0, 1))
            dq[at].index_add_(0, chosen, (ds @ keys[at][span]).view_as(rows))
            if dbias is not None:
                dbias[at][chosen, tile.block] = ds.view(len(chosen), -1).sum(1)
        dq = _by_token(dq.mul_(ctx.scale), q, group).to(q.dtype)
        dk, dv = dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)
        dbias = None if block_bias is None or dbias is None else dbias.to(block_bias.dtype)
        return dq, dk, dv, dbias, None, None, None, None


def _logits(tile: _Tile, rows: Tensor, keys: Tensor, block_bias: Tensor | None) -> Tensor:
    """rows [n, rows of a block, head_dim] -> [n * rows, keys of the tile]; -inf where a query does not see a key."""
    logits = rows.flatten(0, 1) @ keys[tile.keys].t()
    n, width = len(rows), logits.shape[1]
    if block_bias is not None:
        logits.view(n, -1).add_(block_bias[tile.head][tile.queries, tile.block].unsqueeze(1))
    if tile.hidden is not None:
        some, size = tile.hidden.shape[:2]
        first = logits.view(n, -1)[:some].view(some, size, -1, width)
        first.masked_fill_(tile.hidden, -torch.inf)
    return logits


def _by_block(x: Tensor, mask: BlockMask, group: int) -> Tensor:
    """[batch, seq, heads, dim] -> [batch, kv_heads, q_blocks, query_block_size * group, dim], float32 at least; the
    last block is filled up with zeros."""
    batch, seq, _, dim = x.shape
    _, kv_heads, q_blocks = mask.count.shape
    x = F.pad(x, (0, 0, 0, 0, 0, q_blocks * mask.query_block_size - seq))
    x = x.to(torch.promote_types(x.dtype, torch.float32)).view(batch, -1, kv_heads, group, dim).transpose(1, 2)
    return x.reshape(batch, kv_heads, q_blocks, -1, dim)


def _by_token(x: Tensor, like: Tensor, group: int) -> Tensor:
    """The inverse: -> [batch, seq, heads, dim]"""
    batch, seq, heads, _ = like.shape
    x = x.view(batch, heads // group, -1, group, x.shape[-1])[:, :, :seq]
    return x.transpose(1, 2).reshape(batch, seq, heads, -1)


def _by_head(x: Tensor) -> Tensor:
    """[batch, keys, kv_heads, dim] -> [batch, kv_heads, keys, dim], float32 at least."""
    return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32)).contiguous()
