"""AdamW: its groups of parameters, and whose kernel steps."""

from __future__ import annotations

from subprocess import CalledProcessError
from typing import Any

import torch
import torch.nn as nn
from deepspeed.ops.adam import FusedAdam as DeepSpeedFusedAdam
from deepspeed.ops.op_builder import FusedAdamBuilder
from deepspeed.ops.op_builder.builder import MissingCUDAException

from megasparse import platform
from megasparse.config import Recipe
from megasparse.placement import is_expert


def adamw(recipe: Recipe, chunks: nn.Module) -> torch.optim.Optimizer:
    """DeepSpeed's FusedAdam where it runs, else torch's AdamW with its own fused kernel."""
    groups, how = parameter_groups(chunks, recipe.optimizer.weight_decay), recipe.optimizer
    arguments: dict[str, Any] = {"lr": how.lr, "betas": (how.beta1, how.beta2), "eps": how.eps}
    if fused_adam_missing(recipe) is None:
        return FusedAdam(groups, **arguments)
    return torch.optim.AdamW(groups, **arguments, fused=True)


def fused_adam_missing(recipe: Recipe) -> str | None:
    """What keeps DeepSpeed's FusedAdam from stepping here; None if nothing does."""
    if not platform.has_cuda():
        return "there is no CUDA device"
    if recipe.parallel.offload_optimizer:
        return "parallel.offload_optimizer=true steps on the CPU"
    try:
        FusedAdamBuilder().load(verbose=False)  # compiled the first time
    except (RuntimeError, OSError, ImportError, CalledProcessError, MissingCUDAException) as error:
        return f"DeepSpeed cannot compile FusedAdam ({' '.join(str(error).split())[:200]})"
    return None


class FusedAdam(DeepSpeedFusedAdam):
    """DeepSpeed's, which counts the steps of a group in its last parameter: here each has the count, as with torch's
    AdamW, so that a checkpoint of one goes on with the other."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for parameter in (p for group in groups for p in group if self.state[p]):
            self.state[parameter]["step"] = int(self.state[parameter]["step"])
        loss = super().step(closure)
        for group in groups:
            for parameter in group:
                self.state[parameter]["step"] = torch.tensor(float(self.state[group[-1]]["step"]))
        return loss


def parameter_groups(chunks: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: decayed matrices and undecayed vectors; experts apart, as DeepSpeed reduces them elsewhere."""
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    parameter: Any
    for parameter in chunks.parameters():
        decayed, expert = parameter.dim() > 1, is_expert(parameter)
        if (decayed, expert) not in groups:
            moe = {"moe": True, "name": parameter.group_name} if expert else {}
            groups[decayed, expert] = {"params": [], "weight_decay": weight_decay if decayed else 0.0, **moe}
        groups[decayed, expert]["params"].append(parameter)
    return list(groups.values())


def bf16_optimizer(recipe: Recipe) -> bool:
    """Is it DeepSpeed's BF16_Optimizer that steps, its ZeRO-1 for bf16, and not the one for the other precisions?"""
    return (
        recipe.training.precision == "bf16"
        and recipe.parallel.zero_stage == 1
        and not recipe.parallel.offload_optimizer
    )
