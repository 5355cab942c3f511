"""``faults.jsonl`` of a run: what went wrong, and what was done about it, one JSON object a line."""

from __future__ import annotations

import json
import time
from pathlib import Path


def append_event(
    run_dir: Path, kind: str, message: str, step: int | None = None, rank: int | None = None, host: str | None = None
) -> None:
    """Add one; several processes may. ``step``: of the run, from 1. OSError if it cannot be written."""
    clock = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    event = {"time": clock, "step": step, "kind": kind, "rank": rank, "host": host, "message": message}
    with (run_dir / "faults.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
