"""A checkpoint of ours that can be exported: the model as it computes now, and each of its weights in their terms."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasparse import platform, schedule
from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint.hf.families import family_for
from megasparse.checkpoint.hf.family import Family, Fields
from megasparse.checkpoint.hf.tensors import Piece, Shape
from megasparse.checkpoint.reader import Reader
from megasparse.config import Model, Recipe, parse_recipe
from megasparse.sparsity.weight import forward_weight

MODEL = "model."
EXPERT = re.compile(r"(.*\.experts)\.(w[123])")
IN_WEIGHTS = re.compile(r"\.sparsity\.")  # state that the weights which are written have in them
STATE = re.compile(r"\.fp8_scales\.|\.router\.(load|bias)$|\.core_attention\.(gate|centroids)\.")  # and the other
ALL_BLOCKS = 2**30  # of any sequence


@dataclass(frozen=True)
class Export:
    """A checkpoint in the terms of a family."""

    reader: Reader
    recipe: Recipe
    progress: float  # share of the run's steps that were done
    model: Model  # with the block-sparse attention of this moment
    family: Family
    config: Fields  # theirs
    tensors: dict[str, tuple[Shape, list[Piece]]]  # of ours
    dtype: torch.dtype

    def dtype_of(self, name: str) -> torch.dtype:
        """Of theirs that are made of this one of ours: selection biases keep their precision."""
        return torch.float32 if name.endswith("router.bias") else self.dtype

    @property
    def beside(self) -> list[str]:
        """Tensors of ours that have no place with theirs."""
        placed = {MODEL + name for name, (_, pieces) in self.tensors.items() if pieces}
        state = [name for name in self.reader.tensors if name.startswith(MODEL) and name not in placed]
        return [name for name in state if not IN_WEIGHTS.search(name)]

    def is_24(self, name: str) -> bool:
        """Is the weight that is written 2:4?"""
        sparsity = self.recipe.sparsity.weights
        if sparsity is None or f"{MODEL}{_state_of(name)}mask" not in self.reader.tensors:
            return False
        masked = schedule.weights_are_sparse(self.progress, sparsity) and sparsity.method != "dense"
        whole = sparsity.boost is not None or schedule.masked_share(self.progress, sparsity) > 0
        return masked and not whole and schedule.n_of_m(self.progress, sparsity) == (2, 4)

    def weight(self, name: str, offsets: Shape, shape: Shape) -> Tensor:
        """A rectangle of a weight of ours as the forward pass takes it, in their type. ValueError if it is not
        finite."""
        weight = self.reader.region(MODEL + name, offsets, shape)
        smallest, largest = torch.aminmax(weight)  # not a number, if one is
        if not (torch.isfinite(smallest) and torch.isfinite(largest)):
            raise ValueError(
                f"{self.reader.path}: {name} has values that are not finite: convert an earlier checkpoint"
            )
        weight = weight.to(self.dtype_of(name))
        return (
            self._sparse(name, weight, offsets) if MODEL + _state_of(name) + "mask" in self.reader.tensors else weight
        )

    def _sparse(self, name: str, weight: Tensor, offsets: Shape) -> Tensor:
        sparsity, reader, state = self.recipe.sparsity.weights, self.reader, MODEL + _state_of(name)
        assert sparsity is not None
        shape: Shape = tuple(weight.shape)
        scale = boost = None
        mask = reader.region(f"{state}mask", offsets, shape)
        if sparsity.method == "s_ste":  # a number for each matrix
            scale = reader.region(f"{state}scale", *((offsets[:1], shape[:1]) if len(shape) > 2 else ((0,), (1,))))
        if sparsity.boost:  # a number for so many columns, all of which are here
            groups = (*weight.shape[:-1], weight.shape[-1] // sparsity.boost)
            boost = reader.region(f"{state}boost", offsets, groups).to(weight.dtype)
        return forward_weight(weight, sparsity, mask, scale, boost, schedule.masked_share(self.progress, sparsity))


def _state_of(name: str) -> str:
    """What the names of a weight's sparsity begin with (sparsity/weight.py)."""
    expert = EXPERT.fullmatch(name)
    return f"{expert[1]}.sparsity.{expert[2]}." if expert else f"{name.removesuffix('.weight')}.sparsity."


def open_export(path: Path, precision: str | None, family_name: str | None) -> Export:
    """The checkpoint at ``path``, or the latest one of a run folder. Reads its manifest and its table of tensors.

    ``precision``: of their weights; None: that of training. ``family_name``: a model_type; None: the first family that
    can say the model. ValueError, naming it, if a tensor is missing, left over or of another shape, or if no family,
    or not the named one, can say the model."""
    if (path / "checkpoints").is_dir():
        path = checkpoints.latest(path / "checkpoints") or path
    if precision is not None and precision not in platform.DTYPES:
        raise ValueError(f"--dtype {precision}: give one of {', '.join(platform.DTYPES)}")
    reader = Reader(path)
    recipe = parse_recipe(reader.manifest["recipe"], source=f"the recipe of {path}")
    progress = max(1, reader.manifest["step"]) / recipe.training.steps
    vocab_size = reader.tensors[f"{MODEL}embedding.word_embeddings.weight"].shape[0]
    model = _now(recipe, progress).model_copy(update={"vocab_size": vocab_size})
    family, config = family_for(model, vocab_size, recipe.data.seq_length, family_name)
    tensors = family.tensors(model, vocab_size, recipe.data.seq_length)
    _check(reader, tensors)
    dtype = platform.DTYPES[precision or recipe.training.precision]
    return Export(reader, recipe, progress, model, family, config, tensors, dtype)


def _now(recipe: Recipe, progress: float) -> Model:
    """The model whose attention is always as it is at ``progress``."""
    model, sparse = recipe.model, recipe.model.sparse_attention
    if sparse is None:
        return model
    all_blocks = math.ceil(recipe.data.seq_length / sparse.block_size)
    budget = schedule.attention_blocks(progress, sparse, all_blocks)
    if budget is None and sparse.selector != "nsa":  # which has its other branches all the same
        return model.model_copy(update={"sparse_attention": None})
    changes: dict[str, Any] = {"dense_start": 0.0, "dense_end": 0.0, "ramp": 0.0}
    if sparse.chooses:
        changes["blocks"] = ALL_BLOCKS if budget is None else budget
    return model.model_copy(update={"sparse_attention": sparse.model_copy(update=changes)})


def _check(reader: Reader, tensors: dict[str, tuple[Shape, list[Piece]]]) -> None:
    for name, (shape, _) in tensors.items():
        found = reader.tensors.get(MODEL + name)
        if found is None:
            raise ValueError(f"{reader.path} has no {name} {list(shape)}, which its recipe's model has")
        if found.shape != shape:
            raise ValueError(f"{reader.path}: {name} is {list(found.shape)}, its recipe makes it {list(shape)}")
        if found.elements != math.prod(shape):
            raise ValueError(f"{reader.path}: {name} {list(shape)} has only {found.elements:,} elements")
    for name in reader.tensors:
        known = name.removeprefix(MODEL) in tensors or IN_WEIGHTS.search(name) or STATE.search(name)
        if name.startswith(MODEL) and not known:
            raise ValueError(f"{reader.path} has {name.removeprefix(MODEL)}, which its recipe's model has not")
