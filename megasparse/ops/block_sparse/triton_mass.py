"""The share of attention that listed key blocks get, in Triton: the target of the attention gate.

The first half of the attention's forward kernel, with its rows and tiles (triton.py): logits, and with the log-sum-exp
that is known already, weights. They are added up over the keys of a block; what is written is the largest of a tile's
rows, so that no head of a group has numbers of its own in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megasparse.ops.block_sparse.blocks import BlockMask
from megasparse.ops.block_sparse.triton import LOG2E, _dot, _logits, check, launch_of


@triton.jit
def _mass(
    q, k, documents, count, index, lse, mass,
    scale, queries, keys, kv_heads, q_blocks, longest,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (rows of a query block, kv_head, batch): for each entry of the list the largest share of BLOCK_M rows,
    into mass [batch, kv_heads, q_blocks, TILES, longest]. lse is +inf where a row sees no key: its shares are zero."""
    TILES: tl.constexpr = (QUERY_BLOCK * GROUP + BLOCK_M - 1) // BLOCK_M
    STEPS: tl.constexpr = (KEY_BLOCK + BLOCK_N - 1) // BLOCK_N
    tile, block = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    head, batch = tl.program_id(1), tl.program_id(2)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = block * QUERY_BLOCK + row // GROUP
    valid = (row < QUERY_BLOCK * GROUP) & (query < queries)
    position = keys - queries + query
    at = (batch * queries + query).to(tl.int64) * (kv_heads * GROUP) + head * GROUP + row % GROUP
    dim, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside = valid[:, None] & (dim < HEAD_DIM)[None, :]
    rows = tl.load(q + at[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
    norm = tl.load(lse + at, mask=valid, other=float("inf")) * LOG2E
    own = None
    if documents is not None:
        documents += batch * keys
        own = tl.load(documents + position, mask=valid, other=0)[:, None]

    first = (batch.to(tl.int64) * keys * kv_heads + head) * HEAD_DIM
    step = n[:, None] * (kv_heads * HEAD_DIM) + dim[None, :]
    place = (batch * kv_heads + head).to(tl.int64) * q_blocks + block
    index += place * longest
    mass += (place * TILES + tile) * longest
    share = tl.zeros([BLOCK_M], tl.float32)
    for i in range(tl.load(count + place) * STEPS):
        listed = tl.load(index + i // STEPS)
        start = listed * KEY_BLOCK + i % STEPS * BLOCK_N
        end = tl.minimum(keys, (listed + 1) * KEY_BLOCK)
        offset = first + start.to(tl.int64) * kv_heads * HEAD_DIM
        real = (start + n < end)[:, None] & (dim < HEAD_DIM)[None, :]
        columns = tl.load(k + offset + step, mask=real, other=0.0)
        document = None
        if documents is not None:
            document = tl.load(documents + start + n, mask=start + n < end, other=0)[None, :]
        s = _dot(rows, tl.trans(columns), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        s = _logits(s, scale, None, position[:, None], (start + n)[None, :], end, own, document, CAUSAL)
        share = tl.where(i % STEPS == 0, 0.0, share) + tl.sum(tl.exp2(s - norm[:, None]), 1)
        tl.store(mass + i // STEPS, tl.max(share))  # of the keys up to this step; the last one stays


KERNELS: dict[str, Any] = {"mass": _mass}


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, mask: BlockMask, causal: bool, scale: float, document_ids: Tensor | None
) -> Tensor:
    """See ``block_sparse.block_mass``; float32. Raises ValueError as triton.block_sparse_attention."""
    check(q)
    group, head_dim = q.shape[2] // k.shape[2], q.shape[3]
    launch = launch_of("mass", q.dtype, head_dim, group, mask.query_block_size, mask.block_size, causal)
    tiles = triton.cdiv(mask.query_block_size * group, launch.constants["BLOCK_M"])
    batch, kv_heads, q_blocks = mask.count.shape
    longest = mask.index.shape[3]
    mass = torch.zeros(batch, kv_heads, q_blocks, tiles, longest, dtype=torch.float32, device=q.device)
    documents = None if document_ids is None else document_ids.to(torch.int32).contiguous()
    rows = lse.float().masked_fill(lse == -torch.inf, torch.inf).contiguous()
    lists = mask.count.contiguous(), mask.index.contiguous()
    sizes = (q.shape[1], k.shape[1], kv_heads, q_blocks, longest)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    KERNELS["mass"][(q_blocks * tiles, kv_heads, batch)](
        q.contiguous(), k.contiguous(), documents, *lists, rows, mass, scale, *sizes, **launch.constants, **options
    )
    return mass.amax(3)
