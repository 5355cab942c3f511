"""The unbiased 2:4 estimate (MVUE, arXiv 2203.10991) in Triton. See ``naive.mvue``, whose arithmetic it is."""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.ops.two_four.triton_groups import INFINITY, _load, _store, _tile


@triton.jit(do_not_specialize=["seed", "first_group", "first_column"])
def _mvue(
    g, y, rows: tl.int64, width: tl.int64, groups: tl.int64, seed: tl.int64, first_group: tl.int64,
    first_column: tl.int64, EXACT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """groups: how many there are along the dimension; a row has them for LAST, else one of each column."""
    row, first = _tile(width, ROWS, WIDTH)
    x0, x1, x2, x3 = _load(g, row, first, rows, width, LAST, WIDTH)
    a = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    finite = _sum(a) < INFINITY
    # Zero where no number is drawn; and so Triton draws them in the layout of what was loaded, not to move them there.
    lane = tl.where(finite, first + tl.arange(0, WIDTH)[None, :], 0)
    if LAST:
        group, column = lane, row
    else:
        group, column = row % groups, row // groups * width + lane
    group, column = (group + first_group).to(tl.uint32), (column + first_column).to(tl.uint32)
    word0, word1, _, _ = tl.philox(seed, group, column, 0, 0)
    values = _exact(a, _uniform(word0)) if EXACT else _approx(a, _uniform(word0), _uniform(word1))
    nan = float("nan")
    estimates = (
        tl.where(finite, _signed(values[0], x0), nan),
        tl.where(finite, _signed(values[1], x1), nan),
        tl.where(finite, _signed(values[2], x2), 0.0),
        tl.where(finite, _signed(values[3], x3), 0.0),
    )
    _store(y, estimates, row, first, rows, width, LAST, WIDTH)


@triton.jit
def _uniform(word):
    """The upper 24 of 32 bits as a number in [0, 1)."""
    return (word >> 8).to(tl.int32).to(tl.float32) * (1 / (1 << 24))


@triton.jit
def _signed(value, x):
    return tl.where((x < 0) & (value > 0), -value, value)


@triton.jit
def _sum(a):
    return ((a[0] + a[1]) + a[2]) + a[3]


@triton.jit
def _exact(a, u):
    """See ``naive._exact``."""
    low, high = tl.minimum(a[0], a[1]), tl.maximum(a[0], a[1])
    lower, upper = tl.minimum(a[2], a[3]), tl.maximum(a[2], a[3])
    a1, a4 = tl.minimum(low, lower), tl.maximum(high, upper)
    inner, other = tl.maximum(low, lower), tl.minimum(high, upper)
    a2, a3 = tl.minimum(inner, other), tl.maximum(inner, other)
    three = (a1 + a2) + a3
    total = three + a4
    near = 2 * a1 + a3 > a4
    width13 = tl.where(near, (2 * a1 + a3) - a4, 0.0)
    width14 = tl.where(near, 2 * a1 + (a4 - a3), 4 * a1)
    width23 = tl.where(near, (2 * a2 + a3) - a4, 2 * (three - a4))
    width24 = tl.where(near, 2 * a2 + (a4 - a3), 2 * ((a2 - a1) + (a4 - a3)))
    draw = u * (2 * total)
    upto14 = width13 + width14
    upto23 = upto14 + width23
    upto24 = upto23 + width24
    one = tl.where(draw < upto14, 0, tl.where(draw < upto24, 1, 2))
    two = tl.where((draw < width13) | ((draw >= upto14) & (draw < upto23)), 2, 3)
    alone = a4 > three
    draw = u * three
    one = tl.where(alone, tl.where(draw < a1, 0, tl.where(draw < a1 + a2, 1, 2)), one)
    two = tl.where(alone, 3, two)
    value_one, value_two = tl.where(alone, three, total * 0.5), tl.where(alone, a4, total * 0.5)
    r0, r1, r2, r3 = _ranks(a)
    return (
        tl.where(a[0] > 0, tl.where(r0 == two, value_two, tl.where(r0 == one, value_one, 0.0)), 0.0),
        tl.where(a[1] > 0, tl.where(r1 == two, value_two, tl.where(r1 == one, value_one, 0.0)), 0.0),
        tl.where(a[2] > 0, tl.where(r2 == two, value_two, tl.where(r2 == one, value_one, 0.0)), 0.0),
        tl.where(a[3] > 0, tl.where(r3 == two, value_two, tl.where(r3 == one, value_one, 0.0)), 0.0),
    )


@triton.jit
def _ranks(a):
    """Place of each of four in ascending order; of equals, the first comes first."""
    a0, a1, a2, a3 = a
    above01, above02, above03 = (a0 > a1).to(tl.int32), (a0 > a2).to(tl.int32), (a0 > a3).to(tl.int32)
    above12, above13, above23 = (a1 > a2).to(tl.int32), (a1 > a3).to(tl.int32), (a2 > a3).to(tl.int32)
    return (
        above01 + above02 + above03,
        1 - above01 + above12 + above13,
        2 - above02 - above12 + above23,
        3 - above03 - above13 - above23,
    )


@triton.jit
def _approx(a, u, v):
    """See ``naive._approx``."""
    a0, a1, a2, a3 = a
    first = _drawn(a, u)
    rest = (
        tl.where(first == 0, 0.0, a0),
        tl.where(first == 1, 0.0, a1),
        tl.where(first == 2, 0.0, a2),
        tl.where(first == 3, 0.0, a3),
    )
    second = _drawn(rest, v)
    o0 = tl.where(a0 > 0, tl.div_rn(a0, (a1 + a2) + a3), 0.0)
    o1 = tl.where(a1 > 0, tl.div_rn(a1, (a0 + a2) + a3), 0.0)
    o2 = tl.where(a2 > 0, tl.div_rn(a2, (a0 + a1) + a3), 0.0)
    o3 = tl.where(a3 > 0, tl.div_rn(a3, (a0 + a1) + a2), 0.0)
    total = _sum(a)
    return (
        tl.where(((first == 0) | (second == 0)) & (a0 > 0), tl.div_rn(total, 1 + ((o1 + o2) + o3)), 0.0),
        tl.where(((first == 1) | (second == 1)) & (a1 > 0), tl.div_rn(total, 1 + ((o0 + o2) + o3)), 0.0),
        tl.where(((first == 2) | (second == 2)) & (a2 > 0), tl.div_rn(total, 1 + ((o0 + o1) + o3)), 0.0),
        tl.where(((first == 3) | (second == 3)) & (a3 > 0), tl.div_rn(total, 1 + ((o0 + o1) + o2)), 0.0),
    )


@triton.jit
def _drawn(a, u):
    """Which of four, in proportion to ``a``."""
    draw = u * _sum(a)
    place = (draw >= a[0]).to(tl.int32) + (draw >= a[0] + a[1]).to(tl.int32)
    return place + (draw >= (a[0] + a[1]) + a[2]).to(tl.int32)
