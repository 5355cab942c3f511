"""Any layout, one answer: every layout's losses, norms, weights and routes over real updates, against one process."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megasparse.checkpoint.save import Saver
from megasparse.checkpoint.weights import load_teacher, teacher_source
from megasparse.config import Recipe, parse_recipe
from megasparse.engine import Engine
from megasparse.layout import Layout
from megasparse.model import build_model, moe_layers
from megasparse.placement import blocks, local_buffers, local_weights
from tests import small
from tests.helpers import assert_close, relative_error, run_distributed

STEPS = 5
VOCAB = small.VOCAB - 1  # odd: tensor parallelism pads it
MOE = {"aux_loss_coefficient": 0.05, "z_loss_coefficient": 0.001}
TOKENIZER = "of no tokens"  # its hash


def train(raw: dict[str, Any], masked: bool) -> dict[str, Any]:
    """STEPS updates on this rank; what it saw and what it holds."""
    recipe = parse_recipe(raw)
    place = small.start(recipe)
    chunks, state = build_model(recipe, place, VOCAB)
    for weight in local_weights(chunks, place):
        if weight.name.endswith(("compress_key.output", "compress_value.output")):
            weight.tensor.data.fill_(0.05)  # with its zeros nothing before it would have a gradient
    source = teacher_source(recipe, VOCAB, TOKENIZER, place.world_size)
    teacher = load_teacher(recipe, source, place, VOCAB) if source else None
    engine = Engine(recipe, place, chunks, state, teacher)
    routes: dict[tuple[int, int, int], list[int]] = {}

    def record(layer: int) -> Any:
        def hook(_: Any, inputs: tuple, output: Any) -> None:
            for token, experts in zip(inputs[1].tolist(), output.experts.tolist(), strict=True):
                routes[state.step, layer, token] = sorted(experts)

        return hook

    for layer, moe in moe_layers(chunks):
        moe.router.register_forward_hook(record(layer))
    steps = []
    for step in range(STEPS):
        batches = small.batches(recipe, step, place.dp_rank, place.dp, masked)
        result = engine.train_step(batches, step, 3e-3)
        steps.append(
            {
                **{"loss": result.loss, "norm": result.grad_norm, **result.aux_losses},
                **{"tokens": result.expert_tokens, "attention": result.attention, "sparsity": result.sparsity},
                **result.distillation,
            }
        )
    nats, tokens = engine.evaluate(small.batches(recipe, STEPS, place.dp_rank, place.dp, masked))
    weights, buffers = (
        [
            (w.name, w.shape, [(o, part.float().clone()) for o, part in blocks(w, 0, w.tensor.detach().reshape(-1))])
            for w in found(chunks, place)
        ]
        for found in (local_weights, local_buffers)
    )
    evaluation = {"loss": nats / tokens, "tokens": tokens}
    return {"steps": steps, "evaluation": evaluation, "weights": weights, "routes": routes, "buffers": buffers}


def whole(ranks: list[dict[str, Any]], kind: str = "weights") -> dict[str, Tensor]:
    """The full weights or buffers from every rank's parts. Ranks that hold the same elements hold the same bits."""
    full: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}
    for rank in ranks:
        for name, shape, parts in rank[kind]:
            tensor, covered = full.setdefault(name, torch.zeros(shape)), held.setdefault(name, torch.zeros(shape) > 0)
            for offsets, part in parts:
                place = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))
                assert (tensor[place] == part)[covered[place]].all(), f"replicas of {name} differ"
                tensor[place], covered[place] = part, True
    assert all(covered.all() for covered in held.values())
    return full


@functools.cache
def one_process(text: str, masked: bool) -> dict[str, Any]:
    """The reference: plain AdamW in one process, data parallelism as accumulation."""
    return run_distributed(train, 1, json.loads(text), masked)[0]


def reference_of(recipe: Recipe, masked: bool, **training: Any) -> dict[str, Any]:
    raw = recipe.model_dump(mode="json")
    raw["optimizer"]["eps"] = 1e-3
    raw["training"].update(training)
    raw["parallel"] = {"zero_stage": 0 if raw["training"]["precision"] == "fp32" else 1}
    return one_process(json.dumps(raw), masked)


def run(recipe: Recipe, layout: str, masked: bool, **parallel: Any) -> list[dict[str, Any]]:
    raw = recipe.model_dump(mode="json")
    raw["optimizer"]["eps"] = 1e-3
    parsed = Layout.parse(layout)
    return run_distributed(train, parsed.world_size, {**raw, "parallel": {**parsed.parallel(), **parallel}}, masked)


def compare(recipe: Recipe, layout: str, masked: bool = False, **parallel: Any) -> None:
    """Losses and norms to 1e-6, every updated weight to 1e-5, no route flipped.

    AdamW divides a gradient by its own size: where it is all rounding (an output projection's first gradients are
    5e-7 with a rounding of 3e-9), eps=1e-8 turns noise into full-size updates: one weight of 86,688 then is 4.7e-5 off
    under ep2, fifteen up to 1e-4 under tp2. With eps=1e-3 such weights move by little in either layout.
    """
    single = reference_of(recipe, masked)
    ranks = run(recipe, layout, masked, **parallel)
    for rank in ranks:
        for step, (ours, reference) in enumerate(zip(rank["steps"], single["steps"], strict=True)):
            assert_close(ours, reference, 1e-6, f"step {step}")
        assert_close(rank["evaluation"], single["evaluation"], 1e-6, "evaluation")
        assert all(route == single["routes"][key] for key, route in rank["routes"].items())
    assert set().union(*(rank["routes"] for rank in ranks)) == single["routes"].keys()
    assert_close(whole(ranks), whole([single]), 1e-5)
    buffers = 1e-6 if recipe.training.fp8 is None else 1e-5  # amaxes of gradients
    assert_close(whole(ranks, "buffers"), whole([single], "buffers"), buffers)


# Every layout ---------------------------------------------------------------------------------------------------------

DROPLESS = small.recipe(
    {"num_layers": 4, "tie_embeddings": True, "qk_norm": "head", "head_dim": 12},
    {**MOE, "layers": [0, 1, 1, 1], "bias_update_rate": 0.01},
    {"micro_batch_size": 1},
    data={"document_mask": True},
)
LAYOUTS = (
    "tp2 tp2+sp pp2 pp2vp2 pp4 ep2 ep4 cp2 cp4 dp2+zero0 dp2 dp2+zero2 dp2+offload single+offload tp2ep2 tp2ep4+sp "
    "pp2ep2 cp2ep2 tp2dp2+zero2 tp2cp2+sp tp2pp2ep2 tp2pp2ep2dp2 tp2pp2vp2ep2 tp2pp2cp2 pp2+zero0 ep2+zero0"
)


@pytest.mark.parametrize("layout", LAYOUTS.split())
def test_every_layout_equals_one_process(layout: str) -> None:
    """Tied embeddings of an odd vocabulary, documents and uneven loss masks, a stage without experts (pp4), router
    biases that move, clipping; one sequence a micro-batch."""
    compare(DROPLESS, layout, masked=True)


EVERYTHING = small.recipe(
    {"num_layers": 4, "qk_norm": "full", "bias": "qkv"},
    {
        "layers": [0, 1, 0, 1],
        "aux_loss_scope": "global_batch",
        "aux_loss_coefficient": 0.05,
        "bias_update_rate": 0.01,
        "jitter": 0.1,
        "capacity_factor": 1.0,
        "shared_expert_ffn_hidden_size": 16,
        "score_function": "sigmoid",
        "num_groups": 4,
        "top_k_groups": 2,
    },
    {"recompute": "full"},
)


@pytest.mark.parametrize("layout", ["tp2+sp", "pp2", "cp2", "ep2", "dp2+zero2", "tp2ep4", "tp2pp2ep2"])
def test_with_everything_on(layout: str) -> None:
    """Global-batch statistics, router bias, jitter, capacity, shared and dense layers together, under recompute."""
    compare(EVERYTHING, layout)


POSITION = small.recipe({"norm_placement": "post"}, {**MOE, "capacity_factor": 1.25, "drop_policy": "position"})


@pytest.mark.parametrize("layout", ["tp2", "cp2", "tp2cp2", "ep2dp4"])
def test_a_capacity_over_the_whole_micro_batch(layout: str) -> None:
    """Which tokens an expert drops depends on all of the micro-batch, wherever its tokens are."""
    compare(POSITION, layout)


GPT2 = small.recipe(
    {
        "num_layers": 4,
        "num_query_groups": 4,
        "position_embedding": "learned",
        "normalization": "LayerNorm",
        "bias": "all",
        "activation": "gelu",
        "tie_embeddings": True,
    },
    data={"document_mask": True, "reset_position_ids": True},
)


@pytest.mark.parametrize("layout", ["tp2+sp", "pp2vp2", "cp2", "dp2+zero2", "tp2pp2cp2"])
def test_gpt2(layout: str) -> None:
    """Learned positions, biases, LayerNorm."""
    compare(GPT2, layout, masked=True)


POOLED = {"selector": "pooled", "block_size": 4, "blocks": 4}
# One block to choose, also for the first query block of each part of a sequence that context parallelism makes.
BY_QUERY_BLOCKS = {"block_size": 2, "query_block_size": 3, "blocks": 3, "local_blocks": 1, "sink_blocks": 0}
NSA = {"selector": "nsa", "compression_size": 4, "compression_stride": 2, "window_blocks": 2}
SCHEDULE = {"dense_start": 0.05, "ramp": 0.15}  # of 20 steps: one dense, three with fewer and fewer blocks, sparse
SPARSE = {
    "pooled": small.recipe(
        {"num_layers": 4, "sparse_attention": {**POOLED, "layers": [1, 1, 0, 1], **SCHEDULE}},
        {**MOE, "layers": [0, 1, 1, 1]},
        {"recompute": "full"},
        data={"document_mask": True},
    ),
    "pooled by query blocks": small.recipe({"sparse_attention": {**POOLED, **BY_QUERY_BLOCKS}}, MOE),
    "gate": small.recipe(
        {"sparse_attention": {**POOLED, "selector": "gate", "gate_dim": 8, "dense_start": 0.1}},
        MOE,
        {"micro_batch_size": 1},
        data={"document_mask": True},
    ),
    "nsa": small.recipe(
        {"sparse_attention": {**POOLED, **NSA, "dense_start": 0.1}, "qk_norm": "full", "norm_placement": "post"},
        MOE,
        {"recompute": "full", "micro_batch_size": 1},
        data={"document_mask": True},
    ),
    "clusters": small.recipe(
        {"sparse_attention": {**POOLED, "selector": "clusters", "clusters": 3, "dense_start": 0.1}},
        MOE,
        data={"document_mask": True},
    ),
    "clusters by query blocks": small.recipe(
        {"sparse_attention": {**BY_QUERY_BLOCKS, "selector": "clusters", "clusters": 3}},
        MOE,
        {"recompute": "full"},
        data={"document_mask": True},
    ),
    "strided": small.recipe(
        {"sparse_attention": {"selector": "strided", "block_size": 2, "query_block_size": 3, "stride": 5}}, MOE
    ),
}


@pytest.mark.parametrize(
    ("sparse", "layout"),
    [
        *[("pooled", layout) for layout in ("tp2+sp", "pp2vp2", "cp2", "ep2", "dp2+zero2", "tp2cp2", "tp2pp2ep2")],
        *[("gate", layout) for layout in ("tp2+sp", "pp2", "cp2", "ep2", "dp2+zero2", "dp2", "tp2cp2")],
        *[("nsa", layout) for layout in ("tp2+sp", "pp2", "cp2", "ep2", "dp2+zero2", "tp2cp2", "tp2pp2ep2")],
        *[("clusters", layout) for layout in ("tp2+sp", "cp2", "dp2+zero2")],
        *[("pooled by query blocks", layout) for layout in ("tp2", "dp2", "cp2", "tp2cp2")],
        ("clusters by query blocks", "cp2"),
        *[("strided", layout) for layout in ("tp2+sp", "cp2", "pp2ep2")],
    ],
)
def test_block_sparse_attention(sparse: str, layout: str) -> None:
    """Lists chosen in every layout alike: by heads that tensor parallelism splits, over keys that context parallelism
    gathers, in documents, under recompute."""
    compare(SPARSE[sparse], layout, masked=SPARSE[sparse].data.document_mask)


EVERYWHERE = {"targets": ["."], "refresh_interval": 2}  # attention, dense and shared MLPs, experts
TWO_FOUR = {
    "transposable": small.recipe(
        {"num_layers": 4},
        {**MOE, "layers": [0, 1, 1, 0], "shared_expert_ffn_hidden_size": 16},
        {"micro_batch_size": 1},
        sparsity={"weights": {**EVERYWHERE, "method": "sr_ste", "decay": 0.02, "ramp": 0.1, "dense_start": 0.05}},
    ),
    "ast": small.recipe(
        {"num_layers": 4},
        {**MOE, "layers": [0, 1, 1, 0], "shared_expert_ffn_hidden_size": 16},
        {"micro_batch_size": 1},
        sparsity={
            "weights": {**EVERYWHERE, "method": "ast", "decay": 0.02, "boost": 4, "score": "wanda", "dense_start": 0.05}
        },
    ),
    "mvue": small.recipe(
        {"num_layers": 4, "bias": "qkv"},
        {**MOE, "layers": [0, 1, 0, 0], "shared_expert_ffn_hidden_size": 16},
        {"recompute": "full"},
        data={"seq_length": 32},
        sparsity={"weights": {**EVERYWHERE, "method": "s_ste", "mvue": "exact"}},
    ),
    "s_ste": small.recipe(
        {"bias": "qkv"},
        {**MOE, "layers": [0, 1]},
        {"recompute": "full", "micro_batch_size": 1},
        sparsity={"weights": {**EVERYWHERE, "method": "s_ste", "dense_start": 0.05}},
    ),
}


@pytest.mark.parametrize(
    ("sparsity", "layout"),
    [
        *[("transposable", layout) for layout in ("tp2+sp", "pp2vp2", "cp2", "ep2", "dp2", "dp2+zero2", "dp2+offload")],
        ("transposable", "tp2pp2ep2"),
        *[("ast", layout) for layout in ("tp2+sp", "pp2vp2", "cp2", "ep2", "dp2+zero2", "tp2pp2ep2", "dp2+zero0")],
        *[("mvue", layout) for layout in ("tp2+sp", "tp2", "pp2vp2", "tp2cp2", "dp2")],
        *[("s_ste", layout) for layout in ("tp2", "ep2", "tp2pp2ep2", "dp2+zero0")],
    ],
)
def test_two_four_weights(sparsity: str, layout: str) -> None:
    """Masks made from each process's part of a weight, scales over all parts, decay before each of ZeRO's AdamWs."""
    compare(TWO_FOUR[sparsity], layout)


def fp8(recipe: str, **fields: Any) -> dict[str, Any]:
    """A cast is a step: where layouts differ in the last bit of float32, some element in a million rounds to the next
    float8, 6% away. ``smooth`` has what the layout could change, the scales, and no steps."""
    return {"fp8": {"recipe": recipe, "rounding": "smooth", **fields}}


FP8 = {
    "delayed": small.recipe(
        {"num_layers": 4, "bias": "qkv"},
        {**MOE, "layers": [0, 1, 0, 1], "shared_expert_ffn_hidden_size": 16},
        {"recompute": "full", **fp8("delayed", amax_history_len=3, margin=1, num_layers_at_end_in_bf16=1)},
    ),
    "current": small.recipe(
        {"bias": "qkv", "sparse_attention": POOLED},
        {**MOE, "layers": [0, 1], "shared_expert_ffn_hidden_size": 16},
        fp8("current"),
    ),
    "block": small.recipe(
        {"head_dim": 64, "ffn_hidden_size": 256},
        {**MOE, "ffn_hidden_size": 144, "layers": [0, 1], "shared_expert_ffn_hidden_size": 256},
        {"micro_batch_size": 16, "global_batch_size": 32, **fp8("block", gradients="e4m3")},
        data={"seq_length": 32},
    ),
    "s_ste": small.recipe(
        {"num_layers": 2, "bias": "qkv"},
        {**MOE, "layers": [0, 1]},
        {"recompute": "full", **fp8("delayed", amax_compute_algo="most_recent")},
        data={"seq_length": 32},
        sparsity={"weights": {**EVERYWHERE, "method": "s_ste", "mvue": "approx"}},
    ),
}


@pytest.mark.parametrize(
    ("scaling", "layout"),
    [
        *[("delayed", layout) for layout in ("tp2+sp", "pp2vp2", "cp2", "ep2", "dp2+zero2")],
        *[("current", layout) for layout in ("tp2", "cp2", "ep2", "dp2")],
        *[("block", layout) for layout in ("tp2+sp", "cp2", "ep2")],
        *[("s_ste", layout) for layout in ("tp2pp2ep2", "dp2")],
    ],
)
def test_fp8(scaling: str, layout: str) -> None:
    """Scales of whole tensors from each process's parts, histories over all processes, tiles that end with a part."""
    compare(FP8[scaling], layout)


@pytest.mark.parametrize(
    ("scaling", "layout", "precision"),
    [("current", "cp2", "fp32"), ("delayed", "tp2+sp", "fp32"), ("block", "ep2", "bf16")],
)
def test_a_layout_moves_less_than_fp8_itself(scaling: str, layout: str, precision: str) -> None:
    """With casts: the same loss in fp32 until one of them falls on the other side; then what FP8 costs is the bound."""
    raw = FP8[scaling].model_dump(mode="json")
    raw["training"]["precision"] = precision
    raw["training"]["fp8"]["rounding"] = "nearest"
    recipe = parse_recipe(raw)
    exact, single = reference_of(recipe, False, precision="fp32", fp8=None), reference_of(recipe, False)
    for rank in run(recipe, layout, False):
        if precision == "fp32":
            assert_close(rank["steps"][0]["loss"], single["steps"][0]["loss"], 1e-6)
        for key in ("loss", "norm"):
            cost = max(
                relative_error(torch.tensor(a[key]), torch.tensor(b[key]))
                for a, b in zip(single["steps"], exact["steps"], strict=True)
            )
            assert_close([s[key] for s in rank["steps"]], [s[key] for s in single["steps"]], cost, key)


# A teacher ------------------------------------------------------------------------------------------------------------

TEACHER = small.recipe(
    {"num_layers": 6, "hidden_size": 48, "bias": "qkv", "init_std": 0.2},
    {"num_experts": 4, "layers": [0, 1, 0, 1, 0, 1], "shared_expert_ffn_hidden_size": 16},
    {"steps": 4},
    sparsity={"weights": {"method": "s_ste", "dense_start": 0.25}},
)


def save(raw: dict[str, Any], folder: Path) -> None:
    """A checkpoint after two steps."""
    recipe = parse_recipe(raw)
    place = small.start(recipe)
    engine = Engine(recipe, place, *build_model(recipe, place, VOCAB))
    for step in range(2):
        engine.train_step(small.batches(recipe, step), step, 3e-3)
    Saver(engine, folder, "", TOKENIZER).save(2)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """DROPLESS with a teacher of another size, with other experts and 2:4 weights."""
    folder = tmp_path_factory.mktemp("teacher")
    run_distributed(save, 1, TEACHER.model_dump(mode="json"), folder)
    raw = DROPLESS.model_dump(mode="json")
    raw["training"]["teacher"] = {"checkpoint": str(folder / "step_2")}
    return parse_recipe(raw)


@pytest.mark.parametrize("layout", ["tp2+sp", "pp2", "pp2vp2", "cp2", "ep2", "dp2+zero2"])
def test_a_teacher(taught: Recipe, layout: str) -> None:
    """Its logits of each micro-batch meet the student's, over a padded vocabulary that tensor parallelism splits."""
    compare(taught, layout, masked=True)


@pytest.mark.parametrize(
    ("layout", "parallel"),
    [
        ("pp2", {"layers_per_stage": [1, 3]}),
        ("pp2vp2", {"layers_per_stage": [1, 1, 1, 1]}),
        ("pp3", {"loss_weight": 1.0, "embedding_weight": 0.5}),
        ("tp2pp2", {"layers_per_stage": [3, 1]}),
    ],
    ids=str,
)
def test_uneven_stages(layout: str, parallel: dict[str, Any]) -> None:
    compare(DROPLESS, layout, masked=True, **parallel)


# Precisions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tp2+sp", "pp2vp2", "pp4", "cp2", "ep2", "dp2+zero2", "dp2+offload", "tp2pp2ep2"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_layout_moves_less_than_the_precision_itself(precision: str, layout: str) -> None:
    """In bf16 and fp16 sums in another order round otherwise. The bound is what the precision costs by itself: the
    worst difference of loss and norm between one process in it and one in fp32, over the same five updates."""
    training = {"micro_batch_size": 1, "precision": precision, "loss_scale": 1024.0}
    recipe = small.recipe({"num_layers": 4, "tie_embeddings": True}, {**MOE, "layers": [0, 1, 1, 1]}, training)
    exact, single = reference_of(recipe, False, precision="fp32"), reference_of(recipe, False)
    for rank in run(recipe, layout, False):
        for key in ("loss", "norm"):
            bound = max(
                relative_error(torch.tensor(a[key]), torch.tensor(b[key]))
                for a, b in zip(single["steps"], exact["steps"], strict=True)
            )
            assert_close([s[key] for s in rank["steps"]], [s[key] for s in single["steps"]], bound, key)


# Dropout --------------------------------------------------------------------------------------------------------------

DROPOUT = {"num_layers": 4, "hidden_dropout": 0.2, "attention_dropout": 0.2}


@pytest.mark.parametrize("layout", ["single", "tp2", "tp2+sp", "pp2vp2", "cp2"])
def test_recompute_draws_the_same_dropout_in_every_layout(layout: str) -> None:
    """The masks of the first pass, whatever other micro-batches drew in between."""
    plain, recomputed = (
        run(small.recipe(DROPOUT, {**MOE, "layers": [0, 1, 0, 1]}, {"recompute": recompute}), layout, False)
        for recompute in ("none", "full")
    )
    for ours, reference in zip(recomputed, plain, strict=True):
        assert_close(ours["steps"], reference["steps"], 1e-6)
    without = reference_of(small.recipe({"num_layers": 4}, {**MOE, "layers": [0, 1, 0, 1]}), False)
    assert relative_error(torch.tensor(plain[0]["steps"][0]["norm"]), torch.tensor(without["steps"][0]["norm"])) > 1e-3


def test_dropout_follows_ranks_not_experts_or_optimizers() -> None:
    """Masks are the ranks': layouts that differ in expert parallelism, ZeRO or offload alone draw the same ones."""
    recipe = small.recipe(DROPOUT, MOE)
    reference, *others = (
        run(recipe, layout, False) for layout in ("dp2+zero0", "dp2", "dp2+zero2", "ep2", "dp2+offload")
    )
    for ranks in others:
        for ours, theirs in zip(ranks, reference, strict=True):
            assert_close(ours["steps"], theirs["steps"], 1e-6)


# Overflow -------------------------------------------------------------------------------------------------------------


def scales(raw: dict[str, Any]) -> list[tuple[bool, float]]:
    """(skipped, loss scale) of each step from a scale that is far too large."""
    recipe = parse_recipe(raw)
    place = small.start(recipe)
    engine = Engine(recipe, place, *build_model(recipe, place, VOCAB))
    results = [engine.train_step(small.batches(recipe, s, place.dp_rank, place.dp), s, 3e-3) for s in range(10)]
    return [(result.skipped, result.loss_scale) for result in results]


@pytest.mark.parametrize("layout", ["tp2pp2", "ep2", "cp2", "dp2+zero2", "dp2+offload"])
def test_an_overflow_on_one_rank_is_skipped_by_all(layout: str) -> None:
    training = {"precision": "fp16", "loss_scale": 2.0**24, "micro_batch_size": 1}
    raw = small.recipe(moe={"layers": [0, 1]}, training=training).model_dump(mode="json")
    (alone,) = run_distributed(scales, 1, raw)
    assert alone[0][0], "the first step overflows"
    assert not alone[-1][0], "a smaller scale is found"
    parsed = Layout.parse(layout)
    ranks = run_distributed(scales, parsed.world_size, {**raw, "parallel": parsed.parallel()})
    assert all(rank == ranks[0] for rank in ranks)
    assert ranks[0][0][0]
    assert not ranks[0][-1][0]
    assert [scale for _, scale in ranks[0]] == sorted((scale for _, scale in ranks[0]), reverse=True)
