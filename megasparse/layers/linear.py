"""megatron-core's linear layers with a 2:4 weight (sparsity/)."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megasparse.config import WeightSparsity
from megasparse.sparsity.weight import SparseWeight


class SparseColumnParallelLinear(ColumnParallelLinear):
    """[seq, batch, in] -> [seq, batch, out / tp]."""

    def __init__(self, *args: Any, name: str, sparsity: WeightSparsity, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sparsity = SparseWeight(name, self.weight, sparsity, self.tp_group)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super()._forward_impl(input, self.sparsity(weight), *args, **kwargs)


class SparseRowParallelLinear(RowParallelLinear):
    """[seq, batch, in / tp] -> [seq, batch, out]."""

    def __init__(self, *args: Any, name: str, sparsity: WeightSparsity, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sparsity = SparseWeight(name, self.weight, sparsity, self.tp_group)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super()._forward_impl(input, self.sparsity(weight), *args, **kwargs)
