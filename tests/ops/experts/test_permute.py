"""Ordering, gathering and combining against their naive forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megasparse.ops.experts import combine, gather, naive, sort_by_expert
from megasparse.ops.experts.permute import stable_order

TOKENS, TOP_K, EXPERTS, HIDDEN = 700, 3, 8, 16  # more rows than a chunk of combine's backward


def choices(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(TOKENS, EXPERTS - 1, generator=generator).topk(TOP_K).indices  # the last expert: never chosen


def kept(share: float | None) -> Tensor | None:
    if share is None:
        return None
    return torch.rand(TOKENS, TOP_K, generator=torch.Generator().manual_seed(1)) < share


@pytest.mark.parametrize("share", [None, 1.0, 0.6, 0.0])
def test_sort_equals_naive(share: float | None) -> None:
    order, counts = sort_by_expert(choices(), EXPERTS, kept(share))
    expected_order, expected_counts = naive.sort_by_expert(choices(), EXPERTS, kept(share))
    assert torch.equal(order, expected_order)
    assert torch.equal(counts, expected_counts)
    assert order.dtype == counts.dtype == torch.int64


@pytest.mark.parametrize("bound", [7, 2**15, 2**20])
def test_stable_order(bound: int) -> None:
    keys = torch.randint(bound, (5000,)) % bound
    assert torch.equal(stable_order(keys, bound), torch.sort(keys, stable=True).indices)


@pytest.mark.parametrize("share", [None, 0.6, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gather_and_combine_equal_naive(dtype: torch.dtype, share: float | None) -> None:
    torch.manual_seed(0)
    order, _ = sort_by_expert(choices(), EXPERTS, kept(share))
    x = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    y = torch.randn(len(order), HIDDEN).to(dtype).requires_grad_()
    weight_dtype = torch.promote_types(dtype, torch.float32)
    weights = torch.rand(TOKENS, TOP_K, dtype=weight_dtype, requires_grad=True)
    d_rows, d_out = torch.randn(len(order), HIDDEN).to(dtype), torch.randn(TOKENS, HIDDEN).to(dtype)
    results = []
    for module_gather, module_combine in ((gather, combine), (naive.gather, naive.combine)):
        rows, out = module_gather(x, order, TOP_K), module_combine(y, order, weights)
        results.append(
            [rows, out, *torch.autograd.grad(rows, x, d_rows), *torch.autograd.grad(out, [y, weights], d_out)]
        )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(results[0][0], results[1][0])


def test_gradients_by_finite_differences() -> None:
    experts = torch.tensor([[0, 2], [2, 1], [1, 0]])
    order, _ = sort_by_expert(experts, 3, torch.tensor([[True, True], [False, True], [True, True]]))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: combine(gather(x, order, 2).square(), order, w), (x, weights))


def test_round_trip() -> None:
    """Weights that sum to one give the tokens back; without its dropped copies a token keeps the rest's share."""
    x = torch.randn(TOKENS, HIDDEN)
    weights = torch.rand(TOKENS, TOP_K).softmax(-1)
    order, counts = sort_by_expert(choices(), EXPERTS)
    assert counts.sum() == TOKENS * TOP_K
    torch.testing.assert_close(combine(gather(x, order, TOP_K), order, weights), x)
    keep = kept(0.5)
    assert keep is not None
    order, counts = sort_by_expert(choices(), EXPERTS, keep)
    assert counts.sum() == keep.sum()
    torch.testing.assert_close(
        combine(gather(x, order, TOP_K), order, weights), x * (weights * keep).sum(-1, keepdim=True)
    )


def test_bf16_sums_in_float32() -> None:
    """256 + 1 + 1: the ones are lost one by one in bf16."""
    y = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert combine(y, torch.arange(3), torch.ones(1, 3)).item() == 258


@pytest.mark.parametrize("threads", [1, 2])
def test_repeats_to_the_bit(threads: int) -> None:
    before = torch.get_num_threads()
    order, _ = sort_by_expert(choices(), EXPERTS)
    y, weights = torch.randn(len(order), HIDDEN), torch.rand(TOKENS, TOP_K)
    try:
        torch.set_num_threads(threads)
        actual = combine(y, order, weights)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(actual, combine(y, order, weights))
