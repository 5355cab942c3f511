"""Block-sparse attention on CPU, in C++ (cpu.cpp): FlashAttention-2's loops over lists of blocks.

Memory is linear in the sequence. Arithmetic is float32 at least. Results are the same to the bit for any number of
threads.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.ops import extension
from megasparse.ops.block_sparse.blocks import BlockMask


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
    """See ``block_sparse.block_sparse_attention``; and the log-sum-exp [batch, seq, heads]."""
    return _Attend.apply(q, k, v, block_bias, mask, causal, scale, document_ids)  # type: ignore[no-any-return]


@torch.no_grad()
def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, mask: BlockMask, causal: bool, scale: float, document_ids: Tensor | None
) -> Tensor:
    """See ``block_sparse.block_mass``."""
    rows = lse.masked_fill(lse == -torch.inf, torch.inf).to(_arithmetic(q)).contiguous()
    return _operators().block_mass(
        q.contiguous(), k.contiguous(), rows, *_lists(mask), *_settings(mask, causal, scale, document_ids)
    )


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
        bias = None if block_bias is None else block_bias.to(_arithmetic(q)).contiguous()
        ctx.mask, ctx.settings = mask, _settings(mask, causal, scale, document_ids)
        ctx.bias_dtype = None if block_bias is None else block_bias.dtype
        output, lse = _operators().attend(q, k, v, bias, *_lists(mask), *ctx.settings)
        ctx.save_for_backward(q, k, v, bias, output, lse)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, doutput: Tensor, dlse: Tensor):
        q, k, v, bias, output, lse = ctx.saved_tensors
        gradients = doutput.contiguous(), dlse.contiguous()
        dq, dk, dv, dbias = _operators().attend_backward(
            q, k, v, bias, output, lse, *gradients, *_lists(ctx.mask.transpose()), *ctx.settings
        )
        return dq.to(q.dtype), dk, dv, None if bias is None else dbias.to(ctx.bias_dtype), None, None, None, None


@functools.cache
def _operators() -> Any:
    extension.load(Path(__file__).with_name("cpu.cpp"))
    return torch.ops.megasparse_block_sparse


def _arithmetic(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _lists(mask: BlockMask) -> tuple[Tensor, Tensor]:
    return mask.count.contiguous(), mask.index.contiguous()


def _settings(
    mask: BlockMask, causal: bool, scale: float, document_ids: Tensor | None
) -> tuple[int, int, bool, float, Tensor | None]:
    documents = None if document_ids is None else document_ids.long().contiguous()
    return mask.query_block_size, mask.block_size, causal, scale, documents
