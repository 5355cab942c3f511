"""To float8 and back, and the product of two float8 matrices."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megasparse.ops.fp8.scales import E5M2, TILE


class Float8(NamedTuple):
    """A tensor x as data = x * scale, rounded to float8 (or as ``smooth`` says, in float32)."""

    data: Tensor
    scale: Tensor  # float32: [] of the whole, or [rows, columns] of a matrix's tiles, each 1, TILE or all of it wide

    def t(self) -> Float8:
        return Float8(self.data.t(), self.scale.t())


def quantize(x: Tensor, dtype: torch.dtype, scale: Tensor, smooth: bool = False) -> Float8:
    """x * scale in float32, rounded to the nearest number of ``dtype``, ties to even.

    x: float32, bfloat16 or float16, of any shape, or [m, n] if the scale is by tiles. Finite values beyond the largest
    number become it. Infinity stays so in e5m2 and becomes NaN in e4m3, which has none: Transformer Engine's cast
    (satfinite) would make it finite, and the step that has to be skipped would not be. Nor is this left to torch's
    cast to e4m3, which saturates infinity on some devices.

    smooth: a continuous map in place of the cast, for proofs: off by at most as much, depending on the scale as much,
    but where x differs in float32's last bit the result does so too, and not by a step of ``dtype``.
    """
    largest = torch.finfo(dtype).max
    rounded = (x.float() * _spread(scale, x.shape)).clamp(-largest, largest)
    not_finite = x.float() if dtype == E5M2 else rounded.new_tensor(math.nan)
    if smooth:
        rounded += rounded * torch.finfo(dtype).eps / 2 * (8 * rounded.abs().clamp(min=1e-30).log()).sin()
    return Float8(torch.where(x.isfinite(), rounded, not_finite).to(torch.float32 if smooth else dtype), scale)


def dequantize(q: Float8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that q stands for: times 1 / scale in float32, as Transformer Engine stores it."""
    return (q.data.float() * _spread(1 / q.scale, q.data.shape)).to(dtype)


def fp8_matmul(a: Float8, b: Float8, dtype: torch.dtype = torch.float32) -> Tensor:
    """a [m, k] times b [k, n], in ``dtype``: an FP8 GEMM that accumulates in float32, up to the order of the sum.

    Two float8 significands have at most 8 bits together, so float32 holds each product exactly: only sums round, as
    in the GEMM. For that, scales of whole tensors are applied to the sum; those of tiles are powers of two, by which
    the operands are multiplied exactly. Tensor cores may keep fewer bits of a sum than float32 (on Hopper, between
    the additions of split accumulation): that is not emulated.
    """
    if a.scale.dim() == b.scale.dim() == 0:
        return (a.data.float() @ b.data.float() * (1 / a.scale) * (1 / b.scale)).to(dtype)
    return (dequantize(a) @ dequantize(b)).to(dtype)


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """The scale of each element: of tiles, repeated along the dimensions in which they are TILE wide."""
    if scale.dim() == 0:
        return scale
    for dim, size in enumerate(shape):
        if scale.shape[dim] not in (1, size):
            assert scale.shape[dim] == -(-size // TILE)
            scale = scale.repeat_interleave(TILE, dim).narrow(dim, 0, size)
    return scale
