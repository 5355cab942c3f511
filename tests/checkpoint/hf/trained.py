"""Checkpoints of tiny runs, in any layout, to be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megasparse import topology
from megasparse.checkpoint.save import Saver
from megasparse.config import Recipe, parse_recipe
from megasparse.engine import Engine
from megasparse.layout import Layout
from megasparse.model import build_model
from megasparse.placement import local_weights
from tests import small
from tests.checkpoint.runs import FINGERPRINT
from tests.helpers import run_distributed

VOCAB = small.VOCAB - 1  # odd: tensor parallelism pads it
STEPS = 4


def recipe_of(model: dict[str, Any], moe: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    training = {"steps": STEPS, "micro_batch_size": 1, **sections.pop("training", {})}
    return small.recipe({"init_std": 0.15, **model}, moe, training, **sections)


def train(recipe: Recipe, folder: Path, layout: str = "single", steps: int = STEPS) -> Path:
    """The checkpoint after ``steps`` steps of ``recipe`` in ``layout``."""
    parsed = Layout.parse(layout)
    raw = {**recipe.model_dump(mode="json"), "parallel": parsed.parallel()}
    run_distributed(_train, parsed.world_size, raw, folder, steps)
    return folder / f"step_{steps}"


def train_here(recipe: Recipe, folder: Path, steps: int = STEPS) -> Path:
    """The same of one process: this one."""
    _train(recipe.model_dump(mode="json"), folder, steps)
    topology.shutdown()
    return folder / f"step_{steps}"


def _train(raw: dict[str, Any], folder: Path, steps: int) -> None:
    recipe = parse_recipe(raw)
    place = small.start(recipe)
    chunks, state = build_model(recipe, place, VOCAB)
    for weight in local_weights(chunks, place):  # else what is 0 or 1 at first could be swapped or forgotten
        if weight.tensor.dim() == 1 or weight.name.endswith(".output"):
            weight.tensor.data += 0.1 * torch.sin(torch.arange(weight.tensor.numel()) + 1.0).view(weight.tensor.shape)
    engine = Engine(recipe, place, chunks, state)
    for step in range(steps):
        engine.train_step(small.batches(recipe, step, place.dp_rank, place.dp), step, 3e-3)
    saver = Saver(engine, folder, FINGERPRINT)
    saver.save(steps)
    saver.wait()
