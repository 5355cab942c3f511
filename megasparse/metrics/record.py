"""metrics.jsonl and faults.jsonl, a JSON object a line: how a line is written and how the files are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any


def line_of(record: Mapping[str, Any]) -> str:
    """The record as a line of metrics.jsonl, to the bit; what is not finite is null."""
    return json.dumps(_finite(dict(record)), allow_nan=False) + "\n"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in order; a last line cut short by a kill is left out. Empty if there is none."""
    return _read_lines(run_dir / "metrics.jsonl")


def read_faults(run_dir: Path) -> list[dict[str, Any]]:
    """What went wrong in the run, in order: faults.jsonl, each with ``time`` (ISO 8601), ``step``, ``kind``, ``rank``,
    ``host`` and ``message``, of which step, rank and host may be null. Empty if there is none."""
    return _read_lines(run_dir / "faults.jsonl")


class Follower:
    """Reads metrics.jsonl as it grows: each ``read`` gives the records that are new.

    A resumed run rewrites the file without the steps that it does again. That is seen by the last line read, which is
    no longer where it was: ``restarted`` is then true, and the records are those of the whole file.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.restarted = False
        self._end, self._last = 0, b""

    def read(self) -> list[dict[str, Any]]:
        """The new whole lines; a line that is being written waits for the next time."""
        self.restarted = False
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self.restarted, self._end, self._last = self._end > 0, 0, b""
            return []
        with file:
            file.seek(self._end - len(self._last))
            if file.read(len(self._last)) != self._last:
                self.restarted, self._end, self._last = True, 0, b""
                file.seek(0)
            lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if lines:
            self._end, self._last = self._end + sum(map(len, lines)), lines[-1]
        return [json.loads(line) for line in lines]


def moment(text: str) -> datetime:
    """ISO 8601 with any of ``+0000``, ``+00:00`` and ``Z``, or in local time without, as a time of this machine's zone.

    Raises ValueError for what is no time."""
    colon = re.sub(r"([+-]\d\d)(\d\d)$", r"\1:\2", text.replace("Z", "+00:00"))  # what Python 3.10 reads
    return datetime.fromisoformat(colon).astimezone()


def _read_lines(path: Path) -> list[dict[str, Any]]:
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
