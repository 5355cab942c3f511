"""What one rank is asked, all hear; who is slow is named."""

from __future__ import annotations

import os
import socket

import pytest

from megasparse import topology
from megasparse.layout import Layout
from megasparse.pulse import Heard, Pulse, Straggler
from megasparse.signals import Signals
from tests.helpers import run_distributed


def pulses(asked: dict[int, tuple[str | None, bool]], seconds: list[float]) -> tuple[list[Heard], list[Straggler]]:
    """Two steps; before the first, ranks are ``asked`` to stop by a signal and to profile."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    topology.initialize(Layout(dp=world))
    signals, pulse = Signals(), Pulse(Layout(dp=world), 2, 1.5)
    signals.stop, signals.profile = asked.get(rank, (None, False))
    first = pulse.exchange(signals, seconds[rank])
    assert pulse.stragglers() == []
    signals.stop = None
    second = pulse.exchange(signals, seconds[rank])
    found = pulse.stragglers()
    assert pulse.stragglers() == []
    return [first, second], found


def test_one_is_asked_and_all_hear() -> None:
    for heard, stragglers in run_distributed(pulses, 3, {1: ("SIGUSR1", False), 2: (None, True)}, [1.0, 1.0, 1.2]):
        assert [(beat.stop, beat.profile) for beat in heard] == [("SIGUSR1", True), (None, False)]
        assert heard[0].spread == pytest.approx(1.2)
        assert stragglers == []


def test_of_two_signals_the_same_one_is_heard_by_all() -> None:
    results = run_distributed(pulses, 2, {0: ("SIGTERM", False), 1: ("SIGUSR1", False)}, [1.0, 1.0])
    assert len({heard[0].stop for heard, _ in results}) == 1


def test_a_slow_rank_is_named() -> None:
    for heard, (slow,) in run_distributed(pulses, 3, {}, [0.1, 0.5, 0.2]):
        assert slow == Straggler(1, socket.gethostname(), 0.5, 0.2)
        assert heard[1].spread == pytest.approx(2.5)
    assert str(slow) == (
        f"rank 1 on {socket.gethostname()} is slow: 0.500 s of its own a step, 2.5 times the median of 0.200 s"
    )


def of_stages(seconds: list[float]) -> Heard:
    rank = int(os.environ["RANK"])
    place = topology.initialize(Layout(pp=2, dp=2))
    assert place.pp_rank == rank // 2, "the ranks of a stage follow each other"
    return Pulse(place, 100, 1.5).exchange(Signals(), seconds[rank])


def test_each_pipeline_stage_has_its_time_and_memory() -> None:
    for heard in run_distributed(of_stages, 4, [0.1, 0.2, 0.4, 0.3]):
        assert heard.stage_seconds == [0.2, 0.4]
        assert len(heard.stage_memory) == 2
        assert all(0.05 < memory < 24 for memory in heard.stage_memory)
