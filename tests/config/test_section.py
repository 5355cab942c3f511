"""Any section: no key it does not know, none left out, no value changed."""

from __future__ import annotations

from typing import Any

import pytest

from megasparse.config import parse_recipe
from tests.config.recipes import assert_refused, raw

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"modle": {}}, "modle: unknown key"),
    ({"model.moe.experts": 4}, "model.moe.experts: unknown key"),
    ({"model.num_layers": None}, "model.num_layers: missing"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str):
    assert_refused(changes, message)


def test_values_are_fixed_once_read():
    recipe = parse_recipe(raw())
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]
