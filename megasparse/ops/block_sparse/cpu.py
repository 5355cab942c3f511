"""Block-sparse attention on CPU, in C++ (cpu.cpp): FlashAttention-2's three loops over lists of blocks.

Memory is linear in the sequence. Arithmetic is float32 at least. Each task owns what it writes: results are the same to
the bit for any number of threads.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.ops import extension
from megasparse.ops.block_sparse.blocks import BlockMask


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


@torch.no_grad()
def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, mask: BlockMask, causal: bool, scale: float, document_ids: Tensor | None
) -> Tensor:
    """See ``block_sparse.block_mass``."""
    keys, lists = _by_key_block(k, mask, scale), (mask.count.contiguous(), mask.index.contiguous())
    documents = None if document_ids is None else document_ids.long().contiguous()
    settings = (k.shape[2], mask.query_block_size, q.shape[1], k.shape[1], causal, documents)
    shift = lse.masked_fill(lse == -torch.inf, torch.inf).to(keys.dtype).unsqueeze(-1)
    rows = _by_query_block(shift, mask, k.shape[2], fill=torch.inf).contiguous()
    queries = _by_query_block(q, mask, k.shape[2])
    return _operators().block_mass(queries, keys, _transposed(keys), *lists, rows, *settings).view(mask.index.shape)


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
        keys, values = _by_key_block(k, mask, scale), _by_key_block(v, mask)
        bias = None if block_bias is None else block_bias.to(keys.dtype).contiguous()
        documents = None if document_ids is None else document_ids.long().contiguous()
        ctx.settings = (k.shape[2], mask.query_block_size, q.shape[1], k.shape[1], causal, documents)
        lists = mask.count.contiguous(), mask.index.contiguous()
        queries = _by_query_block(q, mask, k.shape[2])
        rows, lse = _operators().attend(queries, keys, _transposed(keys), values, *lists, bias, *ctx.settings)
        output = _by_token(rows, q)
        ctx.save_for_backward(q, k, v, bias, output, lse)
        ctx.mask, ctx.scale, ctx.bias_dtype = mask, scale, None if block_bias is None else block_bias.dtype
        return output, _by_token(lse.unsqueeze(-1), q.new_empty(*q.shape[:3], 1, dtype=lse.dtype)).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, doutput: Tensor, dlse: Tensor):
        q, k, v, bias, output, lse = ctx.saved_tensors
        mask, kv_heads, inverse = ctx.mask, k.shape[2], ctx.mask.transpose()
        keys, values = _by_key_block(k, mask, ctx.scale), _by_key_block(v, mask)
        dq, dk, dv, dbias = _operators().attend_backward(
            _by_query_block(q, mask, kv_heads),
            keys,
            _transposed(keys),
            values,
            _transposed(values),
            mask.count.contiguous(),
            mask.index.contiguous(),
            inverse.count,
            inverse.index,
            bias,
            _by_query_block(output, mask, kv_heads),
            _by_query_block(doutput, mask, kv_heads),
            lse.masked_fill(lse == -torch.inf, torch.inf),  # sees no key: exp(logit - inf) = 0
            _by_query_block(dlse.unsqueeze(-1), mask, kv_heads),
            *ctx.settings,
        )
        dk, dv = (
            dx.view(len(k), kv_heads, -1, k.shape[3])[:, :, : k.shape[1]].transpose(1, 2).to(k.dtype)
            for dx in (dk.mul_(ctx.scale), dv)
        )
        return _by_token(dq, q), dk, dv, None if bias is None else dbias.to(ctx.bias_dtype), None, None, None, None


@functools.cache
def _operators() -> Any:
    extension.load(Path(__file__).with_name("cpu.cpp"))
    return torch.ops.megasparse_block_sparse


def _by_query_block(x: Tensor, mask: BlockMask, kv_heads: int, fill: float = 0.0) -> Tensor:
    """[batch, seq, heads, dim] -> [batch * kv_heads, q_blocks, query_block_size * group, dim], float32 at least; the
    last block is filled up with ``fill``."""
    batch, seq, heads, dim = x.shape
    blocks, size = mask.count.shape[2], mask.query_block_size
    rows = x.new_empty(
        batch, kv_heads, blocks * size, heads // kv_heads, dim, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    rows[:, :, :seq] = x.unflatten(2, (kv_heads, -1)).transpose(1, 2)  # one pass over memory
    rows[:, :, seq:] = fill
    return rows.view(batch * kv_heads, blocks, -1, dim)


def _by_token(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse, in the shape and type of ``like`` [batch, seq, heads, dim]."""
    batch, seq, heads, dim = like.shape
    x = torch.empty_like(like, memory_format=torch.contiguous_format)
    kv_heads = len(rows) // batch
    x.view(batch, seq, kv_heads, -1, dim)[:] = rows.view(batch, kv_heads, -1, heads // kv_heads, dim)[
        :, :, :seq
    ].transpose(1, 2)
    return x


def _by_key_block(x: Tensor, mask: BlockMask, scale: float = 1.0) -> Tensor:
    """[batch, keys, kv_heads, dim] -> [batch * kv_heads, k_blocks, block_size, dim] times ``scale``, float32 at least;
    the last block is filled up with zeros."""
    batch, keys, kv_heads, dim = x.shape
    x = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2) * scale
    x = F.pad(x, (0, 0, 0, mask.num_key_blocks * mask.block_size - keys))
    return x.reshape(batch * kv_heads, mask.num_key_blocks, mask.block_size, dim).contiguous()


def _transposed(blocks: Tensor) -> Tensor:
    """[..., block_size, dim] -> [..., dim, block_size]"""
    return blocks.transpose(2, 3).contiguous()
