"""A sparse weight: what its layer multiplies by, and the state behind that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from megasparse import platform, schedule
from megasparse.config import Recipe, WeightSparsity
from megasparse.ops import two_four
from megasparse.ops.two_four.matmul import MIN_EXPERT_TOKENS, Door, Operands, choose, prepare, products

SPLIT = ("allreduce", "group_name", "tensor_model_parallel", "partition_dim", "partition_stride")  # how a weight is


@dataclass
class Refresh:
    """Sums over the weights whose masks were made anew in a step: this process's part, float64."""

    flipped: float = 0.0  # places that changed since the last mask
    compared: float = 0.0  # of so many, 0 for a first mask
    kept: float = 0.0  # sum of the magnitudes of what the mask keeps
    all: float = 0.0  # and of all

    def add(self, other: Refresh, share: float) -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + share * getattr(other, name))


class SparseWeight(nn.Module):
    """Turns a weight, [..., rows, columns], into the sparse weight that the forward pass takes: 2:4, or n:m.

    State, in every checkpoint: ``mask``, which places count now, all of them while weights are dense; with S-STE
    ``scale``, one number a matrix (an expert's each), 0 while weights are dense; with Wanda's score ``input_norm``, of
    each column's input; and the parameter ``boost`` [..., rows, columns / k] of SLoRB, added to each k columns.
    """

    mask: Tensor
    scale: Tensor
    input_norm: Tensor

    def __init__(self, name: str, weight: nn.Parameter, sparsity: WeightSparsity, tp_group: Any = None) -> None:
        """``tp_group``: the ranks that hold the other parts of the matrix. ValueError where a block of 4x4, or a group
        of m or of SLoRB, would not lie in one part."""
        super().__init__()
        *matrices, rows, columns = weight.shape
        parts = weight.partition_stride if getattr(weight, "tensor_model_parallel", False) else 1  # type: ignore[attr-defined]
        for size, unit, what in (
            (rows // parts, 4 if sparsity.transposable else 1, "rows of blocks of 4x4"),
            (columns, sparsity.n_of_m[1], f"columns of {sparsity.pattern} groups"),
            (columns, sparsity.boost or 1, "columns of sparsity.weights.boost"),
        ):
            if size % unit:
                raise ValueError(
                    f"sparsity.weights: a process holds {parts} x [{rows // parts}, {columns}] of {name}, not whole "
                    f"{what}: lower parallel.tp, change the model's sizes or take it out of sparsity.weights.targets"
                )
        self.name, self.sparsity, self.tp_group = name, sparsity, tp_group
        self.weight = (weight,)  # in a tuple: it is the layer's parameter, not this module's
        self.in_step = False
        self.product: Tensor | None = None  # what a step's micro-batches multiply by, once the first has made it
        self.masked = 0.0  # the share of a masked weight that is left in the product
        self.boosted = False  # does the boost learn?
        self.operands: dict[int | None, Operands] = {}  # the product as its kernels take it, of experts by number
        self.door: Door
        self.door, self.why_masked = choose(
            sparsity.products, weight.shape, weight.dtype, platform.device(), sparsity.transposable
        )
        self.boost: nn.Parameter | None = None
        self.register_buffer("mask", torch.ones(weight.shape, dtype=torch.bool))
        if sparsity.method == "s_ste":
            self.register_buffer("scale", torch.zeros(matrices or [1]))
        if sparsity.score == "wanda":
            self.register_buffer("input_norm", torch.ones(*matrices, columns))
        if sparsity.boost:
            self.boost = nn.Parameter(torch.zeros(*matrices, rows, columns // sparsity.boost, dtype=weight.dtype))
            for attribute in SPLIT:
                if hasattr(weight, attribute):
                    setattr(self.boost, attribute, getattr(weight, attribute))

    # What is multiplied ----------------------------------------------------------------------------------------------

    def forward(self, weight: Tensor) -> Tensor:
        product = self._product(weight) if self.product is None else self.product
        if self.in_step:
            self.product = product
        factor = (self.mask, self.masked) if self.sparsity.cuts_gradients else None
        return _Substitute.apply(weight, self.boost, product, factor, self.boosted)  # type: ignore[no-any-return]

    def _product(self, weight: Tensor) -> Tensor:
        scale = self.scale if self.sparsity.method == "s_ste" else None
        return forward_weight(weight, self.sparsity, self.mask, scale, self.boost, self.masked)

    @property
    def door_now(self) -> Door:
        """Where the product is not 2:4, and outside of training, the masked one."""
        is_24 = self.boosted and not self.masked and self.boost is None and self.sparsity.pattern == "2:4"
        return self.door if self.in_step and is_24 else "masked"

    def prepared(self, product: Tensor, expert: int | None = None) -> Operands:
        """What ``forward`` returned, or an expert's part of it, as the kernels of ``door_now`` take it; once a step."""
        if expert not in self.operands:
            operands = prepare(product, self.door_now, self.sparsity.transposable)
            if not self.in_step:
                return operands
            self.operands[expert] = operands
        return self.operands[expert]

    # When masks change -----------------------------------------------------------------------------------------------

    def becomes_sparse(self, step: int, steps: int) -> bool:
        """Is ``step`` (from 0) of ``steps`` the first one with sparse weights?"""
        before, now = (schedule.weights_are_sparse((s + 1) / steps, self.sparsity) for s in (step - 1, step))
        return now and (step == 0 or not before)

    @torch.no_grad()
    def begin_step(self, step: int, steps: int) -> Refresh:
        """Before step ``step`` (from 0) of ``steps``: a new mask if one is due. Every rank of tp_group calls it. Until
        ``end_step``, the weight is taken not to change."""
        progress, first = (step + 1) / steps, self.becomes_sparse(step, steps)
        self.in_step, self.product, self.operands = True, None, {}
        self.masked = schedule.masked_share(progress, self.sparsity)
        self.boosted = schedule.weights_are_sparse(progress, self.sparsity)
        if not schedule.weights_are_sparse(progress, self.sparsity):
            self.mask.fill_(True)
            return Refresh()
        if not first and (self.sparsity.method == "asp" or step % self.sparsity.interval):
            return Refresh()
        weight = self.weight[0].detach()
        if first and self.sparsity.method == "s_ste":
            self.scale.copy_(self._scale(weight))
        mask, magnitude = self._mask(weight, progress), weight.abs()
        flips = Refresh() if first else Refresh((mask != self.mask).sum().item(), mask.numel())
        flips.kept, flips.all = (m.sum(dtype=torch.float64).item() for m in (magnitude * mask, magnitude))
        self.mask.copy_(mask)
        if first and self.boost is not None:
            self.boost.copy_(_groups(torch.where(mask, 0.0, weight), self.boost).mean(-1))
        return flips

    def end_step(self) -> None:
        self.in_step, self.product, self.operands = False, None, {}

    def _mask(self, weight: Tensor, progress: float) -> Tensor:
        score = weight
        if self.sparsity.score == "wanda":
            score = weight.abs() * self.input_norm.unsqueeze(-2).to(weight.dtype)
        if self.sparsity.transposable:
            return two_four.transposable_mask(score, self.sparsity.search)
        n, m = schedule.n_of_m(progress, self.sparsity)
        return two_four.prune_24(score)[1] if (n, m) == (2, 4) else two_four.prune_nm(score, n, m)[1]

    def _scale(self, weight: Tensor) -> Tensor:
        """two_four.sste_scale of each whole matrix."""
        soft = two_four.soft_threshold_24(weight).double()
        sums = torch.stack([(other * soft).sum((-2, -1)) for other in (weight.double(), soft)])
        if self.tp_group is not None:
            dist.all_reduce(sums, group=self.tp_group)
        return torch.where(sums[1] > 0, sums[0] / sums[1], 1.0)

    # Decay of what is masked -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_decay(self, gradient: Tensor, weight: Tensor, start: int, decay: float) -> None:
        """gradient += decay * weight where masked; both hold the elements from ``start`` on of the flattened weight."""
        masked = ~self.mask.view(-1)[start : start + len(gradient)]
        gradient.addcmul_(weight, masked, value=decay)  # one pass over memory

    @torch.no_grad()
    def decay_after_adam(self, weight: Tensor, second_moment: Tensor, start: int, decay: float, eps: float) -> None:
        """weight -= decay * weight / (sqrt(second_moment) + eps) where masked: AST's decay, which is no part of Adam's
        momentum. second_moment: Adam's, corrected for its start; all from ``start`` on. No further than to 0: where
        gradients are as small as the decay, as an expert's without tokens, the quotient would pass 1, then 2, and the
        weight would grow until a mask takes it in."""
        masked = ~self.mask.view(-1)[start : start + len(weight)]
        share = torch.full_like(second_moment, decay).div_(second_moment.sqrt().add_(eps)).clamp_(max=1.0)
        weight.addcmul_(weight * masked, share, value=-1.0)


@torch.no_grad()
def forward_weight(
    weight: Tensor, sparsity: WeightSparsity, mask: Tensor, scale: Tensor | None, boost: Tensor | None, masked: float
) -> Tensor:
    """What the forward pass takes for the weight, or for some rows or experts of it, given the same of its state.
    ``masked``: the share of a masked weight that is left (schedule.masked_share)."""
    if sparsity.method == "s_ste":
        assert scale is not None
        scale = scale if weight.dim() == 2 else scale[:, None, None]
        soft = two_four.soft_threshold_24(weight).mul_(scale.to(weight.dtype))
        return torch.where(scale > 0, soft, weight)
    if sparsity.method == "dense":
        return weight.detach()
    product = torch.where(mask, weight, masked * weight if masked else 0.0)
    if boost is not None:
        _groups(product, boost).add_(boost.unsqueeze(-1))
    return product


def sparse_weights(module: nn.Module) -> Iterator[SparseWeight]:
    return (child for child in module.modules() if isinstance(child, SparseWeight))


def notes(recipe: Recipe, chunks: nn.Module) -> list[str]:
    """For the log: what is sparse, and which products of this process's linear layers run so, or why none does."""
    sparsity = recipe.sparsity.weights
    if sparsity is None:
        return []
    kind = "transposable masks" if sparsity.transposable else "masks by rows"
    found = [
        f"sparsity.weights: {len(recipe.sparse_weights)} of {len(recipe.model.linear_weights)} weights of linear "
        f"layers and experts, {sparsity.pattern}, {sparsity.method}, {kind}"
    ]
    doors: Counter[tuple[str, Door, str | None]] = Counter(
        ("linear layers" if sparse.weight[0].dim() == 2 else "matrices of experts", sparse.door, sparse.why_masked)
        for sparse in sparse_weights(chunks)
    )
    for (what, door, reason), count in doors.items():
        mvue = sparsity.mvue != "none" and what == "linear layers"
        text = products(door, sparsity.transposable, mvue)
        if what != "linear layers" and door != "masked":
            text += f", of an expert with {MIN_EXPERT_TOKENS} tokens or more"
        found.append(f"{count} {what}: {text}" + (f" ({reason})" if reason else ""))
    return found


def _groups(x: Tensor, boost: Tensor) -> Tensor:
    """[..., columns] -> a view [..., columns / k, k]."""
    return x.unflatten(-1, (boost.shape[-1], -1))


class _Substitute(torch.autograd.Function):
    """``product`` in place of the weight, which gets its gradient as if it were the product (straight through), times
    ``factor`` if one is given: 1 where the mask is true, else the number. boost gets the sum over its columns."""

    @staticmethod
    def forward(
        ctx, weight: Tensor, boost: Tensor | None, product: Tensor, factor: tuple[Tensor, float] | None, boosted: bool
    ) -> Tensor:
        ctx.boost, ctx.factor, ctx.boosted = boost, factor, boosted
        return product.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        dboost = None
        if ctx.boost is not None:
            dboost = _groups(gradient, ctx.boost).sum(-1) * float(ctx.boosted)
        if ctx.factor is not None:
            mask, masked = ctx.factor
            gradient = torch.where(mask, gradient, masked * gradient)
        return gradient, dboost, None, None, None
