"""Records of short runs."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from megasparse.config import Data, DataSet, Logging, Model, Recipe, Training
from megasparse.metrics.log import MetricsLogger


def recipe(**logging: Any) -> Recipe:
    return Recipe(
        name="tiny",
        data=Data(sets=[DataSet(path=Path("data/none"))]),
        model=Model(num_layers=3, hidden_size=32, num_attention_heads=4),
        training=Training(steps=20),
        logging=Logging(**{"tensorboard": False, "wandb": "disabled", **logging}),
    )


def figures(step: int) -> dict[str, Any]:
    values = {"loss": 5 / step + 0.1, "learning_rate": 1e-3 / step, "grad_norm": math.sqrt(step), "expert_load": 1.5}
    return {**values, "validation_loss": 5 / step} if step % 5 == 0 else values


def record(run_dir: Path, first: int, last: int, **logging: Any) -> None:
    log = MetricsLogger(run_dir, recipe(**logging), first_step=first)
    for step in range(first, last + 1):
        log.log(step, figures(step), {"tokens_per_second": time.perf_counter()})
    log.close()
