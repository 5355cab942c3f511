"""Bad steps: done again, skipped, counted; and the record of a run's faults."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint.load import load
from megasparse.checkpoint.state import random_state, set_random_state
from megasparse.config import Faults
from megasparse.data.loader import Batch
from megasparse.engine import Engine, Limits, StepResult
from megasparse.metrics.log import MetricsLogger
from megasparse.replicas import check_replicas
from megasparse.supervisor import append_event


class FaultLog:
    """Rank 0 notes faults in ``faults.jsonl`` and says them; on other ranks ``note`` does nothing."""

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self.run_dir, self.say = run_dir, say

    def note(self, kind: str, message: str, step: int, rank: int | None = None, host: str | None = None) -> None:
        if dist.get_rank() == 0:
            try:
                append_event(self.run_dir, kind, message, step, rank, host)
            except OSError as error:
                self.say(f"could not note in {self.run_dir / 'faults.jsonl'}: {error.strerror}")
            self.say(f"step {step}: {message}")


class Spikes:
    """The losses and gradient norms of the last good steps, and what counts as a spike beside them."""

    def __init__(self, faults: Faults) -> None:
        self.deviations = faults.spike_deviations
        self.losses: deque[float] = deque(maxlen=faults.spike_window)
        self.grad_norms: deque[float] = deque(maxlen=faults.spike_window)

    def limits(self) -> Limits:
        """More than either is a spike."""
        return Limits(self._limit(self.losses), self._limit(self.grad_norms))

    def _limit(self, values: deque[float]) -> float:
        if self.deviations == 0 or 2 * len(values) < (values.maxlen or 0):
            return math.inf
        return statistics.fmean(values) + self.deviations * statistics.pstdev(values)

    def add(self, result: StepResult) -> None:
        self.losses.append(result.loss)
        self.grad_norms.append(result.grad_norm)

    def state(self) -> dict[str, Any]:
        """For the checkpoint; empty if nothing is a spike."""
        return {name: list(getattr(self, name)) for name in ("losses", "grad_norms") if self.deviations}

    def restore(self, state: dict[str, Any]) -> None:
        for name in ("losses", "grad_norms"):
            values = getattr(self, name)
            values.clear()
            values.extend(state.get(name, ()))


class Steps:
    """Optimizer steps as the recipe's ``faults`` wants them."""

    def __init__(self, engine: Engine, log: FaultLog) -> None:
        self.engine, self.log = engine, log
        self.faults = engine.recipe.faults
        self.spikes = Spikes(self.faults)
        self.skipped_in_a_row = 0
        self._may_retry = self.faults.retry and engine.recipe.training.precision != "fp16"

    def step(self, batches: list[Batch], step: int, learning_rate: float) -> StepResult:
        """Step ``step`` (from 0), a second time where that may mend it. What is skipped even so is counted."""
        limits = self.spikes.limits()
        generators = random_state(dist.get_rank()) if self._may_retry else {}
        result = self.engine.train_step(batches, step, learning_rate, limits)
        if result.skipped and self._may_retry:
            bad = result
            set_random_state(generators)
            result = self.engine.train_step(batches, step, learning_rate, limits, again=True)
            if not result.skipped:
                self.log.note("retried", f"{_what(bad, limits)} the first time; done again it was good", step + 1)
        if result.skipped:
            self.skipped_in_a_row += 1
            if self.engine.recipe.training.precision != "fp16":  # there it is how the loss scale is found
                self.log.note("skipped", f"{_what(result, limits)}; skipped", step + 1)
        else:
            self.skipped_in_a_row = 0
            self.spikes.add(result)
        return result

    @property
    def given_up(self) -> bool:
        """Have there been too many bad steps in a row?"""
        return self.skipped_in_a_row == self.faults.max_skipped_steps

    def begin_anew(self, state: dict[str, Any]) -> None:
        """From a checkpoint whose manifest has ``state``."""
        self.skipped_in_a_row = 0
        self.spikes.restore(state)


def roll_back(steps: Steps, metrics: MetricsLogger, step: int, before: int) -> int:
    """Back to the last checkpoint before the bad steps that end with ``step``; returns its step. ValueError if the
    recipe does not want it, or no more often than the ``before`` times it happened."""
    recipe, bad = steps.engine.recipe, steps.skipped_in_a_row
    problem = f"{bad} steps in a row had a loss or gradient norm that was not finite or spiked, last step {step}"
    good = checkpoints.newest_before(steps.log.run_dir / "checkpoints", step - bad)
    if before == recipe.faults.max_rollbacks or good is None:
        why = "; there is no checkpoint before them" if recipe.faults.max_rollbacks and good is None else ""
        raise ValueError(
            f"{problem}{why}: lower optimizer.lr={recipe.optimizer.lr}, raise faults.max_rollbacks="
            f"{recipe.faults.max_rollbacks}, or resume from an earlier checkpoint"
        )
    steps.log.note("rollback", f"{problem}: back to {good.name}", step)
    first = load(steps.engine, good)
    if dist.get_rank() == 0:
        checkpoints.set_latest(good)
    steps.begin_anew(checkpoints.read_manifest(good).get("faults", {}))
    metrics.rewind(first + 1)
    return first


def refuse_differing(engine: Engine, log: FaultLog, step: int) -> None:
    """ValueError on every rank if some copies of a weight differ."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, check_replicas(engine))
    differing = sorted(filter(None, found), key=lambda text: (" (" not in text, text))  # the odd rank's own, if any
    if differing:
        log.note("replicas_differ", differing[0], step)
        raise ValueError(
            f"after step {step} {differing[0]}: a device or its memory is at fault; take that host out and resume from "
            "the last checkpoint"
        )


def _what(result: StepResult, limits: Limits) -> str:
    for name, value, limit in (
        ("loss", result.loss, limits.loss),
        ("gradient norm", result.grad_norm, limits.grad_norm),
    ):
        if not math.isfinite(value):
            return f"the {name} was not finite"
        if value > limit:
            return f"the {name} spiked to {value:.4g}, over {limit:.4g}"
    raise AssertionError("a step is skipped for its loss or its norm")
