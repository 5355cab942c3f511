"""Groups of four in memory: where a program's lie, their values loaded and stored.

A program has [ROWS, WIDTH] groups: WIDTH of them side by side in memory, in each of ROWS rows. Along the last dimension
a thread loads as many groups as fill 16 bytes; along another dimension it loads its four values from four rows, with
the neighbours of each.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _tile(width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """This program's rows, int64 [ROWS, 1], and the first group that it has in each."""
    across = tl.cdiv(width, WIDTH).to(tl.int32)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row[:, None], (tl.program_id(0) % across).to(tl.int64) * WIDTH


@triton.jit
def _places(row, first, rows, width, EACH: tl.constexpr, WIDTH: tl.constexpr):
    """Of EACH elements of all groups, in rows of ``width`` groups that lie one after the other; and which are real."""
    element = EACH * first + tl.arange(0, EACH * WIDTH)[None, :]
    return row * (EACH * width) + element, (row < rows) & (element < EACH * width)


@triton.jit
def _columns(row, first, rows, width, WIDTH: tl.constexpr):
    """Of the first elements of groups whose other three lie in the next three rows of ``width`` elements; and which
    are real."""
    column = first + tl.arange(0, WIDTH)[None, :]
    return row * (4 * width) + column, (row < rows) & (column < width)


@triton.jit
def _split(x):
    """[ROWS, 2 n] -> its even and its odd columns, [ROWS, n]."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _join(even, odd):
    """The inverse of ``_split``."""
    return tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])


@triton.jit
def _split4(x):
    """[ROWS, 4 n] -> the four of each group, [ROWS, n]."""
    even, odd = _split(x)
    x0, x2 = _split(even)
    x1, x3 = _split(odd)
    return x0, x1, x2, x3


@triton.jit
def _join4(x):
    return _join(_join(x[0], x[2]), _join(x[1], x[3]))


@triton.jit
def _wide(x):
    """As float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # whose conversions lose what is denormal, and do not round
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """float32 as ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + (bits >> 16 & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _load(x, row, first, rows, width, LAST: tl.constexpr, WIDTH: tl.constexpr):
    """The four values of each group, float32 [ROWS, WIDTH]."""
    if LAST:
        at, real = _places(row, first, rows, width, 4, WIDTH)
        return _split4(_wide(tl.load(x + at, mask=real, other=0.0)))
    at, real = _columns(row, first, rows, width, WIDTH)
    return (
        _wide(tl.load(x + at, mask=real, other=0.0)),
        _wide(tl.load(x + at + width, mask=real, other=0.0)),
        _wide(tl.load(x + at + 2 * width, mask=real, other=0.0)),
        _wide(tl.load(x + at + 3 * width, mask=real, other=0.0)),
    )


@triton.jit
def _store(y, values, row, first, rows, width, LAST: tl.constexpr, WIDTH: tl.constexpr):
    dtype: tl.constexpr = y.dtype.element_ty
    if LAST:
        at, real = _places(row, first, rows, width, 4, WIDTH)
        tl.store(y + at, _narrow(_join4(values), dtype), mask=real)
    else:
        at, real = _columns(row, first, rows, width, WIDTH)
        for i in tl.static_range(4):
            tl.store(y + at + i * width, _narrow(values[i], dtype), mask=real)
