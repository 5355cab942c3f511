"""Weights without a training state: those of another run that a run begins with, its teacher's, and a model's that is
evaluated or writes text."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn as nn

from megasparse import platform
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
from megasparse.launch import launch
from megasparse.layers import te
from megasparse.layout import check_layout
from megasparse.model import build_model
from megasparse.parameters import FP8_SCALES
from megasparse.schedule import masked_share
from megasparse.sparsity.weight import sparse_weights
from megasparse.topology import Topology

MODEL = "model."  # what the names of weights and buffers begin with
# What a run may add to the model that it begins with, and that starts as in a new model: the state of weight sparsity
# (masks, scales, input norms, boosts) and of FP8, and what only chooses blocks of attention (gates, centroids).
FRESH = re.compile(r"\.sparsity\.|\.fp8_scales\.|\.core_attention\.(gate|centroids)\.")


@dataclass(frozen=True)
class Source:
    """A checkpoint of another run."""

    path: Path
    recipe: Recipe  # the run's; a teacher's as distillation.teacher_recipe makes it, or as inference_source does
    step: int

    @property
    def identity(self) -> dict[str, Any]:
        """For the record: ``sha256`` is that of the manifest, which has those of the other files."""
        sha256 = sha256_of_file(self.path / "manifest.json")
        return {"path": str(self.path.resolve()), "run": self.recipe.name, "step": self.step, "sha256": sha256}


class Vocabulary(NamedTuple):
    """Of a checkpoint."""

    size: int  # rows of the embedding
    tokenizer: str | None  # its hash, if the checkpoint says


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


def inference_source(
    path: Path, parallel: dict[str, Any], precision: str | None, fp8: bool = True
) -> tuple[Source, Vocabulary]:
    """The checkpoint at ``path`` for inference: its recipe with this ``parallel`` section and ``precision`` (None: its
    own), in FP8 only if ``fp8`` and if it was trained so, without the rules of training alone. ValueError if it is not
    whole, or not possible in this world's layout."""
    source, vocabulary = _read(path)
    raw, own = source.recipe.model_dump(mode="json"), source.recipe
    world_size = launch().world_size
    raw["parallel"] = parallel
    raw["schedule"] = {"type": "constant"}
    raw["training"].update(global_batch_size=world_size, micro_batch_size=1, recompute="none")
    raw["training"]["precision"] = precision or own.training.precision
    if not fp8:
        raw["training"]["fp8"] = None
    if own.model.moe is not None:
        raw["model"]["moe"]["aux_loss_scope"] = "micro_batch"
    if own.sparsity.weights is not None:
        raw["sparsity"]["weights"]["mvue"] = "none"
    recipe = parse_recipe(raw, str(path))
    check_layout(recipe, world_size)
    return replace(source, recipe=recipe), vocabulary


def _source(field: str, path: Path, vocab_size: int, tokenizer: str) -> Source:
    """The vocabulary is the same if it has as many tokens and if its tokenizer, where the checkpoint says which, has
    the hash of the data's. Other data will do."""
    try:
        source, vocabulary = _read(path)
    except ValueError as error:
        raise ValueError(f"{field}={path}: {error}") from None
    if vocabulary.size != vocab_size:
        raise ValueError(
            f"{field}={path}: its vocabulary has {vocabulary.size} tokens, this run's {vocab_size}: prepare the data "
            "with its tokenizer, or set model.vocab_size"
        )
    if vocabulary.tokenizer not in (None, tokenizer):
        raise ValueError(f"{field}={path}: it has another tokenizer than data.sets: prepare the data with that one")
    return source


def _read(path: Path) -> tuple[Source, Vocabulary]:
    """Reads the manifest and the table of tensors only."""
    manifest = checkpoints.read_manifest(path)
    checkpoints.verify(path, manifest, [".metadata"])
    tokens = Reader(path).tensors["model.embedding.word_embeddings.weight"].shape[0]
    recipe = parse_recipe(manifest["recipe"], source="its recipe")
    return Source(path, recipe, manifest["step"]), Vocabulary(tokens, manifest.get("tokenizer"))


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
    """The teacher of ``recipe``: ``load_model`` of ``source``."""
    assert recipe.training.teacher is not None
    return Teacher(recipe.training.teacher, source.recipe, topology, load_model(source, topology, vocab_size))


def load_model(source: Source, topology: Topology, vocab_size: int) -> nn.ModuleList:
    """The model of ``source``'s recipe without an optimizer, as it was when it was saved: with its masks, and in its
    state of schedules; in evaluation mode. ValueError as load_initial, but with every tensor there. Random generators
    are left as they were."""
    random = random_state(topology.rank)
    chunks, state = build_model(source.recipe, topology, vocab_size)
    set_random_state(random)
    _load(source.path, weights(chunks, topology), unused="" if source.recipe.training.fp8 else FP8_SCALES)
    for scales in te.delayed_scales(chunks):
        scales.give(unit=1)  # it has no gradients
    state.begin(max(source.step, 1) - 1, source.recipe.training.steps, 1)
    for sparse in sparse_weights(chunks):
        sparse.masked = masked_share(state.progress, sparse.sparsity)
    for parameter in chunks.parameters():  # as DeepSpeed casts them for training: megatron-core makes some in float32
        parameter.data = parameter.data.to(platform.DTYPES[source.recipe.training.precision])
    return chunks.eval().requires_grad_(False)


def _load(path: Path, state: dict[str, Sharded], fresh: re.Pattern[str] | None = None, unused: str = "") -> list[str]:
    """``unused``: what names have that may be there for nothing."""
    verify(path, lambda: "copy it again, or take another one")
    saved = {name: info for name, info in Reader(path).tensors.items() if name.startswith(MODEL)}
    saved = {name: info for name, info in saved.items() if not (unused and unused in name)}
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
