"""The definition and the CPU path against torch's attention, where the mask is full."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.ops.block_sparse import block_sparse_attention
from tests.helpers import assert_close
from tests.ops.block_sparse.cases import random_mask, tensors


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize(("block", "query_block"), [(16, 16), (32, 16), (16, 1)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_a_full_mask_is_torchs_attention(
    backend: str, block: int, query_block: int, kv_heads: int, causal: bool
) -> None:
    q, k, v = tensors(2, 75, 75, 4, kv_heads, 8)
    mask = random_mask(q, k, block, query_block, density=1.0)
    ours = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = [x.clone().requires_grad_() for x in (q, k, v)]
    output = block_sparse_attention(*ours, mask, causal=causal, backend=backend)  # type: ignore[arg-type]
    assert isinstance(output, Tensor)
    heads_first = [x.transpose(1, 2) for x in theirs]
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True).transpose(1, 2)
    assert_close(output, expected, 1e-10)
    weights = torch.randn_like(output)
    for a, b in zip(
        torch.autograd.grad(output, ours, weights), torch.autograd.grad(expected, theirs, weights), strict=True
    ):
        assert_close(a, b, 1e-10)
