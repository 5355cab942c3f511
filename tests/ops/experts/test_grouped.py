"""torch's grouped matmul, which CUDA uses, run on the CPU against naive. It has no float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.experts.test_experts import COUNTS, check_equals_naive


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_naive(dtype: torch.dtype, counts: list[int]) -> None:
    check_equals_naive("grouped", dtype, counts)
