"""The faults section: what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from megasparse.config import Faults, parse_recipe
from tests.config.recipes import assert_refused, raw

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"faults.spike_deviations": -1}, "faults.spike_deviations = -1: "),
    ({"faults.spike_deviations": float("nan")}, "faults.spike_deviations = nan: "),
    ({"faults.spike_window": 7}, "faults.spike_window = 7: "),
    ({"faults.retry": "perhaps"}, "faults.retry = 'perhaps': "),
    ({"faults.max_skipped_steps": 0}, "faults.max_skipped_steps = 0: "),
    ({"faults.max_rollbacks": -1}, "faults.max_rollbacks = -1: "),
    ({"faults.check_replicas_interval": -1}, "faults.check_replicas_interval = -1: "),
    ({"faults.hang_minutes": 0}, "faults.hang_minutes = 0: "),
    ({"faults.straggler_interval": 0}, "faults.straggler_interval = 0: "),
    ({"faults.straggler_factor": 1.0}, "faults.straggler_factor = 1.0: "),
    ({"faults.max_skips": 3}, "faults.max_skips"),
    (
        {"faults.spike_deviations": 6.0, "training.precision": "fp16"},
        "faults.spike_deviations=6.0 with training.precision=fp16",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str):
    assert_refused(changes, message)


def test_the_least_of_each_is_taken():
    least = {"spike_window": 8, "max_skipped_steps": 1, "straggler_interval": 1, "straggler_factor": 1.01}
    faults = parse_recipe(raw(**{f"faults.{name}": value for name, value in least.items()})).faults
    assert faults == Faults().model_copy(update=least)


def test_fp16_without_spikes_is_trained():
    assert parse_recipe(raw(**{"training.precision": "fp16"})).faults == Faults()
