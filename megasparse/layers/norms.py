"""Norms for megatron-core's slots, sequence-parallel aware (mcore's WrappedTorchNorm refuses that)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from megasparse.layers import apex


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.fused: Any = apex.norms()
        mark_tensor_parallel_partial(self, config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is None:
            return super().forward(x)
        return self.fused.fused_rms_norm_affine(x, self.weight, self.normalized_shape, self.eps)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.fused: Any = apex.norms()
        mark_tensor_parallel_partial(self, config.sequence_parallel)

    def forward(self, input: Tensor) -> Tensor:
        if self.fused is None:
            return super().forward(input)
        return self.fused.fused_layer_norm_affine(input, self.weight, self.bias, self.normalized_shape, self.eps)


class HeadRMSNorm(RMSNorm):
    """Query or key norm of each head by itself (Qwen3). Each tensor-parallel rank sees its own heads only."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config, hidden_size, eps)
        mark_tensor_parallel_partial(self, config.tensor_model_parallel_size > 1)


class FullWidthRMSNorm(nn.Module):
    """Query or key norm over all heads together (OLMo2, OLMoE). Weight: [heads * head_dim], split by tensor parallel.

    Takes and returns [seq, batch, local heads, head_dim].
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, *, heads: int, **_: Any) -> None:
        super().__init__()
        self.tensor_parallel = config.tensor_model_parallel_size
        self.width = heads * hidden_size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(self.width // self.tensor_parallel, dtype=config.params_dtype))
        if self.tensor_parallel > 1:
            self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            self.weight.partition_dim = 0  # type: ignore[attr-defined]
            self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(-2)
        if self.tensor_parallel == 1:
            return F.rms_norm(flat, (self.width,), self.weight, self.eps).view_as(x)
        values = flat.float()
        square_sum = _AllReduce.apply(values.square().sum(-1, keepdim=True))
        normed = values * torch.rsqrt(square_sum / self.width + self.eps)
        return (normed.to(x.dtype) * self.weight).view_as(x)


class _AllReduce(torch.autograd.Function):
    """Sum over tensor parallel in both directions: each rank's output depends on every rank's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return reduce_from_tensor_model_parallel_region(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return reduce_from_tensor_model_parallel_region(grad.clone())


def mark_tensor_parallel_partial(module: nn.Module, partial: bool) -> None:
    """Say whether each tensor-parallel rank has only a part of these weights' gradient (the engine sums them)."""
    for parameter in module.parameters():
        parameter.sequence_parallel = partial  # type: ignore[attr-defined]  # megatron-core's name for it
