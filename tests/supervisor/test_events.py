"""faults.jsonl: what is written is read again, in order, whoever wrote it."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import pytest

from megasparse.metrics.record import read_faults
from megasparse.supervisor import append_event
from tests.helpers import run_distributed


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


def note_many(run_dir: Path) -> None:
    for step in range(100):
        append_event(run_dir, os.environ["RANK"], "a line of " + "many words " * 30, step)


def test_several_processes_at_once(tmp_path: Path) -> None:
    """No line is torn or lost, and each process's are in order."""
    run_distributed(note_many, 3, tmp_path)
    events = read_faults(tmp_path)
    for rank in "012":
        assert [event["step"] for event in events if event["kind"] == rank] == list(range(100))
    assert len(events) == 300


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        append_event(tmp_path / "gone", "hang", "")
