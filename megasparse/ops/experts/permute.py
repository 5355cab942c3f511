"""Tokens to the rows of their experts and back.

A *copy* is one of the ``top_k`` choices of a token, numbered ``token * top_k + choice``. A *row* is a copy that is
computed, at its place in the order by expert. Every sum over copies runs in the order of a token's choices on one
thread: results are the same to the bit from run to run.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 512  # rows whose temporaries stay in cache in the backward of combine: half the time of doing all at once


def sort_by_expert(experts: Tensor, num_experts: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Order the copies by expert, and within an expert by token.

    experts: [tokens, top_k] int64. keep: [tokens, top_k] bool, False for dropped copies; None: all are kept.
    Returns order [rows] int64, the copy at each row, and counts [num_experts] int64, the rows of each expert.
    """
    flat = experts.reshape(-1)
    if keep is not None:
        flat = torch.where(keep.reshape(-1), flat, num_experts)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    order = stable_order(flat, num_experts + 1)
    return (order if keep is None else order[: int(counts.sum())]), counts


def stable_order(keys: Tensor, bound: int) -> Tensor:
    """The permutation that sorts integer ``keys`` [n] in [0, bound), equal keys in their order."""
    if keys.device.type == "cpu" and bound <= 2**15:
        # numpy's stable sort of 16-bit integers is a radix sort: ten times faster than torch.sort
        return torch.from_numpy(np.argsort(keys.to(torch.int16).numpy(), kind="stable"))
    return torch.sort(keys, stable=True).indices


def gather(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """x [tokens, hidden] -> its rows [rows, hidden]."""
    return _Gather.apply(x, order, top_k)  # type: ignore[no-any-return]


def combine(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """y [rows, hidden] -> [tokens, hidden]: each token's rows, times their weights, summed.

    weights: [tokens, top_k], rounded to y's type. Sums are in float32 at least. Dropped copies count as zero.
    """
    return _Combine.apply(y, order, weights)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.tokens, ctx.top_k = len(x), top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (order,) = ctx.saved_tensors
        return _sum_rows(dy.contiguous(), order, ctx.tokens, ctx.top_k, None), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(y, order, weights)
        tokens, top_k = weights.shape
        return _sum_rows(y, order, tokens, top_k, weights.to(y.dtype).reshape(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        y, order, weights = ctx.saved_tensors
        tokens = order // weights.shape[1]
        by_row = weights.to(y.dtype).reshape(-1).index_select(0, order).unsqueeze(1)
        dy = torch.empty_like(y)
        dot = y.new_empty(len(y), dtype=torch.promote_types(y.dtype, torch.float32))
        dout = dout.contiguous()
        for part in range(0, len(y), CHUNK):
            rows = slice(part, part + CHUNK)
            grad = dout.index_select(0, tokens[rows])
            torch.mul(grad, by_row[rows], out=dy[rows])
            torch.sum(grad.mul_(y[rows]), 1, dtype=dot.dtype, out=dot[rows])
        dweights = torch.zeros_like(weights).view(-1).scatter_(0, order, dot.to(weights.dtype)).view_as(weights)
        return dy, None, dweights


def _sum_rows(y: Tensor, order: Tensor, tokens: int, top_k: int, weights: Tensor | None) -> Tensor:
    """Each token's rows of y, times the weights [copies], summed: one pass, float32 accumulation.

    embedding_bag of the table y, a bag the rows of a token: the only kernel of torch that does this without a copy
    of [tokens, top_k, hidden] in memory.
    """
    copies = tokens * top_k
    row_of_copy = order.new_full((copies,), -1)
    row_of_copy[order] = torch.arange(len(order), device=order.device)
    if len(order) == copies:
        per_bag = None if weights is None else weights.view(tokens, top_k)
        return F.embedding_bag(row_of_copy.view(tokens, top_k), y, mode="sum", per_sample_weights=per_bag)
    kept = row_of_copy >= 0
    per_token = kept.view(tokens, top_k).sum(1)
    return F.embedding_bag(
        row_of_copy[kept],
        y,
        per_token.cumsum(0) - per_token,
        mode="sum",
        per_sample_weights=None if weights is None else weights[kept],
    )
