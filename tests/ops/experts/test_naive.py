"""The reference itself, against finite differences and a loop over single rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megasparse.ops.experts import grouped_swiglu
from tests.ops.experts.test_experts import arguments


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_gradients_by_finite_differences(backend: str) -> None:
    x, counts, w1, w2, w3 = arguments([2, 0, 3], 4, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: grouped_swiglu(t[0], counts, *t[1:], backend=backend), (x, w1, w2, w3))


def test_each_row_goes_through_its_own_expert() -> None:
    x, counts, w1, w2, w3 = arguments([2, 0, 3], 4, 5, torch.float64)
    y = grouped_swiglu(x, counts, w1, w2, w3, backend="naive")
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        hidden = F.silu(w1[expert] @ x[row]) * (w3[expert] @ x[row])
        torch.testing.assert_close(y[row], w2[expert] @ hidden)
