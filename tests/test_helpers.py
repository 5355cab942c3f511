"""The test helpers themselves: what is close."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import assert_close


def test_assert_close():
    a = {"x": [torch.tensor([1.0, 2.0])], "y": 3.0}
    assert_close(a, {"x": [torch.tensor([1.0, 2.0])], "y": 3.0 + 3e-7}, 1e-6)
    with pytest.raises(AssertionError, match=r"x\[0\]: relative error 5.00e-01"):
        assert_close(a, {"x": [torch.tensor([1.0, 4.0])], "y": 3.0}, 1e-6)
    with pytest.raises(AssertionError, match="relative error nan"):
        assert_close(torch.tensor(float("nan")), torch.tensor(1.0), 1e-6)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(2), torch.zeros(3), 1e-6)
    assert_close(torch.zeros(2), torch.zeros(2), 0)
