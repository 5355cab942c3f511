"""FP8 from its definition, in numpy and float64: every code decoded from its bits, rounding by search among them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def decode(code: int, dtype: torch.dtype) -> float:
    """The value of one byte: sign, exponent, mantissa (arXiv:2209.05433, table 1)."""
    mantissa_bits, bias = {E4M3: (3, 7), E5M2: (2, 15)}[dtype]
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if dtype == E4M3 and code & 0x7F == 0x7F:
        return math.nan
    if dtype == E5M2 and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    significand = mantissa / (1 << mantissa_bits) + (1 if exponent else 0)
    return sign * significand * 2.0 ** (max(exponent, 1) - bias)


def round_to(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The nearest finite number of the format, of two as near the one with the even code; float64."""
    table = np.array([decode(code, dtype) for code in range(128)])
    table = table[np.isfinite(table)]  # ascending, as the codes are
    size = np.minimum(np.abs(values), table[-1])
    above = np.searchsorted(table, size)
    below = np.maximum(above - 1, 0)
    down, up = size - table[below], table[above] - size
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.copysign(table[code], values)


def scale_of(amax: float, dtype: torch.dtype, power_of_two: bool) -> float:
    """The largest number of the format divided by a positive amax, in float32."""
    scale = float(np.float32(LARGEST[dtype]) / np.float32(amax))
    return 2.0 ** math.floor(math.log2(scale)) if power_of_two else scale


def scaled_and_rounded(x: np.ndarray, dtype: torch.dtype, scale: float) -> np.ndarray:
    """What stands in float8 for x: the product is a float32, the number a float8, its meaning times 1 / scale."""
    product = (x.astype(np.float32) * np.float32(scale)).astype(np.float64)
    return round_to(product, dtype) * float(np.float32(1) / np.float32(scale))


def tiles(shape: tuple[int, ...], tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    for top in range(0, shape[0], tile[0]):
        for left in range(0, shape[1], tile[1]):
            yield slice(top, top + tile[0]), slice(left, left + tile[1])


def rounded(x: Tensor, dtype: torch.dtype, tile: tuple[int, int] | None = None) -> np.ndarray:
    """x [m, n] by its own amax, or by that of each tile and a power of two; float64."""
    values = x.detach().double().numpy()
    if tile is None:
        return scaled_and_rounded(values, dtype, scale_of(np.abs(values).max(), dtype, power_of_two=False))
    out = np.zeros_like(values)
    for place in tiles(values.shape, tile):
        largest = np.abs(values[place]).max()
        if largest > 0:
            out[place] = scaled_and_rounded(values[place], dtype, scale_of(largest, dtype, power_of_two=True))
    return out
