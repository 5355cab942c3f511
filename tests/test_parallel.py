"""Any layout, one answer: every layout's losses, norms, weights and routes over real updates, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megasparse import topology
from megasparse.config import Recipe, parse_recipe
from megasparse.engine import Engine
from megasparse.model import build_model, global_parameters, moe_layers
from tests import small
from tests.helpers import assert_close, run_distributed

STEPS = 5


def train(raw: dict[str, Any], masked: bool = False) -> dict[str, Any]:
    """STEPS updates on this rank; what it saw and what it holds."""
    recipe = parse_recipe(raw)
    parallel = recipe.parallel
    place = topology.initialize(parallel.tp, parallel.pp, parallel.ep, parallel.sequence_parallel)
    gpt, state = build_model(recipe, place, small.VOCAB)
    engine = Engine(recipe, place, gpt, state)
    routes: dict[tuple[int, int, int], list[int]] = {}

    def record(layer: int) -> Any:
        def hook(_: Any, inputs: tuple, output: Any) -> None:
            for token, experts in zip(inputs[1].tolist(), output.experts.tolist(), strict=True):
                routes[state.step, layer, token] = sorted(experts)

        return hook

    for layer, moe in moe_layers(gpt):
        moe.router.register_forward_hook(record(layer))
    steps = []
    for step in range(STEPS):
        result = engine.train_step(small.batches(recipe, step, place.dp_rank, place.dp, masked), step, 3e-3)
        steps.append(
            {"loss": result.loss, "norm": result.grad_norm, **result.aux_losses, "tokens": result.expert_tokens}
        )
    weights = {}
    for name, parameter in global_parameters(gpt):
        split = getattr(parameter, "tensor_model_parallel", False) and place.tp > 1
        dim, stride = (parameter.partition_dim, parameter.partition_stride) if split else (None, None)
        if ".experts.w" in name:
            weights[name] = (parameter.detach().clone(), "ep", place.ep_rank, 0, 1)
        else:
            weights[name] = (parameter.detach().clone(), "tp" if split else "all", place.tp_rank, dim, stride)
    buffers = {f"{layer}.{n}": b.clone() for layer, moe in moe_layers(gpt) for n, b in moe.router.named_buffers()}
    return {"steps": steps, "weights": weights, "routes": routes, "buffers": buffers}


def whole(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The full weights from every rank's parts."""
    parts: dict[str, dict[int, tuple]] = {}
    for rank in ranks:
        for name, (tensor, kind, index, dim, stride) in rank["weights"].items():
            parts.setdefault(name, {})[index if kind != "all" else 0] = (tensor, kind, dim, stride)
    full = {}
    for name, pieces in parts.items():
        _, kind, dim, stride = pieces[0]
        tensors = [pieces[i][0] for i in sorted(pieces)]
        if kind == "all":
            full[name] = tensors[0]
        else:
            strided = [t.chunk(stride, dim) for t in tensors]
            full[name] = torch.cat([s[j] for j in range(stride) for s in strided], dim)
    return full


def compare(recipe: Recipe, world_size: int, parallel: dict[str, Any], masked: bool = False) -> None:
    """Losses and norms to 1e-6, every updated weight to 1e-5, no route flipped.

    AdamW divides a gradient by its own size: where it is all rounding (an expert's hardly used row), eps=1e-8 turns
    noise into full-size updates: one weight of 86,688 then is 4.7e-5 off under ep2, fifteen up to 1e-4 under tp2.
    In float64 the first is 5e-7, so it is rounding. With eps=1e-5 such weights move by little in either layout.
    """
    raw = recipe.model_dump(mode="json")
    raw["optimizer"]["eps"] = 1e-5
    single = run_distributed(train, 1, {**raw, "parallel": {"zero_stage": 0}}, masked)[0]
    ranks = run_distributed(train, world_size, {**raw, "parallel": parallel}, masked)
    for rank in ranks:
        for step, (ours, reference) in enumerate(zip(rank["steps"], single["steps"], strict=True)):
            assert_close(ours, reference, 1e-6, f"step {step}")
        for key, value in rank["buffers"].items():
            assert_close(value, single["buffers"][key], 1e-6, key)
    routes = {key: route for rank in ranks for key, route in rank["routes"].items()}
    assert routes == single["routes"]
    assert_close(whole(ranks), whole([single]), 1e-5)


MOE = {"aux_loss_coefficient": 0.05, "z_loss_coefficient": 0.001}


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_ep2_equals_one_process(zero_stage: int) -> None:
    compare(small.recipe(moe=MOE), 2, {"ep": 2, "zero_stage": zero_stage})


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_dp2_equals_accumulation(zero_stage: int) -> None:
    compare(small.recipe(moe=MOE), 2, {"ep": 1, "zero_stage": zero_stage})


def test_ep2_dp4_equals_one_process() -> None:
    """Four ranks, experts in two copies, dense weights in four; uneven loss masks."""
    compare(small.recipe(moe=MOE), 4, {"ep": 2}, masked=True)


def test_ep2_with_everything_on() -> None:
    """Global-batch statistics, router bias, jitter, capacity, shared and dense layers together, under recompute."""
    recipe = small.recipe(
        model={"num_layers": 3},
        moe={
            "layers": [0, 1, 1],
            "aux_loss_scope": "global_batch",
            "aux_loss_coefficient": 0.05,
            "bias_update_rate": 0.01,
            "jitter": 0.1,
            "capacity_factor": 1.0,
            "shared_expert_ffn_hidden_size": 16,
            "score_function": "sigmoid",
            "num_groups": 4,
            "top_k_groups": 2,
        },
        training={"recompute": "full"},
    )
    compare(recipe, 2, {"ep": 2})


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {"tp": 2}),
        (2, {"tp": 2, "sequence_parallel": True, "ep": 2}),
        (2, {"pp": 2}),
        (2, {"pp": 2, "zero_stage": 0}),
        (4, {"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True}),
    ],
    ids=["tp2", "tp2sp-ep2", "pp2", "pp2-zero0", "tp2pp2ep2"],
)
def test_tensor_and_pipeline_parallel(world_size: int, parallel: dict[str, Any]) -> None:
    """Tied embeddings, full-width query norms, global-batch statistics and a capacity over the whole micro-batch."""
    recipe = small.recipe(
        model={"tie_embeddings": True, "qk_norm": "full"},
        moe={**MOE, "capacity_factor": 1.25, "drop_policy": "position", "bias_update_rate": 0.01},
    )
    compare(recipe, world_size, parallel)
