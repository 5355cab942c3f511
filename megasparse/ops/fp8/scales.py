"""From the largest absolute value of a tensor or of its tiles, its *amax*, to the *scale* it is multiplied by before
the cast to float8.

The conventions are Transformer Engine 2.20's, from its sources: ``compute_scale_from_amax`` in
common/recipe/recipe_common.cuh (current and block scaling) and ``kernel_bulk`` in common/recipe/delayed_scaling.cu.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TILE = 128  # of block scaling: DeepSeek-V3 (arXiv:2412.19437), and the only size of cuBLAS on Hopper
FLOAT32_MAX = torch.finfo(torch.float32).max
EXPONENT = 0x7F800000  # the exponent bits of a float32


def amax(x: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
    """The largest absolute value of x, float32 []; or of each tile of x [m, n], [ceil(m / tile[0]), ceil(n / tile[1])].

    0 where there is nothing. NaN count as nothing, as CUDA's fmaxf has it; infinity counts.
    """
    x = x.detach().abs().float().nan_to_num(nan=0.0, posinf=math.inf)
    if tile is None:
        return x.max() if x.numel() else x.new_zeros(())
    sizes = [-(-size // t) for size, t in zip(x.shape, tile, strict=True)]
    padded = F.pad(x, (0, sizes[1] * tile[1] - x.shape[1], 0, sizes[0] * tile[0] - x.shape[0]))
    return padded.view(sizes[0], tile[0], sizes[1], tile[1]).amax((1, 3))


def scale_from_amax(amax: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """The scale that takes amax to the largest number of ``dtype``; with ``power_of_two`` rounded down to one.

    amax: float32, of any shape. Where it is 0, infinite or NaN the scale is 1; where it is so small that the scale
    overflows, float32's largest number.
    """
    scale = _divide(torch.finfo(dtype).max, amax)
    if power_of_two:
        scale = scale.view(torch.int32).bitwise_and(EXPONENT).view(torch.float32)
    return torch.where(amax.isfinite() & (amax > 0), scale, 1.0)


def update_history(
    history: Tensor,
    scale: Tensor,
    amax: Tensor,
    dtype: torch.dtype,
    algo: Literal["max", "most_recent"] = "max",
    margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """Delayed scaling's end of a step: the history with this step's amax, and the scale for the next step.

    history: float32 [length, n], oldest first from row 1 on. Row 0 is the step under way and always zero here, as in
    Transformer Engine's checkpoints; both begin as zeros, and scale [n] as ones. amax: float32 [n], over all
    microbatches and, by all-reduce(max), all ranks that share the scale. "max" looks at the last ``length`` steps with
    this one. The scale takes the amax looked at to the largest number of ``dtype`` / 2^margin.

    Where amax is 0 the tensor was not seen: neither history nor scale changes. Where the amax looked at is infinite the
    scale stays too: with "max", until the infinity has left the window.
    """
    window = torch.cat([history[1:], amax[None]])
    match algo:
        case "max":
            looked_at = window.amax(0)
        case "most_recent":
            looked_at = amax
        case _:
            raise ValueError(f"algo={algo!r}: use 'max' or 'most_recent'")
    largest = torch.finfo(dtype).max * 2.0**-margin
    new = torch.where(looked_at.isfinite(), _divide(largest, looked_at), scale)
    rolled = torch.cat([torch.zeros_like(window[:1]), window[1:]])
    seen = amax != 0
    return torch.where(seen, rolled, history), torch.where(seen, new, scale)


def _divide(largest: float, amax: Tensor) -> Tensor:
    """Correctly rounded, which torch's number / tensor is not: it multiplies by the reciprocal."""
    return (torch.full_like(amax, largest) / amax).clamp(max=FLOAT32_MAX)
