"""megatron-core's linear layers: with a 2:4 weight and an estimate of its gradient (sparsity/), in FP8, or with both.

FP8 quantises what is multiplied: the 2:4 weight, whole sequences, and the estimate apart from dy (S-STE, arXiv
2409.09099, section 5). Transformer Engine's layers take their place on a GPU (layers/te.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from megatron.core.tensor_parallel import layers as megatron
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megasparse.config import Fp8, WeightSparsity
from megasparse.layers.fp8 import Fp8Scales
from megasparse.layers.step import StepState
from megasparse.ops.fp8 import fp8_linear
from megasparse.ops.two_four.matmul import Fp8Operand, fp8_linear_24, linear_24, prepare_fp8
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


@dataclass(frozen=True)
class Product:
    """How a linear layer multiplies, beside megatron-core's arguments."""

    name: str  # in the whole model
    state: StepState
    token_group: Any  # the ranks that share a micro-batch's tokens
    sparsity: WeightSparsity | None = None
    fp8: Fp8 | None = None


@contextlib.contextmanager
def fp8_sparse_products(module: nn.Module) -> Iterator[None]:
    """Within it, 2:4 linear layers multiply by torchao's FP8 2:4 kernel, without gradients; weights do not change.

    ValueError where it does not run, or a weight does not fit it or is not 2:4; nothing has changed then."""
    layers = [layer for layer in module.modules() if isinstance(layer, (ColumnParallelLinear, RowParallelLinear))]
    sparse = [layer for layer in layers if layer.sparsity is not None]
    with torch.no_grad():
        operands = [prepare_fp8(layer.sparsity(layer.weight)) for layer in sparse]  # type: ignore[misc]
    for layer, operand in zip(sparse, operands, strict=True):
        layer.inference = operand
    try:
        yield
    finally:
        for layer in sparse:
            layer.inference = None


class ColumnParallelLinear(megatron.ColumnParallelLinear):
    """[seq, batch, in] -> [seq, batch, out / tp]."""

    inference: Fp8Operand | None = None

    def __init__(self, *args: Any, product: Product, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sparsity, self.estimate, self.fp8_scales = _parts(product, self.weight, self.tp_group, self.tp_group)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _product(super()._forward_impl, self, input, weight, *args, **kwargs)


class RowParallelLinear(megatron.RowParallelLinear):
    """[seq, batch, in / tp] -> [seq, batch, out]."""

    inference: Fp8Operand | None = None

    def __init__(self, *args: Any, product: Product, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sparsity, self.estimate, self.fp8_scales = _parts(product, self.weight, self.tp_group, None)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _product(super()._forward_impl, self, input, weight, *args, **kwargs)


def _parts(
    product: Product, weight: Any, tp_group: Any, output_group: Any
) -> tuple[SparseWeight | None, GradientEstimate | None, Fp8Scales | None]:
    """output_group: the ranks over which the output's features are split."""
    name, sparsity, fp8 = product.name, product.sparsity, product.fp8
    return (
        None if sparsity is None else SparseWeight(name, weight, sparsity, tp_group),
        None if sparsity is None else GradientEstimate.of(name, weight, sparsity, product.state, output_group),
        None if fp8 is None else Fp8Scales(fp8, product.state, product.token_group),
    )


def _product(
    dense: Callable[..., Tensor],
    layer: ColumnParallelLinear | RowParallelLinear,
    x: Tensor,
    weight: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """x times the weight: by mcore's product, ``dense``, but in FP8, where the weight's gradient is an estimate, and by
    2:4 kernels."""
    if layer.inference is not None:
        if kwargs["sequence_parallel"]:
            x = gather_from_sequence_parallel_region(x, group=kwargs["tp_group"])
        y = fp8_linear_24(x, layer.inference)
        return y if kwargs["bias"] is None else y + kwargs["bias"]
    sparsity = layer.sparsity
    weight = weight if sparsity is None else sparsity(weight)
    estimate = layer.estimate.of_these_tokens() if layer.estimate is not None and torch.is_grad_enabled() else None
    if layer.fp8_scales is None and estimate is None and (sparsity is None or sparsity.door == "masked"):
        return dense(x, weight, *args, **kwargs)
    if kwargs["sequence_parallel"]:
        x = gather_from_sequence_parallel_region(x, group=kwargs["tp_group"])
    elif kwargs["allreduce_dgrad"]:
        x = copy_to_tensor_model_parallel_region(x, group=kwargs["tp_group"])
    seq, batch, _ = x.shape
    if layer.fp8_scales is not None:
        by_rows = None if estimate is None else lambda dy: estimate(dy.view(seq, batch, -1)).flatten(0, 1)
        y = fp8_linear(x, weight, layer.fp8_scales.scaling(), by_rows)
    else:
        assert sparsity is not None
        # Four tokens of a sequence are four rows of dy where sequences come first.
        by_rows = (
            None if estimate is None else lambda dy: _turned(estimate(_turned(dy.view(batch, seq, -1)))).flatten(0, 1)
        )
        y = _turned(linear_24(_turned(x), weight, sparsity.prepared(weight), by_rows, dw_is_24=by_rows is not None))
    return y if kwargs["bias"] is None else y + kwargs["bias"]


def _turned(x: Tensor) -> Tensor:
    """[seq, batch, features] -> [batch, seq, features], and back."""
    return _Turn.apply(x)  # type: ignore[no-any-return]


class _Turn(torch.autograd.Function):
    """Contiguous in both directions: mcore's all-reduce of what is not loses its result."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.transpose(0, 1).contiguous()
