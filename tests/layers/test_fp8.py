"""FP8 state in the model: which layers, scales over ranks by hand, when amaxes count and when they do not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megasparse import topology
from megasparse.config import Fp8, Recipe
from megasparse.engine import Engine
from megasparse.layers.fp8 import Fp8Scales, end_step, fp8_scales
from megasparse.layers.step import StepState
from megasparse.layout import Layout
from megasparse.model import build_model
from megasparse.ops.fp8.linear import DY, WEIGHT, X
from megasparse.placement import local_buffers
from tests import small
from tests.helpers import assert_close, run_distributed

MOE = {"layers": [0, 1, 1, 0], "shared_expert_ffn_hidden_size": 16}
DELAYED = {"recipe": "delayed", "amax_history_len": 3}


def recipe_of(
    fp8: dict[str, Any],
    moe: dict[str, Any] | None = MOE,
    training: dict[str, Any] | None = None,
    **sections: Any,
) -> Recipe:
    return small.recipe({"num_layers": 4}, moe, {"fp8": fp8, **(training or {})}, **sections)


def engine_of(recipe: Recipe, place: topology.Topology) -> Engine:
    return Engine(recipe, place, *build_model(recipe, place, small.VOCAB))


def scales_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of the buffers of FP8."""
    found = local_buffers(engine.chunks, engine.topology)
    return {buffer.name: buffer.tensor.clone() for buffer in found if ".fp8_scales." in buffer.name}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a | b)


@pytest.mark.parametrize(
    ("fields", "count"),
    [({}, 22), ({"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2}, 7), ({"experts": False}, 16)],
    ids=str,
)
@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_the_weights_that_the_recipe_names_are_in_fp8(
    single: topology.Topology, fields: dict[str, Any], count: int, norm_placement: str
) -> None:
    recipe = small.recipe(
        {"num_layers": 4, "norm_placement": norm_placement}, MOE, {"fp8": {"recipe": "current", **fields}}
    )
    chunks, _ = build_model(recipe, single, small.VOCAB)
    (chunk,) = chunks
    found = {name for name, module in chunk.named_modules() if isinstance(module, Fp8Scales)}
    expected = {
        name.replace("experts.w", "experts.fp8_scales.w")
        if ".experts.w" in name
        else name.replace(".weight", ".fp8_scales")
        for name in recipe.fp8_weights
    }
    assert found == expected
    assert len(found) == count
    assert not any(".fp8_scales." in name for name in chunk.state_dict()), "current scaling has no state"


# Over ranks, by hand --------------------------------------------------------------------------------------------------


def two_ranks(recipe: str) -> Any:
    """Rank r has seen 2 and 3, 5 and 7: of x; the double of the weight; as gradients, times 4, of a unit of 4."""
    topology.initialize(Layout(dp=2))
    rank, group = dist.get_rank(), dist.group.WORLD
    x = torch.tensor([[[2.0, -3.0], [-1.0, 0.5]], [[5.0, 0.0], [1.0, -7.0]]])[rank]
    state = StepState(gradient_unit=4.0)
    history = {"amax_history_len": 2, "margin": 1} if recipe == "delayed" else {}
    layer = Fp8Scales(Fp8(recipe=recipe, **history), state, group)  # type: ignore[arg-type]
    experts = Fp8Scales(Fp8(recipe=recipe, **history), state, group, (4, range(2 * rank, 2 * rank + 2)))  # type: ignore[arg-type]
    results = []
    for factor in (1.0, 0.5, 0.25):
        scaling = layer.scaling()
        q = [scaling.quantize(factor * y, o, (1, 128)).scale for o, y in ((X, x), (WEIGHT, 2 * x), (DY, 4 * x))]
        for expert, row in enumerate(x):
            experts.scaling(expert).quantize(factor * row[None], X, (1, 128))
        end_step([layer, experts], group, done=True)
        results.append([scale.item() for scale in q])
    return results, layer.scale.tolist() if recipe == "delayed" else None, _buffers(experts)


def _buffers(module: torch.nn.Module) -> list[Any]:
    return [buffer.tolist() for name, buffer in module.named_buffers() if name != "amax"]


def test_two_ranks_have_one_scale_now() -> None:
    """Current: 448 / 7 on both, half the values: twice the scale. e5m2's largest number is 57344."""
    for results, _, _ in run_distributed(two_ranks, 2, "current"):
        assert results == [[k * 448 / 7, k * 448 / 14, k * 57344 / 7 / 4] for k in (1, 2, 4)]


def test_two_ranks_have_one_scale_in_the_next_step() -> None:
    """Delayed: 1 at first; then by the largest of two steps and a margin of one bit. Gradients are of the unit."""
    ranks = run_distributed(two_ranks, 2, "delayed")
    for rank, (results, scale, (expert_scale, expert_history)) in enumerate(ranks):
        assert results == [[1, 1, 0.25], *[[224 / 7, 224 / 14, 28672 / 7 / 4]] * 2], (
            "the second step's 7 / 2 is no more"
        )
        assert scale == [224 / 3.5, 224 / 7, 28672 / 3.5, 1]
        largest = [[3.0, 1.0], [5.0, 7.0]][rank]  # of the experts here; the other rank has none of them
        assert expert_scale == [[pytest.approx(224 / (a / 2)), 1, 1, 1] for a in largest]
        assert expert_history == [[[0.0] * 4] * 2, [[a / 4, 0.0, 0.0, 0.0] for a in largest]]


# When amaxes count ----------------------------------------------------------------------------------------------------


def steps(engine: Engine, first: int, last: int) -> list[float]:
    return [engine.train_step(small.batches(engine.recipe, s), s, 3e-3).loss for s in range(first, last)]


def test_a_step_that_is_skipped_leaves_no_trace(single: topology.Topology) -> None:
    """The infinity of one gradient is in no history: the next step is as if that one had not been."""
    engine = engine_of(recipe_of(DELAYED), single)
    steps(engine, 0, 2)
    before = scales_of(engine)
    assert len(before) == 2 * len(engine.recipe.fp8_weights)
    chunk: Any = engine.chunks[0]
    handle = chunk.decoder.layers[2].self_attention.linear_proj.register_full_backward_hook(
        lambda _, gradients, __: tuple(g * math.inf for g in gradients)
    )
    assert engine.train_step(small.batches(engine.recipe, 2), 2, 3e-3).skipped
    handle.remove()
    assert same(scales_of(engine), before)
    assert all((layer.amax == 0).all() for layer in fp8_scales(engine.chunks))
    after = steps(engine, 3, 5)
    other = engine_of(recipe_of(DELAYED), single)
    steps(other, 0, 2)
    assert after == steps(other, 3, 5)
    assert not same(scales_of(engine), before)


def test_evaluation_uses_scales_and_leaves_them(single: topology.Topology) -> None:
    engine = engine_of(recipe_of(DELAYED), single)
    fresh = engine.evaluate(small.batches(engine.recipe, 9))
    assert all((layer.amax == 0).all() for layer in fp8_scales(engine.chunks))
    steps(engine, 0, 1)
    before = scales_of(engine)
    engine.evaluate(small.batches(engine.recipe, 9))
    assert same(scales_of(engine), before)
    assert all((layer.amax == 0).all() for layer in fp8_scales(engine.chunks))
    for layer in fp8_scales(engine.chunks):
        layer.scale.fill_(2.0**-9)
    assert engine.evaluate(small.batches(engine.recipe, 9)) != fresh, "a scale that makes all zero"


@pytest.mark.parametrize("sparsity", [None, {"method": "s_ste", "mvue": "exact", "targets": ["."]}], ids=["", "s_ste"])
def test_recompute_counts_once(single: topology.Topology, sparsity: dict[str, Any] | None) -> None:
    sections = {"sparsity": {"weights": sparsity}} if sparsity else {}
    plain, again = (
        engine_of(recipe_of(DELAYED, training={"recompute": recompute}, **sections), single)
        for recompute in ("none", "full")
    )
    assert steps(plain, 0, 4) == steps(again, 0, 4)
    assert same(scales_of(plain), scales_of(again))
    assert all(
        (scale > 1).all() for name, scale in scales_of(again).items() if name.endswith("qkv.fp8_scales.scale")
    ) is bool(sparsity), "the fourth operand is seen with MVUE only"


def test_scales_do_not_follow_the_loss_scale(single: topology.Topology) -> None:
    """Nor, by the same division, the batch: histories are of the sum of token losses."""
    found = []
    for loss_scale in (16.0, 512.0):
        engine = engine_of(recipe_of(DELAYED, None, {"precision": "fp16", "loss_scale": loss_scale}), single)
        steps(engine, 0, 1)
        found.append(scales_of(engine))
    assert_close(found[0], found[1], 2e-2)


# Learning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaling", "precision"), [("delayed", "fp32"), ("current", "fp32"), ("block", "fp32"), ("delayed", "bf16")]
)
def test_s_ste_mvue_and_fp8_together_learn(single: topology.Topology, scaling: str, precision: str) -> None:
    """As in S-STE's section 5: a 2:4 weight, the weight's gradient from a 2:4 estimate, all products in FP8."""
    sparsity = {"weights": {"method": "s_ste", "mvue": "exact", "targets": ["."], "refresh_interval": 5}}
    training = {"precision": precision, "fp8": {"recipe": scaling}}
    sparse = small.recipe({}, {"layers": [0, 1]}, training, sparsity=sparsity)
    dense = small.recipe({}, {"layers": [0, 1]}, {**training, "fp8": None})
    losses = [steps(engine_of(recipe, single), 0, 20) for recipe in (sparse, dense)]
    assert losses[0] != losses[1]
    fallen = [sum(loss[:3]) - sum(loss[-3:]) for loss in losses]
    assert fallen[0] > 0.6 * fallen[1] > 0.5
