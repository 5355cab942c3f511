"""A run's metrics on their way to metrics.jsonl, TensorBoard, wandb and the screen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megasparse.config import Recipe
from megasparse.files import write_atomic
from megasparse.metrics.console import Console
from megasparse.metrics.record import line_of, read_metrics
from megasparse.metrics.trackers import Wandb, tensorboard


class MetricsLogger:
    """Rank 0's record of a run; on other ranks every method does nothing.

    ``metrics.jsonl`` has one JSON object a step: ``step``, the metrics, and under ``timing`` everything that depends on
    the clock, with ``time`` in seconds since 1970, so that the rest is the same to the bit in a run that was killed
    and resumed. A value that is not finite is null there. The console shows a progress bar, or a plain line every
    ``log_interval`` steps where the output is not a terminal. Names it knows: ``loss``, ``learning_rate``,
    ``grad_norm``, ``expert_load``, ``dropped_fraction``, ``block_density``, ``attention_recall``; timing's
    ``tokens_per_second`` and ``mfu``. All are
    optional.
    """

    def __init__(self, run_dir: Path, recipe: Recipe, first_step: int = 1, rank: int = 0) -> None:
        """``first_step`` is the number of the next step (from 1): what a killed run had recorded from there on is
        removed, for it is about to be done again."""
        self.active = rank == 0
        if not self.active:
            return
        self.run_dir, self.recipe = run_dir, recipe
        run_dir.mkdir(parents=True, exist_ok=True)
        self._open(first_step)
        self._wandb = Wandb(run_dir, recipe)
        self._console = Console(recipe.training.steps, first_step, recipe.logging.log_interval)

    def _open(self, first_step: int) -> None:
        path = self.run_dir / "metrics.jsonl"
        kept = [record for record in read_metrics(self.run_dir) if record["step"] < first_step]
        write_atomic(path, "".join(line_of(record) for record in kept))
        self._file = path.open("a")
        self._tensorboard = tensorboard(self.run_dir, first_step) if self.recipe.logging.tensorboard else None

    def rewind(self, first_step: int) -> None:
        """Go back: ``first_step`` is next, and what was recorded from there on is removed."""
        if self.active:
            self._close_files()
            self._open(first_step)

    def _close_files(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def log(self, step: int, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Record step number ``step``. Values are numbers, or (lists of) numbers for metrics.jsonl alone."""
        if not self.active:
            return
        line = line_of({"step": step, **metrics, "timing": {**timing, "time": round(time.time(), 3)}})
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise ValueError(f"could not write {self._file.name}: {error.strerror}; resume when it can be") from None
        scalars = {key: value for key, value in {**metrics, **timing}.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for key, value in scalars.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()
        self._wandb.log({"step": step, **scalars})
        self._console.update(step, scalars)

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            self._console.say(message)

    def close(self) -> None:
        """Write out what is buffered; wandb gets at most a minute."""
        if not self.active:
            return
        self._console.close()
        self._close_files()
        self._wandb.close()
