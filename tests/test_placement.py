"""Names and places of weights: every layout holds parts of the same model."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse import placement
from megasparse.config import Recipe
from megasparse.layout import Layout
from megasparse.model import build_model
from megasparse.placement import Slab, Weight, blocks, local_weights
from tests import small
from tests.helpers import run_distributed


def layout_weights(raw: dict[str, Any], vocab: int) -> list[tuple[str, tuple, list[tuple]]]:
    """This rank's initial weights: name, shape of the whole, and the parts of it that are here."""
    recipe = Recipe.model_validate(raw)
    place = small.start(recipe)
    chunks, _ = build_model(recipe, place, vocab)
    weights = local_weights(chunks, place)
    return [
        (w.name, w.shape, [(o, part.clone()) for o, part in blocks(w, 0, w.tensor.detach().reshape(-1))])
        for w in weights
    ]


def assembled(ranks: list[list[tuple[str, tuple, list[tuple]]]]) -> dict[str, torch.Tensor]:
    """The whole weights; where ranks hold the same part, they must agree."""
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, shape, parts in rank:
            tensor = whole.setdefault(name, torch.full(shape, torch.nan))
            for offsets, part in parts:
                here = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))]
                assert here.isnan().all() or torch.equal(here, part), name
                here.copy_(part)
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


@pytest.mark.parametrize("layout", ["tp2", "pp2vp2", "pp4", "ep4", "tp2pp2ep2", "tp2ep4", "cp2ep2"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_layout_starts_from_the_same_weights(layout: str, tied: bool) -> None:
    """To the bit, and every element of every weight is somewhere; 95 tokens make tp=2 pad the vocabulary."""
    recipe = small.recipe(
        {"num_layers": 5, "tie_embeddings": tied, "qk_norm": "full", "bias": "qkv"},
        {"layers": [0, 0, 1, 0, 1], "shared_expert_ffn_hidden_size": 16},
        {"micro_batch_size": 1},
    )
    raw, parsed = recipe.model_dump(mode="json"), Layout.parse(layout)
    reference = assembled(run_distributed(layout_weights, 1, raw, 95))
    ranks = run_distributed(layout_weights, parsed.world_size, {**raw, "parallel": parsed.parallel()}, 95)
    whole = assembled(ranks)
    assert whole.keys() == reference.keys()
    for name, value in reference.items():
        assert torch.equal(whole[name], value), name


@pytest.mark.parametrize(
    "slabs",
    [
        (Slab(0, (3, 5, 2), (0, 0, 0)),),
        (Slab(0, (2, 5, 2), (0, 0, 0)), Slab(20, (2, 5, 2), (6, 0, 0))),
        (Slab(0, (1, 5, 2), (4, 5, 0)),),
    ],
    ids=["whole", "two halves", "one row of it"],
)
def test_blocks_of_every_range(slabs: tuple[Slab, ...]) -> None:
    """Brute force: each element of each flat range lands where the slabs say, once, as a view that can be written."""
    count = max(slab.start + math.prod(slab.shape) for slab in slabs)
    local = torch.arange(count, dtype=torch.float32)
    weight = Weight("w", local, (9, 10, 2), slabs)
    home = torch.full(weight.shape, -1.0)
    for slab in slabs:
        for i, index in enumerate(itertools.product(*map(range, slab.shape))):
            home[tuple(o + j for o, j in zip(slab.offsets, index, strict=True))] = slab.start + i
    for start in range(count):
        for end in range(start, count + 1):
            found = torch.full(weight.shape, -1.0)
            flat = local[start:end].clone()
            for offsets, view in blocks(weight, start, flat):
                here = found[tuple(slice(o, o + n) for o, n in zip(offsets, view.shape, strict=True))]
                assert (here == -1).all(), "no element twice"
                here.copy_(view)
                view.zero_()
            expected = torch.where((home >= start) & (home < end), home, -1.0)
            assert torch.equal(found, expected), (start, end)
            assert not flat.any()


def test_a_norm_within_a_linear_layer_has_its_own_name() -> None:
    """Transformer Engine's LayerNormLinear: a checkpoint knows no difference."""
    layers = [SimpleNamespace(layer_number=4)]
    chunk = SimpleNamespace(decoder=SimpleNamespace(layers=layers))
    for theirs, ours in [
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.weight"),
        ("mlp.linear_fc1.layer_norm_bias", "pre_mlp_layernorm.bias"),
        ("input_layernorm.weight", "input_layernorm.weight"),
    ]:
        assert placement._global_name(chunk, f"decoder.layers.0.{theirs}") == f"decoder.layers.3.{ours}"
