"""Training in any layout against one process: what a run sees and holds, and the comparison of two."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor

from megasparse.checkpoint.weights import load_teacher, teacher_source
from megasparse.config import Recipe, parse_recipe
from megasparse.engine import Engine
from megasparse.layout import Layout
from megasparse.model import build_model, moe_layers
from megasparse.placement import blocks, local_buffers, local_weights
from tests import small
from tests.helpers import assert_close, run_distributed

STEPS = 5  # as many as schedules, masks made anew and histories of FP8 need
VOCAB = small.VOCAB - 1  # odd: tensor parallelism pads it
MOE = {"aux_loss_coefficient": 0.05, "z_loss_coefficient": 0.001}
TOKENIZER = small.TOKENIZER.hash


def train(raw: dict[str, Any], masked: bool, count: int) -> dict[str, Any]:
    """``count`` updates on this rank; what it saw and what it holds."""
    recipe = parse_recipe(raw)
    place = small.start(recipe)
    chunks, state = build_model(recipe, place, VOCAB)
    for weight in local_weights(chunks, place):
        if weight.name.endswith(("compress_key.output", "compress_value.output")):
            weight.tensor.data.fill_(0.05)  # with its zeros nothing before it would have a gradient
    source = teacher_source(recipe, VOCAB, TOKENIZER, place.world_size)
    teacher = load_teacher(recipe, source, place, VOCAB) if source else None
    engine = Engine(recipe, place, chunks, state, teacher)
    routes: dict[tuple[int, int, int], list[int]] = {}

    def record(layer: int) -> Any:
        def hook(_: Any, inputs: tuple, output: Any) -> None:
            for token, experts in zip(inputs[1].tolist(), output.experts.tolist(), strict=True):
                routes[state.step, layer, token] = sorted(experts)

        return hook

    for layer, moe in moe_layers(chunks):
        moe.router.register_forward_hook(record(layer))
    steps = []
    for step in range(count):
        batches = small.batches(recipe, step, place.dp_rank, place.dp, masked)
        result = engine.train_step(batches, step, 3e-3)
        steps.append(
            {
                **{"loss": result.loss, "norm": result.grad_norm, **result.aux_losses},
                **{"tokens": result.expert_tokens, "attention": result.attention, "sparsity": result.sparsity},
                **result.distillation,
            }
        )
    nats, tokens = engine.evaluate(small.batches(recipe, count, place.dp_rank, place.dp, masked))
    weights, buffers = (
        [
            (w.name, w.shape, [(o, part.float().clone()) for o, part in blocks(w, 0, w.tensor.detach().reshape(-1))])
            for w in found(chunks, place)
        ]
        for found in (local_weights, local_buffers)
    )
    evaluation = {"loss": nats / tokens, "tokens": tokens}
    return {"steps": steps, "evaluation": evaluation, "weights": weights, "routes": routes, "buffers": buffers}


def whole(ranks: list[dict[str, Any]], kind: str = "weights") -> dict[str, Tensor]:
    """The full weights or buffers from every rank's parts. Ranks that hold the same elements hold the same bits."""
    full: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}
    for rank in ranks:
        for name, shape, parts in rank[kind]:
            tensor, covered = full.setdefault(name, torch.zeros(shape)), held.setdefault(name, torch.zeros(shape) > 0)
            for offsets, part in parts:
                place = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))
                assert (tensor[place] == part)[covered[place]].all(), f"replicas of {name} differ"
                tensor[place], covered[place] = part, True
    assert all(covered.all() for covered in held.values())
    return full


@functools.cache
def one_process(text: str, masked: bool, steps: int) -> dict[str, Any]:
    """The reference: plain AdamW in one process, data parallelism as accumulation."""
    return run_distributed(train, 1, json.loads(text), masked, steps)[0]


def reference_of(recipe: Recipe, masked: bool, steps: int = STEPS, **training: Any) -> dict[str, Any]:
    raw = recipe.model_dump(mode="json")
    raw["optimizer"]["eps"] = 1e-3
    raw["training"].update(training)
    raw["parallel"] = {"zero_stage": 0 if raw["training"]["precision"] == "fp32" else 1}
    return one_process(json.dumps(raw), masked, steps)


def run(recipe: Recipe, layout: str, masked: bool, steps: int = STEPS, **parallel: Any) -> list[dict[str, Any]]:
    raw = recipe.model_dump(mode="json")
    raw["optimizer"]["eps"] = 1e-3
    parsed = Layout.parse(layout)
    raw["parallel"] = {**parsed.parallel(), **parallel}
    return run_distributed(train, parsed.world_size, raw, masked, steps)


def compare(recipe: Recipe, layout: str, masked: bool = False, steps: int = STEPS, **parallel: Any) -> None:
    """Losses and norms to 1e-6, every updated weight to 1e-5, no route flipped.

    AdamW divides a gradient by its own size: where it is all rounding (an output projection's first gradients are
    5e-7 with a rounding of 3e-9), eps=1e-8 turns noise into full-size updates: one weight of 86,688 then is 4.7e-5 off
    under ep2, fifteen up to 1e-4 under tp2. With eps=1e-3 such weights move by little in either layout.
    """
    single = reference_of(recipe, masked, steps)
    ranks = run(recipe, layout, masked, steps, **parallel)
    for rank in ranks:
        for step, (ours, reference) in enumerate(zip(rank["steps"], single["steps"], strict=True)):
            assert_close(ours, reference, 1e-6, f"step {step}")
        assert_close(rank["evaluation"], single["evaluation"], 1e-6, "evaluation")
        assert all(route == single["routes"][key] for key, route in rank["routes"].items())
    assert set().union(*(rank["routes"] for rank in ranks)) == single["routes"].keys()
    assert_close(whole(ranks), whole([single]), 1e-5)
    buffers = 1e-6 if recipe.training.fp8 is None else 1e-5  # amaxes of gradients
    assert_close(whole(ranks, "buffers"), whole([single], "buffers"), buffers)
