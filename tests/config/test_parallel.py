"""The parallel section: what it refuses; what goes together is test_layout.py's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.recipes import assert_refused

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"parallel.zero_stage": 4}, "parallel.zero_stage = 4: "),
    ({"parallel.world_size": 0}, "parallel.world_size = 0: "),
    ({"parallel.deepspeed.reduce_bucket_size": 0}, "parallel.deepspeed.reduce_bucket_size = 0: "),
    ({"parallel.deepspeed.overlap_comm": True}, "parallel.deepspeed.overlap_comm: unknown key"),
    ({"parallel.layers_per_stage": [2, 0]}, "parallel.layers_per_stage.1 = 0: "),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str):
    assert_refused(changes, message)
