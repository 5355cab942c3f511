"""Block-sparse attention as it is defined: a dense mask and a softmax. The reference; [seq, seq] memory."""

from __future__ import annotations

import torch
from torch import Tensor

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
    """The op of the package, and the log of each query's sum of exponents [batch, seq, heads]."""
    precise = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.to(precise).repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(precise), keys) * scale
    if block_bias is not None:
        scores = scores + _by_token(block_bias.to(precise), mask, q, k)
    seen = _by_token(mask.to_dense(), mask, q, k) & visible(q.shape[1], k.shape[1], causal, document_ids, q.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    empty = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    output = torch.einsum("bhqk,bkhd->bqhd", weights, values).to(q.dtype)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
    return output, lse.transpose(1, 2)


def visible(queries: int, keys: int, causal: bool, document_ids: Tensor | None, device: torch.device) -> Tensor:
    """bool, broadcast to [batch, heads, queries, keys]: what causality and documents allow. The queries are the last
    ones of the keys' sequence."""
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if causal:
        seen = seen.tril(keys - queries)
    if document_ids is not None:
        own = document_ids[:, keys - queries :]
        seen = seen & (own.unsqueeze(-1) == document_ids.unsqueeze(-2)).unsqueeze(1)
    return seen


def _by_token(blocks: Tensor, mask: BlockMask, q: Tensor, k: Tensor) -> Tensor:
    """[batch, kv_heads, q_blocks, k_blocks] -> [batch, heads, queries, keys]"""
    group = q.shape[2] // k.shape[2]
    rows = blocks.repeat_interleave(group, 1).repeat_interleave(mask.query_block_size, 2)[:, :, : q.shape[1]]
    return rows.repeat_interleave(mask.block_size, 3)[..., : k.shape[1]]
