"""The attention gate: a small projection of queries and of pooled keys that learns where attention goes.

After SeerAttention-R (arXiv 2506.08889): one gate for the heads of a group, single queries, keys pooled to max, min and
mean of each block, a Kullback-Leibler loss to the share of attention that blocks get. Here it learns while the model is
pretrained: its inputs are detached, so that the loss trains the gate alone, and the share is measured over the listed
blocks. Queries and keys come with their rotary embedding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.layers.selectors import CHUNK
from megasparse.ops.block_sparse import BlockMask


class AttentionGate(nn.Module):
    """score(t, j) = <W_q [q_t of the group's heads], W_k [max, min, mean of block j's keys]> / sqrt(gate_dim).

    query [kv_heads, gate_dim, group * head_dim] and key [kv_heads, gate_dim, 3 * head_dim]: of this tensor-parallel
    rank's K/V heads.
    """

    def __init__(self, config: Any, kv_heads: int, group: int, gate_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(
            torch.empty(kv_heads, gate_dim, group * config.kv_channels, dtype=config.params_dtype)
        )
        self.key = nn.Parameter(torch.empty(kv_heads, gate_dim, 3 * config.kv_channels, dtype=config.params_dtype))
        for weight in (self.query, self.key):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)

    def forward(self, q: Tensor, k: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """q [batch, seq, heads, head_dim], k [batch, keys, kv_heads, head_dim] -> float32 queries [batch, kv_heads,
        seq, gate_dim], over sqrt(gate_dim), and keys [batch, kv_heads, k_blocks, gate_dim]."""
        grouped = q.detach().unflatten(2, (k.shape[2], -1)).flatten(3)
        queries = torch.einsum("bqhe,hge->bhqg", grouped, self.query).float() / math.sqrt(self.query.shape[1])
        keys = torch.einsum("bkhe,hge->bhkg", pooled_keys(k.detach(), block_size), self.key).float()
        return queries, keys


def pooled_keys(k: Tensor, size: int) -> Tensor:
    """[batch, keys, kv_heads, head_dim] -> [batch, k_blocks, kv_heads, 3 * head_dim]: max, min and mean of each block.
    A ragged last block, which no score is of, is filled up with zeros."""
    blocks = F.pad(k, (0, 0, 0, 0, 0, -k.shape[1] % size)).unflatten(1, (-1, size))
    return torch.cat([blocks.amax(2), blocks.amin(2), blocks.mean(2)], -1)


def gate_loss(queries: Tensor, keys: Tensor, mask: BlockMask, mass: Tensor, first: Tensor) -> Tensor:
    """sum over lists of KL(target || softmax(queries keys^T)), over the listed blocks that lie before the query's own.

    queries [batch, kv_heads, seq, gate_dim], keys [batch, kv_heads, k_blocks, gate_dim]; mass: ops.block_sparse.
    block_mass of the mask, which is normed to the target; first [seq]: the own block of each query. No more than
    selectors.CHUNK scores are in memory at once.
    """
    return _Divergence.apply(queries, keys, mask, mass, first)  # type: ignore[no-any-return]


class _Divergence(torch.autograd.Function):
    """The gradient of a score is softmax - target: that of queries and keys is made with the loss, and nothing of the
    size of the scores is kept."""

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, mask: BlockMask, mass: Tensor, first: Tensor) -> Tensor:
        batch, heads, seq, _ = queries.shape
        loss, dqueries, dkeys = queries.new_zeros(()), torch.empty_like(queries), torch.zeros_like(keys)
        step = max(1, CHUNK // (batch * heads * keys.shape[2]))
        listed = mask.listed()
        for part in (slice(start, start + step) for start in range(0, seq, step)):
            some, index = queries[:, :, part], mask.index[:, :, part].long()
            before = listed[:, :, part] & (index < first[part].unsqueeze(-1))
            held = mass[:, :, part].where(before, 0)
            target = held / held.sum(-1, keepdim=True).clamp(min=torch.finfo(held.dtype).tiny)
            scores = some @ keys.mT
            logs = scores.gather(-1, index).masked_fill(~before, torch.finfo(scores.dtype).min).log_softmax(-1)
            loss += (torch.xlogy(target, target) - target * logs).where(before, 0).sum()
            if any(ctx.needs_input_grad[:2]):
                # A list without attention has no target, and no gradient.
                difference = (logs.exp() * target.sum(-1, keepdim=True) - target).where(before, 0)
                dscores = torch.zeros_like(scores).scatter_add_(-1, index, difference.to(scores.dtype))
                dqueries[:, :, part] = dscores @ keys
                dkeys += dscores.mT @ some
        ctx.save_for_backward(dqueries, dkeys)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        dqueries, dkeys = ctx.saved_tensors
        return dloss * dqueries, dloss * dkeys, None, None, None
