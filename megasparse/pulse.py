"""What ranks tell each other after each step: was one asked to stop, and how long did each one's own part take."""

from __future__ import annotations

import socket
import statistics
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megasparse import platform
from megasparse.layout import Layout
from megasparse.signals import STOP, Signals


@dataclass(frozen=True)
class Heard:
    """The same on every rank."""

    stop: str | None  # the signal that some rank got
    profile: bool  # some rank was asked to
    spread: float  # the slowest rank's own seconds in this step, over the median
    stage_seconds: list[float]  # the slowest rank's of each pipeline stage
    stage_memory: list[float]  # GiB: the most that a rank of each pipeline stage has held so far


@dataclass(frozen=True)
class Straggler:
    rank: int
    host: str
    seconds: float  # of its own, a step
    median: float  # of all ranks

    def __str__(self) -> str:
        times = self.seconds / max(self.median, 1e-9)
        return (
            f"rank {self.rank} on {self.host} is slow: {self.seconds:.3f} s of its own a step, {times:.1f} times the "
            f"median of {self.median:.3f} s"
        )


class Pulse:
    """One all-gather of four numbers a step, over the world."""

    def __init__(self, layout: Layout, interval: int, factor: float) -> None:
        """Every ``interval`` steps a rank whose mean is more than ``factor`` times the median is a straggler."""
        self.stages, self.interval, self.factor = layout.pp, interval, factor
        self.hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self.hosts, socket.gethostname())
        self._seconds: list[list[float]] = []

    def exchange(self, signals: Signals, own_seconds: float) -> Heard:
        """After a step, on every rank. ``own_seconds``: before this rank waited for the others' gradients."""
        asked = [number.name for number in STOP].index(signals.stop) + 1 if signals.stop else 0
        values = [asked, signals.profile, own_seconds, platform.peak_memory() / 2**30]
        own = torch.tensor(values, dtype=torch.float64, device=platform.device())
        signals.profile = False
        everyone = own.new_empty(len(self.hosts) * len(values))
        dist.all_gather_into_tensor(everyone, own)
        stops, profiles, seconds, memory = everyone.view(-1, len(values)).T.tolist()
        self._seconds.append(seconds)
        return Heard(
            stop=STOP[int(max(stops)) - 1].name if any(stops) else None,
            profile=any(profiles),
            spread=max(seconds) / max(statistics.median(seconds), 1e-9),
            stage_seconds=self._by_stage(seconds),
            stage_memory=self._by_stage(memory),
        )

    def _by_stage(self, values: list[float]) -> list[float]:
        """The most of each pipeline stage, whose ranks follow each other."""
        size = len(values) // self.stages
        return [max(values[first : first + size]) for first in range(0, len(values), size)]

    def stragglers(self) -> list[Straggler]:
        """Who was slow, once ``interval`` steps have been seen; then it looks anew. Coupled ranks are slow together:
        those of one expert- or tensor-parallel group wait for each other in every layer."""
        if len(self._seconds) < self.interval:
            return []
        means = [statistics.mean(of_rank) for of_rank in zip(*self._seconds, strict=True)]
        self._seconds.clear()
        median = statistics.median_low(means)
        return [
            Straggler(rank, self.hosts[rank], mean, median)
            for rank, mean in enumerate(means)
            if mean > self.factor * median
        ]
