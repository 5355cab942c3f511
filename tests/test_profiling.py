"""Windows of profiled steps: which steps are in them, and what is left of them."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from megasparse.config import Logging
from megasparse.profiling import Profiler

FLOATS = 5_000_000


def work(step: int) -> None:
    """A step: a product and, for as long as it lasts, 20 MB."""
    with record_function(f"work {step}"):
        held = torch.zeros(FLOATS)
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))
        del held


During = dict[int, Callable[[Profiler], Any]]


def run(folder: Path, steps: range, during: During | None = None, rank: int = 0, **settings: Any) -> list[str]:
    """Steps under a profiler, with something done in some of them; the names of the windows that are left."""
    profiler = Profiler(folder, rank, Logging(**settings), first_step=steps[0])
    for step in steps:
        work(step)
        if during and step in during:
            during[step](profiler)
        profiler.step(step)
    profiler.close()
    return sorted(path.name for path in (folder / "profile").glob("*"))


def steps_in(window: Path, rank: int = 0) -> set[int]:
    with gzip.open(window / f"rank_{rank}.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"]]
    return {int(name.split()[1]) for name in names if name.startswith("work ")}


def test_a_planned_window(tmp_path: Path):
    assert run(tmp_path, range(1, 6), profile_steps=(2, 3)) == ["step_2-3"]
    window = tmp_path / "profile" / "step_2-3"
    assert steps_in(window) == {2, 3}
    assert sorted(path.name for path in window.iterdir()) == ["rank_0.json.gz", "rank_0.memory.csv", "rank_0.txt"]
    assert "aten::mm" in (window / "rank_0.txt").read_text()
    rows = list(csv.reader((window / "rank_0.memory.csv").open()))
    assert rows[0] == ["microseconds", "bytes"]
    times, held = [float(row[0]) for row in rows[1:]], [int(row[1]) for row in rows[1:]]
    assert times == sorted(times)
    assert 4 * FLOATS <= max(held) < 4 * FLOATS + 100_000
    rises = sum(later >= 4 * FLOATS > before for before, later in pairwise([0, *held]))
    assert rises == 2  # one for each step
    assert held[-1] < 100_000


@pytest.mark.parametrize(("steps", "window"), [((1, 1), {1}), ((1, 3), {1, 2, 3}), ((4, 9), {4, 5})])
def test_windows_at_the_ends_of_a_run(tmp_path: Path, steps: tuple[int, int], window: set[int]):
    (name,) = run(tmp_path, range(1, 6), profile_steps=steps)
    assert name == f"step_{min(window)}-{max(window)}"
    assert steps_in(tmp_path / "profile" / name) == window


def test_a_run_resumed_within_the_window(tmp_path: Path):
    assert run(tmp_path, range(3, 8), profile_steps=(2, 4)) == ["step_3-4"]
    assert run(tmp_path / "later", range(6, 8), profile_steps=(2, 4)) == []
    assert run(tmp_path / "earlier", range(1, 3), profile_steps=(3, 4)) == []  # it would begin with the next step


def test_what_is_asked_for_begins_with_the_next_step(tmp_path: Path):
    """By a signal, as a user asks a run; the second request comes while the first window is open."""
    during: During = {
        2: lambda profiler: signal.signal(signal.SIGUSR2, lambda *_: profiler.request(2)),
        3: lambda _: os.kill(os.getpid(), signal.SIGUSR2),
        4: lambda profiler: profiler.request(1),
    }
    before = signal.getsignal(signal.SIGUSR2)
    try:
        assert run(tmp_path, range(1, 9), during) == ["step_4-5", "step_6-6"]
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert steps_in(tmp_path / "profile" / "step_4-5") == {4, 5}
    assert steps_in(tmp_path / "profile" / "step_6-6") == {6}


def test_only_the_ranks_of_the_recipe(tmp_path: Path):
    ask: During = {1: lambda profiler: profiler.request()}
    assert run(tmp_path, range(1, 4), ask, rank=1, profile_steps=(2, 3)) == []
    assert run(tmp_path, range(1, 4), rank=1, profile_steps=(2, 3), profile_ranks=[1, 5]) == ["step_2-3"]
    assert steps_in(tmp_path / "profile" / "step_2-3", rank=1) == {2, 3}


def test_nothing_is_left_where_nothing_is_asked_for(tmp_path: Path):
    assert run(tmp_path, range(1, 5)) == []


def test_a_disk_that_takes_nothing_stops_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "profile").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="megasparse"):
        profiler = Profiler(tmp_path, 0, Logging(profile_steps=(1, 1)))
        work(1)
        profiler.step(1)
    assert "no profile of steps 1 to 1: " in caplog.text
    assert (tmp_path / "profile").read_text() == "in the way"
