"""Estimates of gradients in Triton's interpreter: naive's bits, from the same random numbers."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.ops.two_four.cases import BF16, CASES, F16, F32, check, values


@pytest.mark.parametrize("method", ["exact", "approx"])
@pytest.mark.parametrize("kind", ["gaussian", "tied", "special"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_estimates(interpreter: ProcessPoolExecutor, dtype: torch.dtype, kind: str, method: str) -> None:
    for shape, dim in CASES:
        check(interpreter, "mvue_24", values(kind, shape, dtype), dim, method=method, seed=2**63 + 5)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**64 - 1])
@pytest.mark.parametrize("start", [(3, 1), (2**32 - 1, 2**31 + 7)])
def test_seeds_and_parts_of_a_matrix(interpreter: ProcessPoolExecutor, seed: int, start: tuple[int, int]) -> None:
    for shape, dim in ((3, 40), 1), ((16, 6), 0):
        check(interpreter, "mvue_24", values("gaussian", shape, F32), dim, seed=seed, start=start)
