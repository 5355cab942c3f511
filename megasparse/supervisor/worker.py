"""The rank's side: starting under a supervisor, telling it how far one is, and what went wrong."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from megasparse.launch import Launch

T = TypeVar("T")
VARIABLE = "MEGASPARSE_SUPERVISOR"  # "none": no supervisor; set by one: its socket, and the file for stacks
RESUME = 75  # exit status of a run that saved and ended because it was told to (EX_TEMPFAIL): start it again to go on
ANSWER_SECONDS = 10.0  # how long a rank that raised waits for the hub to have heard of it


def supervise(place: Launch) -> None:
    """Become the supervisor of this command and end with its exit status, unless it has one already, or
    MEGASPARSE_SUPERVISOR=none says that it shall have none (for a debugger)."""
    if VARIABLE not in os.environ:
        from megasparse.supervisor.guard import guard

        sys.exit(guard(place, [sys.executable, *sys.orig_argv[1:]]))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # until training profiles at it
    if os.environ[VARIABLE] != "none":
        faulthandler.enable()  # a crash in C code: its Python traceback, on stderr
        faulthandler.register(signal.SIGQUIT, file=_descriptors()[1], all_threads=True)


def tell(**content: Any) -> bool:
    """Send ``content`` to the supervisor; False if there is none (any more)."""
    if os.environ.get(VARIABLE, "none") == "none":
        return False
    try:
        os.write(_descriptors()[0], json.dumps(content).encode() + b"\n")
    except OSError:
        return False
    return True


def report(kind: str, message: str, traceback: str = "") -> bool:
    """Leave it to the supervisor to print an error ("refused" or "raised"): True when all know of it, so that what this
    rank's end does to the others comes second; False if there is none."""
    if not tell(say=kind, message=message, traceback=traceback):
        return False
    with socket.socket(fileno=os.dup(_descriptors()[0])) as line:
        line.settimeout(ANSWER_SECONDS)
        try:
            line.recv(1)
        except OSError:
            return False
    return True


class Beats:
    """Tells the supervisor that work goes on; it ends the job when nothing was heard for ``minutes``."""

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._last = now, 0.0
        tell(say="watch", minutes=minutes)

    def beat(self, step: int | None = None) -> None:
        """Call it as often as you like; ``step``: that so many steps are done, which is always told."""
        now = self._now()
        if step is not None or now - self._last > 1.0:
            self._last = now
            tell(say="beat", step=step)

    def during(self, work: Iterable[T]) -> Iterator[T]:
        """What ``work`` yields, with a beat for each."""
        for part in work:
            self.beat()
            yield part


def _descriptors() -> tuple[int, int]:
    """The socket to the supervisor, the file for stacks."""
    line, stacks = os.environ[VARIABLE].split(",")
    return int(line), int(stacks)
