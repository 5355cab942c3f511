"""A 2:4 weight: what its layer multiplies by, and the state behind that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from megasparse import schedule
from megasparse.config import WeightSparsity
from megasparse.ops import two_four


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
    """Turns a weight, [..., rows, columns], into the 2:4 weight that the forward pass takes.

    State, in every checkpoint: ``mask``, which places count now, all of them while weights are dense; and with S-STE
    ``scale``, one number a matrix (an expert's each), 0 while weights are dense.
    """

    mask: Tensor
    scale: Tensor

    def __init__(self, name: str, weight: nn.Parameter, sparsity: WeightSparsity, tp_group: Any = None) -> None:
        """``tp_group``: the ranks that hold the other parts of the matrix. ValueError where a block of 4x4 would not
        lie in one part."""
        super().__init__()
        *matrices, rows, columns = weight.shape
        parts = weight.partition_stride if getattr(weight, "tensor_model_parallel", False) else 1  # type: ignore[attr-defined]
        if rows // parts % 4 or columns % 4:
            raise ValueError(
                f"sparsity.weights: a process holds {parts} x [{rows // parts}, {columns}] of {name}, not in whole "
                "blocks of 4x4: lower parallel.tp, change the model's sizes or take it out of sparsity.weights.targets"
            )
        self.name, self.sparsity, self.tp_group = name, sparsity, tp_group
        self.weight = (weight,)  # in a tuple: it is the layer's parameter, not this module's
        self.in_step = False
        self.product: Tensor | None = None  # what a step's micro-batches multiply by, once the first has made it
        self.register_buffer("mask", torch.ones(weight.shape, dtype=torch.bool))
        if sparsity.method == "s_ste":
            self.register_buffer("scale", torch.zeros(matrices or [1]))

    def forward(self, weight: Tensor) -> Tensor:
        product = self._sparse(weight) if self.product is None else self.product
        if self.in_step:
            self.product = product
        # Straight through; what was pruned for good gets no gradient.
        return _Substitute.apply(weight, product, self.mask if self.sparsity.method == "asp" else None)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _sparse(self, weight: Tensor) -> Tensor:
        if self.sparsity.method != "s_ste":
            return torch.where(self.mask, weight, 0.0)
        scale = self.scale if weight.dim() == 2 else self.scale[:, None, None]
        soft = two_four.soft_threshold_24(weight).mul_(scale.to(weight.dtype))
        return torch.where(scale > 0, soft, weight)

    @torch.no_grad()
    def begin_step(self, step: int, steps: int) -> Refresh:
        """Before step ``step`` (from 0) of ``steps``: a new mask if one is due. Every rank of tp_group calls it. Until
        ``end_step``, the weight is taken not to change."""
        self.in_step, self.product = True, None
        before, now = (schedule.weights_are_sparse((s + 1) / steps, self.sparsity) for s in (step - 1, step))
        first = now and not (before and step > 0)
        if not now:
            self.mask.fill_(True)
            return Refresh()
        if not first and (self.sparsity.method == "asp" or step % self.sparsity.interval):
            return Refresh()
        weight = self.weight[0].detach()
        if first and self.sparsity.method == "s_ste":
            self.scale.copy_(self._scale(weight))
        mask, magnitude = self._mask(weight), weight.abs()
        flips = Refresh() if first else Refresh((mask != self.mask).sum().item(), mask.numel())
        flips.kept, flips.all = (m.sum(dtype=torch.float64).item() for m in (magnitude * mask, magnitude))
        self.mask.copy_(mask)
        return flips

    def end_step(self) -> None:
        self.in_step, self.product = False, None

    def _mask(self, weight: Tensor) -> Tensor:
        if self.sparsity.transposable:
            return two_four.transposable_mask(weight, self.sparsity.search)
        return two_four.prune_24(weight)[1]

    def _scale(self, weight: Tensor) -> Tensor:
        """two_four.sste_scale of each whole matrix."""
        soft = two_four.soft_threshold_24(weight).double()
        sums = torch.stack([(other * soft).sum((-2, -1)) for other in (weight.double(), soft)])
        if self.tp_group is not None:
            dist.all_reduce(sums, group=self.tp_group)
        return torch.where(sums[1] > 0, sums[0] / sums[1], 1.0)

    @torch.no_grad()
    def add_decay(self, gradient: Tensor, weight: Tensor, start: int, decay: float) -> None:
        """gradient += decay * weight where masked; both hold the elements from ``start`` on of the flattened weight."""
        masked = ~self.mask.view(-1)[start : start + len(gradient)]
        gradient.addcmul_(weight, masked, value=decay)  # one pass over memory


def sparse_weights(module: nn.Module) -> Iterator[SparseWeight]:
    return (child for child in module.modules() if isinstance(child, SparseWeight))


class _Substitute(torch.autograd.Function):
    """``product`` in place of the weight, which gets its gradient, where ``mask`` is given only there."""

    @staticmethod
    def forward(ctx, weight: Tensor, product: Tensor, mask: Tensor | None) -> Tensor:
        ctx.mask = mask
        return product.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient if ctx.mask is None else gradient * ctx.mask, None, None
