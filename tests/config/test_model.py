"""The model section: what follows from it and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from megasparse.config import parse_recipe
from tests.config.recipes import assert_refused, raw


def test_derived_numbers():
    model = parse_recipe(raw(**{"model.moe.layers": 2})).model
    assert model.moe_layers == [False, True, False, True]
    assert (model.kv_heads, model.head_size, model.ffn_size) == (2, 16, 256)
    assert parse_recipe(raw(**{"model.moe.layers": [1, 0, 0, 1]})).model.moe_layers == [True, False, False, True]
    assert parse_recipe(raw(**{"model.moe": None})).model.moe_layers == [False] * 4


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model.num_layers": 0}, "model.num_layers = 0: "),
    ({"model.num_layers": "four"}, "model.num_layers = 'four': "),
    ({"model.moe.top_k": 9}, "top_k=9 is more than num_experts=8"),
    ({"model.hidden_size": 66}, "hidden_size=66 is not divisible by num_attention_heads=4"),
    ({"model.num_query_groups": 3}, "num_attention_heads=4 is not divisible by num_query_groups=3"),
    ({"model.head_dim": 15}, "head_dim=15 with rope.percent=1 rotates 15 channels"),
    ({"model.normalization": "LayerNorm", "model.qk_norm": "head"}, "qk_norm=head needs normalization=RMSNorm"),
    ({"model.moe.layers": [1, 0]}, "moe.layers has 2 flags for num_layers=4"),
    ({"model.moe.layers": 5}, "moe.layers selects no layer"),
    ({"model.activation": "gelu"}, "moe experts are bias-free SwiGLU"),
    ({"model.moe.num_groups": 4}, "num_groups and top_k_groups go together"),
    ({"model.moe.num_groups": 3, "model.moe.top_k_groups": 1}, "num_experts=8 is not divisible by num_groups=3"),
    ({"model.moe.num_groups": 8, "model.moe.top_k_groups": 4}, "num_experts / num_groups must be >= 2"),
    ({"model.moe.num_groups": 4, "model.moe.top_k_groups": 5}, "top_k_groups=5 is more than num_groups=4"),
    (
        {"model.moe.num_groups": 4, "model.moe.top_k_groups": 1, "model.moe.top_k": 3},
        "top_k=3 is more than the experts in top_k_groups=1 groups",
    ),
    ({"model.rope.scaling": "yarn"}, "scaling=yarn needs original_max_position_embeddings"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str):
    assert_refused(changes, message)
