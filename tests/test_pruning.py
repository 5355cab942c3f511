"""Each method over real optimizer steps, against its formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megasparse import topology
from megasparse.config import Recipe
from megasparse.engine import Engine
from megasparse.fragments import Fragment
from megasparse.model import build_model
from tests import small
from tests.helpers import assert_close

LR, DECAY, EPS, CLIP = 3e-3, 0.05, 1e-3, 0.1
NAME = "decoder.layers.0.mlp.linear_fc1.weight"


def engine_of(place: topology.Topology, weights: dict[str, Any] | None, **sections: Any) -> Engine:
    recipe: Recipe = small.recipe(sparsity={"weights": weights}, **sections)
    return Engine(recipe, place, *build_model(recipe, place, small.VOCAB))


def weight_of(engine: Engine) -> Tensor:
    chunk: Any = engine.chunks[0]
    return chunk.decoder.layers[0].mlp.linear_fc1.weight


# Decay ----------------------------------------------------------------------------------------------------------------


def one_step(engine: Engine) -> tuple[Tensor, Tensor, Tensor, float]:
    """Of the weight NAME, flat: before the step, its reduced gradient, how far it moved; and the gradient's norm."""
    gradients: list[Tensor] = []

    def fragment() -> Fragment:
        return next(fragment for fragment in engine.fragments if fragment.weight.name == NAME)

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
    masked = ~engine.sparse_weights.of[weight_of(engine)].mask.view(-1)
    assert masked.float().mean() == 0.5
    assert norm > 2 * CLIP, "it clips"
    update = gradient * CLIP / (norm + 1e-6) + DECAY * masked * start
    assert_close(moved, -LR * update / (update.abs() + EPS), 1e-4)
    without = one_step(engine_of(single, {"method": "sr_ste", "decay": 0.0}, **sections))[2]
    assert torch.equal(moved[~masked], without[~masked])
    assert (((moved - without) * start)[masked] < 0).float().mean() > 0.99


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 0), ("fp32", 2), ("bf16", 1)])
def test_decay_beside_adams_momentum_by_hand(single: topology.Topology, precision: str, zero_stage: int) -> None:
    """AST: after Adam's first update W -= lr decay (1 - M) W / (|g| + eps), as its second moment is g^2 then."""
    optimizer = {"clip_grad": CLIP, "weight_decay": 0.0, "eps": EPS}
    sections = {"optimizer": optimizer, "parallel": {"zero_stage": zero_stage}, "training": {"precision": precision}}
    engine = engine_of(single, {"method": "ast", "decay": DECAY}, **sections)
    start, gradient, moved, norm = one_step(engine)
    masked = ~engine.sparse_weights.of[weight_of(engine)].mask.view(-1)
    clipped = gradient * CLIP / (norm + 1e-6)
    after_adam = start - LR * clipped / (clipped.abs() + EPS)
    expected = after_adam - LR * DECAY * masked * after_adam / (clipped.abs() + EPS) - start
    assert_close(moved, expected, 1e-4)
    without = one_step(engine_of(single, {"method": "ast", "decay": 0.0}, **sections))[2]
    assert torch.equal(moved[~masked], without[~masked])
    assert (((moved - without) * start)[masked] < 0).float().mean() > 0.99


def test_a_boost_is_the_optimizers_too(single: topology.Topology) -> None:
    """Its first values, made in the middle of a run, are the master weights': it goes on from them."""
    weights = {"method": "ast", "decay": 1e-3, "boost": 16, "dense_start": 0.1, "score": "wanda"}
    engine = engine_of(single, weights, training={"precision": "bf16"})
    before = {}
    for step in range(4):
        engine.before_step = lambda: before.update(  # after masks are made, before Adam
            {f.weight.name: f.master.clone() for f in engine.fragments if f.weight.name.endswith("boost")}
        )
        engine.train_step(small.batches(engine.recipe, step), step, LR)
        boosts = {f.weight.name: f.master for f in engine.fragments if f.weight.name.endswith("boost")}
        assert len(boosts) == 4
        for name, boost in boosts.items():
            assert before[name].any() == boost.any() == (step >= 2), name
            assert (boost - before[name]).abs().max() <= 3 * LR


def test_decay_shrinks_what_is_masked(single: topology.Topology) -> None:
    """Over 20 steps; its sign is right and kept weights are not decayed."""
    sizes = {}
    for decay in (0.0, 1.0):
        engine = engine_of(single, {"method": "sr_ste", "decay": decay, "refresh_interval": 1000})
        for step in range(20):
            engine.train_step(small.batches(engine.recipe, step), step, LR)
        weight, mask = weight_of(engine), engine.sparse_weights.of[weight_of(engine)].mask
        sizes[decay] = (weight[mask].abs().mean().item(), weight[~mask].abs().mean().item())
    assert sizes[1.0][1] < 0.3 * sizes[0.0][1]
    assert sizes[1.0][0] == pytest.approx(sizes[0.0][0], rel=0.05)


MASKS = {"ste": 20, "sr_ste": 4, "s_ste": 1, "asp": 1, "ast": 2, "mdgf": 4, "sdgf": 4}  # in 20 steps

# A whole model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [
        {"method": "ste"},
        {"method": "sr_ste", "decay": 1e-3, "refresh_interval": 4, "dense_end": 0.2},
        {"method": "s_ste"},
        {"method": "asp", "dense_start": 0.3},
        {"method": "ast", "decay": 1e-3, "ramp": 0.2, "boost": 8, "score": "wanda"},
        {"method": "mdgf", "ramp": 0.5, "refresh_interval": 5},
        {"method": "sdgf", "ramp": 0.5, "refresh_interval": 5},
    ],
    ids=lambda weights: weights["method"],
)
def test_it_learns_and_says_what_it_keeps(single: topology.Topology, weights: dict[str, Any]) -> None:
    engine = engine_of(single, {**weights, "targets": ["."]}, moe={"layers": [0, 1]})
    results = [engine.train_step(small.batches(engine.recipe, step), step, LR) for step in range(20)]
    assert results[-1].loss < 0.75 * results[0].loss
    masses = [result.sparsity["mass_kept"] for result in results if "mass_kept" in result.sparsity]
    flips = [result.sparsity["flip_rate"] for result in results if "flip_rate" in result.sparsity]
    assert len(masses) == MASKS[weights["method"]]
    assert len(flips) == len(masses) - 1
    assert all(0.69 < mass < (0.8 if weights["method"] != "sdgf" else 1) for mass in masses)
    assert all(rate < 0.4 for rate in flips)
    assert all(rate > 0 for rate in flips[:2]), "later, what is masked may have no gradient any more"
    dense_at_the_end = weights["method"] == "sr_ste"
    for weight, state in engine.sparse_weights.of.items():
        used = state(weight) if state.boost is None else weight * state.mask
        groups = (used != 0).unflatten(-1, (-1, 4)).sum(-1)
        assert groups.max() == (4 if dense_at_the_end else 2), state.name
