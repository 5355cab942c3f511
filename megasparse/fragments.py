"""What DeepSpeed's optimizer holds of this process's weights, and where; and the norm of the model's gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from megasparse import platform
from megasparse.config import Recipe
from megasparse.placement import Weight, is_expert, local_weights
from megasparse.topology import Topology


@dataclass(frozen=True)
class PlaceInAdam:
    """Of a weight in AdamW: elements ``offset`` .. ``offset + size`` of the flattened ``owner``, one of its parameters,
    are those from ``start`` on of the flattened local weight."""

    owner: Tensor
    offset: int
    start: int
    size: int

    def of(self, tensor: Tensor) -> Tensor:
        """Its elements of ``owner``, or of a tensor like that: a view, [size]."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.size]


@dataclass(frozen=True)
class Fragment:
    """A range of a weight, from element ``start`` of the flattened local weight on, as an optimizer holds it. All
    tensors are flat views of it, [n]: writing into them changes the optimizer."""

    weight: Weight
    start: int
    master: Tensor  # float32
    gradient: Tensor | None  # reduced over every rank, times the loss scale; only between backward and the step
    state: dict[str, Tensor]  # Adam's exp_avg and exp_avg_sq; empty before the first step


class Fragments:
    """Iterated, what this rank's optimizer holds, weight by weight: under ZeRO a range of each weight or none of it,
    else all of it. The last stage's copy of a tied embedding is among them."""

    def __init__(
        self,
        recipe: Recipe,
        topology: Topology,
        chunks: nn.ModuleList,
        adam: torch.optim.Optimizer,
        optimizer: Any,
    ) -> None:
        """optimizer: DeepSpeed's, around ``adam``."""
        self.parallel, self.topology, self.chunks = recipe.parallel, topology, chunks
        self.adam, self.optimizer = adam, optimizer

    def __iter__(self) -> Iterator[Fragment]:
        for weight in local_weights(self.chunks, self.topology):
            parameter: Any = weight.tensor
            place = self.place(parameter)
            if place is not None:
                state = {
                    name: place.of(value)
                    for name, value in self.adam.state.get(place.owner, {}).items()
                    if torch.is_tensor(value) and value.shape == place.owner.shape
                }
                yield Fragment(weight, place.start, place.of(place.owner), self._gradient(parameter), state)

    @property
    def partitioned(self) -> bool:
        """Does DeepSpeed hold only this rank's partition of the reduced gradients (its fp32/fp16 ZeRO optimizer)?"""
        return hasattr(self.optimizer, "averaged_gradients")

    def place(self, parameter: Any) -> PlaceInAdam | None:
        """Where AdamW holds this rank's part of a parameter; None where it has no part of it."""
        if self.parallel.zero_stage == 0:
            return PlaceInAdam(parameter, 0, 0, parameter.numel())
        link = parameter._hp_mapping
        if link is None:
            return None
        group, there = link.param_group_index, link.hp_fragment_address
        flat = (
            self.optimizer.single_partition_of_fp32_groups
            if self.partitioned
            else self.optimizer.fp32_groups_flat_partition
        )
        return PlaceInAdam(flat[group], there.start, link.lp_fragment_address.start, there.numel)

    def _gradient(self, parameter: Any) -> Tensor | None:
        if self.parallel.zero_stage == 0:
            return None if parameter.grad is None else parameter.grad.view(-1)
        link = parameter._hp_mapping
        group, there = link.param_group_index, link.hp_fragment_address
        if not self.partitioned:  # DeepSpeed's bf16 optimizer keeps the whole local gradient, from the first one on
            if not hasattr(parameter, "_hp_grad"):
                return None
            return parameter._hp_grad.view(-1).narrow(0, link.lp_fragment_address.start, there.numel)
        if self.parallel.offload_optimizer:
            gradient = self.optimizer.single_partition_of_fp32_groups[group].grad
            return None if gradient is None else gradient.narrow(0, there.start, there.numel)
        parts = self.optimizer.averaged_gradients.get(group)
        return None if parts is None else parts[parameter._index_in_param_group].view(-1)

    def gradient_norm(self) -> float:
        """sqrt of the sum of squares over the whole model, each weight once: one all-reduce over the world. Not finite
        if any rank's gradient is not, its copy of another's weight or not."""
        dense = torch.zeros((), dtype=torch.float64)
        experts = torch.zeros((), dtype=torch.float64)
        for fragment in self:
            gradient, parameter = fragment.gradient, fragment.weight.tensor
            if gradient is None:
                continue
            square = torch.linalg.vector_norm(gradient.float()).double().square().cpu()
            if is_expert(parameter):
                experts += square
                continue
            whole = not getattr(parameter, "tensor_model_parallel", False)  # on each tensor-parallel rank
            copy = fragment.weight.copy or (whole and self.topology.tp_rank > 0)
            dense += 0 * square if copy else square  # 0 times what is not finite is not a number
        if self.parallel.zero_stage == 0:  # every replica counted the same gradient
            dense, experts = dense / self.topology.replicas, experts / self.topology.expert_dp
        total = (dense + experts).to(platform.device())
        dist.all_reduce(total)
        return math.sqrt(total.item())
