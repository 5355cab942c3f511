"""What a run is asked to do from outside: SIGTERM and SIGUSR1 to save and end, SIGUSR2 to profile."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

STOP = (signal.SIGTERM, signal.SIGUSR1)  # Slurm's preemption, and --signal=USR1@seconds before the time limit
PROFILE = signal.SIGUSR2


class Signals:
    """Notes signals from ``with`` on, instead of ending at them; outside of it they are what they were."""

    def __init__(self) -> None:
        self.stop: str | None = None  # the name of the signal that asked for it
        self.profile = False

    def __enter__(self) -> Signals:
        self._before: list[tuple[signal.Signals, Any]] = [
            (number, signal.signal(number, self._note)) for number in (*STOP, PROFILE)
        ]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == PROFILE:
            self.profile = True
        else:
            self.stop = signal.Signals(number).name
