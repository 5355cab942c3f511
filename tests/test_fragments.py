"""What optimizers hold is every weight once; norms of ranks add as squares."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megasparse import topology
from megasparse.config import Recipe
from megasparse.engine import Engine
from megasparse.model import build_model
from megasparse.placement import local_weights
from tests import small
from tests.helpers import run_distributed


def engine_of(recipe: Recipe, place: topology.Topology) -> Engine:
    return Engine(recipe, place, *build_model(recipe, place, small.VOCAB))


def held(raw: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, int, int]]]:
    """Elements of this rank's local weights, and (weight, first, last) of its fragments. Checked here: masters are the
    weights, and what is written into them becomes the weights."""
    recipe = Recipe.model_validate(raw)
    engine = engine_of(recipe, small.start(recipe))
    weights = {weight.name: weight.tensor.detach() for weight in local_weights(engine.chunks, engine.topology)}
    found = []
    for fragment in engine.fragments:
        name, start, end = fragment.weight.name, fragment.start, fragment.start + len(fragment.master)
        part = weights[name].view(-1)[start:end].float().clone()
        assert fragment.state == {}
        assert torch.equal(fragment.master, part)
        fragment.master.neg_()
        found.append((name, start, end, part))
    engine.follow_loaded()
    for name, start, end, part in found:
        assert torch.equal(weights[name].view(-1)[start:end].float(), -part), name
    return {name: weight.numel() for name, weight in weights.items()}, [item[:3] for item in found]


@pytest.mark.parametrize(
    ("precision", "parallel"),
    [
        ("fp32", {"zero_stage": 0}),
        ("fp32", {"zero_stage": 1, "offload_optimizer": True}),
        ("fp32", {"zero_stage": 1, "ep": 2}),
        ("fp16", {"zero_stage": 2}),
        ("bf16", {"zero_stage": 1}),
        ("bf16", {"zero_stage": 1, "ep": 2}),
        ("bf16", {"zero_stage": 2}),
    ],
    ids=str,
)
def test_every_element_of_a_weight_is_held_once(precision: str, parallel: dict[str, Any]) -> None:
    """On two ranks: by one of them under ZeRO, by both without it, experts of a rank by itself."""
    recipe = small.recipe(moe={"layers": [0, 1]}, training={"precision": precision}, parallel=parallel)
    ranks = run_distributed(held, 2, recipe.model_dump(mode="json"))
    for name, size in ranks[0][0].items():
        covered = [[(first, last) for other, first, last in found if other == name] for _, found in ranks]
        everywhere = parallel["zero_stage"] == 0 or (".experts." in name and "ep" in parallel)
        for ranges in covered if everywhere else [sorted(covered[0] + covered[1])]:
            assert [0, *(last for _, last in ranges)] == [*(first for first, _ in ranges), size], name


# Norm and clipping over expert-parallel ranks ------------------------------------------------------------------------

LOCAL = {0: {"w1": 4.0, "w3": 16.0}, 1: {"w1": 36.0, "w3": 64.0}}  # squared norms: 20 on rank 0, 100 on rank 1


def known_gradients(raw: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """(norm, norms of Adam's first moments) after a step whose gradients are all zero but for two expert weights."""
    recipe = Recipe.model_validate(raw)
    place = small.start(recipe)
    engine = engine_of(recipe, place)
    loss = torch.zeros(())
    for name, parameter in engine.chunks.named_parameters():
        square = LOCAL[place.rank].get(name.rsplit(".", 1)[1], 0.0) if "layers.0.mlp.experts" in name else 0.0
        value = math.sqrt(square / parameter.numel()) * place.replicas  # DeepSpeed divides by the replicas
        loss = loss + (parameter.float() * value).sum() * engine.loss_scale()
    loss.backward()
    engine._finalize_gradients(None)
    engine._norm = engine.fragments.gradient_norm()
    engine._clip_and_step(good=True)
    moments = {"w1": 0.0, "w3": 0.0, "others": 0.0}
    for fragment in engine.fragments:
        name = fragment.weight.name
        key = name[-2:] if "layers.0.mlp.experts" in name and name[-2:] in moments else "others"
        moments[key] += fragment.state["exp_avg"].double().square().sum().item()
    return engine._norm / engine.loss_scale(), moments


@pytest.mark.parametrize(
    ("precision", "parallel"),
    [
        ("fp32", {"ep": 2, "zero_stage": 0}),
        ("fp32", {"ep": 2}),
        ("fp32", {"ep": 2, "zero_stage": 2}),
        ("fp32", {"ep": 2, "offload_optimizer": True}),
        ("fp32", {"ep": 2, "tp": 2}),
        ("bf16", {"ep": 2}),
        ("bf16", {"ep": 2, "zero_stage": 2}),
        ("fp16", {"ep": 2}),
    ],
    ids=str,
)
def test_norms_of_expert_ranks_add_as_squares(precision: str, parallel: dict[str, Any]) -> None:
    """sqrt(20) on one rank and sqrt(100) on the other are sqrt(120) = 10.954452; their mean 7.236068 is the known
    mistake (DeepSpeed pull request 8478). Clipped to 1, each gradient is divided by the norm: Adam's first moment
    after a step is 0.1 of that."""
    training = {"precision": precision, "loss_scale": 4.0}
    recipe = small.recipe(moe={"num_experts": 4}, training=training, parallel=parallel)
    ranks = run_distributed(known_gradients, 2, recipe.model_dump(mode="json"))
    rounding = 1e-6 if precision == "fp32" else 5e-3  # what is summed are gradients of that precision
    for rank, (norm, moments) in enumerate(ranks):
        assert norm == pytest.approx(10.954452, rel=rounding)
        for name, square in LOCAL[rank].items():
            assert moments[name] == pytest.approx(0.01 * square / 120, rel=10 * rounding), name
        assert moments["others"] == 0
