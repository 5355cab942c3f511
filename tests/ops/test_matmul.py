"""Matmuls of the CPU paths: sizes, and that oneDNN computes the same."""

from __future__ import annotations

import pytest
import torch

from megasparse.ops.matmul import matmul, round_up
from tests.helpers import assert_close


def test_round_up() -> None:
    sizes = [round_up(count) for count in range(1, 5000)]
    assert all(count <= size < count + max(8, count / 16) for count, size in enumerate(sizes, 1))
    assert all(round_up(size) == size for size in sizes)
    assert len(set(sizes)) < 120  # kernels to compile


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul(dtype: torch.dtype, transposed: bool) -> None:
    a, b = torch.randn(24, 17).to(dtype), torch.randn(17, 5).to(dtype)
    a = a.t().contiguous().t() if transposed else a
    exact = a.double() @ b.double()
    assert_close(matmul(a, b).double(), exact, 2.0**-7 if dtype == torch.bfloat16 else 1e-6)
