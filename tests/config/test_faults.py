"""The faults section: what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.recipes import assert_refused

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"faults.spike_deviations": -1}, "faults.spike_deviations = -1: "),
    ({"faults.spike_window": 4}, "faults.spike_window = 4: "),
    ({"faults.max_skipped_steps": 0}, "faults.max_skipped_steps = 0: "),
    ({"faults.hang_minutes": 0}, "faults.hang_minutes = 0: "),
    ({"faults.straggler_factor": 1.0}, "faults.straggler_factor = 1.0: "),
    (
        {"faults.spike_deviations": 6.0, "training.precision": "fp16"},
        "faults.spike_deviations=6.0 with training.precision=fp16",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str):
    assert_refused(changes, message)
