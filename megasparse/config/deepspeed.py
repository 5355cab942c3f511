"""``parallel.deepspeed``: what is DeepSpeed's own; and DeepSpeed's JSON, read into the recipe's fields.

Each number has one owner, the recipe: a JSON file only says some of them in DeepSpeed's words.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from megasparse.config.section import Section


class CommsLogger(Section):
    """Time and sizes of messages, printed after the last step. DeepSpeed sees those that go through it: its reductions
    of gradients and gathers of weights, and the experts' all-to-all; megatron-core's and the loop's own do not. Each
    waits for the device, which costs speed."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = Field(default=[])  # with prof_all=false: of these kinds, such as all_reduce
    debug: bool = False  # names the functions that send them


class FlopsProfiler(Section):
    """Operations and time of each module's forward pass in one step of the first process, printed. It counts causal
    attention as whole, and not what goes past torch's functions: experts' grouped products, FP8 and 2:4 kernels."""

    enabled: bool = False
    profile_step: PositiveInt = 2  # the first one also compiles and allocates
    module_depth: int = Field(default=-1, ge=-1)  # -1: the innermost
    top_modules: PositiveInt = 1
    detailed: bool = True
    output_file: Path | None = None  # None: stdout


class DeepSpeed(Section):
    """Names are those of DeepSpeed's JSON."""

    reduce_bucket_size: PositiveInt = 2**24
    """Elements reduced in one message; DeepSpeed allocates a buffer of them: with zero_stage=2, with offload_optimizer,
    and with zero_stage=1 where the precision is not bf16. Else whole groups of weights are reduced."""
    comms_logger: CommsLogger = CommsLogger()
    flops_profiler: FlopsProfiler = FlopsProfiler()


# Where a key of DeepSpeed's JSON belongs in a recipe.
OWNERS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "optimizer.clip_grad",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "activation_checkpointing": "training.recompute",
    "steps_per_print": "logging.log_interval",
    "tensorboard": "logging.tensorboard",
    "wandb": "logging.wandb",
    "tensor_parallel": "parallel.tp",
    "sequence_parallel_size": "parallel.cp",
    "pipeline": "parallel.pp",
    "expert_parallel": "parallel.ep",
}
WHY_NOT = {
    "zero_optimization.overlap_comm": "gradients are reduced when backward is done",
    "zero_optimization.allgather_bucket_size": "weights are gathered a group at once",
    "wall_clock_breakdown": "its timers are in a forward and backward pass that is not called; metrics.jsonl has times",
}
SECTIONS = {"comms_logger": CommsLogger, "flops_profiler": FlopsProfiler}


def deepspeed_overrides(path: Path) -> list[str]:
    """The recipe overrides that a file of DeepSpeed's settings stands for, such as ``parallel.zero_stage=2``.

    ValueError for a file that cannot be read, and for a key that is the recipe's or unknown."""
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"--deepspeed-config: no file {path}") from None
    except ValueError as error:
        raise ValueError(f"--deepspeed-config: {path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"--deepspeed-config: {path} is not a JSON object")
    found = [override for key, value in raw.items() for override in _overrides(path, key, value)]
    precisions = [override for override in found if override.startswith("training.precision=")]
    if len(precisions) > 1:
        raise ValueError(f"--deepspeed-config: {path} enables bf16 and fp16: enable one")
    return found


def _overrides(path: Path, key: str, value: Any) -> list[str]:
    match key, value:
        case "zero_optimization", {**settings}:
            return [o for name, setting in settings.items() for o in _zero(path, name, setting)]
        case (("bf16" | "fp16"), {"enabled": bool(enabled), **rest}):
            own = [o for name, setting in rest.items() for o in _precision(path, key, name, setting)]
            return [f"training.precision={key}", *own] if enabled else []
        case (("comms_logger" | "flops_profiler"), {**settings}):
            unknown = [field for field in settings if field not in SECTIONS[key].model_fields]
            if unknown:
                raise _refusal(path, f"{key}.{unknown[0]}", None)
            return [f"parallel.deepspeed.{key}.{field}={json.dumps(setting)}" for field, setting in settings.items()]
    raise _refusal(path, key, value)


def _zero(path: Path, name: str, value: Any) -> list[str]:
    match name, value:
        case "stage", _:
            return [f"parallel.zero_stage={json.dumps(value)}"]
        case "offload_optimizer", {"device": "cpu" | "none" as device, **rest} if not rest:
            return [f"parallel.offload_optimizer={json.dumps(device == 'cpu')}"]
        case "offload_optimizer", {"device": "cpu" | "none", **rest}:
            raise _refusal(path, f"zero_optimization.offload_optimizer.{next(iter(rest))}", None)
        case "reduce_bucket_size", _:
            return [f"parallel.deepspeed.reduce_bucket_size={json.dumps(value)}"]
    raise _refusal(path, f"zero_optimization.{name}", value)


def _precision(path: Path, key: str, name: str, value: Any) -> list[str]:
    match key, name, value:
        case "fp16", "initial_scale_power", int(power):
            return [f"training.loss_scale={math.ldexp(1.0, power)}"]
        case "fp16", "loss_scale_window", _:
            return [f"training.loss_scale_window={json.dumps(value)}"]
    raise _refusal(path, f"{key}.{name}", value)


def _refusal(path: Path, key: str, value: Any) -> ValueError:
    if key in OWNERS:
        return ValueError(f"--deepspeed-config: {path} sets {key}, which is the recipe's {OWNERS[key]}: set that")
    if key in WHY_NOT:
        return ValueError(f"--deepspeed-config: {path} sets {key}: {WHY_NOT[key]}; leave it out")
    known = key in ("zero_optimization", "zero_optimization.offload_optimizer", "bf16", "fp16", *SECTIONS)
    what = f"has {key}={json.dumps(value)}, which it cannot be" if known else f"has an unknown key {key}: leave it out"
    return ValueError(f"--deepspeed-config: {path} {what}")
