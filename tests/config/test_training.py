"""The training section, FP8 and a teacher: what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.recipes import assert_refused

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"training.teacher": {"weight": 0.5}}, "training.teacher.checkpoint: missing"),
    ({"training.teacher": {"checkpoint": "x", "weight": 1.5}}, "training.teacher.weight = 1.5: "),
    ({"training.teacher": {"checkpoint": "x", "temperature": 0}}, "training.teacher.temperature = 0: "),
    ({"training.fp8": {"recipe": "mxfp8"}}, "training.fp8.recipe = 'mxfp8': "),
    ({"training.fp8": {"recipe": "block", "margin": 1}}, "training.fp8: margin=1 with recipe=block: it has none"),
    ({"training.fp8": {"recipe": "current", "amax_history_len": 9}}, "amax_history_len=9 with recipe=current: it has"),
    (
        {"training.fp8": {"recipe": "current", "amax_compute_algo": "most_recent"}},
        "amax_compute_algo=most_recent with recipe=current: it has none, unset it",
    ),
    ({"training.keep_every": 3, "training.save_interval": 2}, "keep_every=3 is not a multiple of save_interval=2"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str):
    assert_refused(changes, message)
