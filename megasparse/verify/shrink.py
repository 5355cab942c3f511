"""A recipe small enough for this machine that keeps its structure: the ratios, patterns and rules that layouts meet."""

from __future__ import annotations

import math
import re
from typing import Any

from megasparse.config import Model, Recipe, parse_recipe
from megasparse.layout import FP8_TILE, Layout

HEAD_DIM, WIDTH, EXPERT_WIDTH, EXPERTS, LAYERS, VOCAB, SEQUENCE, MICRO_BATCH = 16, 96, 48, 8, 4, 251, 32, 2
EPS = 1e-3
LR, DECAY, CLIP = 2e-3, 0.1, 0.1
LOSS_SCALE = 1024.0
BLOCK = 4  # keys or queries of sparse attention
STEPS = 1_000_000  # of the run, of which the first few are taken
DENSE_START = 1.5 / STEPS
MASK_DECAY = 0.02
UNEVEN = 2.0  # the embedding as so many layers: stages of 1 and 3 in place of 2 and 2


def shrink(recipe: Recipe, layouts: list[Layout]) -> tuple[Recipe, list[str]]:
    """The recipe that is verified, and what was changed: ``field: before -> after (why)``.

    Everything that is larger than it need be is reduced to what the layouts can still split: heads by the same factor
    for queries and keys, experts with their groups, the pattern of dense and MoE layers, micro-batches for every
    pipeline. A small recipe stays as it is but for dropout, precision, schedule and eps.
    """
    before = recipe.model_dump(mode="json")
    raw = recipe.model_dump(mode="json")
    tp = math.lcm(*(layout.tp for layout in layouts))
    cp = math.lcm(*(layout.cp for layout in layouts))
    stages = max(layout.pp * layout.vp for layout in layouts)
    tile = FP8_TILE if tp > 1 and recipe.training.fp8 and recipe.training.fp8.recipe == "block" else 1
    unit = tp * max(tile, 4 if recipe.sparse_weights else 1)  # of split widths: 2:4 weights are whole blocks of 4x4
    _shrink_attention(raw["model"], recipe, tp, unit, tile)
    _shrink_layers(raw["model"], recipe, stages + (recipe.parallel.layers_per_stage is not None))
    if recipe.model.moe is not None:
        _shrink_experts(raw["model"]["moe"], math.lcm(*(layout.ep for layout in layouts)), unit)
    if recipe.model.sparse_attention is not None:
        _shrink_sparse_attention(raw["model"], recipe, raw["model"]["num_layers"])
    if recipe.sparsity.weights is not None:
        _hasten_weight_sparsity(raw["sparsity"]["weights"], Model.model_validate(raw["model"]).linear_weights)
    if recipe.training.fp8 is not None:
        _smooth_fp8(raw["training"]["fp8"])
    _shrink_text(raw, recipe, layouts, tp, cp)
    raw["model"].update(attention_dropout=0.0, hidden_dropout=0.0)
    raw["schedule"] = {"type": "constant"}
    raw["optimizer"].update(eps=max(recipe.optimizer.eps, EPS), lr=max(recipe.optimizer.lr, LR))
    if recipe.optimizer.clip_grad:
        raw["optimizer"]["clip_grad"] = min(recipe.optimizer.clip_grad, CLIP)
    if recipe.optimizer.weight_decay:
        raw["optimizer"]["weight_decay"] = max(recipe.optimizer.weight_decay, DECAY)
    if recipe.training.precision == "fp16":
        raw["training"]["loss_scale"] = min(recipe.training.loss_scale, LOSS_SCALE)
    raw["training"]["precision"] = "fp32"
    raw["training"].update(initial_checkpoint=None, teacher=None)
    raw["training"]["steps"] = STEPS
    if recipe.parallel.layers_per_stage is not None:  # of other stages than the layouts'
        uneven = len(set(recipe.parallel.layers_per_stage)) > 1
        raw["parallel"].update(layers_per_stage=None, embedding_weight=UNEVEN if uneven else 0.0)
    return parse_recipe(raw), _changes(before, raw)


def _shrink_attention(model: dict[str, Any], recipe: Recipe, tp: int, unit: int, tile: int) -> None:
    queries_per_key = recipe.model.num_attention_heads // recipe.model.kv_heads
    keys = _at_most(recipe.model.kv_heads, 2 * tp, tp)  # several on a rank
    heads, head_dim = keys * queries_per_key, min(recipe.model.head_size, HEAD_DIM)
    if recipe.model.hidden_size <= WIDTH:
        return
    square = recipe.model.hidden_size == recipe.model.num_attention_heads * recipe.model.head_size
    if heads * head_dim > 2 * WIDTH:  # many queries a key
        head_dim = 4
    if tile > 1:  # whole tiles of queries, and of keys and values, on each rank
        square, head_dim = False, tile // math.gcd(keys // tp, 2)
    model.update(
        num_attention_heads=heads,
        num_query_groups=keys if recipe.model.num_query_groups else None,
        head_dim=None if square else head_dim,
        hidden_size=heads * head_dim if square else WIDTH,
        ffn_hidden_size=_at_most(recipe.model.ffn_size, WIDTH, unit),
    )


def _shrink_layers(model: dict[str, Any], recipe: Recipe, stages: int) -> None:
    """The first layers and the last, with a dense and an MoE layer where the recipe has both."""
    wanted = max(LAYERS, stages)
    if recipe.model.num_layers <= wanted:
        return
    model["num_layers"] = wanted
    if recipe.model.moe is not None and recipe.model.moe.layers != "all":
        model["moe"]["layers"] = _kept(recipe.model.moe_layers, wanted)


def _kept(flags: list[bool], wanted: int) -> list[int]:
    """``wanted`` of the layers' flags: the first ones and the last, with both kinds where there are both."""
    if len(flags) <= wanted:
        return [int(flag) for flag in flags]
    kept = [*flags[: wanted - 1], flags[-1]]
    if any(flags) and not any(kept):
        kept[-2] = True
    if not all(flags) and all(kept):
        kept[0] = False
    return [int(flag) for flag in kept]


def _shrink_sparse_attention(model: dict[str, Any], recipe: Recipe, layers: int) -> None:
    """Blocks so small that the short sequence has many, and as few to see that some are left out."""
    sparse, before = model["sparse_attention"], recipe.model.sparse_attention
    assert before is not None
    most = {"block_size": BLOCK, "query_block_size": BLOCK, "local_blocks": 2, "sink_blocks": 1, "stride": 3}
    most |= {"window_blocks": 2, "compression_size": BLOCK, "compression_stride": BLOCK // 2, "clusters": 4}
    for name, value in (most | {"gate_dim": HEAD_DIM}).items():
        sparse[name] = min(sparse[name], value)
    sparse.update(dense_start=0.0, dense_end=0.0, ramp=0.0)
    if before.blocks is not None:
        always = sparse["local_blocks"] + sparse["sink_blocks"] + sparse["query_block_size"] // sparse["block_size"]
        sparse["blocks"] = min(before.blocks, always + 1)
    if before.layers != "all":
        sparse["layers"] = _kept(recipe.model.sparse_layers, layers)


def _hasten_weight_sparsity(weights: dict[str, Any], names: list[str]) -> None:
    """Sparse from the first or, where it was dense before, from the second step on, with new masks every other step.
    Targets that are no layer of the small model are left out; all of its weights are, if none is left."""
    weights["targets"] = [t for t in weights["targets"] if any(re.search(t, name) for name in names)] or ["."]
    start = DENSE_START if weights["dense_start"] else 0.0
    weights.update(dense_start=start, dense_end=0.0, ramp=0.0)
    if weights["method"] != "asp":
        weights["refresh_interval"] = min(weights["refresh_interval"] or 2, 2)
    if weights["decay"]:
        weights["decay"] = max(weights["decay"], MASK_DECAY)


def _smooth_fp8(fp8: dict[str, Any]) -> None:
    fp8.update(rounding="smooth", emulate=True)
    if fp8["recipe"] == "delayed":
        fp8["amax_history_len"] = min(fp8["amax_history_len"], 2)
    for end in ("start", "end"):
        name = f"num_layers_at_{end}_in_bf16"
        fp8[name] = min(fp8[name], 1)


def _shrink_experts(moe: dict[str, Any], ep: int, unit: int) -> None:
    groups = moe["num_groups"] or 1
    multiple = math.lcm(ep, groups)
    experts = moe["num_experts"]
    if experts > EXPERTS:
        wanted = multiple * max(1, math.ceil(max(EXPERTS, 2 * groups, 2 * moe["top_k"]) / multiple))
        if moe["top_k"] > EXPERTS // 2 and not moe["num_groups"]:
            moe["top_k"] = EXPERTS // 2
            wanted = multiple * math.ceil(EXPERTS / multiple)
        moe["num_experts"] = min(experts, wanted)
    moe["ffn_hidden_size"] = min(moe["ffn_hidden_size"], EXPERT_WIDTH)
    if moe["shared_expert_ffn_hidden_size"]:
        moe["shared_expert_ffn_hidden_size"] = _at_most(moe["shared_expert_ffn_hidden_size"], EXPERT_WIDTH, unit)


def _shrink_text(raw: dict[str, Any], recipe: Recipe, layouts: list[Layout], tp: int, cp: int) -> None:
    sparse, fp8 = raw["model"]["sparse_attention"], recipe.training.fp8
    micro = min(recipe.training.micro_batch_size, MICRO_BATCH)
    rows = FP8_TILE // math.gcd(FP8_TILE, micro) if fp8 and fp8.recipe == "block" and cp > 1 else 1
    unit = 2 * cp * math.lcm(tp, sparse["query_block_size"] if sparse else 1, rows)
    raw["data"]["seq_length"] = _at_most(recipe.data.seq_length, math.ceil(SEQUENCE / unit) * unit, unit)
    if recipe.model.max_position_embeddings:
        raw["model"]["max_position_embeddings"] = min(recipe.model.max_position_embeddings, raw["data"]["seq_length"])
    raw["model"]["vocab_size"] = min(recipe.model.vocab_size or VOCAB, VOCAB)
    data = math.lcm(*(layout.dp for layout in layouts))
    pipeline = math.lcm(*(layout.pp for layout in layouts))
    wanted = micro * data * pipeline * (2 if data * pipeline < 4 else 1)
    global_batch = recipe.training.global_batch_size
    if global_batch > wanted or global_batch % (micro * data * pipeline):
        global_batch = wanted
    raw["training"].update(micro_batch_size=micro, global_batch_size=global_batch)


def _at_most(value: int, limit: int, multiple: int) -> int:
    """``value`` if it is small, else ``limit`` rounded up to a multiple."""
    return value if value <= limit else math.ceil(limit / multiple) * multiple


REASONS = {
    "model.attention_dropout": "its masks follow the ranks",
    "model.hidden_dropout": "its masks follow the ranks",
    "optimizer.eps": "AdamW divides a gradient by its own size: where that is rounding, a small eps makes it an update",
    "optimizer.lr": "so that what moves weights can be seen in them",
    "optimizer.weight_decay": "so that it can be seen",
    "optimizer.clip_grad": "so that it clips",
    "sparsity.weights.decay": "so that it can be seen",
    "sparsity.weights.refresh_interval": "so that masks change",
    "training.precision": "where rounding hides nothing; in the recipe's own after that",
    "training.fp8.rounding": "a cast is a step: where float32 differs in the last bit it would make 6% of it",
    "training.fp8.emulate": "that needs it",
    "training.fp8.amax_history_len": "so that amaxes leave it",
    "training.loss_scale": "a step that overflows is skipped",
    "training.initial_checkpoint": "weights are drawn from the seed, some are smaller",
    "training.teacher": "weights are drawn from the seed, some are smaller",
    "parallel.layers_per_stage": "layouts have other numbers of stages",
    "parallel.embedding_weight": "they are uneven by this",
}
SILENT = ("training.steps", "schedule")  # of no consequence here


def _changes(before: dict[str, Any], after: dict[str, Any], path: str = "") -> list[str]:
    lines = []
    for key in after:
        name = f"{path}{key}"
        if name in SILENT or before.get(key) == after[key]:
            continue
        if isinstance(after[key], dict) and isinstance(before.get(key), dict):
            lines += _changes(before[key], after[key], f"{name}.")
        else:
            reason = f" ({REASONS[name]})" if name in REASONS else ""
            lines.append(f"{name}: {before.get(key)} -> {after[key]}{reason}")
    return lines


def default_layouts(recipe: Recipe) -> list[Layout]:
    """What the recipe asks for, each dimension by its least prime factor; and the layouts everyone should try."""
    asked = recipe.parallel
    two = {"tp": _least_factor(asked.tp), "pp": _least_factor(asked.pp), "vp": min(2, asked.vp)}
    two |= {"cp": _least_factor(asked.cp), "ep": _least_factor(asked.ep)}
    flags = (
        "".join(("+sp" * asked.sequence_parallel, f"+zero{asked.zero_stage}" * (asked.zero_stage != 1)))
        + "+offload" * asked.offload_optimizer
    )
    together = "".join(f"{name}{size}" for name, size in two.items() if size > 1)
    texts = [f"{together or 'dp2'}{flags}", "dp2", "tp2+sp", "pp2", "cp2"]
    if recipe.model.moe is not None:
        texts += ["ep2", "tp2pp2ep2"]
    if asked.vp > 1:
        texts.append("pp2vp2")
    return list(dict.fromkeys(Layout.parse(text) for text in texts))


def _least_factor(size: int) -> int:
    return next((factor for factor in range(2, size + 1) if size % factor == 0), 1)
