"""A run of any size without its processes: one process of each pipeline stage is built without memory for its weights,
its groups and the parts of the model that it holds are checked, and what they need is counted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
from rich.console import Console
from rich.table import Table

from megasparse import layout as layouts
from megasparse import platform, topology
from megasparse.config import Recipe
from megasparse.data.manifest import read_manifest
from megasparse.flops import flops_per_token
from megasparse.layers import te
from megasparse.layout import Layout, stage_layers
from megasparse.memory import Memory, memory
from megasparse.model import build_model
from megasparse.parameters import Count, Shapes, parameter_count, parameters
from megasparse.placement import Slab, local_weights
from megasparse.topology import Topology

GIB = 2**30


@dataclass(frozen=True)
class Stage:
    """One process of a pipeline stage."""

    rank: int  # that was built
    layers: int
    parameters: int  # of the whole model's, on this process
    memory: Memory


@dataclass(frozen=True)
class DryRun:
    """What was found; everything that was checked is right."""

    layout: Layout
    count: Count
    flops_per_token: float
    stages: list[Stage]
    fp8_misfit: str | None  # why Transformer Engine would refuse training.fp8 on a GPU

    @property
    def fullest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.memory.total)


def dry_run(recipe: Recipe, world_size: int | None = None) -> DryRun:
    """Build one process of each pipeline stage of ``world_size`` (None: the recipe's, or the fewest that it needs).

    ValueError if the layout is impossible, or no vocabulary is known; AssertionError if the parts that processes hold
    are not the model, or a group is not what the layout says.
    """
    asked = world_size or recipe.parallel.world_size or Layout.of(recipe.parallel, 0).with_fewest().world_size
    layout, vocab_size = layouts.check_layout(recipe, asked), vocabulary(recipe)
    platform.activate()
    fp8 = recipe.training.fp8
    whole = parameters(recipe.model, vocab_size, recipe.data.seq_length)
    found: Shapes = {}
    stages = []
    for number in range(layout.pp):
        with topology.pretended(layout, _rank_of(layout, number)) as place, torch.device("meta"):
            check_groups(place)
            chunks, _ = build_model(recipe, place, vocab_size)
            here = check_parts(chunks, place)
            assert not here.keys() & found.keys(), f"two stages hold {sorted(here.keys() & found.keys())[0]}"
            found |= here
            size = sum(parameter.numel() for parameter in chunks.parameters())
            counts = stage_layers(recipe.parallel, recipe.model.num_layers)
            stages.append(
                Stage(place.rank, sum(counts[number :: layout.pp]), size, memory(recipe, place, chunks, vocab_size))
            )
    wrong = [name for name in {**whole, **found} if whole.get(name) != found.get(name)]
    assert not wrong, f"{wrong[0]}: the stages hold {found.get(wrong[0])}, the model has {whole.get(wrong[0])}"
    return DryRun(
        layout=layout,
        count=parameter_count(recipe.model, vocab_size, recipe.data.seq_length),
        flops_per_token=flops_per_token(recipe.model, vocab_size, recipe.data.seq_length),
        stages=stages,
        fp8_misfit=te.misfit(recipe, layout.tp, layout.cp) if fp8 is not None and not fp8.emulate else None,
    )


def vocabulary(recipe: Recipe) -> int:
    """Rows of the embedding: the recipe's, or those of the data set's tokenizer."""
    if recipe.model.vocab_size is not None:
        return recipe.model.vocab_size
    try:
        return read_manifest(recipe.data.sets[0].path).vocab_size
    except ValueError as error:
        raise ValueError(f"model.vocab_size is not set, and {error}; or set it") from None


def _rank_of(layout: Layout, stage: int) -> int:
    """One of the ranks of a stage: the first of the first stage, the last of the last, others between."""
    size = layout.world_size // layout.pp
    return stage * size + (stage * (size - 1) // (layout.pp - 1) if layout.pp > 1 else 0)


# Checks ---------------------------------------------------------------------------------------------------------------


def check_groups(place: Topology) -> None:
    """Each group has the layout's size and this process in the right place; dense and expert groups cover the stage."""
    stage = set(dist.get_process_group_ranks(place.stage_group))
    members = {}
    for name, group, size, index in (
        ("tensor", place.tp_group, place.tp, place.tp_rank),
        ("context", place.cp_group, place.cp, place.cp_rank),
        ("tensor x context", place.tp_cp_group, place.tp * place.cp, None),
        ("replica", place.replica_group, place.replicas, None),
        ("expert", place.ep_group, place.ep, place.ep_rank),
        ("expert data", place.expert_dp_group, len(stage) // place.ep, None),
        ("stage", place.stage_group, place.tp * place.cp * place.dp, None),
    ):
        ranks = dist.get_process_group_ranks(group)
        members[name] = set(ranks)
        assert len(ranks) == len(members[name]) == size, f"the {name} group has {len(ranks)} ranks, not {size}"
        assert place.rank in ranks, f"rank {place.rank} is not in its {name} group"
        assert index in (None, ranks.index(place.rank)), f"rank {place.rank} is not number {index} of its {name} group"
        assert members[name] <= stage or name == "stage", f"the {name} group goes over pipeline stages"
    for a, b in (("tensor", "replica"), ("expert", "expert data")):
        assert members[a] & members[b] == {place.rank}, f"the {a} and the {b} group share more than rank {place.rank}"
    assert place.expert_dp == len(members["expert data"])


def check_parts(chunks: nn.ModuleList, place: Topology) -> Shapes:
    """The shapes, in the whole model, of the weights of a stage. The parts of each on the stage's processes are all of
    it: none is missing, none is there twice."""
    shapes: Shapes = {}
    parts: dict[str, set[Slab]] = {}
    for number in range(max(place.tp, place.ep)):
        other = replace(place, tp_rank=number % place.tp, ep_rank=number % place.ep)
        for weight in local_weights(chunks, other):
            if not weight.copy and not weight.name.endswith(".boost"):  # SLoRB's is beside the model's weights
                shapes[weight.name] = weight.shape
                parts.setdefault(weight.name, set()).update(replace(slab, start=0) for slab in weight.slabs)
    for name, slabs in parts.items():
        shape, ends = shapes[name], set()
        for slab in sorted(slabs, key=lambda slab: slab.offsets):
            ends.add(tuple(a + b for a, b in zip(slab.offsets, slab.shape, strict=True)))
            cut = [d for d, (a, b) in enumerate(zip(slab.shape, shape, strict=True)) if a != b]
            assert len(cut) <= 1, f"{name} is split in dimensions {cut}"
            before = slab.offsets[cut[0]] if cut else 0
            starts = [0, *(end[cut[0]] for end in ends)] if cut else [0]
            assert before in starts, f"{name}: a part before {before} is missing"
        held = sum(math.prod(slab.shape) for slab in slabs)
        assert held == math.prod(shape), f"{name}: the processes hold {held} elements of {shape}"
        assert shape in ends, f"{name}: the last part is missing"
    return shapes


# What is printed ------------------------------------------------------------------------------------------------------


def show(recipe: Recipe, run: DryRun, console: Console) -> None:
    """The model, the layout, and a table of what each kind of process needs."""
    (total, active), tokens, flops = run.count, recipe.tokens_per_step, run.flops_per_token
    console.print(
        f"{recipe.name}: {total:,} parameters, {active:,} active per token, {flops:.3g} FLOPs per token "
        f"({flops * tokens:.3g} per step of {tokens:,}); {run.layout} on {run.layout.world_size} processes",
        highlight=False,
        soft_wrap=True,
    )
    rows = [
        [str(first) if first == last else f"{first}-{last}", str(stage.layers), f"{stage.parameters / 1e6:,.1f}"]
        + [f"{getattr(stage.memory, field) / GIB:.2f}" for field in MEMORY.values()]
        for first, last, stage in _alike(run.stages)
    ]
    columns = ["stage", "layers", "M params", *MEMORY]
    table = Table(title=f"one process of each pipeline stage, memory in GiB ({recipe.training.precision})")
    for column, name in enumerate(columns):
        if any(row[column] != "0.00" for row in rows):
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell for i, cell in enumerate(row) if any(other[i] != "0.00" for other in rows)))
    console.print(table)
    if run.fp8_misfit is not None:
        console.print(f"training.fp8 on a GPU: {run.fp8_misfit}", highlight=False, soft_wrap=True)
    console.print(NOTE, highlight=False, soft_wrap=True)


MEMORY = {
    "weights": "weights",
    "grads": "gradients",
    "optim": "optimizer",
    "buffers": "buffers",
    "bucket": "bucket",
    "reduce": "reduction",
    "activ": "activations",
    "peak": "total",
    "host": "host",
}
NOTE = (
    "optim: float32 master weights and Adam's moments; reduce: after backward, when activations are gone; activ: an "
    "estimate after Korthikanti et al. 2022; CUDA's context, NCCL's buffers and fragmentation come on top. Checked: "
    "every group, and that the processes' parts of all weights are the model."
)


def _alike(stages: list[Stage]) -> list[tuple[int, int, Stage]]:
    """Neighbours that need the same: (first, last, one of them)."""
    found: list[tuple[int, int, Stage]] = []
    for number, stage in enumerate(stages):
        if found and replace(found[-1][2], rank=stage.rank) == stage:
            found[-1] = (found[-1][0], number, stage)
        else:
            found.append((number, number, stage))
    return found
