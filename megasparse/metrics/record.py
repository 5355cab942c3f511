"""metrics.jsonl, one JSON object a step: how a line is written and how the file is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def line_of(record: Mapping[str, Any]) -> str:
    """The record as a line of metrics.jsonl, to the bit; what is not finite is null."""
    return json.dumps(_finite(dict(record)), allow_nan=False) + "\n"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in order; a last line cut short by a kill is left out. Empty if there is none."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut short
    return [json.loads(line) for line in lines]


def _finite(value: Any) -> Any:
    """JSON has no nan or infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
