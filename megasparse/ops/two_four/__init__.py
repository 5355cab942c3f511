"""2:4 sparsity: of every four weights in a row, at most two are not zero.

naive.py    every operation as it is defined
cpu.py      the same in C++ (cpu.cpp), sixteen groups at a time
triton.py   the same on CUDA, with triton_groups.py and triton_mvue.py

All backends give the same bits, but where sums of eight weights tie up to rounding or overflow float32.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from megasparse.ops.two_four import cpu, naive

__all__ = [
    "mvue_24",
    "pack_24",
    "prune_24",
    "prune_nm",
    "soft_threshold_24",
    "sste_scale",
    "transposable_mask",
    "unpack_24",
]

Backend = Literal["auto", "naive", "cpu", "triton"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASK64 = 2**64 - 1


@torch.no_grad()
def prune_24(w: Tensor, dim: int = -1, score: Tensor | None = None, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Keep the two of every four along ``dim`` whose |score| is largest; ties go to the first, NaN is kept.

    w: any shape, a multiple of 4 along dim. score: of the shape of w; None: w itself (magnitude pruning). Returns
    (w where kept and 0 elsewhere, bool mask), both of the shape of w. Raises ValueError for a size that is not a
    multiple of 4.
    """
    score = w if score is None else score
    if score.shape != w.shape:
        raise ValueError(f"score {list(score.shape)} must have the shape of w {list(w.shape)}")
    groups, shape = _grouped(score, dim)
    mask = _backend(backend, w).prune_mask(groups).view(shape)
    return torch.where(mask, w, 0.0), mask


@torch.no_grad()
def prune_nm(score: Tensor, n: int, m: int, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Keep the n of every m along ``dim`` whose |score| is largest; ties go to the first. As ``prune_24``, by sorting.

    score: any shape, a multiple of m along dim, else ValueError. Returns (score where kept and 0 elsewhere, bool mask).
    """
    if not 0 < n < m or score.shape[dim] % m:
        raise ValueError(
            f"{n} of every {m} along dim={dim} of {list(score.shape)}: 0 < n < m and multiples of m are needed"
        )
    groups = torch.where(score.isnan(), torch.inf, score.abs()).unflatten(dim, (-1, m))
    along = dim if dim < 0 else dim + 1
    order = groups.sort(dim=along, descending=True, stable=True).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(along, order.narrow(along, 0, n), True).view(score.shape)
    return torch.where(mask, score, 0.0), mask


@torch.no_grad()
def transposable_mask(w: Tensor, method: Literal["exact", "greedy"] = "exact", backend: Backend = "auto") -> Tensor:
    """Keep two in each row and each column of every 4x4 block: the mask of w and of its transpose are 2:4.

    w: [..., rows, columns], both multiples of 4. Returns a bool mask of that shape. "exact" keeps the largest
    sum of |w| of the 90 patterns that there are (2by4, arXiv 2404.01847); "greedy" takes the largest first where its
    row and its column have room, as torch's _sparse_semi_structured_tile does with "largest_abs_values_greedy": it may
    keep fewer than 8 of 16. Ties go to the first, NaN is kept. Raises ValueError for sizes that are not multiples of 4.
    """
    if method not in ("exact", "greedy"):
        raise ValueError(f"method={method!r}: use 'exact' or 'greedy'")
    if w.dim() < 2 or w.shape[-1] % 4 or w.shape[-2] % 4:
        raise ValueError(f"w {list(w.shape)} must be [..., rows, columns], both multiples of 4")
    _check_float(w)
    matrices = w.detach().reshape(math.prod(w.shape[:-2]), *w.shape[-2:])
    return _backend(backend, w).transposable_mask(matrices, method).view(w.shape)


@torch.no_grad()
def soft_threshold_24(w: Tensor, dim: int = -1, backend: Backend = "auto") -> Tensor:
    """sign(w) max(|w| - t, 0), where t is the second smallest magnitude of every four along ``dim``: at most two are
    not zero, and the result is continuous in w (S-STE, arXiv 2409.09099).

    w: any shape, a multiple of 4 along dim, else ValueError. Returns the shape and type of w.
    """
    groups, shape = _grouped(w, dim)
    return _backend(backend, w).soft_threshold(groups).view(shape)


@torch.no_grad()
def sste_scale(w: Tensor, dim: int = -1, backend: Backend = "auto") -> Tensor:
    """The factor by which ``soft_threshold_24(w, dim)`` is nearest to w: <w, S(w)> / |S(w)|^2; 1 where S(w) is 0.

    Returns a float32 (float64 for float64) scalar. S-STE computes it once and keeps it: one that follows the weights
    diverges. About 1.48 for Gaussian weights.
    """
    soft = soft_threshold_24(w, dim, backend).double()
    square = (soft * soft).sum()
    scale = torch.where(square > 0, (w.double() * soft).sum() / square, 1.0)
    return scale.to(torch.promote_types(w.dtype, torch.float32))


@torch.no_grad()
def mvue_24(
    g: Tensor,
    dim: int = -1,
    method: Literal["exact", "approx"] = "exact",
    *,
    seed: int,
    start: tuple[int, int] = (0, 0),
    backend: Backend = "auto",
) -> Tensor:
    """An unbiased random estimate of g with at most two of every four along ``dim`` not zero.

    g: any shape, a multiple of 4 along dim, else ValueError. Returns the shape and type of g. "exact" has the least
    variance of all (MVUE, arXiv 2203.10991); "approx" draws two without replacement in proportion to the magnitudes.
    A group whose sum of magnitudes is not finite becomes NaN at its first two places.

    Random numbers are a function (Philox4x32-10) of ``seed``, of the number of the group along dim, and of the column,
    which is the flat index in the other dimensions: the same on every device. ``start``: the first group and column of
    g in a larger matrix of which it is a part. In float16 and bfloat16 the values kept are rounded.
    """
    if method not in ("exact", "approx"):
        raise ValueError(f"method={method!r}: use 'exact' or 'approx'")
    groups, shape = _grouped(g, dim)
    return _backend(backend, g).mvue(groups, method, seed & MASK64, start).view(shape)


@torch.no_grad()
def pack_24(w: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """The two values of every four in the last dimension, and which two.

    w: [..., columns], columns a multiple of 4, at most two of each four not zero; any float type. Returns (values
    [..., columns / 2], metadata uint8 [..., ceil(columns / 8)]): a byte holds two groups of four, the first in its low
    half; of each half, bits 0-1 are the place of the first value and bits 2-3 that of the second, in ascending order.
    Raises ValueError where more than two of four are not zero.
    """
    if w.dim() == 0 or w.shape[-1] % 4:
        raise ValueError(f"w {list(w.shape)} must be [..., columns], a multiple of 4")
    rows = w.detach().reshape(math.prod(w.shape[:-1]), w.shape[-1])
    full = int((rows.float().ne(0).unflatten(1, (-1, 4)).sum(2) > 2).sum())
    if full:
        raise ValueError(f"{full} groups of four have more than two values that are not zero: prune w first")
    values, metadata = _backend(backend, w).pack(rows)
    return values.view(*w.shape[:-1], values.shape[1]), metadata.view(*w.shape[:-1], metadata.shape[1])


@torch.no_grad()
def unpack_24(values: Tensor, metadata: Tensor, backend: Backend = "auto") -> Tensor:
    """What ``pack_24`` packed: values [..., columns / 2] and metadata [..., ceil(columns / 8)] -> [..., columns].

    Raises ValueError for shapes or types that do not fit.
    """
    expected = (*values.shape[:-1], math.ceil(values.shape[-1] / 4)) if values.dim() else None
    if expected is None or values.shape[-1] % 2 or metadata.shape != expected or metadata.dtype != torch.uint8:
        raise ValueError(
            f"values {list(values.shape)} and metadata {metadata.dtype} {list(metadata.shape)} do not fit: "
            "[..., columns / 2] and uint8 [..., ceil(columns / 8)] are expected"
        )
    rows = [part.reshape(math.prod(part.shape[:-1]), part.shape[-1]) for part in (values, metadata)]
    return _backend(backend, values).unpack(*rows).view(*values.shape[:-1], 2 * values.shape[-1])


def _grouped(x: Tensor, dim: int) -> tuple[Tensor, torch.Size]:
    """x as [outer, along dim, inner], contiguous, and its shape."""
    _check_float(x)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim} is not a dimension of {list(x.shape)}")
    dim %= x.dim()
    if x.shape[dim] % 4:
        raise ValueError(f"{list(x.shape)} has {x.shape[dim]} elements along dim={dim}: must be a multiple of 4")
    outer, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    return x.detach().reshape(outer, x.shape[dim], inner).contiguous(), x.shape


def _check_float(x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"{x.dtype} is not one of {', '.join(str(dtype) for dtype in FLOATS)}")


def _backend(name: str, x: Tensor) -> ModuleType:
    if name == "auto":
        name = "cpu" if x.device.type == "cpu" else "triton"
    match name:
        case "naive":
            return naive
        case "cpu":
            return cpu
        case "triton":
            from megasparse.ops.two_four import triton

            return triton
    raise ValueError(f"backend={name!r}: use 'auto', 'naive', 'cpu' or 'triton'")
