"""Copies of weights: one flipped bit is found, and named."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from megasparse.placement import is_expert, local_weights
from megasparse.replicas import check_replicas, fingerprint
from tests import small
from tests.helpers import run_distributed
from tests.test_engine import engine_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint(dtype: torch.dtype) -> None:
    """Against integers without bounds; any flipped bit changes it, and so do two elements that change places."""
    x = torch.randn(5, 7).to(dtype)
    integers = x.view(torch.int32 if dtype == torch.float32 else torch.int16).flatten().tolist()
    expected = sum(value * (2 * place + 1) for place, value in enumerate(integers)) % 2**64
    assert fingerprint(x).item() % 2**64 == expected
    for place in range(x.numel()):
        for bit in random.sample(range(8 * x.element_size()), 4):
            assert fingerprint(flipped(x, place, bit)) != fingerprint(x), (place, bit)
    swapped = x.flatten().clone()
    swapped[[1, 2]] = swapped[[2, 1]]
    assert fingerprint(swapped) != fingerprint(x)
    assert fingerprint(x.T.contiguous().T) == fingerprint(x)


def flipped(x: Tensor, place: int, bit: int) -> Tensor:
    raw = x.clone().contiguous().view(torch.uint8).flatten()
    raw[place * x.element_size() + bit // 8] ^= 1 << bit % 8
    return raw.view(x.dtype).view(x.shape)


def checked(recipe: Any, kind: str, rank: int) -> tuple[str | None, str | None, str]:
    """After two steps: what differs, then with one bit of a weight of ``kind`` flipped on ``rank``; its name."""
    place = small.start(recipe)
    engine = engine_of(recipe, place)
    for step in range(2):
        batches = small.batches(recipe, step, place.dp_rank, place.dp)
        engine.train_step(batches, step, 3e-3)
    before = check_replicas(engine)

    def fits(weight: Any) -> bool:
        match kind:
            case "expert":
                return is_expert(weight.tensor)
            case "norm":
                return "layernorm" in weight.name or "norm" in weight.name
            case "tied":
                return weight.name == "embedding.word_embeddings.weight"
            case _:
                return "linear_proj.weight" in weight.name

    chosen = next((weight for weight in local_weights(engine.chunks, place) if fits(weight)), None)
    if chosen is not None and int(os.environ["RANK"]) == rank:
        chosen.tensor.data.copy_(flipped(chosen.tensor.data, 5, 3))
    return before, check_replicas(engine), "" if chosen is None else chosen.name


@pytest.mark.parametrize(
    ("parallel", "world", "kind", "rank", "seen_by"),
    [
        ({}, 3, "dense", 1, {0, 1, 2}),
        ({"zero_stage": 0}, 3, "dense", 2, {0, 1, 2}),
        ({"tp": 2, "sequence_parallel": True}, 2, "norm", 1, {0, 1}),
        ({"ep": 2}, 4, "expert", 2, {0, 2}),
        ({"pp": 2}, 4, "dense", 3, {2, 3}),
        ({"pp": 3}, 3, "tied", 2, {0, 2}),
    ],
    ids=["dp3", "zero0", "tp2", "experts", "pp2", "tied"],
)
def test_one_flipped_bit(parallel: dict[str, Any], world: int, kind: str, rank: int, seen_by: set[int]) -> None:
    model = {"tie_embeddings": True, "num_layers": 3} if kind == "tied" else {}
    recipe = small.recipe(model, moe={}, training={"global_batch_size": 24}, parallel=parallel)
    results = run_distributed(checked, world, recipe, kind, rank)
    assert [before for before, _, _ in results] == [None] * world
    after = {number: found for number, (_, found, _) in enumerate(results) if found}
    assert after.keys() == seen_by
    name = results[rank][2]
    for found in after.values():
        assert f"holds another {name} than its copies (1 of " in found
        if len(seen_by) > 2:  # of two copies nobody knows which is right
            assert found.startswith(f"rank {rank} ")
        else:
            assert found.startswith(f"each of ranks {', '.join(map(str, sorted(seen_by)))} ")
