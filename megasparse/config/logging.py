"""``logging``: where metrics go, and which steps are profiled."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, field_validator

from megasparse.config.section import Section


class Logging(Section):
    """Where metrics go besides the console and metrics.jsonl, and which steps are profiled."""

    log_interval: PositiveInt = 1
    tensorboard: bool = True
    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "megasparse"
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None  # the first and the last, counted from 1
    profile_ranks: tuple[NonNegativeInt, ...] = (0,)  # that profile these steps, and those asked for during the run

    @field_validator("profile_steps")
    @classmethod
    def _check(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and steps[1] < steps[0]:
            raise ValueError(f"profile_steps={list(steps)}: the last step is before the first, exchange them")
        return steps
