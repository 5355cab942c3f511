"""What a process needs memory for: weights, gradients and optimizer states, counted; activations, estimated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from megasparse import platform
from megasparse.config import Model, Recipe
from megasparse.layout import Layout, stage_layers
from megasparse.optimizer import bf16_optimizer, parameter_groups
from megasparse.placement import is_expert
from megasparse.sparsity.weight import SparseWeight
from megasparse.topology import Topology

FP32 = 4
ADAM = 2 * FP32  # its two moments
REDUCE_BUCKET = 500_000_000  # elements that DeepSpeed flattens at a time where ZeRO does not reduce (its engine.py)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: on its device, and ``host``."""

    weights: int
    gradients: int
    optimizer: int  # float32 master weights and Adam's moments
    buffers: int  # routers', masks, and the 2:4 weights as a step multiplies by them
    bucket: int  # what ZeRO copies gradients into while backward runs
    reduction: int  # besides all that, when backward is done: copies to reduce, and the step's gradients
    activations: int  # an estimate
    host: int  # ZeRO-Offload's states

    @property
    def total(self) -> int:
        """At the fullest moment: the last backward's, or the reduction and the step after it."""
        kept = self.weights + self.gradients + self.optimizer + self.buffers
        return kept + max(self.bucket + self.activations, self.reduction)


def memory(recipe: Recipe, topology: Topology, chunks: nn.ModuleList, vocab_size: int) -> Memory:
    """Of a process with these chunks of the model, which may be on the meta device; in its second step or later."""
    parallel, zero = recipe.parallel, recipe.parallel.zero_stage
    size = platform.DTYPES[recipe.training.precision].itemsize
    groups = [_Group.of(group["params"], topology, zero) for group in parameter_groups(chunks, 0.0)]
    count, share = sum(group.count for group in groups), sum(group.share for group in groups)
    largest = max(group.largest for group in groups)
    states = share * (ADAM if zero == 0 else FP32 + ADAM)
    gradients, bucket, host, optimizer = count * FP32, 0, 0, states
    if zero == 0:
        reduction = min(count, REDUCE_BUCKET + largest) * FP32 if topology.world_size > 1 else 0
    elif bf16_optimizer(recipe):
        reduction = max(_bf16_copies([g for g in groups if g.expert is expert], size) for expert in (False, True))
    else:
        # DeepSpeed is told of fp16, and of bf16 only where it is bf16_optimizer: else it adds up in float32.
        elements = parallel.deepspeed.reduce_bucket_size
        told = size if recipe.training.precision == "fp16" else FP32
        apart = FP32 * (told != size)  # float32 copies of bf16 gradients
        gradients = (count if zero == 1 else share) * told
        bucket = elements * (told if zero == 1 else size)
        if zero == 2:
            bucket += min(count, elements) * (size + apart)  # of what is reduced, in the type it is sent in
        if parallel.offload_optimizer:
            bucket += largest * size
            host = states + share * (FP32 + size) + largest * size
            optimizer, reduction = 0, bucket + share * apart * (zero == 1)
        else:
            reduction = max(bucket, share * (told + FP32) - gradients)
    return Memory(
        weights=count * size,
        gradients=gradients,
        optimizer=optimizer,
        buffers=_buffers(chunks),
        bucket=bucket,
        reduction=reduction,
        activations=activations(recipe, topology, topology.pp_rank, vocab_size),
        host=host,
    )


@dataclass(frozen=True)
class _Group:
    """Elements of one of AdamW's groups on this process."""

    count: int
    share: int  # of these, what this process's optimizer holds
    largest: int  # weight
    expert: bool

    @staticmethod
    def of(weights: list[Any], topology: Topology, zero_stage: int) -> _Group:
        expert, numels = is_expert(weights[0]), [weight.numel() for weight in weights]
        sharing = topology.expert_dp if expert else topology.replicas
        share = math.ceil(sum(numels) / sharing) if zero_stage > 0 else sum(numels)
        return _Group(sum(numels), share, max(numels), expert)


def _bf16_copies(groups: list[_Group], size: int) -> int:
    """BF16_Optimizer's float32 gradients are sent as bf16: copies of one group, or of all that go in one message."""
    counts = [group.count for group in groups]
    if len(groups) > 1 and counts[0] <= REDUCE_BUCKET:
        return sum(counts) * (FP32 + size)
    return max(counts, default=0) * size


def _buffers(chunks: nn.ModuleList) -> int:
    sparse = [module.weight[0] for module in chunks.modules() if isinstance(module, SparseWeight)]
    return sum(b.numel() * b.element_size() for b in [*chunks.buffers(), *sparse])


# Activations ----------------------------------------------------------------------------------------------------------


def activations(recipe: Recipe, layout: Layout, stage: int, vocab_size: int) -> int:
    """Estimate of what backward keeps at most on a pipeline stage, in bytes.

    After Korthikanti et al. 2022 (arXiv 2205.05198), with grouped K/V heads, gated MLPs, fused attention, which keeps
    no scores, and experts that all get as many tokens. A pipeline's first stage has as many micro-batches in flight as
    there are stages (1F1B; Narayanan et al. 2021 interleaved).
    """
    model, training = recipe.model, recipe.training
    size = platform.DTYPES[training.precision].itemsize
    tokens = training.micro_batch_size * recipe.data.seq_length // layout.cp
    residual = tokens * model.hidden_size // (layout.tp if layout.sequence_parallel else 1) * size
    counts = stage_layers(recipe.parallel, model.num_layers)
    chunks = [stage + layout.pp * vp for vp in range(layout.vp)]
    layers = [i for chunk in chunks for i in range(sum(counts[:chunk]), sum(counts[: chunk + 1]))]
    kept = [_layer(recipe, layout, index, tokens, residual, size) for index in layers]
    flight = _in_flight(layout, stage, training.global_batch_size // (training.micro_batch_size * layout.dp))
    if training.recompute == "full":  # each layer's input, and one layer as it is computed again
        bytes_ = len(layers) * residual * flight + max(kept)
    else:
        bytes_ = sum(kept) * flight
    if stage == layout.pp - 1:  # final norm, output layer; logits, their softmax and its gradient in float32
        logits = tokens * math.ceil(vocab_size / layout.tp)
        bytes_ += 2 * residual + logits * (size + 2 * FP32)
    return int(bytes_)


def _in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once: megatron-core's warm-up and one more."""
    if layout.vp == 1:
        return min(layout.pp - stage, micro_batches)
    warm_up = 2 * (layout.pp - stage - 1) + (layout.vp - 1) * layout.pp
    return min(warm_up + 1, micro_batches * layout.vp) / layout.vp


def _layer(recipe: Recipe, layout: Layout, index: int, tokens: int, residual: int, size: int) -> int:
    """Bytes that one layer keeps of one micro-batch."""
    model, moe, tp = recipe.model, recipe.model.moe, layout.tp
    query, key_value = (heads * model.head_size // tp for heads in (model.num_attention_heads, model.kv_heads))
    # Queries, keys and values as projected, turned (and normed), the keys and values of all context ranks; the output.
    heads = 3 * query + 3 * key_value + (query + key_value) * (model.qk_norm != "none")
    heads += 2 * (layout.cp - 1) * key_value
    sparse = model.sparse_attention
    if model.sparse_layers[index] and sparse is not None and sparse.selector == "nsa":
        heads += 4 * key_value + 2 * query  # the other branches' keys, values and outputs
    bytes_ = 4 * residual + tokens * heads * size  # two norms' inputs and outputs
    if model.hidden_dropout > 0:
        bytes_ += 2 * residual // size  # masks
    if not model.moe_layers[index] or moe is None:
        return bytes_ + tokens * _mlp(model, model.ffn_size // tp) * size
    rows = tokens // tp * moe.top_k  # of this process's experts, if all get as many
    bytes_ += rows * (2 * model.hidden_size + 4 * moe.ffn_hidden_size) * size
    bytes_ += tokens // tp * (model.hidden_size + 3 * moe.num_experts) * FP32  # the router's input, logits and scores
    return bytes_ + tokens * 4 * moe.shared_expert_ffn_hidden_size // tp * size


def _mlp(model: Model, width: int) -> int:
    """Numbers a token leaves in an MLP: gate, up and their product, or the input and output of GELU."""
    return (4 if model.activation == "swiglu" else 2) * width
