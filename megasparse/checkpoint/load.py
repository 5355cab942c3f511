"""Resuming: may this recipe go on from this checkpoint, is it whole, and reading it into an engine of any layout."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint.ranks import together
from megasparse.checkpoint.reader import Reader, TensorInfo
from megasparse.checkpoint.state import (
    LoadPlanner,
    Sharded,
    finish_loading,
    random_state,
    seed_anew,
    set_random_state,
    tensors,
)
from megasparse.config import Recipe, parse_recipe
from megasparse.engine import Engine

logger = logging.getLogger("megasparse")

# What a run may not change when it resumes: it would be another model, on other data.
FIXED = (
    *("model", "sparsity", "data", "training.seed", "training.global_batch_size", "training.precision"),
    *("training.fp8", "training.initial_checkpoint", "training.teacher"),
)
FREE = ("training.fp8.emulate",)  # but for where it runs
RANDOM = "random."  # what the names of generators begin with
NOTHING = re.compile(r"(?!)")


def check_resumable(path: Path, recipe: Recipe, fingerprint: str) -> None:
    """ValueError, naming the field or the damaged file, if ``recipe`` cannot go on from the checkpoint at ``path``.
    Reads its manifest only, and needs no process group."""
    try:
        manifest = checkpoints.read_manifest(path)
    except checkpoints.Damaged as damage:
        raise ValueError(f"{damage}; {checkpoints.whole_before(path)}") from None
    saved = parse_recipe(manifest["recipe"], source=f"the recipe of {path}").model_dump(mode="json")
    for section in FIXED:
        then, now = _dig(saved, section), _dig(recipe.model_dump(mode="json"), section)
        for difference in differences(section, then, now):
            if difference.startswith(FREE):
                continue
            raise ValueError(f"cannot resume from {path}: {difference}. Use the recipe it was saved with or a new run")
    if manifest["data_fingerprint"] != fingerprint:
        raise ValueError(f"cannot resume from {path}: the data sets were prepared anew since it was saved")
    if manifest["step"] >= recipe.training.steps:
        raise ValueError(
            f"{path} has all of training.steps={recipe.training.steps} behind it: "
            f"pass training.steps={2 * recipe.training.steps}, say, to train on"
        )


def load(engine: Engine, path: Path) -> int:
    """Restore the state saved at ``path``; returns the number of optimizer steps done. Every rank calls it.

    ValueError on every rank, before anything is changed, if a file is damaged, or if a tensor is missing, not used or
    of another shape. Random generators are restored in the layout that saved them."""
    verify(path, lambda: checkpoints.whole_before(path))
    reader = Reader(path)
    saved, manifest = reader.tensors, reader.manifest
    state, random = tensors(engine, copies=True), random_state(dist.get_rank())
    check_tensors(path, state, {name: info for name, info in saved.items() if not name.startswith(RANDOM)})
    same = together(None, lambda: _shapes(random), lambda parts: _same_generators(saved, _union(parts)))
    same = same and manifest["layout"] == str(engine.topology)
    read(path, {**state, **random} if same else state)
    finish_loading(engine, manifest)
    if same:
        set_random_state(random)
    else:
        seed_anew(manifest["step"])
        logger.info("%s was saved in layout %s: random generators start anew", path.name, manifest["layout"])
    return manifest["step"]


def verify(path: Path, cure: Callable[[], str]) -> None:
    """Every file has the hash it was written with; each rank reads some of them. ValueError on every rank, with the
    ``cure``, if one has not."""

    def damage() -> str:
        try:
            manifest = checkpoints.read_manifest(path)
            checkpoints.verify(path, manifest, list(manifest["files"])[dist.get_rank() :: dist.get_world_size()])
        except checkpoints.Damaged as error:
            return str(error)
        return ""

    def refuse(damages: list[str]) -> None:
        found = sorted(filter(None, damages))
        if found:
            raise ValueError(f"{found[0]}; {cure()}")

    together(None, damage, refuse)


def read(path: Path, state: dict[str, Sharded]) -> None:
    """Every tensor of ``state`` from the checkpoint at ``path``, in place. Every rank calls it."""

    def part() -> None:
        with torch.no_grad():
            dcp.load(state, storage_reader=dcp.FileSystemReader(path), planner=LoadPlanner())

    together(None, part, lambda _: None)


Shapes = dict[str, tuple[int, ...]]


def _shapes(state: dict[str, Sharded]) -> Shapes:
    return {name: tuple(sharded.shape) for name, sharded in state.items()}


def _union(parts: list[Shapes]) -> Shapes:
    """Of what the ranks hold: the whole model's."""
    return {name: shape for part in parts for name, shape in part.items()}


def check_tensors(
    path: Path, state: dict[str, Sharded], saved: dict[str, TensorInfo], fresh: re.Pattern[str] | None = None
) -> list[str]:
    """ValueError on every rank unless the ``saved`` tensors are those of ``state`` over all ranks, each complete. What
    ``fresh`` matches may be missing there: returns these names."""
    return together(
        None, lambda: _shapes(state), lambda parts: _check_shapes(path, _union(parts), saved, fresh or NOTHING)
    )


def _check_shapes(path: Path, expected: Shapes, saved: dict[str, TensorInfo], fresh: re.Pattern[str]) -> list[str]:
    missing = []
    for name in sorted(expected.keys() | saved.keys()):
        if name not in saved:
            if fresh.search(name):
                missing.append(name)
                continue
            raise ValueError(f"cannot load {path}: the model has {name} {expected[name]}, the checkpoint has not")
        shape = saved[name].shape
        if name not in expected:
            raise ValueError(f"cannot load {path}: it has {name} {shape}, the model has not")
        if shape != expected[name]:
            raise ValueError(f"cannot load {path}: {name} is {shape} there, {expected[name]} in the model")
        if saved[name].elements != math.prod(shape):
            raise ValueError(f"cannot load {path}: {name} {shape} has only {saved[name].elements:,} elements there")
    return missing


def _same_generators(saved: dict[str, TensorInfo], here: Shapes) -> bool:
    return here == {name: info.shape for name, info in saved.items() if name.startswith(RANDOM)}


def _dig(mapping: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        mapping = mapping[key]
    return mapping


def differences(path: str, then: Any, now: Any) -> Iterator[str]:
    """``path was THEN, is NOW`` of every leaf that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from differences(f"{path}.{key}", then.get(key), now.get(key))
    elif then != now:
        yield f"{path} was {then}, is {now}"
