"""megatron-core's linear layers with a 2:4 weight (sparsity/) and an estimate of the weight's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megasparse.config import WeightSparsity
from megasparse.layers.step import StepState
from megasparse.sparsity.gradient import GradientEstimate
from megasparse.sparsity.weight import SparseWeight


class NumberedTransformerLayer(TransformerLayer):
    """A transformer layer that tells those in it which tokens it has, in its first run and when it is recomputed."""

    def __init__(self, *args: Any, state: StepState, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state = state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """mcore hands ``padding_mask`` through untouched: each token's number in the run, int64 [batch, seq]."""
        self.state.token_index = kwargs.get("padding_mask")
        return super().forward(*args, **kwargs)


class SparseColumnParallelLinear(ColumnParallelLinear):
    """[seq, batch, in] -> [seq, batch, out / tp]."""

    def __init__(self, *args: Any, name: str, sparsity: WeightSparsity, state: StepState, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sparsity = SparseWeight(name, self.weight, sparsity, self.tp_group)
        self.estimate = GradientEstimate.of(name, self.weight, sparsity, state, self.tp_group)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _product(super()._forward_impl, self, input, weight, *args, **kwargs)


class SparseRowParallelLinear(RowParallelLinear):
    """[seq, batch, in / tp] -> [seq, batch, out]."""

    def __init__(self, *args: Any, name: str, sparsity: WeightSparsity, state: StepState, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sparsity = SparseWeight(name, self.weight, sparsity, self.tp_group)
        self.estimate = GradientEstimate.of(name, self.weight, sparsity, state, None)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _product(super()._forward_impl, self, input, weight, *args, **kwargs)


def _product(
    dense: Callable[..., Tensor],
    layer: SparseColumnParallelLinear | SparseRowParallelLinear,
    x: Tensor,
    weight: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """x times the sparse weight: by mcore's product, ``dense``, but where the weight's gradient is an estimate."""
    sparse = layer.sparsity(weight)
    if layer.estimate is None or not torch.is_grad_enabled():
        return dense(x, sparse, *args, **kwargs)
    if kwargs["sequence_parallel"]:
        x = gather_from_sequence_parallel_region(x, group=kwargs["tp_group"])
    elif kwargs["allreduce_dgrad"]:
        x = copy_to_tensor_model_parallel_region(x, group=kwargs["tp_group"])
    y = _EstimatedProduct.apply(x, sparse, layer.estimate.of_these_tokens())
    return y if kwargs["bias"] is None else y + kwargs["bias"]


class _EstimatedProduct(torch.autograd.Function):
    """x [seq, batch, in] times weight [out, in], whose gradient is made of an estimate of the output's."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, estimate: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.estimate = estimate
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        rows = ctx.estimate(dy).flatten(0, 1)
        return dy @ weight, rows.t() @ x.flatten(0, 1), None
