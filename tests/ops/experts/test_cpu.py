"""Rows are rounded up; neighbours do not show through it."""

from __future__ import annotations

import pytest
import torch

from megasparse.ops.experts import grouped_swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_do_not_see_each_other(dtype: torch.dtype) -> None:
    """An expert's results are to the bit those of a call with it alone, whoever its neighbours are."""
    torch.manual_seed(0)
    counts = [3, 0, 21, 100, 9]
    x, dy = torch.randn(sum(counts), 32).to(dtype), torch.randn(sum(counts), 32).to(dtype)
    w1, w2, w3 = torch.randn(5, 48, 32).to(dtype), torch.randn(5, 32, 48).to(dtype), torch.randn(5, 48, 32).to(dtype)

    def run(rows: slice, experts: slice) -> list[torch.Tensor]:
        args = [t.clone().requires_grad_() for t in (x[rows], w1[experts], w2[experts], w3[experts])]
        y = grouped_swiglu(args[0], torch.tensor(counts[experts]), *args[1:], backend="cpu")
        return [y, *torch.autograd.grad(y, args, dy[rows])]

    together = run(slice(None), slice(None))
    start = 0
    for expert, count in enumerate(counts):
        rows, experts = slice(start, start + count), slice(expert, expert + 1)
        alone = run(rows, experts)
        for index, (a, b) in enumerate(zip(alone, together, strict=True)):
            assert torch.equal(a, b[rows] if index < 2 else b[experts])
        start += count
