"""What each method multiplies by and what the gradient sees, and when masks change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn

from megasparse import topology
from megasparse.config import WeightSparsity
from megasparse.model import build_model
from megasparse.ops.two_four import prune_24, soft_threshold_24, sste_scale, transposable_mask
from megasparse.sparsity.weight import SparseWeight, notes
from tests import small
from tests.helpers import assert_close


def gaussian(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def sparse(weight: nn.Parameter, **sparsity: Any) -> SparseWeight:
    return SparseWeight("w", weight, WeightSparsity(**sparsity))


# What the forward pass and the gradient see ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "reference"),
    [
        ({"method": "ste"}, prune_24),
        ({"method": "ste", "mask": "transposable"}, lambda w: (w * transposable_mask(w), None)),
        ({"method": "sr_ste", "decay": 1.0}, lambda w: (w * transposable_mask(w), None)),
        ({"method": "sr_ste", "decay": 1.0, "search": "greedy"}, lambda w: (w * transposable_mask(w, "greedy"), None)),
        ({"method": "s_ste"}, lambda w: (sste_scale(w) * soft_threshold_24(w), None)),
    ],
    ids=["ste", "ste transposable", "sr_ste", "sr_ste greedy", "s_ste"],
)
def test_the_product_is_of_the_sparse_weight_and_every_weight_gets_its_gradient(sparsity: dict, reference: Any) -> None:
    weight = gaussian(8, 16)
    module = sparse(weight, **sparsity)
    assert torch.equal(module(weight), weight), "dense before the first step"
    module.begin_step(0, 10)
    used = module(weight)
    assert torch.equal(used, reference(weight.detach())[0])
    gradient = torch.randn(8, 16)
    used.backward(gradient)
    assert torch.equal(weight.grad, gradient)


def test_pruned_once_and_for_all() -> None:
    weight = gaussian(8, 16)
    module = sparse(weight, method="asp", dense_start=0.2)
    for step in range(2):
        module.begin_step(step, 10)
        assert module.mask.all()
    module.begin_step(2, 10)
    mask = prune_24(weight)[1]
    weight.data.mul_(-0.5).add_(torch.randn(8, 16))
    module.begin_step(3, 10)
    assert torch.equal(module.mask, mask)
    module(weight).backward(torch.ones(8, 16))
    assert torch.equal(weight.grad, mask.float())


def test_the_scale_of_s_ste_is_frozen_and_each_expert_has_its_own() -> None:
    weight = gaussian(3, 8, 16)
    module = sparse(weight, method="s_ste", dense_start=0.1)
    module.begin_step(0, 10)
    assert torch.equal(module(weight), weight)
    module.begin_step(1, 10)
    assert_close(module.scale, torch.stack([sste_scale(w) for w in weight]), 1e-6)
    before = module.scale.clone()
    module.end_step()
    weight.data.mul_(torch.rand_like(weight))
    module.begin_step(2, 10)
    assert torch.equal(module.scale, before)
    assert_close(
        module(weight), torch.stack([s * soft_threshold_24(w) for s, w in zip(before, weight, strict=True)]), 1e-6
    )


def test_what_is_multiplied_is_made_once_a_step_and_follows_the_weights_after_it() -> None:
    weight = gaussian(8, 16)
    module = sparse(weight, method="ste")
    module.begin_step(0, 10)
    with torch.no_grad():
        first = module(weight)  # as in a layer that is recomputed
    assert module(weight).data_ptr() == first.data_ptr()
    module.end_step()
    weight.data.mul_(-2)
    assert torch.equal(module(weight), -2 * first)
    assert module.product is None


@pytest.mark.parametrize("shape", [(8, 16), (3, 8, 16)])
def test_the_boost_is_a_product_of_sums_of_inputs(shape: tuple[int, ...]) -> None:
    """SLoRB: y = W' x + B (P x), where P sums k inputs and B begins as the mean of the pruned weights."""
    weight, k = gaussian(*shape), 4
    module = sparse(weight, method="ast", decay=0.1, boost=k, dense_start=0.1)
    module.begin_step(0, 10)
    assert torch.equal(module(weight), weight)
    module(weight).sum().backward()
    assert module.boost is not None
    assert not module.boost.grad.any(), "it does not learn yet"
    module.begin_step(1, 10)
    pruned = weight.detach() * ~module.mask
    projection = torch.zeros(16 // k, 16)
    for group in range(16 // k):
        projection[group, k * group : k * group + k] = 1
    assert_close(module.boost, pruned @ projection.t() / k, 1e-6)
    module.boost.data.normal_()
    module.product = weight.grad = module.boost.grad = None
    x = torch.randn(*shape[:-2], 5, 16)
    kept = (weight * module.mask).detach()
    b = module.boost.detach().clone().requires_grad_()
    expected = x @ kept.mT + (x @ projection.t()) @ b.mT
    y = x @ module(weight).mT
    assert_close(y, expected, 1e-5)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    assert_close(module.boost.grad, b.grad, 1e-5)
    assert_close(weight.grad, dy.mT @ x, 1e-5)


def test_the_score_counts_inputs() -> None:
    weight = gaussian(8, 16)
    module = sparse(weight, method="ast", decay=0.1, score="wanda")
    module.input_norm.copy_(torch.rand(16) ** 4)
    module.begin_step(0, 10)
    assert torch.equal(module.mask, prune_24(weight, score=weight.abs() * module.input_norm)[1])
    assert not torch.equal(module.mask, prune_24(weight)[1])


def test_what_is_masked_fades_in_the_product_and_the_gradient() -> None:
    """MdGf: W (M + D (1 - M)), with D from 1 to 0 over the ramp, and its derivative."""
    weight = gaussian(4, 32)
    module = sparse(weight, method="mdgf", pattern="1:8", ramp=0.5, refresh_interval=1, dense_start=0.1)
    for step, left in ((0, 1.0), (1, 0.8), (3, 0.4), (5, 0.0), (9, 0.0)):
        module.begin_step(step, 10)
        largest = weight.abs().unflatten(1, (-1, 8)).argmax(2, keepdim=True)
        mask = torch.zeros(4, 4, 8, dtype=torch.bool).scatter_(2, largest, True).view(4, 32)
        factor = torch.where(mask, 1.0, left)
        assert_close(module(weight), weight * factor, 1e-6)
        weight.grad = None
        module(weight).backward(torch.full((4, 32), 3.0))
        assert_close(weight.grad, 3 * factor, 1e-6)
        weight.data.add_(torch.randn(4, 32))


def test_more_and_more_of_each_m_is_masked() -> None:
    """SdGf to 1:8: 7, 4, 2 of 8 in thirds of the ramp, then 1; what is masked has no gradient."""
    weight = gaussian(4, 32)
    module = sparse(weight, method="sdgf", pattern="1:8", ramp=0.6, refresh_interval=1)
    kept = []
    for step in range(10):
        module.begin_step(step, 10)
        (count,) = module.mask.unflatten(1, (-1, 8)).sum(2).unique().tolist()
        kept.append(count)
        weight.grad = None
        module(weight).backward(torch.ones(4, 32))
        assert torch.equal(weight.grad, module.mask.float())
    assert kept == [7, 4, 4, 2, 2, 1, 1, 1, 1, 1]


# When masks change ----------------------------------------------------------------------------------------------------


def test_masks_are_made_anew_when_due_and_what_flips_is_counted() -> None:
    weight = gaussian(8, 16)
    module = sparse(weight, method="sr_ste", decay=1.0, dense_start=0.1, dense_end=0.2, refresh_interval=3)
    seen = []
    for step in range(10):
        before = module.mask.clone()
        refresh = module.begin_step(step, 10)
        sparse_now = 0.1 < (step + 1) / 10 <= 0.8
        if step in (1, 3, 6):
            mask = transposable_mask(weight)
            assert torch.equal(module.mask, mask)
            assert (refresh.flipped, refresh.compared) == ((mask != before).sum() if step > 1 else 0, 128 * (step > 1))
            kept, total = weight[mask].abs().double().sum(), weight.abs().double().sum()
            assert (refresh.kept, refresh.all) == pytest.approx((kept.item(), total.item()))
            seen.append(refresh.flipped)
        else:
            assert torch.equal(module.mask, before if sparse_now else torch.ones_like(before))
            assert not any(vars(refresh).values())
        weight.data.add_(0.3 * torch.randn(8, 16))
    assert seen[0] == 0 < min(seen[1:])


def test_a_part_that_cuts_a_block_is_refused() -> None:
    weight: Any = gaussian(12, 8)
    weight.tensor_model_parallel, weight.partition_stride = True, 2
    with pytest.raises(
        ValueError, match=r"holds 2 x \[6, 8\] of w, not whole rows of blocks of 4x4: lower parallel.tp"
    ):
        sparse(weight, method="ste", mask="transposable")
    with pytest.raises(ValueError, match="not whole columns of 1:16 groups"):
        sparse(weight, method="mdgf", pattern="1:16")
    with pytest.raises(ValueError, match=r"not whole columns of sparsity\.weights\.boost"):
        sparse(weight, method="ast", decay=0.1, boost=3)


def test_what_the_log_says(single: topology.Topology) -> None:
    weights = {"method": "sr_ste", "decay": 1e-3, "targets": ["mlp"], "products": "masked"}
    recipe = small.recipe(moe={"layers": [0, 1]}, sparsity={"weights": weights})
    chunks, _ = build_model(recipe, single, small.VOCAB)
    first, linears, experts = notes(recipe, chunks)
    assert first == ("sparsity.weights: 5 of 9 weights of linear layers and experts, 2:4, sr_ste, transposable masks")
    assert linears.startswith(
        "2 linear layers: 2:4 products (masked): all dense; could run sparse on CUDA: forward, input"
    )
    assert experts.startswith(
        "3 matrices of experts: 2:4 products (masked): all dense; could run sparse on CUDA: forward"
    )
    assert notes(small.recipe(), chunks) == []


def test_kernels_that_cannot_run_are_refused() -> None:
    """Without CUDA for want of it, with CUDA for float32."""
    with pytest.raises(ValueError, match="through the door semi_structured are asked for, but "):
        sparse(gaussian(8, 16), method="ste", products="semi_structured")


def test_asts_decay_goes_no_further_than_0() -> None:
    """Where Adam's second moment is as good as 0, as of an expert without tokens: W would turn its sign and grow."""
    weight = gaussian(8, 16)
    module = sparse(weight, method="ast", decay=1e-4)
    module.begin_step(0, 10)
    before, masked = weight.detach().clone(), ~module.mask
    moment = torch.full((8, 16), 1e-6).index_fill_(0, torch.tensor([0, 5]), 0.0)
    module.decay_after_adam(weight.data.view(-1), moment.view(-1), 0, 1e-7, 1e-8)
    share = torch.tensor([1.0 if row in (0, 5) else 1e-7 / (1e-3 + 1e-8) for row in range(8)])
    expected = torch.where(masked, before * (1 - share[:, None]), before)
    assert_close(weight, expected, 1e-6)
    assert not weight[[0, 5]][masked[[0, 5]]].any()
