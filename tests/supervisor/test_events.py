"""faults.jsonl: what is written is read again, in order, whoever wrote it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from megasparse.metrics.record import read_faults
from megasparse.supervisor import append_event


def test_events(tmp_path: Path) -> None:
    append_event(tmp_path, "hang", "rank 3 on n2 made no progress", 7, 3, "n2")
    append_event(tmp_path, "signal", "SIGUSR1: saved", 8)
    first, second = read_faults(tmp_path)
    assert abs((datetime.fromisoformat(first.pop("time")) - datetime.now().astimezone()).total_seconds()) < 60
    assert first == {
        "step": 7,
        "kind": "hang",
        "rank": 3,
        "host": "n2",
        "message": "rank 3 on n2 made no progress",
    }
    assert (second["step"], second["rank"], second["host"]) == (8, None, None)


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        append_event(tmp_path / "gone", "hang", "")
