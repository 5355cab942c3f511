"""Block-sparse attention as it is defined: a dense mask and a softmax. The reference; [seq, seq] memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    scores, seen = _scores(q, k, mask, causal, scale, document_ids, block_bias)
    values = v.to(scores.dtype).repeat_interleave(q.shape[2] // k.shape[2], 2)
    empty = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    output = torch.einsum("bhqk,bkhd->bqhd", weights, values).to(q.dtype)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
    return output, lse.transpose(1, 2)


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, mask: BlockMask, causal: bool, scale: float, document_ids: Tensor | None
) -> Tensor:
    """See ``block_sparse.block_mass``."""
    scores, seen = _scores(q, k, mask, causal, scale, document_ids, None)
    shift = lse.to(scores.dtype).transpose(1, 2).unsqueeze(-1).where(seen, 0)
    weights = (scores.where(seen, 0) - shift).exp().where(seen, 0)
    batch, kv_heads, q_blocks = mask.count.shape
    rows, columns = q_blocks * mask.query_block_size, mask.num_key_blocks * mask.block_size
    weights = F.pad(weights, (0, columns - k.shape[1], 0, rows - q.shape[1]))
    weights = weights.view(batch, kv_heads, -1, q_blocks, mask.query_block_size, mask.num_key_blocks, mask.block_size)
    mass = weights.sum(-1).amax((2, 4))
    return mass.gather(-1, mask.index.long()).where(mask.listed(), 0)


def _scores(
    q: Tensor,
    k: Tensor,
    mask: BlockMask,
    causal: bool,
    scale: float,
    document_ids: Tensor | None,
    block_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Logits [batch, heads, queries, keys], -inf where a query does not see a key, and where it does."""
    precise = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(precise).repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(precise), keys) * scale
    if block_bias is not None:
        scores = scores + _by_token(block_bias.to(precise), mask, q, k)
    seen = _by_token(mask.to_dense(), mask, q, k) & visible(q.shape[1], k.shape[1], causal, document_ids, q.device)
    return scores.masked_fill(~seen, -torch.inf), seen


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
