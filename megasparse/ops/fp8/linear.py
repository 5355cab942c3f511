"""A linear layer's three products in FP8, quantised as Transformer Engine's Linear does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.ops.fp8.float8 import Float8, fp8_matmul, quantize
from megasparse.ops.fp8.scales import E4M3, E5M2, TILE, amax, scale_from_amax

X, WEIGHT, DY, DY_OF_DW = range(4)  # the operands of a layer, in the order of Scaling.scale and Scaling.amax


@dataclass(frozen=True)
class Scaling:
    """Where the scales of one layer's operands come from.

    "delayed": from earlier steps. ``scale``: float32 [4], for x, weight, dy, and the dy of dW if another is put in its
    place. What is seen raises ``amax``, float32 [4], in place: at the end of a step the caller reduces it over ranks,
    gives it to ``update_history`` and zeroes it.
    "current": from each tensor itself. ``reduce_amax`` takes its amax [] to the largest over the ranks that hold parts
    of the same tensor; None: this rank's alone.
    "block": from tiles of TILE elements along the sum of x and dy, and of TILE x TILE of the weight; powers of two.

    by_row: a row of x or dy shares its scale with no other row. "current": it has one. "block": its tiles lie along
    the row for all three products. No GEMM has such operands for dW: this is for layers that would see other rows
    side by side in another layout. Nothing changes for "delayed".
    gradient_unit: dy is that many times the gradient that ``scale`` and ``amax``, and powers of two, are of.
    smooth: see ``quantize``.
    """

    recipe: Literal["delayed", "current", "block"]
    grad_dtype: torch.dtype = E5M2  # of dy. Transformer Engine's formats: e5m2 is "hybrid", e4m3 is "e4m3"
    scale: Tensor | None = None
    amax: Tensor | None = None
    reduce_amax: Callable[[Tensor], Tensor] | None = None
    by_row: bool = False
    gradient_unit: float = 1.0
    smooth: bool = False

    def __post_init__(self) -> None:
        if self.recipe not in ("delayed", "current", "block"):
            raise ValueError(f"recipe={self.recipe!r}: use 'delayed', 'current' or 'block'")
        if self.recipe == "delayed" and (self.scale is None or self.amax is None):
            raise ValueError("recipe='delayed' needs scale and amax, float32 [4]")

    def quantize(self, x: Tensor, operand: int, tile: tuple[int, int]) -> Float8:
        """The operand x [m, n] in float8: dy in ``grad_dtype``, the others in e4m3. tile: the block recipe's."""
        dtype, unit = (self.grad_dtype, self.gradient_unit) if operand in (DY, DY_OF_DW) else (E4M3, 1.0)
        by_row = self.by_row and operand != WEIGHT
        match self.recipe:
            case "delayed":
                assert self.scale is not None
                assert self.amax is not None
                self.amax[operand] = torch.maximum(self.amax[operand], amax(x) / unit)
                scale = self.scale[operand].clone()  # backward needs it as it is now
            case "current":
                largest = amax(x, (1, x.shape[1]) if by_row else None) / unit
                scale = scale_from_amax(largest if self.reduce_amax is None else self.reduce_amax(largest), dtype)
            case "block":
                largest = amax(x, (1, TILE) if by_row else tile) / unit
                scale = scale_from_amax(largest, dtype, power_of_two=True)
        return quantize(x, dtype, scale / unit, self.smooth)


def fp8_linear(
    x: Tensor, weight: Tensor, scaling: Scaling, dy_of_dw: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """y = x weight^T, with x and weight in e4m3; in backward dx = dy weight and dW = dy^T x, with dy in e5m2.

    x: [..., in] and weight: [out, in], float32, bfloat16 or float16 -> [..., out] in x's type. The weight is what is
    multiplied (masked, thresholded, scaled, ...): its gradient is of that tensor. dy_of_dw takes dy [tokens, out] to
    the one that dW is made of (pruned by MVUE, say), of the same shape; it is quantised by itself.

    The block recipe quantises x and dy for dW anew from their values before FP8, in tiles along tokens, as tiles
    cannot be transposed; the other recipes use one cast for both products. A sequence of m tokens, a layer of n
    features need not be multiples of TILE: the last tiles are smaller.
    """
    return _Linear.apply(x, weight, scaling, dy_of_dw)  # type: ignore[no-any-return]


def fp8_grouped_swiglu(
    x: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, scaling: Sequence[tuple[Scaling, Scaling, Scaling]]
) -> Tensor:
    """``experts.grouped_swiglu`` with fp8_linear's products: w1, w2 and w3 of each expert by ``scaling``, by expert.

    One expert after the other, and x is quantised for w1 and again for w3: slower than the products in float32.
    """
    y = []
    for rows, gate, down, up, (of_gate, of_down, of_up) in zip(
        x.split(counts.tolist()), w1, w2, w3, scaling, strict=True
    ):
        hidden = F.silu(fp8_linear(rows, gate, of_gate)) * fp8_linear(rows, up, of_up)
        y.append(fp8_linear(hidden, down, of_down))
    return torch.cat(y)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scaling: Scaling, dy_of_dw: Callable[[Tensor], Tensor] | None):
        rows = x.reshape(-1, x.shape[-1])
        qx = scaling.quantize(rows, X, (1, TILE))
        qw = scaling.quantize(weight, WEIGHT, (TILE, TILE))
        y = fp8_matmul(qx, qw.t(), x.dtype)
        if scaling.recipe == "block" and not scaling.by_row and ctx.needs_input_grad[1]:
            qx = scaling.quantize(rows, X, (TILE, 1))
        ctx.save_for_backward(*qx, *qw)
        ctx.scaling, ctx.dy_of_dw = scaling, dy_of_dw
        ctx.shape, ctx.types = x.shape, (x.dtype, weight.dtype)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        scaling: Scaling = ctx.scaling
        x_data, x_scale, w_data, w_scale = ctx.saved_tensors
        qx, qw = Float8(x_data, x_scale), Float8(w_data, w_scale)
        dy = dy.reshape(-1, len(w_data))
        block = scaling.recipe == "block" and not scaling.by_row
        dx = dw = qdy = None
        if ctx.needs_input_grad[0]:
            qdy = scaling.quantize(dy, DY, (1, TILE))
            dx = fp8_matmul(qdy, qw, ctx.types[0]).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            if ctx.dy_of_dw is not None:
                qdy = scaling.quantize(ctx.dy_of_dw(dy), DY_OF_DW, (TILE, 1))
            elif qdy is None or block:
                qdy = scaling.quantize(dy, DY, (TILE, 1))
            dw = fp8_matmul(qdy.t(), qx, ctx.types[1])
        return dx, dw, None, None
