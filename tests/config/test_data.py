"""The data section: what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.recipes import assert_refused

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"data.sets": []}, "data.sets = []: "),
    ({"data.sets": [{"path": "x", "weight": 0}]}, "data.sets.0.weight = 0: "),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str):
    assert_refused(changes, message)
