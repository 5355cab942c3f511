"""The rank's side of its supervisor, with a socket in the supervisor's place."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from megasparse.supervisor import worker
from megasparse.supervisor.worker import Beats, report, tell


@pytest.fixture
def other_side(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        monkeypatch.setenv(worker.VARIABLE, f"{theirs.fileno()},2")
        yield ours


def heard(line: socket.socket) -> list[dict[str, object]]:
    return [json.loads(text) for text in line.recv(1 << 16).splitlines()]


def test_beats_are_no_more_than_one_a_second_but_for_steps(other_side: socket.socket) -> None:
    clock = iter([10.0, 10.5, 10.9, 11.2, 11.3])
    beats = Beats(2.5, lambda: next(clock))
    assert heard(other_side) == [{"say": "watch", "minutes": 2.5}]
    for _ in range(4):
        beats.beat()
    beats.beat(7)
    assert heard(other_side) == [{"say": "beat", "step": step} for step in (None, None, 7)]


def test_work_is_handed_through(other_side: socket.socket) -> None:
    assert list(Beats(1).during(iter("abc"))) == ["a", "b", "c"]
    assert heard(other_side)[1:] == [{"say": "beat", "step": None}]


def test_a_report_waits_until_it_is_known(other_side: socket.socket) -> None:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(report("raised", "raised X", "Traceback")))
    thread.start()
    assert heard(other_side) == [{"say": "raised", "message": "raised X", "traceback": "Traceback"}]
    assert not results
    other_side.send(b"\n")
    thread.join(10)
    assert results == [True]


def test_a_supervisor_that_is_gone(other_side: socket.socket) -> None:
    other_side.close()
    assert not tell(say="beat")
    assert not report("raised", "x")


def test_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(worker.VARIABLE, raising=False)
    assert not tell(say="beat")
    monkeypatch.setenv(worker.VARIABLE, "none")
    assert not tell(say="beat")
    assert os.environ[worker.VARIABLE] == "none"
