"""The training loop, top to bottom: check, build, resume, train, evaluate, save, report."""

from __future__ import annotations

import gzip
import math
import os
import time
from pathlib import Path

import torch

from megasparse import platform, topology
from megasparse.checkpoint import native
from megasparse.config import Recipe
from megasparse.data.loader import TrainingData, ValidationWindows
from megasparse.engine import Engine, StepResult
from megasparse.generate import generate
from megasparse.layers.router import largest_load
from megasparse.metrics import MetricsLogger, flops_per_token, matmul_flops, parameter_count, plot_loss, write_environment
from megasparse.model import build_model
from megasparse.schedule import learning_rate


def train(recipe: Recipe, run_dir: Path, resume: bool = False) -> None:
    """Train ``recipe`` into ``run_dir``; every rank of the job calls it.

    Raises ValueError for what the user can mend (data, layout, a run folder in use), before any work is done.
    """
    training = recipe.training
    platform.activate()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    recipe.data_parallel_size(world_size)
    data = TrainingData(recipe.data, training.seed)
    checkpoint = checkpoint_to_resume(run_dir, resume, recipe, world_size, data)
