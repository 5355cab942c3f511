"""Weights without a training state: those of another run that a run begins with, and its teacher's."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint.load import check_tensors, differences, read, verify
from megasparse.checkpoint.reader import Reader
from megasparse.checkpoint.state import (
    Sharded,
    random_state,
    set_random_state,
    tensors,
    weights,
)
from megasparse.config import Recipe, parse_recipe
from megasparse.distillation import Teacher, teacher_recipe
from megasparse.engine import Engine
from megasparse.files import sha256_of_file
from megasparse.layers import te
from megasparse.model import build_model
from megasparse.topology import Topology

MODEL = "model."  # what the names of weights and buffers begin with
# What a run may add to the model that it begins with, and that starts as in a new model: the state of weight sparsity
# (masks, scales, input norms, boosts) and of FP8, and what only chooses blocks of attention (gates, centroids).
FRESH = re.compile(r"\.sparsity\.|\.fp8_scales\.|\.core_attention\.(gate|centroids)\.")


@dataclass(frozen=True)
class Source:
    """A checkpoint of another run."""

    path: Path
    recipe: Recipe  # the run's; a teacher's as distillation.teacher_recipe makes it
    step: int

    @property
    def identity(self) -> dict[str, Any]:
        """For the record: ``sha256`` is that of the manifest, which has those of the other files."""
        sha256 = sha256_of_file(self.path / "manifest.json")
        return {"path": str(self.path.resolve()), "run": self.recipe.name, "step": self.step, "sha256": sha256}


# Before any work, in one process --------------------------------------------------------------------------------------


def initial_source(recipe: Recipe, vocab_size: int, tokenizer: str) -> Source | None:
    """training.initial_checkpoint; ValueError if it is not whole or has another vocabulary (``_source``)."""
    path = recipe.training.initial_checkpoint
    return None if path is None else _source("training.initial_checkpoint", path, vocab_size, tokenizer)


def teacher_source(recipe: Recipe, vocab_size: int, tokenizer: str, world_size: int) -> Source | None:
    """training.teacher.checkpoint; ValueError as initial_source, and if it is not possible in the recipe's layout."""
    teacher = recipe.training.teacher
    if teacher is None:
        return None
    source = _source("training.teacher.checkpoint", teacher.checkpoint, vocab_size, tokenizer)
    return replace(source, recipe=teacher_recipe(recipe, source.recipe, source.path, world_size))


def _source(field: str, path: Path, vocab_size: int, tokenizer: str) -> Source:
    """The vocabulary is the same if it has as many tokens and if its tokenizer, where the checkpoint says which, has
    the hash of the data's. Other data will do. Reads the manifest and the table of tensors only."""
    try:
        manifest = checkpoints.read_manifest(path)
        checkpoints.verify(path, manifest, [".metadata"])
        tokens = Reader(path).tensors["model.embedding.word_embeddings.weight"].shape[0]
        recipe = parse_recipe(manifest["recipe"], source="its recipe")
    except ValueError as error:
        raise ValueError(f"{field}={path}: {error}") from None
    if tokens != vocab_size:
        raise ValueError(
            f"{field}={path}: its vocabulary has {tokens} tokens, this run's {vocab_size}: prepare the data with its "
            "tokenizer, or set model.vocab_size"
        )
    if manifest.get("tokenizer") not in (None, tokenizer):
        raise ValueError(f"{field}={path}: it has another tokenizer than data.sets: prepare the data with that one")
    return Source(path, recipe, manifest["step"])


# On every rank --------------------------------------------------------------------------------------------------------


def load_initial(engine: Engine, source: Source) -> list[str]:
    """Weights and persistent buffers from ``source``, saved in any layout; the optimizer stays new. Returns the names
    that FRESH allows and the checkpoint has not.

    ValueError on every rank, before anything is changed, if a file is damaged, or if another tensor is missing, not
    used or of another shape."""
    state = {name: t for name, t in tensors(engine, copies=True).items() if name.startswith(MODEL)}
    fresh = _load(source.path, state, FRESH)
    engine.follow_loaded()
    return fresh


def load_teacher(recipe: Recipe, source: Source, topology: Topology, vocab_size: int) -> Teacher:
    """The teacher of ``recipe``, as it was when ``source`` was saved: with its masks, and in its state of schedules.
    ValueError as load_initial, but with every tensor there. Random generators are left as they were."""
    assert recipe.training.teacher is not None
    random = random_state(topology.rank)
    chunks, state = build_model(source.recipe, topology, vocab_size)
    set_random_state(random)
    _load(source.path, weights(chunks, topology))
    for scales in te.delayed_scales(chunks):
        scales.give(unit=1)  # it has no gradients
    state.begin(source.step - 1, source.recipe.training.steps, 1)
    return Teacher(recipe.training.teacher, source.recipe, topology, chunks)


def _load(path: Path, state: dict[str, Sharded], fresh: re.Pattern[str] | None = None) -> list[str]:
    verify(path, lambda: "copy it again, or take another one")
    saved = {name: info for name, info in Reader(path).tensors.items() if name.startswith(MODEL)}
    missing = check_tensors(path, state, saved, fresh)
    read(path, {name: sharded for name, sharded in state.items() if name not in missing})
    return missing


# What the log says ----------------------------------------------------------------------------------------------------


def about_initial(recipe: Recipe, source: Source, fresh: list[str]) -> str:
    """Where the weights come from, what starts anew, and every other setting of the model that changed."""
    then, now = (r.model.model_dump(mode="json") for r in (source.recipe, recipe))
    said = [f"weights from {source.path} ({source.recipe.name}, step {source.step:,})"]
    if fresh:
        said.append(f"{len(fresh)} tensors it has not start anew, the first {fresh[0]}")
    said += differences("model", then, now)
    return "; ".join(said)


def about_teacher(recipe: Recipe, source: Source) -> str:
    teacher = recipe.training.teacher
    assert teacher is not None
    return (
        f"taught by {source.path} ({source.recipe.name}, step {source.step:,}): {1 - teacher.weight:g} of the "
        f"cross-entropy and {teacher.weight:g} of {teacher.temperature:g}^2 KL(teacher || student) at temperature "
        f"{teacher.temperature:g}; mfu does not count the teacher"
    )
