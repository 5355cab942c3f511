"""The inputs that sparse weights see, for Wanda's score (arXiv 2306.11695): one pass over samples, forward only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from megasparse.layers.linear import ColumnParallelLinear, RowParallelLinear
from megasparse.layers.moe import MoELayer
from megasparse.sparsity.weight import SparseWeight
from megasparse.topology import Topology


@torch.no_grad()
def measure_inputs(chunks: nn.ModuleList, topology: Topology, run: Callable[[], None]) -> None:
    """Set the ``input_norm`` of every sparse weight to the root mean square of its inputs' features over the tokens,
    of all processes, for which ``run`` calls the model. Every process calls it."""
    sums: dict[SparseWeight, Tensor] = {}  # of squares, float64, and the number of tokens last

    def add(sparse: SparseWeight, x: Tensor) -> None:
        """x [tokens, features]"""
        squares = torch.cat([x.double().square().sum(0), x.new_full((1,), len(x), dtype=torch.float64)])
        sums[sparse] = sums[sparse] + squares if sparse in sums else squares

    def linear(module: Any, inputs: tuple[Tensor, ...]) -> None:
        add(module.sparsity, inputs[0].flatten(0, -2))

    removable = []
    layers = [module for chunk in chunks for module in chunk.modules()]
    for module in layers:
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.sparsity is not None:
            removable.append(module.register_forward_pre_hook(linear))
        elif isinstance(module, MoELayer) and module.experts.sparsity:
            module.observe = _Experts(module)
    try:
        run()
    finally:
        for hook in removable:
            hook.remove()
    for module in layers:
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.sparsity is not None:
            total = sums[module.sparsity]
            dist.all_reduce(total, group=topology.replica_group)
            if isinstance(module, ColumnParallelLinear) and topology.sequence_parallel:
                dist.all_reduce(total, group=topology.tp_group)
            module.sparsity.input_norm.copy_((total[:-1] / total[-1]).sqrt())
        elif isinstance(module, MoELayer) and module.experts.sparsity:
            module.observe.finish(topology.expert_dp_group)  # type: ignore[union-attr]
            module.observe = None


class _Experts:
    """Sums over the tokens of each local expert: of the squares of its input, [experts, hidden + 1], and of what w2
    sees, [experts, ffn + 1]; the number of tokens last."""

    def __init__(self, layer: MoELayer) -> None:
        self.weights: Any = layer.experts
        experts, ffn, hidden = self.weights.w1.shape
        self.inputs, self.hidden = (torch.zeros(experts, n + 1, dtype=torch.float64) for n in (hidden, ffn))

    def __call__(self, rows: Tensor, counts: Tensor) -> None:
        self.inputs, self.hidden = self.inputs.to(rows.device), self.hidden.to(rows.device)
        for expert, x in enumerate(rows.split(counts.tolist())):
            w1, w3 = (weight[expert] for weight in (self.weights.w1, self.weights.w3))
            for sums, seen in ((self.inputs, x), (self.hidden, F.silu(x @ w1.t()) * (x @ w3.t()))):
                sums[expert, :-1] += seen.double().square().sum(0)
                sums[expert, -1] += len(x)

    def finish(self, group: Any) -> None:
        for sums in (self.inputs, self.hidden):
            dist.all_reduce(sums, group=group)
        for name, sparse in self.weights.sparsity.items():
            sums = self.hidden if name == "w2" else self.inputs
            mean = sums[:, :-1] / sums[:, -1:].clamp(min=1)
            sparse.input_norm.copy_(torch.where(sums[:, -1:] > 0, mean.sqrt(), 1.0))  # 1: it saw no token
