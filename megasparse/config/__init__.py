"""The recipe: every number of a run, validated before any work starts.

A recipe is a YAML file with the sections below. Unknown keys are errors, and any value can be
overridden on the command line with a dotted path (``model.num_layers=4``). Field names are those of
Megatron-LM where it has the same number, else those of the paper named beside the field.

A section's fields, and what they mean, are in the file of its name:

data.py       data
model.py      model; model.rope, .moe, .sparse_attention
training.py   training; training.fp8, .teacher
sparsity.py   sparsity.weights
optimizer.py  optimizer, schedule
parallel.py   parallel
deepspeed.py  parallel.deepspeed, and DeepSpeed's JSON
faults.py     faults
logging.py    logging

Here is what goes for sections together, and how a recipe is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from megasparse.config.data import Data, DataSet
from megasparse.config.deepspeed import CommsLogger, DeepSpeed, FlopsProfiler, deepspeed_overrides
from megasparse.config.faults import Faults
from megasparse.config.logging import Logging
from megasparse.config.model import Model, MoE, Rope, SparseAttention
from megasparse.config.optimizer import Optimizer, Schedule
from megasparse.config.parallel import Parallel
from megasparse.config.section import Section
from megasparse.config.sparsity import Sparsity, WeightSparsity
from megasparse.config.training import Fp8, Teacher, Training

__all__ = [
    "CommsLogger",
    "Data",
    "DataSet",
    "DeepSpeed",
    "Faults",
    "FlopsProfiler",
    "Fp8",
    "Logging",
    "MoE",
    "Model",
    "Optimizer",
    "Parallel",
    "Recipe",
    "Rope",
    "Schedule",
    "SparseAttention",
    "Sparsity",
    "Teacher",
    "Training",
    "WeightSparsity",
    "deepspeed_overrides",
    "dump_recipe",
    "load_recipe",
    "parse_model",
    "parse_recipe",
]


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    data: Data
    model: Model
    training: Training
    sparsity: Sparsity = Sparsity()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    parallel: Parallel = Parallel()
    faults: Faults = Faults()
    logging: Logging = Logging()

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.data.seq_length

    @property
    def total_tokens(self) -> int:
        return self.training.steps * self.tokens_per_step

    @property
    def sparse_weights(self) -> list[str]:
        """Names of the weights that are 2:4."""
        weights = self.sparsity.weights
        targets = weights.targets if weights else []
        return [name for name in self.model.linear_weights if any(re.search(target, name) for target in targets)]

    @property
    def fp8_weights(self) -> list[str]:
        """Names of the weights that are multiplied in FP8."""
        fp8 = self.training.fp8
        if fp8 is None:
            return []
        layers = range(fp8.num_layers_at_start_in_bf16, self.model.num_layers - fp8.num_layers_at_end_in_bf16)
        return [
            name
            for name in self.model.linear_weights
            if int(name.split(".")[2]) in layers and (fp8.experts or ".mlp.experts." not in name)
        ]

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        model, data, training = self.model, self.data, self.training
        weights = self.sparsity.weights
        if weights and weights.method == "asp" and weights.dense_start == 0 and training.initial_checkpoint is None:
            raise ValueError(
                "sparsity.weights.method=asp prunes a trained model: set training.initial_checkpoint, or "
                "sparsity.weights.dense_start, the share of the run before that"
            )
        for target in weights.targets if weights else []:
            if not any(re.search(target, name) for name in model.linear_weights):
                raise ValueError(
                    f"sparsity.weights.targets: {target!r} is in no name of {', '.join(model.linear_weights)}"
                )
        if training.fp8 is not None and not self.fp8_weights:
            raise ValueError(
                f"training.fp8: num_layers_at_start_in_bf16={training.fp8.num_layers_at_start_in_bf16} and "
                f"num_layers_at_end_in_bf16={training.fp8.num_layers_at_end_in_bf16} leave none of "
                f"model.num_layers={model.num_layers} in FP8: lower one"
            )
        if training.fp8 is not None and not training.fp8.experts and model.moe is None:
            raise ValueError("training.fp8.experts=false without model.moe: there are none, unset it")
        if training.global_batch_size % training.micro_batch_size:
            raise ValueError(
                f"training.global_batch_size={training.global_batch_size} is not divisible by "
                f"training.micro_batch_size={training.micro_batch_size}"
            )
        if self.faults.spike_deviations and training.precision == "fp16":
            raise ValueError(
                f"faults.spike_deviations={self.faults.spike_deviations} with training.precision=fp16, whose loss "
                "scale is found by overflows: unset it"
            )
        if training.eval_stride is not None and training.eval_stride > data.seq_length:
            raise ValueError(
                f"training.eval_stride={training.eval_stride} is more than data.seq_length={data.seq_length}: lower it"
            )
        if data.reset_position_ids and model.position_embedding != "learned":
            raise ValueError(
                "data.reset_position_ids=true needs model.position_embedding=learned: "
                "rotary attention is relative, data.document_mask is enough"
            )
        if model.position_embedding == "learned" and (model.max_position_embeddings or 2**63) < data.seq_length:
            raise ValueError(
                f"data.seq_length={data.seq_length} is more than "
                f"model.max_position_embeddings={model.max_position_embeddings}"
            )
        if self.schedule.warmup_tokens + self.schedule.decay_tokens > self.total_tokens:
            raise ValueError(
                f"schedule.warmup_tokens + decay_tokens is more than the run's {self.total_tokens} tokens "
                "(training.steps * global_batch_size * data.seq_length)"
            )
        if model.moe is not None and model.moe.aux_loss_scope == "all_layers" and training.recompute != "none":
            raise ValueError("model.moe.aux_loss_scope=all_layers keeps every layer's graph: set recompute=none")
        return self


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply dotted overrides such as ``model.num_layers=4``.

    Raises ValueError with one line for each wrong field: its path, its value and what to do.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"no recipe at {path}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a recipe: a mapping with name, data, model and training is expected")
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_recipe(raw, source=str(path))


def parse_recipe(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; ValueError as in load_recipe."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{source}: " + "; ".join(_describe(e) for e in error.errors())) from None


def parse_model(raw: dict[str, Any], source: str) -> Model:
    """Validate a mapping as a recipe's model; ValueError as in load_recipe."""
    try:
        return Model.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{source}: " + "; ".join(_describe(e) for e in error.errors())) from None


def dump_recipe(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML: load_recipe reads it back equal."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    node: Any = raw
    *parents, leaf = path.split(".")
    for depth, key in enumerate(parents):
        node = _child(node, key, override)
        if node is None or not isinstance(node, (dict, list)):
            raise ValueError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is not a section")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: the value is not YAML") from None
    if isinstance(node, list):
        _child(node, leaf, override)
        node[int(leaf)] = parsed
    else:
        node[leaf] = parsed


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise ValueError(f"override {override!r}: {key!r} is not an index below {len(node)}")
        return node[int(key)]
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _describe(error: Any) -> str:
    """One pydantic error as ``path = value: what is wrong``."""
    path = ".".join(str(part) for part in error["loc"]) or "recipe"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key"
    if error["type"] == "missing":
        return f"{path}: missing"
    if error["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path} = {error['input']!r}: {message}"
