"""The only place that calls deepspeed.initialize: forward and backward, gradient flow, clipping, the step.

Gradients flow through megatron-core's schedule, not through DeepSpeed's forward and backward. When the last
micro-batch is done, ``_finalize_gradients`` sums what each rank holds in part (tensor parallel norms and routers, the
tied embedding of two pipeline stages) and lets DeepSpeed average over data and context parallelism. The norm is then
taken over the whole model, exactly once per weight, and DeepSpeed's optimizer steps.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn as nn
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megasparse import deepspeed_profilers, platform
from megasparse.config import Recipe
from megasparse.data.loader import Batch
from megasparse.distillation import Teacher
from megasparse.fragments import Fragments
from megasparse.layers import apex, fp8, te
from megasparse.layers.step import StepState, attention_observations, auxiliary_losses
from megasparse.model import GPTModel, moe_layers
from megasparse.optimizer import adamw, bf16_optimizer
from megasparse.placement import local_weights
from megasparse.pruning import SparseWeights
from megasparse.sparsity.weight import Refresh
from megasparse.topology import MegatronMPU, Topology


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank. Losses are in nats."""

    loss: float  # cross-entropy per token over the global batch
    aux_losses: dict[str, float]  # unscaled, mean over micro-batches and layers
    grad_norm: float  # global, before clipping
    skipped: bool  # loss or norm was not finite or over its limit: weights, moments and router biases are as before
    loss_scale: float
    expert_tokens: Tensor  # [MoE layers, experts] int64: tokens routed to each expert
    dropped_fraction: float  # of the routed copies; 0 when dropless
    attention: dict[str, float]
    """Of block-sparse layers: ``block_density``, the share of causal key blocks that they saw, and what
    layers.step.attention_observations names. Empty where attention was dense."""
    sparsity: dict[str, float]
    """Of 2:4 weights whose masks were made anew: ``mass_kept``, the share of the sum of magnitudes that they keep, and
    ``flip_rate``, the share of places that changed since the masks before. Else empty."""
    distillation: dict[str, float]
    """With a teacher: ``distillation_loss``, KL(teacher || student) per token, before its weight and temperature^2.
    Else empty."""


@dataclass(frozen=True)
class Limits:
    """A step with more of either is skipped."""

    loss: float = math.inf
    grad_norm: float = math.inf


class Engine:
    """The model of this rank under DeepSpeed: ``train_step``, ``evaluate``, and the module for checkpoints."""

    def __init__(
        self,
        recipe: Recipe,
        topology: Topology,
        chunks: nn.ModuleList,
        step_state: StepState,
        teacher: Teacher | None = None,
    ) -> None:
        self.recipe, self.topology, self.chunks, self.step_state = recipe, topology, chunks, step_state
        self.teacher = teacher
        self.config: Any = chunks[0].config
        if recipe.training.precision == "fp16":
            platform.allow_fp16()
        self.adam = adamw(recipe, chunks)
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory readings
            self.deepspeed, self.optimizer, *_ = deepspeed.initialize(
                model=chunks,
                optimizer=self.adam,  # type: ignore[arg-type]
                config=deepspeed_config(recipe, topology),
                mpu=MegatronMPU(),
            )
        deepspeed_profilers.log_messages(recipe)
        self.fragments = Fragments(recipe, topology, chunks, self.adam, self.optimizer)
        # DeepSpeed's own norms wait for stages that have no experts and count by their own rules.
        if self.fragments.partitioned:
            self.optimizer.scaled_global_norm = self._scaled_global_norm
        elif bf16_optimizer(recipe):
            self.optimizer.step = self._bf16_step
            if apex.gradients_missing() is None:
                apex.add_gradients_in_place(chunks, self._bf16_gradients())
        self.config.finalize_model_grads_func = self._finalize_gradients
        if recipe.training.precision == "fp16":
            self.config.grad_scale_func = lambda loss: loss * self.optimizer.loss_scale
        self.before_step: Callable[[], None] | None = None  # to look at gradients: reduced, not yet clipped
        self._refresh = Refresh()
        self._clock = platform.Clock()
        self._moe = moe_layers(chunks)
        self._fp8, self._te_scales = fp8.fp8_scales(chunks), te.delayed_scales(chunks)
        self.sparse_weights = SparseWeights(recipe, topology, chunks, self.adam, self.fragments)
        self._partial = [
            weight.tensor
            for weight in local_weights(chunks, topology)
            if topology.tp > 1 and getattr(weight.tensor, "sequence_parallel", False)
        ]
        if recipe.parallel.zero_stage == 2:
            # It reduces over the replicas while backward runs: what is partial is summed as it appears.
            for parameter in self._partial:
                parameter.register_hook(lambda gradient: self._sum_over_tensor_parallel([gradient])[0])

    # Training ------------------------------------------------------------------------------------------------------

    def train_step(
        self, batches: list[Batch], step: int, learning_rate: float, limits: Limits | None = None, again: bool = False
    ) -> StepResult:
        """One optimizer step (``step`` counts from 0) on this rank's micro-batches. ``again``: the same one once more,
        after it was skipped."""
        limits = limits or Limits()
        self._clock.start()
        self.chunks.train()
        calibrate = None if again else partial(self._forward_backward, batches, 1.0, forward_only=True)
        refresh = self.sparse_weights.begin_step(step, calibrate)
        refresh = self._refresh if again else refresh  # the second time nothing flips
        self._refresh = refresh
        self.step_state.begin(step, self.recipe.training.steps, len(batches))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        tokens = self._loss_tokens(batches)
        scale = self.topology.replicas / tokens
        self.step_state.gradient_unit = scale * self.loss_scale()
        with deepspeed_profilers.flops_of_forward(self.recipe, self.chunks, step, self.topology.rank):
            losses = self._forward_backward(batches, scale)
        self.sparse_weights.end_step()
        statistics = self._reduce_statistics(losses, tokens, refresh)
        loss_scale = self.loss_scale()
        self._norm = self.fragments.gradient_norm()
        good = statistics.loss <= limits.loss and self._norm / loss_scale <= limits.grad_norm
        good = good and math.isfinite(statistics.loss) and math.isfinite(self._norm)
        if self.before_step is not None:
            self.before_step()
        self._clip_and_step(good)
        for layer, moe in self._moe:
            moe.router.end_step(statistics.expert_tokens[layer] if good else None)
        fp8.end_step(self._fp8, self.topology.stage_group, done=good)
        for scales in self._te_scales:
            scales.take(self._te_unit())
        is_moe = torch.tensor(self.recipe.model.moe_layers)
        routed = statistics.expert_tokens.sum().item()
        return StepResult(
            loss=statistics.loss,
            aux_losses=statistics.aux_losses,
            grad_norm=self._norm / loss_scale,
            skipped=not good,
            loss_scale=loss_scale,
            expert_tokens=statistics.expert_tokens[is_moe],
            dropped_fraction=statistics.dropped / routed if routed else 0.0,
            attention=statistics.attention,
            sparsity=statistics.sparsity,
            distillation=statistics.distillation,
        )

    @property
    def own_seconds(self) -> float:
        """Of the last step: until gradients were there, before ranks waited for each other's."""
        return self._clock.seconds()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """(sum of nats, tokens scored) over every data-parallel rank's batches; ranks pass equally many."""
        self.chunks.eval()
        nats, tokens = 0.0, 0.0
        for batch in batches:
            # Interleaved stages want as many micro-batches as stages: the others are copies that are not counted.
            copies = [batch] * (self.topology.pp if self.topology.vp > 1 else 1)
            losses = self._forward_backward(copies, scale=1.0, forward_only=True)
            nats += sum(loss[0].item() for loss in losses[:1])
            tokens += batch.loss_mask.sum().item() / self.topology.cp  # the same on every context-parallel rank
        nats = nats if self._reports_loss else 0.0
        tokens = tokens if self._reports_loss else 0.0
        nats, tokens = self._all_reduce([nats, tokens], None)
        return nats, round(tokens)

    def _forward_backward(self, batches: list[Batch], scale: float, forward_only: bool = False) -> list[Tensor]:
        """Run the pipeline; returns each micro-batch's summed loss on the last stage, [1], in training with a teacher
        [2], with the divergence from it; [] elsewhere."""
        place = self.topology
        parts = [batch.context_part(place.cp_rank, place.cp) for batch in batches]
        chunks = list(self.chunks)
        distill = self.teacher.distill(parts) if self.teacher is not None and not forward_only else None
        self._started = 0
        # megatron-core scales auxiliary losses where the model has experts: a dense one's gates have a loss too.
        MoEAuxLossAutoScaler.main_loss_backward_scale = torch.full((1,), self.loss_scale(), device=platform.device())
        return get_forward_backward_func()(
            forward_step_func=lambda iterator, model: self._forward(
                next(iterator), model, scale, len(batches), distill if model.post_process else None
            ),
            data_iterator=[iter(parts) for _ in chunks] if place.vp > 1 else iter(parts),
            model=chunks if place.vp > 1 else chunks[0],
            num_microbatches=len(parts),
            seq_length=self.recipe.data.seq_length,
            micro_batch_size=self.recipe.training.micro_batch_size,
            forward_only=forward_only,
        )

    def _forward(
        self, batch: Batch, model: GPTModel, scale: float, num_micro_batches: int, distill: Iterator[Any] | None
    ) -> tuple[Tensor, Any]:
        if self.recipe.parallel.zero_stage == 2 and torch.is_grad_enabled():
            # Its hooks reduce each backward's gradients: close the previous one's, and say whether this is the last.
            if self._started > 0:
                self.optimizer.overlapping_partition_gradients_reduce_epilogue()
            self._started += 1
            self.deepspeed.set_gradient_accumulation_boundary(self._started == num_micro_batches)
        batch = batch.to(platform.device())
        model.distill = None if distill is None else next(distill)
        output = model(
            batch.tokens,
            batch.position_ids,
            attention_mask=batch.document_ids,
            labels=batch.labels,
            padding_mask=batch.token_index,
        )
        model.distill = None  # the teacher's logits are of no more use

        def loss_function(token_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Token losses [batch, seq], or two of them -> what is differentiated: the local sum over the global
            batch's tokens, times the number of replicas that DeepSpeed's average will divide by."""
            losses = [token_losses] if distill is None else token_losses.unbind()
            totals = [(loss * batch.loss_mask).sum() for loss in losses]
            objective = totals[0] if self.teacher is None or distill is None else self.teacher.objective(*totals)
            return objective * scale, batch.loss_mask.sum().int(), torch.stack(totals).detach()

        return output, loss_function

    def _finalize_gradients(self, models: Any, num_tokens: Any = None, **_: Any) -> None:
        """Called by mcore's schedule after the last backward, before the optimizer."""
        self._clock.stop()
        if self._partial and self.recipe.parallel.zero_stage < 2:
            gradients = [self._gradient(parameter) for parameter in self._partial]
            for gradient, total in zip(gradients, self._sum_over_tensor_parallel(gradients), strict=True):
                gradient.copy_(total)
        if self.recipe.model.tie_embeddings and self.topology.pp > 1 and parallel_state.is_rank_in_embedding_group():
            chunk: Any = self.chunks[0] if self.topology.is_first_stage else self.chunks[-1]
            shared = chunk.shared_embedding_or_output_weight()
            dist.all_reduce(self._gradient(shared), group=parallel_state.get_embedding_group())
        if self.recipe.parallel.zero_stage > 0 or self.topology.world_size > 1:
            self.deepspeed.allreduce_gradients()

    def _sum_over_tensor_parallel(self, gradients: list[Tensor]) -> list[Tensor]:
        """Their sums over the tensor-parallel ranks, in one message."""
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=self.topology.tp_group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]

    def _gradient(self, parameter: Tensor) -> Tensor:
        """The full local gradient, before data-parallel reduction: DeepSpeed's bf16 optimizer keeps it in fp32."""
        if parameter.grad is None and hasattr(parameter, "_hp_grad"):
            return parameter._hp_grad  # type: ignore[attr-defined]
        assert parameter.grad is not None
        return parameter.grad

    # Norm, clipping, step ------------------------------------------------------------------------------------------

    def _clip_and_step(self, good: bool) -> None:
        """Scale the gradients to ``clip_grad`` and step; a step that is not good only clears them."""
        self._good = good
        if self.fragments.partitioned:
            self.deepspeed.step()  # clips and skips by _scaled_global_norm, and moves the loss scale
        elif good:
            limit = self.recipe.optimizer.clip_grad
            coefficient = limit / (self._norm + 1e-6) if limit > 0 else 1.0
            if coefficient < 1:
                torch._foreach_mul_([f.gradient for f in self.fragments if f.gradient is not None], coefficient)
            self.deepspeed.step()
        else:
            self.optimizer.zero_grad()
        self.chunks.zero_grad()

    def _bf16_gradients(self) -> dict[Tensor, Tensor]:
        """Where BF16_Optimizer sums each weight's gradient, from now on and not only from its first one on."""
        sums = {}
        for weights, gradients in zip(self.optimizer.bf16_groups, self.optimizer.fp32_groups_gradients, strict=True):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight._hp_grad = sums[weight] = gradient
        return sums

    def _bf16_step(self) -> None:
        """BF16_Optimizer's step without its norm: gradients are clipped and known to be finite."""
        bf16 = self.optimizer
        for master, gradient in zip(
            bf16.fp32_groups_flat_partition, bf16.fp32_groups_gradient_flat_partition, strict=True
        ):
            master.grad = gradient
        bf16.optimizer.step()
        bf16.update_lp_params()
        bf16.clear_hp_grads()

    def _scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """What DeepSpeed's ZeRO optimizer clips and checks by (still times the loss scale)."""
        return torch.tensor(self._norm if self._good else math.inf)

    def follow_loaded(self) -> None:
        """After the optimizer's and the buffers' tensors were written into: what the model computes with follows."""
        if self.recipe.parallel.zero_stage > 0:
            self.optimizer.update_lp_params()
        for scales in self._te_scales:
            scales.give(self._te_unit())

    def _te_unit(self) -> float:
        return te.gradient_unit(self.recipe, self.topology.replicas, self.loss_scale())

    def loss_scale(self) -> float:
        """What fp16 gradients are multiplied by; 1 in the other precisions."""
        return float(self.optimizer.loss_scale) if self.recipe.training.precision == "fp16" else 1.0

    # Statistics ----------------------------------------------------------------------------------------------------

    @property
    def _reports_loss(self) -> bool:
        """One rank of each data-parallel replica adds its loss to the sums: the others hold none or the same."""
        return self.topology.is_last_stage and self.topology.tp_rank == 0

    def _loss_tokens(self, batches: list[Batch]) -> float:
        """Tokens of the global batch that have a loss; 1 where every one is masked."""
        own = sum(batch.loss_mask.sum().item() for batch in batches)
        return max(self._all_reduce([own], self.topology.replica_group)[0] / self.topology.cp, 1.0)

    def _reduce_statistics(self, losses: list[Tensor], tokens: float, refresh: Refresh) -> _Statistics:
        """The global batch's statistics from every rank's part: one all-reduce over the world."""
        model, moe = self.recipe.model, self.recipe.model.moe
        losses_of_layers = auxiliary_losses(model)
        names = losses_of_layers + attention_observations(model)
        counts = torch.zeros(model.num_layers, (moe.num_experts if moe else 0) + 1)
        for layer, mixture in self._moe:
            counts[layer] = mixture.router.counts
        own_losses = [0.0, 0.0]  # and the divergence from a teacher
        if self._reports_loss:
            for i in range(1 if self.teacher is None else 2):
                own_losses[i] = sum(loss[i].item() for loss in losses) / tokens
        own_means = [float(self.step_state.means.get(name, 0.0)) / self.topology.dp for name in names]
        own_blocks = [float(self.step_state.blocks.get(name, 0.0)) for name in ("listed", "all")]
        own_masks = [refresh.flipped, refresh.compared, refresh.kept, refresh.all]
        sums = self._all_reduce([*own_losses, *own_blocks, *own_masks, *own_means, *counts.flatten().tolist()], None)
        loss, distilled, listed, blocks, flipped, compared, kept, all_, *rest = sums
        counts = torch.tensor(rest[len(names) :], dtype=torch.float64).view(counts.shape).long()
        means = dict(zip(names, rest, strict=False))
        auxiliary = {name: means.pop(name) for name in losses_of_layers}
        return _Statistics(
            loss=loss,
            aux_losses=auxiliary,
            expert_tokens=counts[:, :-1],
            dropped=int(counts[:, -1].sum()),
            attention={"block_density": listed / blocks, **means} if blocks else {},
            sparsity={
                **({"mass_kept": kept / all_} if all_ else {}),
                **({"flip_rate": flipped / compared} if compared else {}),
            },
            distillation={} if self.teacher is None else {"distillation_loss": distilled},
        )

    def _all_reduce(self, values: list[float], group: dist.ProcessGroup | None) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=platform.device())
        dist.all_reduce(tensor, group=group)
        return tensor.tolist()


@dataclass(frozen=True)
class _Statistics:
    """Of one global batch, the same on every rank."""

    loss: float
    aux_losses: dict[str, float]
    expert_tokens: Tensor  # [layers, experts] int64
    dropped: int
    attention: dict[str, float]
    sparsity: dict[str, float]
    distillation: dict[str, float]


def deepspeed_config(recipe: Recipe, topology: Topology) -> dict[str, Any]:
    """The one place where the recipe becomes DeepSpeed's configuration.

    Accumulation is the schedule's and the learning rate the loop's, so DeepSpeed sees one batch per step.
    """
    training = recipe.training
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.global_batch_size // topology.dp,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": recipe.parallel.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,  # false averages expert gradients over the wrong group (ZeRO-1, ep > 1)
            "reduce_scatter": True,
            "reduce_bucket_size": recipe.parallel.deepspeed.reduce_bucket_size,
            "allgather_bucket_size": 2**24,  # unused: torch gathers into one tensor
            **({"offload_optimizer": {"device": "cpu"}} if recipe.parallel.offload_optimizer else {}),
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on the CPU as well
    }
    if bf16_optimizer(recipe):
        # Master weights, moments and accumulated gradients in fp32; gradients are added there as backward makes them.
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif training.precision == "fp16":
        config["fp16"] = {
            "enabled": True,
            "initial_scale_power": round(math.log2(training.loss_scale)),
            "loss_scale_window": training.loss_scale_window,
            "hysteresis": 1,
        }
    # Only its partitioned optimizer clips for us. Unsaid, DeepSpeed 0.19 clips to 1 by a norm of its own.
    partitioned = recipe.parallel.zero_stage > 0 and not bf16_optimizer(recipe)
    config["gradient_clipping"] = recipe.optimizer.clip_grad if partitioned else 0.0
    return config
