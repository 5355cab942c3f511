"""2:4 sparsity in Triton. See naive.py, whose functions these are, for shapes.

A lane has a group of four, or a block of 4x4, and nothing branches. How groups lie in memory is in triton_groups.py;
a group's mask along the last dimension is one word of four bytes. The kernel of gradients' estimates is in
triton_mvue.py, all others and the functions that launch them are here.

Arithmetic is naive.py's in float32, step by step: no product is added to, but by exact doubling, and divisions are
IEEE's, so that no compiler rounds it otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Container
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megasparse.ops.two_four.naive import PAIRS
from megasparse.ops.two_four.triton_groups import (
    INFINITY,
    INTERPRETED,
    _join,
    _join4,
    _load,
    _places,
    _split,
    _split4,
    _store,
    _tile,
)
from megasparse.ops.two_four.triton_mvue import _mvue

WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
BITS = {  # of a value that is moved and not computed with: an integer of its size
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
}


# Masks ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _weight(x):
    """|x|, and infinity for NaN: it is kept, so that it is seen."""
    return tl.where(x == x, tl.abs(x), INFINITY)


@triton.jit
def _two_largest(a):
    """Which two of four: those that are above two of the other three, or equal and before them."""
    a0, a1, a2, a3 = a
    return (
        _two_of(a0 >= a1, a0 >= a2, a0 >= a3),
        _two_of(a1 > a0, a1 >= a2, a1 >= a3),
        _two_of(a2 > a0, a2 > a1, a2 >= a3),
        _two_of(a3 > a0, a3 > a1, a3 > a2),
    )


@triton.jit
def _two_of(x, y, z):
    return (x & y) | (z & (x | y))


@triton.jit
def _word(bits):
    """Four bits as four bytes."""
    return bits * 0x204081 & 0x01010101


@triton.jit
def _prune(score, mask, rows: tl.int64, width: tl.int64, LAST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """mask: words of four bytes for LAST, else bytes."""
    row, first = _tile(width, ROWS, WIDTH)
    x0, x1, x2, x3 = _load(score, row, first, rows, width, LAST, WIDTH)
    kept = _two_largest((_weight(x0), _weight(x1), _weight(x2), _weight(x3)))
    if LAST:
        at, real = _places(row, first, rows, width, 1, WIDTH)
        bits = kept[0].to(tl.int32) | kept[1].to(tl.int32) << 1 | kept[2].to(tl.int32) << 2 | kept[3].to(tl.int32) << 3
        tl.store(mask + at, _word(bits), mask=real)
    else:
        _store(mask, kept, row, first, rows, width, LAST, WIDTH)


# Transposable masks ---------------------------------------------------------------------------------------------------


def _search() -> list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """The pairs of the upper and of the lower two rows, by what the upper rows leave to the lower ones, in the order of
    ``naive.transposable_patterns``: the best of the 90 patterns is the best of 19 best upper plus best lower halves."""
    halves: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for a, b in itertools.product(range(6), repeat=2):
        halves.setdefault(tuple((*PAIRS[a], *PAIRS[b]).count(i) for i in range(4)), []).append((a, b))
    return [(uppers, halves[tuple(2 - x for x in sums)]) for sums, uppers in halves.items()]


SEARCH = _search()
CLASSES = tl.constexpr(len(SEARCH))


@triton.constexpr_function
def _alternatives(k, half):
    return len(SEARCH[k][half])


@triton.constexpr_function
def _pair(k, half, i, row):
    return SEARCH[k][half][i][row]


@triton.constexpr_function
def _code(k, half, i):
    """The bits of two rows."""
    a, b = (sum(1 << place for place in PAIRS[pair]) for pair in SEARCH[k][half][i])
    return a | b << 4


@triton.jit
def _best_half(x, y, k: tl.constexpr, HALF: tl.constexpr):
    """The best of the alternatives for two rows, given the sums of each row's pairs; and both rows' bits."""
    best = x[_pair(k, HALF, 0, 0)] + y[_pair(k, HALF, 0, 1)]
    code = tl.full(best.shape, _code(k, HALF, 0), tl.int32)
    for i in tl.static_range(1, _alternatives(k, HALF)):
        total = x[_pair(k, HALF, i, 0)] + y[_pair(k, HALF, i, 1)]
        better = total > best
        code = tl.where(better, _code(k, HALF, i), code)
        best = tl.where(better, total, best)
    return best, code


@triton.jit
def _pair_sums(x):
    return x[0] + x[1], x[0] + x[2], x[0] + x[3], x[1] + x[2], x[1] + x[3], x[2] + x[3]


@triton.jit
def _best_pattern(w):
    """Of four rows of four, the 16 bits of the best of 90 patterns: see ``_search``."""
    s0, s1, s2, s3 = _pair_sums(w[0]), _pair_sums(w[1]), _pair_sums(w[2]), _pair_sums(w[3])
    best, chosen = _best_of_class(s0, s1, s2, s3, 0)
    for k in tl.static_range(1, CLASSES):
        total, code = _best_of_class(s0, s1, s2, s3, k)
        better = total > best
        chosen = tl.where(better, code, chosen)
        best = tl.where(better, total, best)
    return chosen


@triton.jit
def _best_of_class(s0, s1, s2, s3, k: tl.constexpr):
    upper, upper_code = _best_half(s0, s1, k, 0)
    lower, lower_code = _best_half(s2, s3, k, 1)
    return upper + lower, upper_code | lower_code << 8


@triton.jit
def _greedy_pattern(w):
    """The largest first that is ``free``: its row and its column have room."""
    chosen = tl.zeros(w[0][0].shape, tl.int32)
    free = chosen + 0xFFFF
    for _ in tl.static_range(8):
        best, place = tl.full(chosen.shape, -1.0, tl.float32), chosen * 0
        for i in tl.static_range(16):
            larger = (w[i // 4][i % 4] > best) & ((free >> i & 1) != 0)
            best = tl.where(larger, w[i // 4][i % 4], best)
            place = tl.where(larger, i, place)
        row, column = 0xF << (place & 12), 0x1111 << (place & 3)
        full = tl.where((chosen & row) != 0, row, 0) | tl.where((chosen & column) != 0, column, 0)
        here = tl.where(best >= 0, 1 << place, 0)
        chosen |= here
        free &= ~(full | here)
    return chosen


@triton.jit
def _weights(w, row, first, rows, width, WIDTH: tl.constexpr):
    x0, x1, x2, x3 = _load(w, row, first, rows, width, True, WIDTH)
    return _weight(x0), _weight(x1), _weight(x2), _weight(x3)


@triton.jit
def _transposable(
    w, mask, strips: tl.int64, width: tl.int64, EXACT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """A lane has a block, of four rows. mask: words of four bytes."""
    strip, first = _tile(width, ROWS, WIDTH)
    row, rows = 4 * strip, 4 * strips
    block = (
        _weights(w, row, first, rows, width, WIDTH),
        _weights(w, row + 1, first, rows, width, WIDTH),
        _weights(w, row + 2, first, rows, width, WIDTH),
        _weights(w, row + 3, first, rows, width, WIDTH),
    )
    chosen = _best_pattern(block) if EXACT else _greedy_pattern(block)
    for i in tl.static_range(4):
        at, real = _places(row + i, first, rows, width, 1, WIDTH)
        tl.store(mask + at, _word(chosen >> 4 * i & 15), mask=real)


# Values ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _soft_threshold(w, y, rows: tl.int64, width: tl.int64, LAST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, first = _tile(width, ROWS, WIDTH)
    x0, x1, x2, x3 = _load(w, row, first, rows, width, LAST, WIDTH)
    # Magnitudes have the order of their bits, in which NaN comes last.
    b0, b1, b2, b3 = _magnitude_bits(x0), _magnitude_bits(x1), _magnitude_bits(x2), _magnitude_bits(x3)
    low = tl.maximum(tl.minimum(b0, b1), tl.minimum(b2, b3))
    second = tl.minimum(low, tl.minimum(tl.maximum(b0, b1), tl.maximum(b2, b3))).to(tl.float32, bitcast=True)
    values = _over(x0, second), _over(x1, second), _over(x2, second), _over(x3, second)
    _store(y, values, row, first, rows, width, LAST, WIDTH)


@triton.jit
def _magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _over(x, threshold):
    over = tl.abs(x) - threshold
    over = tl.where(over <= 0, 0.0, over)  # NaN stays
    return tl.where(x < 0, over * -1.0, over)  # in Triton -0 is 0 - 0 = 0


# Packed rows ----------------------------------------------------------------------------------------------------------


@triton.jit
def _pack(
    w, values, metadata, rows: tl.int64, width: tl.int64, row_bytes: tl.int64, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Values are integers of their size: all of their bits but the sign say whether they are zero."""
    row, first = _tile(width, ROWS, WIDTH)
    at, real = _places(row, first, rows, width, 4, WIDTH)
    x0, x1, x2, x3 = _split4(tl.load(w + at, mask=real, other=0))
    k0, k1, k2, k3 = _two_largest((_is_value(x0), _is_value(x1), _is_value(x2), _is_value(x3)))
    one, two = tl.where(k0, x0, tl.where(k1, x1, x2)), tl.where(k3, x3, tl.where(k2, x2, x1))
    at, real = _places(row, first, rows, width, 2, WIDTH)
    tl.store(values + at, _join(one, two), mask=real)
    # Two groups a byte: the second one of the last byte may not be.
    _, real = _places(row, first, rows, width, 1, WIDTH)
    code = tl.where(k0, 0, tl.where(k1, 1, 2)) | tl.where(k3, 3, tl.where(k2, 2, 1)) << 2
    low, high = _split(tl.where(real, code, 0))
    at, real = _places(row, first // 2, rows, row_bytes, 1, WIDTH // 2)
    tl.store(metadata + at, (low | high << 4).to(tl.uint8), mask=real)


@triton.jit
def _is_value(x):
    return (x << 1 != 0).to(tl.int32)


@triton.jit
def _unpack(
    values, metadata, w, rows: tl.int64, width: tl.int64, row_bytes: tl.int64, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row, first = _tile(width, ROWS, WIDTH)
    at, real = _places(row, first, rows, width, 2, WIDTH)
    one, two = _split(tl.load(values + at, mask=real, other=0))
    at, real = _places(row, first // 2, rows, row_bytes, 1, WIDTH // 2)
    byte = tl.load(metadata + at, mask=real, other=0).to(tl.int32)
    code = _join(byte & 15, byte >> 4)
    place1, place2 = code & 3, code >> 2
    groups = (
        tl.where(place2 == 0, two, tl.where(place1 == 0, one, 0)),
        tl.where(place2 == 1, two, tl.where(place1 == 1, one, 0)),
        tl.where(place2 == 2, two, tl.where(place1 == 2, one, 0)),
        tl.where(place2 == 3, two, tl.where(place1 == 3, one, 0)),
    )
    at, real = _places(row, first, rows, width, 4, WIDTH)
    tl.store(w + at, _join4(groups), mask=real)


# Launchers ------------------------------------------------------------------------------------------------------------

KERNELS: dict[str, Any] = {
    "prune": _prune,
    "soft_threshold": _soft_threshold,
    "mvue": _mvue,
    "transposable": _transposable,
    "pack": _pack,
    "unpack": _unpack,
}


def tile_of(element_size: int, last: bool, width: int) -> dict[str, int]:
    """How many groups a program has: as many in a thread as fill 16 bytes of a load, not tuned by time."""
    groups = 32 * WARPS * 16 // element_size // (4 if last else 1)
    across = max(2, min(triton.next_power_of_2(width), groups))
    return {"ROWS": groups // across, "WIDTH": across}


def prune_mask(score: Tensor) -> Tensor:
    _check(score)
    mask = torch.empty_like(score, dtype=torch.bool)
    last, rows, width = _flat(score)
    _run("prune", last, rows, width, (score, mask.view(-1).view(torch.int32 if last else torch.int8)), LAST=last)
    return mask


def transposable_mask(w: Tensor, method: str) -> Tensor:
    _check(w)
    w = w.contiguous()
    mask = torch.empty_like(w, dtype=torch.bool)
    matrices, rows, columns = w.shape
    words = mask.view(-1).view(torch.int32)
    _run("transposable", True, matrices * rows // 4, columns // 4, (w, words), EXACT=method == "exact")
    return mask


def soft_threshold(w: Tensor) -> Tensor:
    _check(w)
    y = torch.empty_like(w)
    last, rows, width = _flat(w)
    _run("soft_threshold", last, rows, width, (w, y), LAST=last)
    return y


def mvue(g: Tensor, method: str, seed: int, start: tuple[int, int]) -> Tensor:
    _check(g)
    y = torch.empty_like(g)
    outer, n, inner = g.shape
    last, groups = inner == 1, n // 4
    rows, width = (outer, groups) if last else (outer * groups, inner)
    signed = seed - 2**64 if seed >= 2**63 else seed
    _run("mvue", last, rows, width, (g, y), groups, signed, *start, EXACT=method == "exact", LAST=last)
    return y


def pack(w: Tensor) -> tuple[Tensor, Tensor]:
    _check(w, BITS)
    rows, columns = w.shape
    values = torch.empty(rows, columns // 2, dtype=w.dtype, device=w.device)
    metadata = torch.empty(rows, triton.cdiv(columns, 8), dtype=torch.uint8, device=w.device)
    bits = BITS[w.dtype]
    _run("pack", True, rows, columns // 4, (w.contiguous().view(bits), values.view(bits), metadata), metadata.shape[1])
    return values, metadata


def unpack(values: Tensor, metadata: Tensor) -> Tensor:
    _check(values, BITS)
    rows, columns = values.shape[0], 2 * values.shape[1]
    w = torch.empty(rows, columns, dtype=values.dtype, device=values.device)
    bits = BITS[w.dtype]
    _run(
        "unpack",
        True,
        rows,
        columns // 4,
        (values.contiguous().view(bits), metadata.contiguous(), w.view(bits)),
        metadata.shape[1],
    )
    return w


def _flat(x: Tensor) -> tuple[bool, int, int]:
    """Whether groups lie along the last dimension; rows of groups and their width, where it does not matter which
    groups are in a row."""
    last = x.shape[2] == 1
    return (last, 1, x.numel() // 4) if last else (last, x.shape[0] * x.shape[1] // 4, x.shape[2])


def _run(
    kernel: str, last: bool, rows: int, width: int, tensors: tuple[Tensor, ...], *sizes: int, **constants: bool
) -> None:
    """A lane for each of ``width`` groups in each of ``rows`` rows."""
    tile = tile_of(tensors[0].element_size(), last, width)
    programs = triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(width, tile["WIDTH"])
    if programs:
        KERNELS[kernel][(programs,)](*tensors, rows, width, *sizes, **constants, **tile, **OPTIONS)


def _check(x: Tensor, dtypes: Container[torch.dtype] = FLOATS) -> None:
    if x.dtype not in dtypes:
        raise ValueError(f"{x.dtype} is not a type that the triton backend takes: use backend='naive'")
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "a tensor is on the CPU: use backend='cpu', or set TRITON_INTERPRET=1 before triton is imported, to run "
            "the kernels in its interpreter"
        )
