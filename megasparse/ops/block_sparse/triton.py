"""Block-sparse attention in Triton: FlashAttention-2's three kernels over lists of blocks.

A row is a query and one of the ``group`` query heads of the K/V head, in this order, so one kernel serves both
granularities. With blocks of queries a program of _forward and _backward_q has up to 128 rows of a block, and wgmma
from 64 rows on; the programs of a block are neighbours in the grid and find its keys in cache. With a list for each
query the rows are the group, filled up to 16 for mma.sync (NSA, arXiv 2502.11089, section 3.4): a group below 8 wastes
most of it. _backward_kv walks over the inverse list of a key block, whose keys are the rows of wgmma, and packs the
rows of as many queries as fit, gathered by index, into a tile. Nothing is added atomically: results repeat to the bit.

float16 and bfloat16 are added up in float32; weights and their gradients are rounded to the inputs' type before they
are multiplied. float32 is multiplied exactly (IEEE, no tensor cores): it is there to check, not to be fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.ops.block_sparse.blocks import BlockMask

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1 / math.log(2))
LOWEST = tl.constexpr(-1e30)  # a running maximum before the first key: finite, so that exp(-inf - LOWEST) is zero
PART_ROWS = 2048  # of an inverse list, at least: less is not worth a program of its own


@triton.jit
def _dot(a, b, acc):
    """acc + a b in float32."""
    if INTERPRETED:  # whose dot multiplies the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _logits(products, scale, bias, position, key, end, own, document, CAUSAL: tl.constexpr):
    """products * scale + bias in units of log 2, -inf where a query (``position`` among the keys, document ``own``)
    does not see a key. Queries and keys lie along the dimensions of the products or of their transpose."""
    logits = products * (scale * LOG2E)
    if bias is not None:
        logits += bias * LOG2E
    seen = key < end
    if CAUSAL:
        seen = seen & (key <= position)
    if document is not None:
        seen = seen & (own == document)
    return tl.where(seen, logits, -float("inf"))


@triton.jit
def _forward(
    q, k, v, bias, documents, count, index, output, lse,
    scale, queries, keys, kv_heads, q_blocks, k_blocks, longest,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (rows of a query block, kv_head, batch): output and log-sum-exp of BLOCK_M rows."""
    TILES: tl.constexpr = (QUERY_BLOCK * GROUP + BLOCK_M - 1) // BLOCK_M
    STEPS: tl.constexpr = (KEY_BLOCK + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0) // TILES
    head, batch = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    query = block * QUERY_BLOCK + row // GROUP
    valid = (row < QUERY_BLOCK * GROUP) & (query < queries)
    position = keys - queries + query
    at = (batch * queries + query).to(tl.int64) * (kv_heads * GROUP) + head * GROUP + row % GROUP
    dim, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    places = at[:, None] * HEAD_DIM + dim[None, :]
    inside = valid[:, None] & (dim < HEAD_DIM)[None, :]
    rows = tl.load(q + places, mask=inside, other=0.0)
    own = None
    if documents is not None:
        documents += batch * keys
        own = tl.load(documents + position, mask=valid, other=0)[:, None]

    first = (batch.to(tl.int64) * keys * kv_heads + head) * HEAD_DIM
    step = n[:, None] * (kv_heads * HEAD_DIM) + dim[None, :]
    place = (batch * kv_heads + head).to(tl.int64) * q_blocks + block
    index += place * longest
    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(tl.load(count + place) * STEPS):
        listed = tl.load(index + i // STEPS)
        start = listed * KEY_BLOCK + i % STEPS * BLOCK_N
        end = tl.minimum(keys, (listed + 1) * KEY_BLOCK)
        offset = first + start.to(tl.int64) * kv_heads * HEAD_DIM
        real = (start + n < end)[:, None] & (dim < HEAD_DIM)[None, :]
        columns = tl.load(k + offset + step, mask=real, other=0.0)
        values = tl.load(v + offset + step, mask=real, other=0.0)
        added, document = None, None
        if bias is not None:
            added = tl.load(bias + place * k_blocks + listed)
        if documents is not None:
            document = tl.load(documents + start + n, mask=start + n < end, other=0)[None, :]
        s = _dot(rows, tl.trans(columns), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        s = _logits(s, scale, added, position[:, None], (start + n)[None, :], end, own, document, CAUSAL)
        new = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(highest - new)
        highest = new
        total = total * shrink + tl.sum(p, 1)
        acc = _dot(p.to(values.dtype), values, acc * shrink[:, None])
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    acc /= total[:, None]
    tl.store(output + places, acc.to(output.dtype.element_ty), mask=inside)
    tl.store(lse + at, tl.where(empty, -float("inf"), (highest + tl.log2(total)) / LOG2E), mask=valid)


@triton.jit
def _backward_q(
    q, k, v, bias, documents, count, index, doutput, lse, delta, dq, dbias,
    scale, queries, keys, kv_heads, q_blocks, k_blocks, longest,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program as in _forward: dq of BLOCK_M rows, and their share of dbias, [batch, kv_heads, q_blocks, TILES,
    k_blocks]. lse is +inf where a row sees no key: its weights are zero. delta: rowsum(doutput * output) - dlse."""
    TILES: tl.constexpr = (QUERY_BLOCK * GROUP + BLOCK_M - 1) // BLOCK_M
    STEPS: tl.constexpr = (KEY_BLOCK + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) % TILES
    block = tl.program_id(0) // TILES
    head, batch = tl.program_id(1), tl.program_id(2)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = block * QUERY_BLOCK + row // GROUP
    valid = (row < QUERY_BLOCK * GROUP) & (query < queries)
    position = keys - queries + query
    at = (batch * queries + query).to(tl.int64) * (kv_heads * GROUP) + head * GROUP + row % GROUP
    dim, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    places = at[:, None] * HEAD_DIM + dim[None, :]
    inside = valid[:, None] & (dim < HEAD_DIM)[None, :]
    rows = tl.load(q + places, mask=inside, other=0.0)
    drows = tl.load(doutput + places, mask=inside, other=0.0)
    norm = tl.load(lse + at, mask=valid, other=float("inf")) * LOG2E
    shift = tl.load(delta + at, mask=valid, other=0.0)
    own = None
    if documents is not None:
        documents += batch * keys
        own = tl.load(documents + position, mask=valid, other=0)[:, None]

    first = (batch.to(tl.int64) * keys * kv_heads + head) * HEAD_DIM
    step = n[:, None] * (kv_heads * HEAD_DIM) + dim[None, :]
    place = (batch * kv_heads + head).to(tl.int64) * q_blocks + block
    index += place * longest
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tile_sum = 0.0
    for i in range(tl.load(count + place) * STEPS):
        listed = tl.load(index + i // STEPS)
        start = listed * KEY_BLOCK + i % STEPS * BLOCK_N
        end = tl.minimum(keys, (listed + 1) * KEY_BLOCK)
        offset = first + start.to(tl.int64) * kv_heads * HEAD_DIM
        real = (start + n < end)[:, None] & (dim < HEAD_DIM)[None, :]
        columns = tl.load(k + offset + step, mask=real, other=0.0)
        values = tl.load(v + offset + step, mask=real, other=0.0)
        added, document = None, None
        if bias is not None:
            added = tl.load(bias + place * k_blocks + listed)
        if documents is not None:
            document = tl.load(documents + start + n, mask=start + n < end, other=0)[None, :]
        zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        s = _dot(rows, tl.trans(columns), zero)
        dp = _dot(drows, tl.trans(values), zero)
        s = _logits(s, scale, added, position[:, None], (start + n)[None, :], end, own, document, CAUSAL)
        ds = tl.exp2(s - norm[:, None]) * (dp - shift[:, None])
        acc = _dot(ds.to(columns.dtype), columns, acc)
        if bias is not None:  # the sum up to this step; the last one stays
            tile_sum = tl.where(i % STEPS == 0, 0.0, tile_sum) + tl.sum(ds)
            tl.store(dbias + (place * TILES + tile) * k_blocks + listed, tile_sum)
    tl.store(dq + places, (acc * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kv(
    q, k, v, bias, documents, count, index, doutput, lse, delta, lists, firsts, dk_parts, dv_parts, limit,
    scale, queries, keys, kv_heads, q_blocks, k_blocks, longest,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (part of an inverse list, BLOCK_N keys of its key block): what the part adds to their dk and dv, into
    dk_parts and dv_parts [parts, KEY_BLOCK, HEAD_DIM] float32. Part p is up to ``limit`` entries, from firsts[p] on,
    of the list lists[p] of count [batch, kv_heads, k_blocks]. The rows of the listed query blocks come in tiles of
    BLOCK_M. A tile's logits are [keys, rows]: so the weights are an operand of wgmma as they lie in registers.
    lse, delta: see _backward_q."""
    ROWS: tl.constexpr = QUERY_BLOCK * GROUP
    STEPS: tl.constexpr = (KEY_BLOCK + BLOCK_N - 1) // BLOCK_N
    part, step = tl.program_id(0) // STEPS, tl.program_id(0) % STEPS
    which, begin = tl.load(lists + part), tl.load(firsts + part)
    block, place = which % k_blocks, which // k_blocks
    head, batch = place % kv_heads, place // kv_heads
    dim, m, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M), step * BLOCK_N + tl.arange(0, BLOCK_N)
    key = block * KEY_BLOCK + n
    end = tl.minimum(keys, (block + 1) * KEY_BLOCK)
    places = ((batch * keys + key).to(tl.int64) * kv_heads + head)[:, None] * HEAD_DIM + dim[None, :]
    inside = (key < end)[:, None] & (dim < HEAD_DIM)[None, :]
    columns = tl.load(k + places, mask=inside, other=0.0)
    values = tl.load(v + places, mask=inside, other=0.0)
    document = None
    if documents is not None:
        documents += batch * keys
        document = tl.load(documents + key, mask=key < end, other=0)[:, None]

    start = batch.to(tl.int64) * queries * (kv_heads * GROUP) + head * GROUP  # the group's first row
    q += start * HEAD_DIM
    doutput += start * HEAD_DIM
    lse += start
    delta += start
    length = tl.minimum(tl.load(count + which) - begin, limit)
    index += which.to(tl.int64) * longest + begin
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range((length * ROWS + BLOCK_M - 1) // BLOCK_M):
        if ROWS % BLOCK_M == 0:  # the tile is of one query block
            row = i % (ROWS // BLOCK_M) * BLOCK_M + m
            listed = tl.load(index + i // (ROWS // BLOCK_M))
            query = listed * QUERY_BLOCK + row // GROUP
            valid = query < queries
        else:
            row = (i * BLOCK_M + m) % ROWS
            entry = (i * BLOCK_M + m) // ROWS
            listed = tl.load(index + entry, mask=entry < length, other=0)
            query = listed * QUERY_BLOCK + row // GROUP
            valid = (entry < length) & (query < queries)
        at = query * (kv_heads * GROUP) + row % GROUP
        pointers = at.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
        real = valid[:, None] & (dim < HEAD_DIM)[None, :]
        rows = tl.load(q + pointers, mask=real, other=0.0)
        drows = tl.load(doutput + pointers, mask=real, other=0.0)
        norm = tl.load(lse + at, mask=valid, other=float("inf")) * LOG2E
        shift = tl.load(delta + at, mask=valid, other=0.0)
        position = keys - queries + query
        added, own = None, None
        if bias is not None:
            added = tl.load(bias + (place.to(tl.int64) * q_blocks + listed) * k_blocks + block)
            if ROWS % BLOCK_M != 0:
                added = added[None, :]
        if documents is not None:
            own = tl.load(documents + position, mask=valid, other=0)[None, :]
        zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        s = _dot(columns, tl.trans(rows), zero)
        s = _logits(s, scale, added, position[None, :], key[:, None], end, own, document, CAUSAL)
        p = tl.exp2(s - norm[None, :])
        dv_acc = _dot(p.to(drows.dtype), drows, dv_acc)
        dp = _dot(values, tl.trans(drows), zero)
        ds = p * (dp - shift[None, :])
        dk_acc = _dot(ds.to(rows.dtype), rows, dk_acc)
    places = (part.to(tl.int64) * KEY_BLOCK + n)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(dk_parts + places, dk_acc * scale, mask=inside)
    tl.store(dv_parts + places, dv_acc, mask=inside)


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled: its constexprs and options."""

    constants: dict[str, int]
    num_warps: int
    num_stages: int


KERNELS: dict[str, Any] = {"forward": _forward, "backward_q": _backward_q, "backward_kv": _backward_kv}


def launch_of(
    kernel: str, dtype: torch.dtype, head_dim: int, group: int, query_block: int, key_block: int, causal: bool
) -> Launch:
    """The sizes for sm_90 that spill no register (tools/bench/kernel_report.md), not tuned by time."""
    dim = max(16, triton.next_power_of_2(head_dim))
    rows = max(16, triton.next_power_of_2(query_block * group))  # of a list
    columns = max(16, triton.next_power_of_2(key_block))
    exact = dtype == torch.float32
    match kernel:
        case "backward_kv" if exact:
            m, n, warps, stages = 32, min(columns, 32), 8, 2
        case "backward_kv":
            n = min(columns, 128)
            m = 64 if n == 128 and dim <= 64 else 32
            warps, stages = (8, 3) if dim > 64 else (8 if n == 128 else 4, 2)
        case _ if exact:
            m, n, warps, stages = min(rows, 64), min(columns, 32), 8, 2
        case _:
            m, n = min(rows, 128), min(columns, 64)
            warps, stages = 8 if m == 128 else 4, 3 if m >= 64 else 2
    constants = {
        "CAUSAL": causal,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "QUERY_BLOCK": query_block,
        "KEY_BLOCK": key_block,
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_D": dim,
    }
    return Launch(constants, warps, stages)


@dataclass(frozen=True)
class _Inputs:
    """What all three kernels read; contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    documents: Tensor | None
    mask: BlockMask
    causal: bool
    scale: float

    def launch(self, kernel: str) -> Launch:
        group, head_dim = self.q.shape[2] // self.k.shape[2], self.q.shape[3]
        blocks = (self.mask.query_block_size, self.mask.block_size)
        return launch_of(kernel, self.q.dtype, head_dim, group, *blocks, self.causal)

    def tiles(self, kernel: str) -> int:
        """Of a query block; of a key block for backward_kv."""
        sizes = self.launch(kernel).constants
        if kernel == "backward_kv":
            return triton.cdiv(sizes["KEY_BLOCK"], sizes["BLOCK_N"])
        return triton.cdiv(sizes["QUERY_BLOCK"] * sizes["GROUP"], sizes["BLOCK_M"])

    def run(self, kernel: str, grid: tuple[int, ...], lists: BlockMask, *own: Tensor | int | None) -> None:
        """lists: the mask, its transpose for backward_kv. own: the kernel's own arguments."""
        launch = self.launch(kernel)
        tensors = (
            self.q,
            self.k,
            self.v,
            self.bias,
            self.documents,
            lists.count.contiguous(),
            lists.index.contiguous(),
        )
        blocks = (self.mask.count.shape[2], self.mask.num_key_blocks, lists.index.shape[3])
        sizes = (self.scale, self.q.shape[1], self.k.shape[1], self.k.shape[2], *blocks)
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        KERNELS[kernel][grid](*tensors, *own, *sizes, **launch.constants, **options)

    def run_by_query(self, kernel: str, *own: Tensor | None) -> None:
        batch, kv_heads, q_blocks = self.mask.count.shape
        self.run(kernel, (q_blocks * self.tiles(kernel), kv_heads, batch), self.mask, *own)

    def run_by_key(self, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """dk, dv. Lists longer than twice the mean are cut, as all queries may list the first block: one program for it
        would take as long as all others together."""
        inverse = self.mask.transpose()
        count = inverse.count.flatten()
        least = PART_ROWS // (self.mask.query_block_size * (self.q.shape[2] // self.k.shape[2]))
        limit = max(1, least, triton.cdiv(2 * int(count.sum()), len(count)))
        parts = ((count + limit - 1) // limit).clamp(min=1)
        lists = torch.arange(len(count), device=count.device).repeat_interleave(parts)
        firsts = (torch.arange(len(lists), device=count.device) - (parts.cumsum(0) - parts)[lists]) * limit
        shape = (len(lists), self.mask.block_size, self.k.shape[3])
        dk, dv = (torch.empty(shape, dtype=torch.float32, device=count.device) for _ in range(2))
        grid = (len(lists) * self.tiles("backward_kv"), 1, 1)
        self.run("backward_kv", grid, inverse, *rows, lists.int(), firsts.int(), dk, dv, limit)
        return self._sum_parts(dk, parts), self._sum_parts(dv, parts)

    def _sum_parts(self, x: Tensor, parts: Tensor) -> Tensor:
        """[all parts, block_size, head_dim] -> [batch, keys, kv_heads, head_dim]"""
        batch, keys, kv_heads, head_dim = self.k.shape
        x = torch.segment_reduce(x, "sum", lengths=parts.long(), unsafe=True)
        x = x.view(batch, kv_heads, -1, head_dim)[:, :, :keys]
        return x.transpose(1, 2).to(self.k.dtype, memory_format=torch.contiguous_format)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_bias: Tensor | None,
        mask: BlockMask,
        causal: bool,
        scale: float,
        document_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        bias = None if block_bias is None else block_bias.float().contiguous()
        documents = None if document_ids is None else document_ids.to(torch.int32).contiguous()
        output, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        _Inputs(q, k, v, bias, documents, mask, causal, scale).run_by_query("forward", output, lse)
        ctx.save_for_backward(q, k, v, bias, documents, output, lse)
        ctx.rest = mask, causal, scale
        ctx.bias_dtype = None if block_bias is None else block_bias.dtype
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, doutput: Tensor, dlse: Tensor):
        q, k, v, bias, documents, output, lse = ctx.saved_tensors
        inputs = _Inputs(q, k, v, bias, documents, *ctx.rest)
        mask, empty = inputs.mask, lse == -torch.inf
        delta = ((doutput.float() * output.float()).sum(-1) - dlse).masked_fill(empty, 0.0)
        rows = doutput.contiguous(), lse.masked_fill(empty, torch.inf), delta
        dq, dbias = torch.empty_like(q), None
        if bias is not None:
            dbias = bias.new_zeros(*mask.count.shape, inputs.tiles("backward_q"), mask.num_key_blocks)
        inputs.run_by_query("backward_q", *rows, dq, dbias)
        dk, dv = inputs.run_by_key(*rows)
        return dq, dk, dv, None if dbias is None else dbias.sum(3).to(ctx.bias_dtype), None, None, None, None


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    causal: bool,
    scale: float,
    document_ids: Tensor | None,
    block_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See ``block_sparse.block_sparse_attention``; and the log-sum-exp [batch, seq, heads], float32.

    document_ids count as int32. Raises ValueError as ``check``.
    """
    check(q)
    return _Attend.apply(q, k, v, block_bias, mask, causal, scale, document_ids)  # type: ignore[no-any-return]


def check(q: Tensor) -> None:
    """Raises ValueError for float64, for a head_dim above 128, and on the CPU outside of Triton's interpreter."""
    if q.dtype == torch.float64:
        raise ValueError("q is torch.float64, which the triton backend does not take: use float32, or backend='naive'")
    if q.shape[-1] > 128:
        raise ValueError(f"q has head_dim {q.shape[-1]}: the triton backend takes up to 128, backend='naive' any")
    if q.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "q is on the CPU: use backend='cpu', or set TRITON_INTERPRET=1 before triton is imported, to run the "
            "kernels in its interpreter"
        )
