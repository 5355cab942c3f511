"""What all layers know of the current step, and what they add up in it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megasparse.config import Model


@dataclass
class StepState:
    """The current optimizer step as every layer of this process sees it. Set and read by the engine.

    The objective of a step adds, for each auxiliary loss, its mean over the step's micro-batches.
    """

    step: int = 0
    progress: float = 1.0  # the share of the run's steps that are done with this one
    seed: int = 0
    num_micro_batches: int = 1
    gradient_unit: float = 1.0  # what backward computes is that many times the gradient of the sum of token losses
    recompute: bool = False  # layers run twice: the first time without gradients
    seq_length: int = 0  # tokens of a training sequence, by whose blocks the budget of block-sparse attention shrinks
    context_parallel: int = 1  # ranks that share a micro-batch's tokens, over which DeepSpeed averages gradients
    context_rank: int = 0
    token_index: Tensor | None = None  # of the layer that runs: its tokens' numbers in the run, int64 [batch, some]
    means: dict[str, Tensor] = field(default_factory=dict)  # over micro-batches and layers, this rank's part
    blocks: dict[str, Tensor] = field(
        default_factory=dict
    )  # key blocks that sparse attention listed, and all there are
    pooled: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # all_layers: (probs sum, counts) of each layer

    def begin(self, step: int, steps: int, num_micro_batches: int) -> None:
        """Step ``step`` (from 0) of a run of ``steps``."""
        self.step, self.progress, self.num_micro_batches = step, (step + 1) / steps, num_micro_batches
        self.means.clear()
        self.blocks.clear()
        self.pooled.clear()

    def first_pass(self) -> bool:
        """False in the second run of a recomputed layer: counters advance once."""
        return not (self.recompute and torch.is_grad_enabled())

    def record(self, name: str, value: Tensor) -> None:
        if self.first_pass():
            part = value.detach() / self.num_micro_batches
            self.means[name] = self.means[name] + part if name in self.means else part

    def count_blocks(self, listed: Tensor, all_: Tensor) -> None:
        if self.first_pass():
            for name, value in (("listed", listed), ("all", all_)):
                self.blocks[name] = self.blocks[name] + value if name in self.blocks else value


def auxiliary_losses(model: Model) -> list[str]:
    """Names of the losses that layers record."""
    coefficients = {}
    if model.moe is not None:
        coefficients |= {"load_balance_loss": model.moe.aux_loss_coefficient, "z_loss": model.moe.z_loss_coefficient}
    if sparse := model.sparse_attention:
        own = {"gate": {"gate_loss": sparse.gate_loss_coefficient}}
        own["clusters"] = {"cluster_loss": sparse.cluster_loss_coefficient}
        coefficients |= own.get(sparse.selector, {})
    return [name for name, coefficient in coefficients.items() if coefficient > 0]


def attention_observations(model: Model) -> list[str]:
    """Names of what block-sparse layers record besides: the share of dense attention that their blocks have
    (layers/recall.py), and in nats the entropy of the softmax over the blocks that a selector chooses from."""
    if model.sparse_attention is None:
        return []
    return ["attention_recall", *(["selector_entropy"] if model.sparse_attention.chooses else [])]
