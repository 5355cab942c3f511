"""Knowledge distillation (Hinton et al. 2015): a teacher's logits of a step's micro-batches, and the divergence of the
student from them.

The loss of a token is (1 - w) CE + w T^2 KL(softmax(teacher / T) || softmax(student / T)), as config.Teacher says; the
auxiliary losses of layers are added to it as without a teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse import config, platform
from megasparse.config import Recipe, parse_recipe
from megasparse.data.loader import Batch
from megasparse.layout import check_layout
from megasparse.model import GPTModel
from megasparse.topology import Topology


def teacher_recipe(student: Recipe, own: Recipe, path: Path, world_size: int) -> Recipe:
    """The recipe that the teacher at ``path``, trained with ``own``, runs with beside the student: its own model and
    sparsity, the student's data, batches, precision and layout; layers are spread evenly over pipeline stages.

    ValueError if it is not possible, in this layout or at all: what is a rule of training alone is set aside."""
    field = f"training.teacher.checkpoint={path}"
    raw, theirs = own.model_dump(mode="json"), student.model_dump(mode="json")
    learned, moe = own.model.position_embedding == "learned", own.model.moe
    raw["data"] = {**theirs["data"], "reset_position_ids": learned and student.data.reset_position_ids}
    raw["parallel"] = {**theirs["parallel"], "layers_per_stage": None, **({} if moe else {"ep": 1})}
    raw["schedule"] = {"type": "constant"}
    raw["training"].update(
        {key: theirs["training"][key] for key in ("global_batch_size", "micro_batch_size", "precision", "seed")},
        **{"recompute": "none", "initial_checkpoint": None, "teacher": None},
    )
    if learned and own.model.max_position_embeddings is None:
        raw["model"]["max_position_embeddings"] = own.data.seq_length  # rows of its table
    if moe is not None:
        raw["model"]["moe"]["aux_loss_scope"] = "micro_batch"
    if own.sparsity.weights is not None:
        raw["sparsity"]["weights"]["mvue"] = "none"
    recipe = parse_recipe(raw, field)
    try:
        check_layout(recipe, world_size)
    except ValueError as error:
        raise ValueError(f"{field}: the teacher in the student's {error}") from None
    return recipe


class Teacher:
    """A trained model that stays as it is, in evaluation mode and without an optimizer, in the student's layout.

    Memory beside its weights: on the last stage the logits [batch, seq / cp, vocab / tp] in training.precision, until
    the student has seen the same tokens. They are those of one micro-batch at a time; under pipeline parallelism, of
    all micro-batches of the step, for the teacher's pipeline runs before the student's. The divergence then keeps a
    float32 tensor of that size from the student's forward pass to its backward pass.
    """

    def __init__(self, settings: config.Teacher, recipe: Recipe, topology: Topology, chunks: nn.ModuleList) -> None:
        """``chunks``: of the model that ``recipe``, a teacher_recipe, says, trained."""
        self.settings, self.recipe, self.topology = settings, recipe, topology
        self.chunks = chunks.eval().requires_grad_(False)
        for parameter in chunks.parameters():  # as DeepSpeed casts the student's: megatron-core makes some in float32
            parameter.data = parameter.data.to(platform.DTYPES[recipe.training.precision])

    def objective(self, cross_entropy: Tensor, divergence: Tensor) -> Tensor:
        """What is differentiated, of the sums of both over tokens, in nats."""
        weight, temperature = self.settings.weight, self.settings.temperature
        return (1 - weight) * cross_entropy + weight * temperature**2 * divergence

    def distill(self, batches: list[Batch]) -> Iterator[Callable[[Tensor], Tensor]]:
        """GPTModel.distill for each micro-batch (this context-parallel rank's part), in order, on the last stage; none
        on the others. Every rank of the pipeline calls it, and asks for the next when the student is about to run."""
        if self.topology.pp > 1:
            found = iter(self._logits(batches))
        else:
            found = (self._logits([batch])[0] for batch in batches)
        return map(self._compare, found)  # a generator's loop would hold on to the last logits

    def _compare(self, teacher: Tensor) -> Callable[[Tensor], Tensor]:
        """teacher [batch, seq, vocab / tp] -> a function: student [seq, batch, vocab / tp] -> nats [batch, seq]."""
        group = self.topology.tp_group if self.topology.tp > 1 else None
        target = teacher.transpose(0, 1)
        return lambda student: divergence(student, target, self.settings.temperature, group).t()

    @torch.no_grad()
    def _logits(self, batches: list[Batch]) -> list[Tensor]:
        """Of each micro-batch, [batch, seq, vocab / tp]; [] but on the last stage."""

        def forward(iterator: Iterator[Batch], model: GPTModel) -> tuple[Tensor, Any]:
            batch = next(iterator).to(platform.device())
            output = model(
                batch.tokens,
                batch.position_ids,
                attention_mask=batch.document_ids,
                padding_mask=batch.token_index,
            )
            return output, lambda logits, non_loss_data: model.unpadded(logits)

        chunks, interleaved = list(self.chunks), self.topology.vp > 1
        scaler: Any = MoEAuxLossAutoScaler  # the schedule writes the scale of the model it runs into its one tensor
        scale, scaler.main_loss_backward_scale = scaler.main_loss_backward_scale, None
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(batches) for _ in chunks] if interleaved else iter(batches),
            model=chunks if interleaved else chunks[0],
            num_microbatches=len(batches),
            seq_length=self.recipe.data.seq_length,
            micro_batch_size=self.recipe.training.micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        scaler.main_loss_backward_scale = scale  # the student's
        return found


def divergence(student: Tensor, teacher: Tensor, temperature: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """KL(p || q) in nats of p = softmax(teacher / T) and q = softmax(student / T), float32 [...].

    student, teacher: logits [..., vocab], or of each rank of ``group`` its part of the vocabulary. The gradient of
    student is (q - p) / T; teacher has none."""
    return _Divergence.apply(student, teacher, temperature, group)  # type: ignore[no-any-return]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
        compute = torch.promote_types(student.dtype, torch.float32)
        log_q, log_p = _log_softmax([x.to(compute) / temperature for x in (student, teacher)], group)
        p = log_p.exp()
        nats = (p * (log_p - log_q)).sum(-1)
        if group is not None:
            dist.all_reduce(nats, group=group)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(log_q.exp_().sub_(p).div_(temperature))
        ctx.dtype = student.dtype
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx, dnats: Tensor):
        (difference,) = ctx.saved_tensors
        return (dnats.unsqueeze(-1) * difference).to(ctx.dtype), None, None, None


def _log_softmax(logits: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Of each [..., vocab / ranks] over the vocabulary of all ranks; in place."""
    largest = torch.stack([x.amax(-1) for x in logits])
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    logits = [x.sub_(most.unsqueeze(-1)) for x, most in zip(logits, largest, strict=True)]
    total = torch.stack([x.exp().sum(-1) for x in logits])
    if group is not None:
        dist.all_reduce(total, group=group)
    return [x.sub_(most.unsqueeze(-1)) for x, most in zip(logits, total.log(), strict=True)]
