"""The one door to apex's kernels: fused norms, and gradients of weights that are added where they are summed.

apex is built from source with these extensions or without them: each is looked for by itself.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch.nn as nn
from torch import Tensor

from megasparse import platform
from megasparse.layers.linear import ColumnParallelLinear, RowParallelLinear

NORMS, GRADIENTS = "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda"  # extensions


def norms_missing() -> str | None:
    """What keeps fused norms from running here; None if nothing does."""
    return _missing(NORMS) or _missing("apex.normalization.fused_layer_norm")


def norms() -> ModuleType | None:
    """apex.normalization.fused_layer_norm, where it runs."""
    return None if norms_missing() else importlib.import_module("apex.normalization.fused_layer_norm")


def gradients_missing() -> str | None:
    """What keeps gradients of weights from being added in place; None if nothing does."""
    return _missing(GRADIENTS)


def add_gradients_in_place(chunks: nn.Module, sums: dict[Tensor, Tensor]) -> None:
    """Let linear layers add their weights' gradients to ``sums``, float32, by weight, in the product that makes them:
    autograd gets none. Those of a 2:4 weight or in FP8 are made otherwise and stay as they are."""
    layer: Any
    for layer in chunks.modules():
        plain = isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) and not (
            layer.sparsity or layer.fp8_scales
        )
        if plain and layer.weight in sums:
            layer.gradient_accumulation_fusion = True
            layer.weight.main_grad = sums[layer.weight].view_as(layer.weight)  # where megatron-core looks for it


def _missing(extension: str) -> str | None:
    if not platform.has_cuda():
        return "there is no CUDA device"
    try:
        importlib.import_module(extension)
    except (ImportError, OSError) as error:
        return f"apex has no {extension} here ({error})"
    return None
