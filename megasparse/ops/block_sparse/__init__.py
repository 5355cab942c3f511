"""Attention over lists of key blocks.

blocks.py   BlockMask, the one format of the lists
naive.py    the definition, with a dense mask
cpu.py      tiles by list, memory linear in the sequence
triton.py   the same on CUDA; triton_mass.py for block_mass
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from megasparse.ops.block_sparse import cpu, naive
from megasparse.ops.block_sparse.blocks import BlockMask

__all__ = ["BlockMask", "block_mass", "block_sparse_attention"]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    causal: bool = True,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    block_bias: Tensor | None = None,
    backend: Literal["auto", "naive", "cpu", "triton"] = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T + block_bias) v over the keys of each query's listed blocks.

    q: [batch, seq, heads, head_dim]; k, v: [batch, keys, kv_heads, head_dim], where query head h reads K/V head
    h // (heads / kv_heads). With fewer queries than keys they are the last ones (a KV cache). causal: no key after
    the query. document_ids: [batch, keys] int, a query sees its own document. block_bias: [batch, kv_heads, q_blocks,
    k_blocks], a logit added to all of a tile. scale: None for 1 / sqrt(head_dim).

    Returns [batch, seq, heads, head_dim]; with return_lse also log(sum(exp(logits))) [batch, seq, heads], float32 or
    float64. A query that sees no key gets zeros, -inf, and no gradient. Differentiable in q, k, v, block_bias, through
    both outputs. Raises ValueError for shapes that do not fit and a scale that is not above 0; on CPU also for a list
    that names a block twice, or one that is not there.

    backend: "cpu", "triton" (CUDA, or CPU tensors in Triton's interpreter), "naive", or "auto": by the device of q.
    """
    mask = _check(q, k, v, mask, document_ids, block_bias)
    scale = _scale(q, scale)
    if backend == "auto":
        backend = "cpu" if q.device.type == "cpu" else "triton"
    match backend:
        case "naive":
            attend = naive.block_sparse_attention
        case "cpu":
            attend = cpu.block_sparse_attention
        case "triton":
            from megasparse.ops.block_sparse import triton

            attend = triton.block_sparse_attention
        case _:
            raise ValueError(f"backend={backend!r}: use 'auto', 'naive', 'cpu' or 'triton'")
    output, lse = attend(q, k, v, mask, causal, scale, document_ids, block_bias)
    return (output, lse) if return_lse else output


@torch.no_grad()
def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: BlockMask,
    *,
    causal: bool = True,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    backend: Literal["auto", "naive", "cpu", "triton"] = "auto",
) -> Tensor:
    """The share of a query's attention that each listed block gets, sum over its keys of exp(logit - lse): the largest
    of a query block's queries and of the group's heads (what SeerAttention's gate learns, arXiv 2410.13276).

    q, k, mask, causal, scale, document_ids: as in block_sparse_attention, whose ``lse`` [batch, seq, heads] this takes;
    the lists may be others, so that a second pass over few blocks measures them by all. Returns [batch, kv_heads,
    q_blocks, max_blocks], float32 or float64, in the places of mask.index, zero after a list's end. Not differentiable.
    backend: as in block_sparse_attention.
    """
    mask = _check(q, k, k, mask, document_ids, None)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse {list(lse.shape)} must be [batch, seq, heads] = {list(q.shape[:3])}")
    scale = _scale(q, scale)
    if backend == "auto":
        backend = "cpu" if q.device.type == "cpu" else "triton"
    match backend:
        case "naive":
            measure = naive.block_mass
        case "cpu":
            measure = cpu.block_mass
        case "triton":
            from megasparse.ops.block_sparse import triton_mass

            measure = triton_mass.block_mass
        case _:
            raise ValueError(f"backend={backend!r}: use 'auto', 'naive', 'cpu' or 'triton'")
    return measure(q, k, lse, mask, causal, scale, document_ids)


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale}: must be > 0")
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, document_ids: Tensor | None, block_bias: Tensor | None
) -> BlockMask:
    """The mask, with the key blocks that k has."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {list(q.shape)} must be [batch, seq, heads, head_dim], k {list(k.shape)} and v {list(v.shape)} "
            "[batch, keys, kv_heads, head_dim]"
        )
    batch, queries, heads, _ = q.shape
    _, keys, kv_heads, _ = k.shape
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads, not a multiple of the {kv_heads} of k and v")
    if queries > keys:
        raise ValueError(f"q has {queries} positions, more than the {keys} of k and v")
    blocks = (batch, kv_heads, math.ceil(queries / mask.query_block_size), math.ceil(keys / mask.block_size))
    if mask.num_key_blocks == math.ceil(blocks[2] * mask.query_block_size / mask.block_size):
        # Made from lists alone: as many key blocks as whole query blocks would fill, where the last one is ragged.
        mask = dataclasses.replace(mask, num_key_blocks=blocks[3])
    if (*mask.count.shape, mask.num_key_blocks) != blocks:
        raise ValueError(
            f"mask of {[*mask.count.shape, mask.num_key_blocks]} [batch, kv_heads, q_blocks, k_blocks] does not fit q "
            f"{list(q.shape)} and k {list(k.shape)} in blocks of {mask.query_block_size} and {mask.block_size}: "
            f"it must be {list(blocks)}"
        )
    if document_ids is not None and (document_ids.shape != (batch, keys) or document_ids.is_floating_point()):
        raise ValueError(
            f"document_ids is {document_ids.dtype} {list(document_ids.shape)}: must be integers [batch, keys] = "
            f"{[batch, keys]}"
        )
    if block_bias is not None and block_bias.shape != blocks:
        raise ValueError(f"block_bias {list(block_bias.shape)} must be {list(blocks)}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ):
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: they must be of one float type")
    return mask
