"""Profiles of a few steps, planned in the recipe or asked for while a run goes on: where the time and the memory go."""

from __future__ import annotations

import gzip
import json
import logging
import os
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megasparse import platform
from megasparse.config import Logging
from megasparse.files import sync

logger = logging.getLogger("megasparse")

TABLE_ROWS = 60
SNAPSHOT_EVENTS = 1_000_000  # allocations and frees that a CUDA memory snapshot reaches back


class Profiler:
    """Profiles windows of steps on the ranks of ``logging.profile_ranks``; on the others every method does nothing.

    A window of steps A to B leaves in ``RUN/profile/step_A-B/``: ``rank_N.json.gz``, a trace for chrome://tracing and
    ui.perfetto.dev; ``rank_N.txt``, the operators by the time they take; and ``rank_N.memory.pickle``, a memory
    snapshot for pytorch.org/memory_viz, or without CUDA ``rank_N.memory.csv``: at each allocation and release the
    microsecond since the window began and the bytes allocated since then. Files appear whole. A disk that cannot take
    them is a warning.
    """

    def __init__(self, run_dir: Path, rank: int, settings: Logging, first_step: int = 1) -> None:
        """``first_step`` is the number of the next step, from 1: a window planned for it begins here."""
        self._folder, self._rank = run_dir / "profile", rank
        self._active = rank in settings.profile_ranks
        self._planned = settings.profile_steps
        self._requested = 0
        self._window = (0, 0)  # first and last step of the window that is open
        self._profile: profile | None = None
        self._done = first_step - 1
        self.step(self._done)

    def request(self, steps: int = 3) -> None:
        """Profile so many steps from the next one on, or once the open window is closed. A signal handler may call it:
        it only makes a note."""
        self._requested = steps

    def step(self, done: int) -> None:
        """After step number ``done``: close the window that ends with it, open the one that begins with the next."""
        if not self._active:
            return
        self._done = done
        if self._profile is not None and done >= self._window[1]:
            self._end()
        if self._profile is None and (window := self._next_window(done + 1)) is not None:
            self._window = window
            self._begin()

    def close(self) -> None:
        """Write what an open window has so far."""
        if self._profile is not None:
            self._end()

    def _next_window(self, step: int) -> tuple[int, int] | None:
        """The window that begins with this step."""
        if self._planned is not None and self._planned[0] <= step <= self._planned[1]:
            return step, self._planned[1]
        if self._requested > 0:
            steps, self._requested = self._requested, 0
            return step, step + steps - 1
        return None

    def _begin(self) -> None:
        cuda = platform.has_cuda()
        if cuda:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=SNAPSHOT_EVENTS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def _end(self) -> None:
        assert self._profile is not None
        stopped, self._profile = self._profile, None
        first, last = self._window[0], min(self._done, self._window[1])
        stopped.stop()
        try:
            if last >= first:
                self._write(stopped, self._folder / f"step_{first}-{last}")
        except OSError as error:
            logger.warning("no profile of steps %d to %d: %s", first, last, error)
        finally:
            if platform.has_cuda():
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, stopped: profile, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank_{self._rank}"
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.", suffix=".tmp") as aside:
            stopped.export_chrome_trace(f"{aside}/{name}.json.gz")
            order = "self_device_time_total" if platform.has_cuda() else "self_cpu_time_total"
            table = stopped.key_averages().table(sort_by=order, row_limit=TABLE_ROWS)
            Path(aside, f"{name}.txt").write_text(table)
            if platform.has_cuda():
                torch.cuda.memory._dump_snapshot(f"{aside}/{name}.memory.pickle")
            else:
                Path(aside, f"{name}.memory.csv").write_text(_memory_of(Path(aside, f"{name}.json.gz")))
            for file in Path(aside).iterdir():
                sync(file)
                os.replace(file, folder / file.name)
        sync(folder)
        logger.info("profile of steps %s: %s", folder.name.removeprefix("step_"), folder)


def _memory_of(trace: Path) -> str:
    """The CPU's allocations in a trace, as CSV."""
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    begin = min(event["ts"] for event in events if event["ph"] == "X")
    moments = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    moments.sort(key=lambda event: event["ts"])
    lines = [f"{event['ts'] - begin:.3f},{event['args']['Total Allocated']}" for event in moments]
    return "\n".join(["microseconds,bytes", *lines]) + "\n"
