"""How the products of the linear layers and experts are quantised, and the state of delayed scaling (ops/fp8).

One tensor has one scale wherever its parts are. Current scaling takes the amax of each operand over the ranks that
share a micro-batch, at once: a part is split over them or they hold the same. Delayed scaling notes the amaxes of a
step and reduces them once, at its end, over all ranks of the pipeline stage. It does not matter there how often a
tensor was seen, so not whether its layer was recomputed either; scales are fixed while a step runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from megasparse.config import Fp8
from megasparse.layers.step import StepState
from megasparse.ops.fp8 import E4M3, E5M2, Scaling, update_history

OPERANDS = 4  # x, weight, dy, and what weights' gradients are made of in its place (sparsity/gradient.py)


class Fp8State(nn.Module):
    """What checkpoints have of one linear layer, or of one of the experts' matrices, by expert: nothing, but of delayed
    scaling ``scale`` [experts, 4] and ``history`` [length, experts, 4] as ops.fp8.update_history has them, in a linear
    layer without the dimension of experts. They are of gradients of the *sum* of a step's token losses, whatever the
    loss scale, the batch and the layout divide it by."""

    scale: Tensor
    history: Tensor

    def __init__(self, fp8: Fp8, experts: tuple[int, range] | None = None) -> None:
        """experts: how many there are, and which are here."""
        super().__init__()
        self.fp8, self.experts = fp8, experts
        self.here = () if experts is None else (len(experts[1]),)
        if fp8.recipe == "delayed":
            self.register_buffer("scale", torch.ones(*self.here, OPERANDS))
            self.register_buffer("history", torch.zeros(fp8.amax_history_len, *self.here, OPERANDS))


class Fp8Scales(Fp8State):
    """How ops.fp8 quantises a layer's products.

    An expert's rows lie beside each other in an order, and on a rank, that depend on the layout. So each has scales of
    its own (ops.fp8.Scaling.by_row), but with delayed scaling those that its expert had for all rows of earlier steps.
    """

    amax: Tensor

    def __init__(self, fp8: Fp8, state: StepState, token_group: Any, experts: tuple[int, range] | None = None) -> None:
        """token_group: the ranks that share a micro-batch's tokens."""
        super().__init__(fp8, experts)
        self.state = state
        self.group = token_group if dist.get_world_size(token_group) > 1 else None
        if fp8.recipe == "delayed":
            self.register_buffer("amax", torch.zeros(*self.here, OPERANDS), persistent=False)  # of the step so far

    def scaling(self, expert: int | None = None) -> Scaling:
        """For the products of one run of the layer, or of expert ``expert`` of those here."""
        scale = amax = None
        if self.fp8.recipe == "delayed":
            scale, amax = self.scale, self.amax if self.training else torch.zeros_like(self.amax)
            if expert is not None:
                scale, amax = scale[expert], amax[expert]
        return Scaling(
            self.fp8.recipe,
            E5M2 if self.fp8.gradients == "e5m2" else E4M3,
            scale,
            amax,
            self._over_ranks if self.group is not None and self.experts is None else None,
            by_row=self.experts is not None,
            gradient_unit=self.state.gradient_unit,
            smooth=self.fp8.rounding == "smooth",
        )

    def _over_ranks(self, amax: Tensor) -> Tensor:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=self.group)
        return amax

    def noted(self) -> Tensor:
        """The step's amaxes, of all experts; 0 for those elsewhere."""
        if self.experts is None:
            return self.amax
        whole = self.amax.new_zeros(self.experts[0], OPERANDS)
        whole[self.experts[1].start : self.experts[1].stop] = self.amax
        return whole

    def update(self, amax: Tensor) -> None:
        """The end of a step with these amaxes: ``noted`` over all ranks."""
        if self.experts is not None:
            amax = amax[self.experts[1].start : self.experts[1].stop]
        gradients = E5M2 if self.fp8.gradients == "e5m2" else E4M3
        for part, dtype in ((slice(0, 2), E4M3), (slice(2, 4), gradients)):
            history, scale = update_history(
                self.history[..., part],
                self.scale[..., part],
                amax[..., part],
                dtype,
                self.fp8.amax_compute_algo,
                self.fp8.margin,
            )
            self.history[..., part], self.scale[..., part] = history, scale


@torch.no_grad()
def end_step(layers: list[Fp8Scales], group: Any, done: bool) -> None:
    """The end of a step, for all ranks of ``group``, those of a pipeline stage: one all-reduce for all layers.

    A step that was not ``done``, its loss or norm not being finite, leaves histories and scales as they were, like
    weights and moments. (Transformer Engine notes its amaxes: until the infinity has left the history, scales stand
    still.)
    """
    delayed = [layer for layer in layers if layer.fp8.recipe == "delayed"]
    if not delayed:
        return
    if done:
        noted = [layer.noted() for layer in delayed]
        flat = torch.cat([amax.reshape(-1) for amax in noted])
        dist.all_reduce(flat, dist.ReduceOp.MAX, group=group)
        for layer, part, amax in zip(delayed, flat.split([amax.numel() for amax in noted]), noted, strict=True):
            layer.update(part.view_as(amax))
    for layer in delayed:
        layer.amax.zero_()


def fp8_scales(module: nn.Module) -> list[Fp8Scales]:
    return [child for child in module.modules() if isinstance(child, Fp8Scales)]
