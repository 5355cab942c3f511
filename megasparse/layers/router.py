"""The router: which experts each token goes to, and the losses and biases that keep their load even."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from megasparse.config import MoE
from megasparse.layers.step import StepState
from megasparse.ops.experts import routing


@dataclass(frozen=True)
class RouterOutput:
    """Where the tokens of one micro-batch (this rank's part) go."""

    weights: Tensor  # [tokens, top_k]
    experts: Tensor  # [tokens, top_k] int64
    keep: Tensor | None  # [tokens, top_k] bool; None: dropless
    loss: Tensor | None  # scalar to be differentiated with the micro-batch's loss; None: no auxiliary loss
    selection: Tensor  # [tokens, experts]: the scores that the experts were chosen by


class Router(nn.Module):
    """Linear router in float32 with top-k selection; see config.MoE for the options and their sources.

    Buffers, all of them checkpoint state: ``bias`` [experts] float32, the selection bias of auxiliary-loss-free
    balancing; ``load`` [experts] float32, each expert's share of the previous step's tokens (sums to 1; uniform at
    first); ``counts`` [experts + 1] int64, tokens per expert of the current step and, last, dropped copies.
    """

    bias: Tensor
    load: Tensor
    counts: Tensor

    def __init__(self, config: Any, moe: MoE, state: StepState, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.moe, self.state = moe, state
        self.group = group  # the tensor- and context-parallel ranks, which share the tokens of a micro-batch
        self.num_moe_layers = 1  # in the whole model; set by model.py
        self.is_last_moe_layer = False
        self.layer_number = 1
        self.weight = nn.Parameter(torch.empty(moe.num_experts, config.hidden_size, dtype=config.params_dtype))
        # Each tensor-parallel rank routes its own tokens: its gradient is a part.
        self.weight.sequence_parallel = config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]
        self.register_buffer("bias", torch.zeros(moe.num_experts))
        self.register_buffer("load", torch.full((moe.num_experts,), 1 / moe.num_experts))
        self.register_buffer("counts", torch.zeros(moe.num_experts + 1, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, token_index: Tensor) -> RouterOutput:
        """x [tokens, hidden], token_index [tokens] (each token's number in the run) -> where they go."""
        moe = self.moe
        if self.training and moe.jitter > 0:
            key = (self.state.seed * 1_000_003 + self.state.step) * 4096 + self.layer_number
            x = x * routing.jitter_noise(token_index, x.shape[-1], moe.jitter, key).to(x.dtype)
        compute = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(compute), self.weight.to(compute))
        routed = routing.route(
            logits,
            moe.top_k,
            moe.score_function,
            moe.normalize_scores,
            moe.score_scale,
            moe.num_groups,
            moe.top_k_groups,
            self.bias if moe.bias_update_rate > 0 else None,
        )
        keep = self._keep(routed.experts, routed.weights, token_index)
        if not self.training:
            return RouterOutput(routed.weights, routed.experts, keep, None, routed.selection)
        counts = torch.zeros(moe.num_experts, dtype=torch.int64, device=x.device)
        flat = routed.experts.reshape(-1)
        counts.scatter_add_(0, flat, torch.ones_like(flat))
        if self.state.first_pass():
            self.counts[:-1] += counts
            if keep is not None:
                self.counts[-1] += keep.numel() - keep.sum()
        loss = self._loss(logits, routed.probs, counts)
        return RouterOutput(routed.weights, routed.experts, keep, loss, routed.selection)

    def _keep(self, experts: Tensor, weights: Tensor, token_index: Tensor) -> Tensor | None:
        """Capacity and drop order are those of the whole micro-batch, wherever its tokens are.

        Evaluation and generation drop nothing: a token's score would depend on what follows it and on the other
        sequences of its micro-batch."""
        moe = self.moe
        if moe.capacity_factor is None or not self.training:
            return None
        tokens = experts.shape[0]
        everyone = [self._gather(t) for t in (experts, weights.detach(), token_index)]
        order = torch.argsort(everyone[2], stable=True)  # batch-major, then position: the same under any split
        limit = routing.capacity(len(order), moe.top_k, moe.num_experts, moe.capacity_factor)
        keep_sorted = routing.capacity_keep(
            everyone[0][order], everyone[1][order], moe.num_experts, limit, moe.drop_policy
        )
        keep = torch.empty_like(keep_sorted)
        keep[order] = keep_sorted
        return keep[dist.get_rank(self.group) * tokens :][:tokens]

    def _gather(self, local: Tensor) -> Tensor:
        size = dist.get_world_size(self.group)
        if size == 1:
            return local
        parts = [torch.empty_like(local) for _ in range(size)]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        return torch.cat(parts)

    def _loss(self, logits: Tensor, probs: Tensor, counts: Tensor) -> Tensor | None:
        """The layer's auxiliary losses times their coefficients, over num_micro_batches.

        Each rank of the group holds its tokens' part: the parts sum to the micro-batch's loss. What is returned is
        times the context-parallel size that DeepSpeed's average will divide by.
        """
        moe, parts = self.moe, dist.get_world_size(self.group)
        loss = logits.new_zeros(())
        if moe.z_loss_coefficient > 0:
            z_loss = routing.z_loss(logits) / parts
            self.state.record("z_loss", z_loss / self.num_moe_layers)
            loss = loss + moe.z_loss_coefficient * z_loss
        if moe.aux_loss_coefficient > 0:
            aux = self._load_balance_loss(probs, counts) / parts
            layers = 1 if moe.aux_loss_scope == "all_layers" else self.num_moe_layers
            self.state.record("load_balance_loss", aux / layers)
            loss = loss + moe.aux_loss_coefficient * aux
        scale = self.state.context_parallel / self.state.num_micro_batches
        return loss * scale if loss.requires_grad else None

    def _load_balance_loss(self, probs: Tensor, counts: Tensor) -> Tensor:
        moe = self.moe
        if moe.aux_loss_scope == "global_batch":
            return routing.load_balance_loss(probs, self.load.to(probs.dtype))
        if dist.get_world_size(self.group) > 1:
            counts = counts.clone()
            dist.all_reduce(counts, group=self.group)
        if moe.aux_loss_scope == "all_layers":
            return self._pooled_loss(probs, counts)
        return routing.load_balance_loss(probs, counts.to(probs.dtype) / counts.sum())

    def _pooled_loss(self, probs: Tensor, counts: Tensor) -> Tensor:
        """transformers' load_balancing_loss_func: E * sum_e (sum_layers count_e / tokens) * mean(prob_e), at the
        last layer; zero at the others. probs are this rank's, counts the micro-batch's."""
        pooled = self.state.pooled
        pooled.append((probs.sum(0), counts.to(probs.dtype)))
        if not self.is_last_moe_layer:
            return probs.new_zeros(())
        tokens = probs.shape[0] * len(pooled)
        mean_probs = torch.stack([p for p, _ in pooled]).sum(0) / tokens
        fraction = torch.stack([c for _, c in pooled]).sum(0) / (tokens * dist.get_world_size(self.group))
        pooled.clear()
        return self.moe.num_experts * (fraction * mean_probs).sum()

    @torch.no_grad()
    def end_step(self, counts: Tensor | None) -> None:
        """Take the global batch's tokens per expert [experts]: remember the load, move the bias, reset the counter.

        None: the step was skipped, load and bias stay."""
        if counts is not None:
            self.load.copy_(counts / counts.sum())
            if self.moe.bias_update_rate > 0:
                self.bias.copy_(routing.bias_update(self.bias, counts, self.moe.bias_update_rate))
        self.counts.zero_()


def load_by_layer(counts: Tensor) -> list[float]:
    """How uneven each layer is: largest / mean tokens per expert. counts: [layers, experts]."""
    mean = counts.double().mean(-1)
    return (counts.amax(-1) / mean.clamp(min=1e-9)).tolist()
