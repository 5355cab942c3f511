"""A recipe to change, and what is wrong with it then."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megasparse.config import parse_recipe


def raw(**changes: Any) -> dict[str, Any]:
    """A valid recipe, with dotted changes."""
    recipe: dict[str, Any] = {
        "name": "tiny",
        "data": {"sets": [{"path": "data/stdlib"}], "seq_length": 64},
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 32},
        },
        "training": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
    }
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        node = recipe
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None:
            node.pop(leaf, None)
        else:
            node[leaf] = value
    return recipe


def assert_refused(changes: dict[str, Any], message: str) -> None:
    """In one line that says what."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_recipe(raw(**changes), source="recipe.yaml")
    assert str(error.value).startswith("recipe.yaml: ")
    assert "\n" not in str(error.value)
