"""The logging section: what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.recipes import assert_refused

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"logging.wandb": "yes"}, "logging.wandb = 'yes': "),
    (
        {"logging.profile_steps": [5, 3]},
        "logging.profile_steps: profile_steps=[5, 3]: the last step is before",
    ),
    ({"logging.profile_steps": [0, 3]}, "logging.profile_steps.0 = 0: "),
    ({"logging.profile_ranks": [-1]}, "logging.profile_ranks.0 = -1: "),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str):
    assert_refused(changes, message)
