"""Layouts: how they are written, which are possible for a recipe, and what is worth knowing of one."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megasparse import platform

if TYPE_CHECKING:
    from megasparse.config import Parallel, Recipe

FP8_TILE = 128  # ops.fp8.TILE
SIZES = ("tp", "pp", "vp", "cp", "ep", "dp")  # in the order of the notation


@dataclass(frozen=True)
class Layout:
    """How many processes share the work, and how. Written ``tp2pp2ep2``: the sizes above 1 in the order tp, pp, vp, cp,
    ep, dp, then ``+sp`` (sequence parallel), ``+zero0`` or ``+zero2`` (1 is not said), ``+offload``; ``single`` for one
    process."""

    tp: int = 1  # tensor
    pp: int = 1  # pipeline
    vp: int = 1  # virtual pipeline: model chunks of each stage, interleaved
    cp: int = 1  # context
    ep: int = 1  # expert, folded over tp x cp x dp
    dp: int = 1  # data
    sequence_parallel: bool = False
    zero_stage: int = 1
    offload_optimizer: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def replicas(self) -> int:
        """Processes whose gradients of a dense weight are averaged: each saw other tokens."""
        return self.dp * self.cp

    def __str__(self) -> str:
        sizes = "".join(f"{name}{getattr(self, name)}" for name in SIZES if getattr(self, name) > 1)
        flags = ["sp"] * self.sequence_parallel
        flags += [f"zero{self.zero_stage}"] * (self.zero_stage != 1) + ["offload"] * self.offload_optimizer
        return "+".join([sizes or "single", *flags])

    @staticmethod
    def parse(text: str) -> Layout:
        """Read the notation; without ``dp``, the least data parallelism that ``ep`` needs. ValueError if it is none."""
        sizes, *flags = text.split("+")
        values: dict[str, Any] = {}
        if sizes != "single":
            if not re.fullmatch(rf"((?:{'|'.join(SIZES)})[1-9]\d*)+", sizes):
                raise ValueError(
                    f"{text!r} is not a layout: write it like tp2pp2ep2 or tp2+sp, from {', '.join(SIZES)}"
                )
            for name, size in re.findall(r"([a-z]+)(\d+)", sizes):
                if name in values:
                    raise ValueError(f"layout {text!r} says {name} twice")
                values[name] = int(size)
        for flag in flags:
            if flag == "sp":
                values["sequence_parallel"] = True
            elif flag == "offload":
                values["offload_optimizer"] = True
            elif re.fullmatch(r"zero[0-3]", flag):
                values["zero_stage"] = int(flag[4:])
            else:
                raise ValueError(f"layout {text!r}: unknown flag {flag!r}: use sp, zero0, zero1, zero2 or offload")
        layout = Layout(**values)
        return layout if "dp" in values else layout.with_fewest()

    @staticmethod
    def of(parallel: Parallel, world_size: int) -> Layout:
        """The recipe's layout in a world of ``world_size``, data parallelism being what is left; 0 if nothing is."""
        layout = Layout(
            tp=parallel.tp,
            pp=parallel.pp,
            vp=parallel.vp,
            cp=parallel.cp,
            ep=parallel.ep,
            sequence_parallel=parallel.sequence_parallel,
            zero_stage=parallel.zero_stage,
            offload_optimizer=parallel.offload_optimizer,
        )
        return replace(layout, dp=0 if world_size % layout.world_size else world_size // layout.world_size)

    def with_fewest(self) -> Layout:
        """With the least data parallelism that ``ep`` needs."""
        return replace(self, dp=self.ep // math.gcd(self.ep, self.tp * self.cp))

    def parallel(self) -> dict[str, Any]:
        """The recipe's ``parallel`` section for this layout (data parallelism is what the world leaves)."""
        return {name: value for name, value in vars(self).items() if name != "dp"}


def stage_layers(parallel: Parallel, num_layers: int) -> list[int]:
    """Transformer layers of each of the pp * vp stages, in the order of the model.

    parallel.layers_per_stage if given. Else one layer each, and every further one to the stage with the least load,
    where the embedding counts as embedding_weight layers on the first stage and the loss as loss_weight on the last.
    """
    if parallel.layers_per_stage is not None:
        return list(parallel.layers_per_stage)
    stages = parallel.pp * parallel.vp
    layers = [1] * stages
    load = [1.0] * stages
    load[0] += parallel.embedding_weight
    load[-1] += parallel.loss_weight
    for _ in range(num_layers - stages):
        least = load.index(min(load))
        layers[least] += 1
        load[least] += 1
    return layers


def check_layout(recipe: Recipe, world_size: int) -> Layout:
    """The recipe's layout in this world. ValueError naming the rule it breaks and the nearest possible layouts."""
    layout = Layout.of(recipe.parallel, world_size)
    broken = next(_broken_rules(recipe, layout), None)
    if broken is None:
        return layout
    possible = nearest_layouts(recipe, layout, world_size)
    hint = f"the nearest possible: {', '.join(map(str, possible))}" if possible else "no layout of this recipe is"
    raise ValueError(f"layout {layout} on {world_size} processes: {broken} ({hint})")


def notes(recipe: Recipe, world_size: int) -> list[str]:
    """What a user should know of a layout that is possible."""
    model = recipe.model
    dropout = [name for name in ("attention_dropout", "hidden_dropout") if getattr(model, name) > 0]
    found = [
        f"model.{name}={getattr(model, name)}: dropout masks follow the ranks, as in Megatron: the run repeats itself "
        "under any ep, ZeRO stage, offload and recompute, not with another tp, pp, cp or dp"
        for name in dropout
    ]
    written_for = recipe.parallel.world_size
    if written_for not in (None, world_size):
        found.append(
            f"parallel.world_size={written_for}: the recipe is written for so many processes, not {world_size}"
        )
    fp8 = recipe.training.fp8
    if fp8 is not None:
        emulated = "emulated with torch's float8 types, not on FP8 tensor cores"
        by = emulated if fp8.emulate or not platform.has_cuda() else "by Transformer Engine"
        found.append(
            f"training.fp8: {len(recipe.fp8_weights)} of {len(model.linear_weights)} weights of linear layers and "
            f"experts are multiplied in FP8 with {fp8.recipe} scaling, {by}; embedding, output layer, routers and "
            "norms are not"
        )
    return found


def nearest_layouts(recipe: Recipe, layout: Layout, world: int, count: int = 3) -> list[Layout]:
    """Possible layouts of ``world`` processes, those that change the sizes by the least factors first."""
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    found = []
    for tp, pp, cp, ep in itertools.product(divisors, repeat=4):
        if world % (tp * pp * cp):
            continue
        for vp, sp, zero, offload in itertools.product(
            {1, layout.vp}, {False, layout.sequence_parallel}, {1, layout.zero_stage}, {False, layout.offload_optimizer}
        ):
            candidate = Layout(tp, pp, vp, cp, ep, world // (tp * pp * cp), sp, zero, offload)
            if next(_broken_rules(recipe, candidate), None) is None:
                found.append(candidate)
    return sorted(found, key=lambda other: (_distance(layout, other), str(other)))[:count]


def _distance(a: Layout, b: Layout) -> float:
    sizes = sum(abs(math.log2(getattr(a, name) / getattr(b, name))) for name in SIZES[:-1])  # dp follows
    flags = [(a.sequence_parallel, b.sequence_parallel), (a.zero_stage, b.zero_stage)]
    return sizes + 0.5 * sum(x != y for x, y in [*flags, (a.offload_optimizer, b.offload_optimizer)])


def _broken_rules(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """What makes this layout impossible for this recipe, one sentence a rule."""
    model, moe, training, parallel = recipe.model, recipe.model.moe, recipe.training, recipe.parallel
    seq, stages = recipe.data.seq_length, layout.pp * layout.vp
    tp, cp, ep = layout.tp, layout.cp, layout.ep
    if layout.dp == 0:
        yield f"tp={tp} x pp={layout.pp} x cp={cp} do not divide them: start a multiple of {tp * layout.pp * cp}"
        return
    for field, value in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.kv_heads),
        ("ffn_hidden_size", model.ffn_size),
        ("moe.shared_expert_ffn_hidden_size", moe.shared_expert_ffn_hidden_size if moe else 0),
    ):
        if value % tp:
            yield f"model.{field}={value} is not divisible by tp={tp}"
    yield from _split_blocks(recipe, tp)
    yield from _split_tiles(recipe, tp, cp)
    if layout.sequence_parallel and tp == 1:
        yield "sequence_parallel=true needs tp > 1"
    if cp > 1 and seq % (2 * cp):
        yield f"data.seq_length={seq} is not divisible by 2 * cp={2 * cp} (each context rank has two parts)"
    if (layout.sequence_parallel or moe) and seq // cp % tp:
        yield f"data.seq_length={seq} / cp={cp} is not divisible by tp={tp}, which splits the sequence"
    sparse = model.sparse_attention
    if cp > 1 and sparse is not None and seq // (2 * cp) % sparse.query_block_size:
        yield (
            f"model.sparse_attention.query_block_size={sparse.query_block_size} does not divide "
            f"data.seq_length={seq} / (2 * cp={2 * cp})"
        )
    weights = recipe.sparsity.weights
    unit = 4 * (2 * cp if cp > 1 else 1)
    if weights is not None and weights.mvue != "none" and seq % unit:
        yield f"data.seq_length={seq} is not divisible by {unit}: sparsity.weights.mvue takes four tokens of a part"
    if ep > 1 and moe is None:
        yield f"ep={ep} needs model.moe: a dense model has no experts"
    if moe is not None and moe.num_experts % ep:
        yield f"model.moe.num_experts={moe.num_experts} is not divisible by ep={ep}"
    if tp * cp * layout.dp % ep:
        yield f"ep={ep} does not divide the {tp * cp * layout.dp} processes of a pipeline stage (tp x cp x dp)"
    if layout.vp > 1 and layout.pp == 1:
        yield f"vp={layout.vp} needs pp > 1: it interleaves the stages of a pipeline"
    if stages > model.num_layers:
        yield f"pp * vp = {stages} stages are more than model.num_layers={model.num_layers}"
    split = parallel.layers_per_stage
    if split is not None and (len(split) != stages or sum(split) != model.num_layers):
        yield (
            f"parallel.layers_per_stage={split} must have pp * vp = {stages} numbers that add up to "
            f"model.num_layers={model.num_layers}"
        )
    local, rest = divmod(training.global_batch_size, training.micro_batch_size * layout.dp)
    if rest:
        yield (
            f"training.global_batch_size={training.global_batch_size} is not divisible by "
            f"micro_batch_size={training.micro_batch_size} x dp={layout.dp}"
        )
    if layout.vp > 1 and local % layout.pp:
        yield f"vp={layout.vp} needs micro-batches in multiples of pp={layout.pp}, each process has {local}"
    if moe is not None and moe.aux_loss_scope == "all_layers" and layout.pp > 1:
        yield "model.moe.aux_loss_scope=all_layers pools every layer: it needs pp=1"
    if layout.zero_stage == 0 and training.precision != "fp32":
        yield (
            f"training.precision={training.precision} needs zero_stage >= 1: "
            "DeepSpeed keeps fp32 master weights only in its ZeRO optimizer"
        )
    if layout.zero_stage == 0 and layout.offload_optimizer:
        yield "offload_optimizer=true needs zero_stage >= 1: it is the ZeRO optimizer that moves"
    if layout.zero_stage == 2 and layout.pp > 1:
        yield (
            f"zero_stage=2 needs pp=1, not {layout.pp}: it reduces gradients in each backward pass, "
            "a pipeline has several in flight"
        )
    if layout.zero_stage == 3:
        yield (
            "zero_stage=3 is not possible: DeepSpeed gathers ZeRO-3 weights in its own forward, which the pipeline "
            "schedule and the experts' all-to-all do not go through; use tp, pp or ep to split weights"
        )


def _split_blocks(recipe: Recipe, tp: int) -> Iterator[str]:
    """2:4 weights whose 4x4 blocks tensor parallelism would cut, or that are not made of such blocks."""
    model, moe = recipe.model, recipe.model.moe
    queries, keys = (heads * model.head_size for heads in (model.num_attention_heads, model.kv_heads))
    for part, parts, field, value in (
        (".", 1, "hidden_size", model.hidden_size),
        ("linear_qkv", tp, "head_dim x (num_attention_heads + 2 num_query_groups)", queries + 2 * keys),
        ("linear_proj", tp, "head_dim x num_attention_heads", queries),
        ("mlp.linear_fc", tp, "ffn_hidden_size", model.ffn_size),
        ("mlp.experts", 1, "moe.ffn_hidden_size", moe.ffn_hidden_size if moe else 0),
        ("shared_experts", tp, "moe.shared_expert_ffn_hidden_size", moe.shared_expert_ffn_hidden_size if moe else 0),
    ):
        if value % (4 * parts) and any(part in name for name in recipe.sparse_weights):
            split = f"4 x tp={tp}" if parts > 1 else "4"
            yield f"model.{field}={value} is not divisible by {split}: sparsity.weights has blocks of 4x4"


def _split_tiles(recipe: Recipe, tp: int, cp: int) -> Iterator[str]:
    """Parts of a tensor that do not end where tiles of FP8's block scaling end: each would have other tiles."""
    model, moe, fp8 = recipe.model, recipe.model.moe, recipe.training.fp8
    if fp8 is None or fp8.recipe != "block":
        return
    queries, keys = (heads * model.head_size for heads in (model.num_attention_heads, model.kv_heads))
    for part, field, value in (
        ("linear_qkv", "head_dim x (num_attention_heads + 2 num_query_groups)", queries + 2 * keys),
        ("linear_proj", "head_dim x num_attention_heads", queries),
        ("mlp.linear_fc", "ffn_hidden_size", model.ffn_size),
        ("shared_experts", "moe.shared_expert_ffn_hidden_size", moe.shared_expert_ffn_hidden_size if moe else 0),
    ):
        if tp > 1 and value % (FP8_TILE * tp) and any(part in name for name in recipe.fp8_weights):
            yield f"model.{field}={value} is not divisible by {FP8_TILE} x tp={tp}: training.fp8 has such tiles"
    rows, batch = recipe.data.seq_length // (2 * cp), recipe.training.micro_batch_size
    if cp > 1 and rows * batch % FP8_TILE:
        yield (
            f"data.seq_length={recipe.data.seq_length} / (2 * cp={2 * cp}) x training.micro_batch_size={batch} is not "
            f"divisible by {FP8_TILE}: training.fp8 has tiles of {FP8_TILE} tokens"
        )
