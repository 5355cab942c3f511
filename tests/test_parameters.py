"""Names and shapes of the recipe against the model that is built, and their sum against transformers'."""

from __future__ import annotations

from typing import Any

import pytest

from megasparse import topology
from megasparse.model import build_model
from megasparse.parameters import parameter_count, parameters, router_buffers
from megasparse.placement import local_buffers, local_weights
from tests import small
from tests.test_flops import MODELS, SEQ, VOCAB

GPT2 = {"position_embedding": "learned", "normalization": "LayerNorm", "bias": "all", "activation": "gelu"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "gpt2": ({**GPT2, "tie_embeddings": True}, None),
    "more positions": ({**GPT2, "max_position_embeddings": 50}, None),
    "experts in some layers": (
        {"num_layers": 4, "qk_norm": "full", "norm_placement": "post", "bias": "qkv"},
        {"layers": 2, "shared_expert_ffn_hidden_size": 40},
    ),
    "heads of any size": (
        {"head_dim": 12, "qk_norm": "head", "norm_placement": "post", "normalization": "RMSNorm"},
        {},
    ),
    "biases and a gated mlp": ({"bias": "all", "normalization": "LayerNorm", "norm_placement": "post"}, None),
    "gate": ({"sparse_attention": {"selector": "gate", "blocks": 8, "gate_dim": 5, "layers": [0, 1]}}, None),
    "nsa": ({"sparse_attention": {"selector": "nsa", "blocks": 8}, "qk_norm": "head"}, None),
    "clusters": ({"sparse_attention": {"selector": "clusters", "blocks": 8, "clusters": 3}}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_the_model(single: topology.Topology, case: str) -> None:
    recipe = small.recipe(*CASES[case])
    chunks, _ = build_model(recipe, single, small.VOCAB)
    built = {weight.name: weight.shape for weight in local_weights(chunks, single)}
    assert built == parameters(recipe.model, small.VOCAB, small.SEQ)
    assert parameter_count(recipe.model, small.VOCAB, small.SEQ).total == sum(p.numel() for p in chunks.parameters())
    assert {buffer.name: buffer.shape for buffer in local_buffers(chunks, single)} == router_buffers(recipe.model)


@pytest.mark.parametrize("make", MODELS)
def test_the_count_is_transformers(make: Any) -> None:
    model, reference = make()
    count = parameter_count(model, VOCAB, SEQ)
    assert count.total == sum(p.numel() for p in reference.parameters())
    idle = 3 * 6 * 3 * 32 * 40 if model.moe else 0  # 3 layers x 6 idle experts x 3 matrices
    assert count.active == count.total - idle
