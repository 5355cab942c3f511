"""``logging``: where metrics go."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from megasparse.config.section import Section


class Logging(Section):
    """Where metrics go besides the console and metrics.jsonl."""

    log_interval: PositiveInt = 1
    tensorboard: bool = True
    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "megasparse"
