"""Signals are noted while a run lasts, and do what they did before and after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from megasparse.signals import Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_end(number: signal.Signals) -> None:
    with Signals() as signals:
        assert (signals.stop, signals.profile) == (None, False)
        os.kill(os.getpid(), number)
        assert (signals.stop, signals.profile) == (number.name, False)


def test_asked_to_profile() -> None:
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert (signals.stop, signals.profile) == (None, True)


def test_afterwards_they_are_what_they_were() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    try:
        with Signals():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert not caught
        os.kill(os.getpid(), signal.SIGUSR1)
        assert caught == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


OUTSIDE = """
import os, signal
from megasparse.signals import Signals
with Signals():
    os.kill(os.getpid(), {number})
print("inside", flush=True)
os.kill(os.getpid(), {number})
print("outside", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_outside_a_process_ends_at_them(number: signal.Signals) -> None:
    program = [sys.executable, "-c", OUTSIDE.format(number=int(number))]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("inside\n", -number), done.stderr


def test_they_are_what_they_were_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="in the run"), Signals():
        raise RuntimeError("in the run")
    assert signal.getsignal(signal.SIGTERM) == before
