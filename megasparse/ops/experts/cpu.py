"""Grouped SwiGLU on CPU: one expert after the other, its activations hot in cache, hand-written backward.

Three things make it fast.

- Matmuls go to oneDNN (ops/matmul.py).
- oneDNN compiles a kernel for every new shape (about 0.5 ms, as long as the matmul itself), and the rows of an expert
  differ at every step. So rows are rounded up to one of 16 sizes an octave: an expert's window reaches over the next
  expert's rows, whose results are overwritten, or are set to zero where rows are summed over (weight gradients).
- Only gate and up are kept for backward: silu and its product, recomputed in cache, cost no more than reading them.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.ops.matmul import ONEDNN, matmul, round_up


def grouped_swiglu(x: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """See ``experts.grouped_swiglu``."""
    return _GroupedSwiGLU.apply(x, counts, w1, w2, w3)  # type: ignore[no-any-return]


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        windows = _windows(counts, x.dtype)
        assert sum(count for _, _, count, _ in windows) == len(x), "counts must sum to the rows of x"
        saved = []
        y = _empty_rows(len(x), w2.shape[1], windows, x)
        gates, ups, downs = w1.unbind(), w3.unbind(), w2.unbind()
        for expert, start, _, size in windows:
            rows = _rows(x, start, size)
            gate, up = matmul(rows, gates[expert].t()), matmul(rows, ups[expert].t())
            saved += [gate, up]
            _mm_into(y[start : start + size], F.silu(gate).mul_(up), downs[expert].t())
        ctx.windows = windows
        ctx.save_for_backward(x, w1, w2, w3, *saved)
        return y[: len(x)]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, w1, w2, w3, *saved = ctx.saved_tensors
        dy = dy.contiguous()
        dx = _empty_rows(len(x), x.shape[1], ctx.windows, x)
        dw1, dw2, dw3 = (torch.empty_like(w) for w in (w1, w2, w3))
        _zero_idle(ctx.windows, dw1, dw2, dw3)
        for (expert, start, count, size), gate, up in zip(ctx.windows, saved[::2], saved[1::2], strict=True):
            rows, dy_rows = _rows(x, start, size), _rows(dy, start, size)
            dup, dgate, silu = matmul(dy_rows, w2[expert]), torch.empty_like(gate), F.silu(gate)
            torch.ops.aten.silu_backward.grad_input(dup * up, gate, grad_input=dgate)
            dup.mul_(silu)
            _mm_into(dx[start : start + size], dgate, w1[expert], dup, w3[expert])
            hidden = silu.mul_(up)
            for tensor in (hidden, dgate, dup):
                tensor[count:].zero_()
            _mm_into(dw2[expert], dy_rows.t(), hidden)
            _mm_into(dw1[expert], dgate.t(), rows)
            _mm_into(dw3[expert], dup.t(), rows)
        return dx[: len(x)], None, dw1, dw2, dw3


def _windows(counts: Tensor, dtype: torch.dtype) -> list[tuple[int, int, int, int]]:
    """(expert, first row, rows, rows rounded up) of every expert that has rows."""
    compiled = ONEDNN and dtype != torch.float64
    sizes = counts.tolist()
    starts = itertools.accumulate(sizes, initial=0)
    return [
        (expert, start, count, round_up(count) if compiled else count)
        for expert, (start, count) in enumerate(zip(starts, sizes, strict=False))
        if count
    ]


def _rows(tensor: Tensor, start: int, size: int) -> Tensor:
    """``size`` rows from ``start``; zeros where the tensor has ended."""
    if start + size <= len(tensor):
        return tensor[start : start + size]
    rows = tensor.new_zeros(size, tensor.shape[1])
    rows[: len(tensor) - start] = tensor[start:]
    return rows


def _empty_rows(rows: int, columns: int, windows: list[tuple[int, int, int, int]], like: Tensor) -> Tensor:
    """Room for ``rows`` and for what the last windows write beyond them."""
    return like.new_empty(max((start + size for _, start, _, size in windows), default=rows), columns)


def _zero_idle(windows: list[tuple[int, int, int, int]], *gradients: Tensor) -> None:
    """The gradients of experts without rows."""
    busy = {window[0] for window in windows}
    for expert in range(len(gradients[0])):
        if expert not in busy:
            for gradient in gradients:
                gradient[expert].zero_()


def _mm_into(out: Tensor, a: Tensor, b: Tensor, c: Tensor | None = None, d: Tensor | None = None) -> None:
    """out = a b, or a b + c d."""
    if ONEDNN and a.dtype == torch.float32:
        if c is None or d is None:
            out.copy_(matmul(a, b))
        else:
            torch.add(matmul(a, b), matmul(c, d), out=out)
        return
    torch.mm(a, b, out=out)
    if c is not None and d is not None:
        out.addmm_(c, d)
