"""Each method over real optimizer steps, against its formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from megasparse import topology
from megasparse.config import Recipe, WeightSparsity
from megasparse.engine import Engine, Fragment
from megasparse.model import build_model
from megasparse.ops.two_four import prune_24, soft_threshold_24, sste_scale, transposable_mask
from megasparse.sparsity.weight import SparseWeight
from tests import small
from tests.helpers import assert_close

LR, DECAY, EPS, CLIP = 3e-3, 0.05, 1e-3, 0.1
NAME = "decoder.layers.0.mlp.linear_fc1.weight"


def gaussian(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def sparse(weight: nn.Parameter, **sparsity: Any) -> SparseWeight:
    return SparseWeight("w", weight, WeightSparsity(**sparsity))


def engine_of(place: topology.Topology, weights: dict[str, Any] | None, **sections: Any) -> Engine:
    recipe: Recipe = small.recipe(sparsity={"weights": weights}, **sections)
    return Engine(recipe, place, *build_model(recipe, place, small.VOCAB))


def weight_of(engine: Engine) -> Tensor:
    chunk: Any = engine.chunks[0]
    return chunk.decoder.layers[0].mlp.linear_fc1.weight


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
    with pytest.raises(ValueError, match=r"holds 2 x \[6, 8\] of w, not in whole blocks of 4x4: lower parallel.tp"):
        sparse(weight, method="ste")


# Decay ----------------------------------------------------------------------------------------------------------------


def one_step(engine: Engine) -> tuple[Tensor, Tensor, Tensor, float]:
    """Of the weight NAME, flat: before the step, its reduced gradient, how far it moved; and the gradient's norm."""
    gradients: list[Tensor] = []

    def fragment() -> Fragment:
        return next(fragment for fragment in engine.fragments() if fragment.weight.name == NAME)

    def look() -> None:
        gradient = fragment().gradient
        assert gradient is not None
        gradients.append(gradient.double().clone())

    engine.before_step = look
    start = fragment().master.double().clone()
    result = engine.train_step(small.batches(engine.recipe, 0), 0, LR)
    return start, gradients[0], fragment().master.double() - start, result.grad_norm


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 0), ("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)])
def test_one_step_of_decay_by_hand(single: topology.Topology, precision: str, zero_stage: int) -> None:
    """Adam's first update from zero moments is lr u / (|u| + eps), u = g + decay (1 - M) W, where g is clipped; what
    the mask keeps moves as without decay, and what it does not keep moves towards zero."""
    optimizer = {"clip_grad": CLIP, "weight_decay": 0.0, "eps": EPS}
    sections = {"optimizer": optimizer, "parallel": {"zero_stage": zero_stage}, "training": {"precision": precision}}
    engine = engine_of(single, {"method": "sr_ste", "decay": DECAY}, **sections)
    start, gradient, moved, norm = one_step(engine)
    masked = ~engine._sparse[weight_of(engine)].mask.view(-1)
    assert masked.float().mean() == 0.5
    assert norm > 2 * CLIP, "it clips"
    update = gradient * CLIP / (norm + 1e-6) + DECAY * masked * start
    assert_close(moved, -LR * update / (update.abs() + EPS), 1e-4)
    without = one_step(engine_of(single, {"method": "sr_ste", "decay": 0.0}, **sections))[2]
    assert torch.equal(moved[~masked], without[~masked])
    assert (((moved - without) * start)[masked] < 0).float().mean() > 0.99


def test_decay_shrinks_what_is_masked(single: topology.Topology) -> None:
    """Over 20 steps; its sign is right and kept weights are not decayed."""
    sizes = {}
    for decay in (0.0, 1.0):
        engine = engine_of(single, {"method": "sr_ste", "decay": decay, "refresh_interval": 1000})
        for step in range(20):
            engine.train_step(small.batches(engine.recipe, step), step, LR)
        weight, mask = weight_of(engine), engine._sparse[weight_of(engine)].mask
        sizes[decay] = (weight[mask].abs().mean().item(), weight[~mask].abs().mean().item())
    assert sizes[1.0][1] < 0.3 * sizes[0.0][1]
    assert sizes[1.0][0] == pytest.approx(sizes[0.0][0], rel=0.05)


# A whole model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [
        {"method": "ste"},
        {"method": "sr_ste", "decay": 1e-3, "refresh_interval": 4, "dense_end": 0.2},
        {"method": "s_ste"},
        {"method": "asp", "dense_start": 0.3},
    ],
    ids=lambda weights: weights["method"],
)
def test_it_learns_and_says_what_it_keeps(single: topology.Topology, weights: dict[str, Any]) -> None:
    engine = engine_of(single, {**weights, "targets": ["."]}, moe={"layers": [0, 1]})
    results = [engine.train_step(small.batches(engine.recipe, step), step, LR) for step in range(20)]
    assert results[-1].loss < 0.75 * results[0].loss
    masses = [result.sparsity["mass_kept"] for result in results if "mass_kept" in result.sparsity]
    flips = [result.sparsity["flip_rate"] for result in results if "flip_rate" in result.sparsity]
    assert len(masses) == {"ste": 20, "sr_ste": 4, "s_ste": 1, "asp": 1}[weights["method"]]
    assert len(flips) == len(masses) - 1
    assert all(0.69 < mass < 0.8 for mass in masses)
    assert all(0 < rate < 0.3 for rate in flips)
    dense_at_the_end = weights["method"] == "sr_ste"
    for weight, state in engine._sparse.items():
        used = state(weight)
        groups = (used != 0).unflatten(-1, (-1, 4)).sum(-1)
        assert groups.max() == (4 if dense_at_the_end else 2), state.name
