"""The sparse weights of a process in an optimizer step: when their masks change, and what AdamW sees of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn

from megasparse import schedule
from megasparse.config import Recipe
from megasparse.fragments import Fragments, PlaceInAdam
from megasparse.layers.wanda import measure_inputs
from megasparse.placement import is_expert
from megasparse.sparsity.weight import Refresh, SparseWeight, sparse_weights
from megasparse.topology import Topology


class SparseWeights:
    def __init__(
        self,
        recipe: Recipe,
        topology: Topology,
        chunks: nn.ModuleList,
        adam: torch.optim.Optimizer,
        fragments: Fragments,
    ) -> None:
        """fragments: of ``adam``."""
        self.sparsity, self.steps = recipe.sparsity.weights, recipe.training.steps
        self.chunks, self.topology, self.fragments = chunks, topology, fragments
        self.of = {sparse.weight[0]: sparse for sparse in sparse_weights(chunks)}
        self.decay = 0.0  # of masked weights, in the current step
        if self.sparsity is not None and self.sparsity.method == "sr_ste":
            adam.register_step_pre_hook(self._decay_before_adam)
        if self.sparsity is not None and self.sparsity.method == "ast":
            adam.register_step_post_hook(self._decay_after_adam)

    def begin_step(self, step: int, calibrate: Callable[[], Any] | None) -> Refresh:
        """Make masks anew where they are due; returns this rank's share in what changed.

        ``calibrate`` runs the model forward on the step's samples, for Wanda's score; None where this step was begun
        before: weights are masked by now, its inputs are not what they were."""
        total = Refresh()
        if self.sparsity is None:
            return total
        self.decay = schedule.mask_decay((step + 1) / self.steps, self.sparsity)
        first = any(sparse.becomes_sparse(step, self.steps) for sparse in self.of.values())
        if first and calibrate is not None and self.sparsity.score == "wanda":
            self.chunks.eval()
            measure_inputs(self.chunks, self.topology, calibrate)
            self.chunks.train()
        for weight, sparse in self.of.items():
            copies = self.topology.expert_dp if is_expert(weight) else self.topology.replicas
            total.add(sparse.begin_step(step, self.steps), 1 / copies)
        if first and self.sparsity.boost:  # boosts were given their first values: the optimizer's copies follow
            boosts = {sparse.boost for sparse in self.of.values()}
            for fragment in self.fragments:
                if fragment.weight.tensor in boosts:
                    flat = fragment.weight.tensor.detach().view(-1)
                    fragment.master.copy_(flat[fragment.start : fragment.start + len(fragment.master)])
        return total

    def end_step(self) -> None:
        """Weights may change from here on."""
        for sparse in self.of.values():
            sparse.end_step()

    def _decay_before_adam(self, adam: torch.optim.Optimizer, *_: Any) -> None:
        """Right before ``adam`` steps, after clipping: the decay becomes a part of the gradient (2by4)."""
        for sparse, place in self._stepping(adam):
            assert place.owner.grad is not None
            sparse.add_decay(place.of(place.owner.grad), place.of(place.owner), place.start, self.decay)

    def _decay_after_adam(self, adam: torch.optim.Optimizer, *_: Any) -> None:
        """Right after it: masked weights decay as by an update of Adam's that its momentum has no part in (AST)."""
        group = adam.param_groups[0]
        for sparse, place in self._stepping(adam):
            state = adam.state[place.owner]
            corrected = place.of(state["exp_avg_sq"]) / (1 - group["betas"][1] ** state["step"].item())
            sparse.decay_after_adam(
                place.of(place.owner), corrected, place.start, group["lr"] * self.decay, group["eps"]
            )

    def _stepping(self, adam: torch.optim.Optimizer) -> Iterator[tuple[SparseWeight, PlaceInAdam]]:
        """The sparse weights that decay and that ``adam`` steps now: under ZeRO, a group at a time."""
        if self.decay == 0:
            return
        stepping = {parameter for group in adam.param_groups for parameter in group["params"]}
        for weight, sparse in self.of.items():
            place = self.fragments.place(weight)
            if place is not None and place.owner in stepping:
                yield sparse, place
