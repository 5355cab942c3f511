"""How much of the attention of a full matrix the listed blocks have: measured on a few queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.ops.block_sparse import BlockMask

SAMPLE = 16  # the last queries of a sequence: those with the most blocks to choose from


@torch.no_grad()
def attention_recall(
    q: Tensor, k: Tensor, mask: BlockMask, scale: float, document_ids: Tensor | None, rows: Tensor
) -> Tensor:
    """float32 [batch, kv_heads, len(rows)]: of the dense attention of queries ``rows`` the part that falls into the
    listed blocks, mean over the heads of a group. Shapes as in ops.block_sparse; document_ids [batch, keys]."""
    lists = rows // mask.query_block_size
    listed = BlockMask(
        mask.count[:, :, lists], mask.index[:, :, lists], mask.block_size, 1, mask.num_key_blocks
    ).to_dense()
    keys = torch.arange(k.shape[1], device=k.device)
    positions = rows + k.shape[1] - q.shape[1]
    seen = keys <= positions.unsqueeze(1)
    if document_ids is not None:
        seen = seen & (document_ids[:, None, positions, None] == document_ids[:, None, None, :]).unsqueeze(1)
    queries = q[:, rows].float().unflatten(2, (k.shape[2], -1))
    logits = torch.einsum("bqhgd,bkhd->bhgqk", queries, k.float()) * scale
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).mean(2)
    by_block = F.pad(weights, (0, -k.shape[1] % mask.block_size)).unflatten(-1, (-1, mask.block_size)).sum(-1)
    return by_block.where(listed, 0).sum(-1)


def sampled(q: Tensor, start: int, seq: int) -> Tensor:
    """Which of the queries [batch, n, heads, head_dim], of positions from ``start`` on, are among the last SAMPLE of a
    sequence of ``seq``."""
    first = min(max(0, seq - SAMPLE - start), q.shape[1])
    return torch.arange(first, q.shape[1], device=q.device)
