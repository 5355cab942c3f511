"""The sparsity section: which weights it takes and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.recipes import assert_refused

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"sparsity.weights": {"method": "sr_ste"}}, "method=sr_ste needs decay: 6e-5 to 2e-4"),
    ({"sparsity.weights": {"method": "ste", "decay": 1e-4}}, "decay=0.0001 with method=ste: it has none, unset it"),
    ({"sparsity.weights": {"method": "s_ste", "mask": "row"}}, "mask=row with method=s_ste: it has none"),
    ({"sparsity.weights": {"method": "s_ste", "dense_end": 0.1}}, "dense_end=0.1 with method=s_ste: it has none"),
    ({"sparsity.weights": {"method": "asp", "refresh_interval": 5, "dense_start": 0.5}}, "refresh_interval=5 with "),
    (
        {"sparsity.weights": {"method": "sr_ste", "decay": 1e-4, "ramp": 0.9, "dense_end": 0.2}},
        "dense_start=0.0 + ramp=0.9 + dense_end=0.2 are more than the run",
    ),
    ({"sparsity.weights": {"method": "ast"}}, "method=ast needs decay"),
    ({"sparsity.weights": {"method": "ste", "boost": 16}}, "boost=16 with method=ste: it has none"),
    ({"sparsity.weights": {"method": "ast", "decay": 1, "boost": 16, "dense_end": 0.1}}, "boost=16 with dense_end=0.1"),
    ({"sparsity.weights": {"method": "ste", "pattern": "1:4"}}, "pattern=1:4 with method=ste: it has none"),
    ({"sparsity.weights": {"method": "mdgf", "pattern": "4:4"}}, "pattern=4:4 masks nothing"),
    ({"sparsity.weights": {"method": "mdgf", "pattern": "half"}}, "sparsity.weights.pattern = 'half': "),
    (
        {"sparsity.weights": {"method": "mdgf", "pattern": "1:8", "mask": "transposable"}},
        "mask=transposable with pattern",
    ),
    ({"sparsity.weights": {"method": "sdgf"}}, "set ramp"),
    ({"sparsity.weights": {"method": "ste", "targets": ["("]}}, "targets: '(' is not a regular expression"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str):
    assert_refused(changes, message)
