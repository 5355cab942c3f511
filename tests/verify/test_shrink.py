"""Large recipes are made small with their structure, and every layout still fits."""

from __future__ import annotations

from typing import Any

import pytest

from megasparse import schedule
from megasparse.config import Recipe, parse_recipe
from megasparse.layout import Layout, check_layout, stage_layers
from megasparse.verify import possible_layouts
from megasparse.verify.shrink import default_layouts, shrink
from tests import small


def recipe_of(model: dict[str, Any], seq: int, parallel: dict[str, Any] | None = None, **training: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "large",
            "data": {"sets": [{"path": "unused"}], "seq_length": seq},
            "model": model,
            "training": {
                "steps": 100,
                "global_batch_size": 1024,
                "micro_batch_size": 4,
                "precision": "bf16",
                **training,
            },
            "parallel": parallel or {},
        }
    )


QWEN3_MOE = recipe_of(
    {
        "num_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "head_dim": 128,
        "qk_norm": "head",
        "moe": {"num_experts": 128, "top_k": 8, "ffn_hidden_size": 768},
    },
    4096,
    {"tp": 4, "sequence_parallel": True, "pp": 4, "ep": 8},
)
DEEPSEEK_LIKE = recipe_of(
    {
        "num_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "num_query_groups": 8,
        "head_dim": 192,
        "ffn_hidden_size": 18432,
        "moe": {
            "num_experts": 256,
            "top_k": 8,
            "ffn_hidden_size": 2048,
            "layers": [0] * 3 + [1] * 58,
            "shared_expert_ffn_hidden_size": 2048,
            "score_function": "sigmoid",
            "num_groups": 8,
            "top_k_groups": 4,
            "bias_update_rate": 0.001,
        },
    },
    4096,
    {"pp": 16, "vp": 2, "ep": 64},
)
GPT2 = recipe_of(
    {
        "num_layers": 48,
        "hidden_size": 1600,
        "num_attention_heads": 25,
        "vocab_size": 50257,
        "position_embedding": "learned",
        "max_position_embeddings": 1024,
        "normalization": "LayerNorm",
        "bias": "all",
        "activation": "gelu",
        "tie_embeddings": True,
        "hidden_dropout": 0.1,
    },
    1024,
    {"pp": 2, "layers_per_stage": [20, 28]},
)


@pytest.mark.parametrize("recipe", [QWEN3_MOE, DEEPSEEK_LIKE, GPT2], ids=["qwen3-moe", "deepseek-like", "gpt2"])
def test_a_large_recipe_becomes_small_and_keeps_its_structure(recipe: Recipe) -> None:
    layouts, _ = possible_layouts(recipe)
    assert len(layouts) >= 3
    made, changes = shrink(recipe, layouts)
    for layout in layouts:
        raw = made.model_dump(mode="json")
        raw["parallel"].update(layout.parallel())
        check_layout(parse_recipe(raw), layout.world_size)
    before, after = recipe.model, made.model
    assert after.hidden_size <= 256
    assert after.num_layers <= 8
    assert made.data.seq_length <= 64
    assert made.training.global_batch_size <= 32
    assert before.num_attention_heads // before.kv_heads == after.num_attention_heads // after.kv_heads
    assert (before.head_size * before.num_attention_heads == before.hidden_size) == (
        after.head_size * after.num_attention_heads == after.hidden_size
    )
    for name in ("qk_norm", "bias", "tie_embeddings", "activation", "normalization", "position_embedding"):
        assert getattr(before, name) == getattr(after, name)
    assert any(before.moe_layers) == any(after.moe_layers)
    assert all(before.moe_layers) == all(after.moe_layers)
    if before.moe is not None and after.moe is not None:
        assert after.moe.num_experts <= 16
        assert after.moe.top_k < after.moe.num_experts
        for name in ("score_function", "num_groups", "top_k_groups", "bias_update_rate"):
            assert getattr(before.moe, name) == getattr(after.moe, name)
        assert bool(before.moe.shared_expert_ffn_hidden_size) == bool(after.moe.shared_expert_ffn_hidden_size)
    assert made.training.precision == "fp32"
    assert after.hidden_dropout == 0
    assert any(line.startswith("model.hidden_size: ") for line in changes)
    assert any("training.precision: bf16 -> fp32 (where" in line for line in changes)
    assert any("optimizer.eps: 1e-08 -> 0.001 (AdamW" in line for line in changes)


def test_sparse_attention_keeps_choosing() -> None:
    """More blocks than a query may see, in whole parts of a context-parallel rank."""
    raw = QWEN3_MOE.model_dump(mode="json")
    raw["model"]["sparse_attention"] = {
        **{"selector": "pooled", "blocks": 16, "query_block_size": 128, "local_blocks": 4},
        "layers": [0] * 4 + [1] * 44,
    }
    made, _ = shrink(parse_recipe(raw), [Layout.parse("tp2+sp"), Layout.parse("pp2vp2")])
    sparse = made.model.sparse_attention
    assert sparse is not None
    assert (sparse.block_size, sparse.query_block_size, sparse.local_blocks, sparse.blocks) == (4, 4, 2, 5)
    assert sparse.blocks < made.data.seq_length // sparse.block_size
    assert made.data.seq_length % (2 * sparse.query_block_size) == 0
    assert sparse.layers == [0, 0, 0, 1]


def test_uneven_stages_stay_uneven() -> None:
    made, changes = shrink(GPT2, [Layout.parse("pp2"), Layout.parse("pp2vp2")])
    raw = made.model_dump(mode="json")
    for layout, layers in (("pp2", [2, 3]), ("pp2vp2", [1, 2, 1, 1])):
        raw["parallel"].update(Layout.parse(layout).parallel())
        recipe = parse_recipe(raw)
        assert stage_layers(recipe.parallel, recipe.model.num_layers) == layers
    assert any(line.startswith("parallel.layers_per_stage: [20, 28] -> None (") for line in changes)


def test_a_small_recipe_stays() -> None:
    recipe = small.recipe({"vocab_size": 95}, {}, optimizer={"eps": 1e-2, "clip_grad": 0.1})
    made, changes = shrink(recipe, [Layout.parse("tp2"), Layout.parse("dp2")])
    assert made.model == recipe.model
    assert changes == []


def test_micro_batches_for_every_pipeline() -> None:
    layouts = [Layout.parse(text) for text in ("pp4vp2", "dp4", "tp2")]
    made, _ = shrink(QWEN3_MOE, layouts)
    assert made.model.num_layers == 8
    for layout in layouts:
        per_rank, rest = divmod(made.training.global_batch_size, made.training.micro_batch_size * layout.dp)
        assert rest == 0
        assert per_rank % layout.pp == 0


def test_clipping_rate_and_decay_are_what_can_be_seen() -> None:
    made, changes = shrink(small.recipe(optimizer={"lr": 1e-6, "weight_decay": 0.01}), [Layout.parse("dp2")])
    assert (made.optimizer.lr, made.optimizer.weight_decay, made.optimizer.clip_grad) == (2e-3, 0.1, 0.1)
    assert any(line.startswith("optimizer.clip_grad: 1.0 -> 0.1 (so that it clips") for line in changes)
    without = small.recipe(optimizer={"weight_decay": 0.0, "clip_grad": 0.0})
    made, _ = shrink(without, [Layout.parse("dp2")])
    assert (made.optimizer.weight_decay, made.optimizer.clip_grad) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({}, "dp2 tp2+sp pp2 cp2 ep2dp2 tp2pp2ep2"),
        ({"tp": 8, "ep": 8}, "tp2ep2 dp2 tp2+sp pp2 cp2 ep2dp2 tp2pp2ep2"),
        ({"pp": 4, "vp": 3, "zero_stage": 0}, "pp2vp2+zero0 dp2 tp2+sp pp2 cp2 ep2dp2 tp2pp2ep2 pp2vp2"),
        ({"tp": 3, "ep": 9}, "tp3ep3 dp2 tp2+sp pp2 cp2 ep2dp2 tp2pp2ep2"),
        ({"zero_stage": 2, "offload_optimizer": True}, "dp2+zero2+offload dp2 tp2+sp pp2 cp2 ep2dp2 tp2pp2ep2"),
    ],
    ids=str,
)
def test_default_layouts(parallel: dict[str, Any], expected: str) -> None:
    assert [str(layout) for layout in default_layouts(small.recipe(moe={}, parallel=parallel))] == expected.split()


def test_a_dense_recipe_has_no_expert_layouts() -> None:
    layouts, left_out = possible_layouts(small.recipe())
    assert [str(layout) for layout in layouts] == ["dp2", "tp2+sp", "pp2", "cp2"]
    assert left_out == []


def test_a_default_layout_that_cannot_be_is_said_not_dropped() -> None:
    """The rules are those of the recipe, not of what it is shrunk to, whose 2 heads tp=2 would divide."""
    layouts, left_out = possible_layouts(GPT2)
    assert [str(layout) for layout in layouts] == ["pp2", "dp2", "cp2"]
    (reason,) = left_out
    assert reason.startswith("layout tp2+sp on 2 processes: model.num_attention_heads=25 is not divisible by tp=2")


@pytest.mark.parametrize("scaling", ["delayed", "block"])
@pytest.mark.parametrize("recipe", [QWEN3_MOE, DEEPSEEK_LIKE], ids=["qwen3-moe", "deepseek-like"])
def test_fp8_has_no_steps_and_whole_tiles(recipe: Recipe, scaling: str) -> None:
    """Where a cast would make 6% of the last bit of float32; histories that amaxes leave; both kinds of layers."""
    raw = recipe.model_dump(mode="json")
    raw["training"]["fp8"] = {"recipe": scaling, "num_layers_at_end_in_bf16": 5}
    layouts, left_out = possible_layouts(parse_recipe(raw))
    assert not left_out
    made, changes = shrink(parse_recipe(raw), layouts)
    fp8 = made.training.fp8
    assert fp8 is not None
    assert (fp8.recipe, fp8.rounding, fp8.num_layers_at_end_in_bf16) == (scaling, "smooth", 1)
    assert fp8.amax_history_len == (2 if scaling == "delayed" else 1024)
    assert any(line.startswith("training.fp8.rounding: nearest -> smooth (a cast is a step") for line in changes)
    for layout in layouts:
        parallel = {**made.model_dump(mode="json"), "parallel": layout.parallel()}
        check_layout(parse_recipe(parallel), layout.world_size)


def test_two_four_weights_change_in_few_steps_and_stay_whole() -> None:
    weights = {"method": "sr_ste", "decay": 1e-4, "dense_start": 0.1, "ramp": 0.3, "dense_end": 0.2}
    raw = QWEN3_MOE.model_dump(mode="json")
    raw["sparsity"] = {"weights": {**weights, "targets": [r"layers\.40\..*experts", "attention"]}}
    layouts = [Layout.parse(text) for text in ("tp4", "tp2pp2ep2")]
    small_recipe, changes = shrink(parse_recipe(raw), layouts)
    shrunk = small_recipe.sparsity.weights
    assert shrunk is not None
    assert shrunk.targets == ["attention"]
    assert (shrunk.refresh_interval, shrunk.decay, shrunk.ramp, shrunk.dense_end) == (2, 0.02, 0.0, 0.0)
    sparse = [schedule.weights_are_sparse((s + 1) / small_recipe.training.steps, shrunk) for s in range(3)]
    assert sparse == [False, True, True]
    assert "sparsity.weights.decay: 0.0001 -> 0.02 (so that it can be seen)" in changes
    for layout in layouts:
        parallel = {**small_recipe.model_dump(mode="json"), "parallel": layout.parallel()}
        check_layout(parse_recipe(parallel), layout.world_size)


def test_weights_of_another_run_are_set_aside_and_said() -> None:
    """The model is another, smaller one: neither could be loaded into it."""
    raw = QWEN3_MOE.model_dump(mode="json")
    raw["training"].update(initial_checkpoint="runs/x/step_1", teacher={"checkpoint": "runs/y/step_2"})
    shrunk, changes = shrink(parse_recipe(raw), [Layout.parse("tp2")])
    assert (shrunk.training.initial_checkpoint, shrunk.training.teacher) == (None, None)
    why = "weights are drawn from the seed, some are smaller"
    assert f"training.initial_checkpoint: runs/x/step_1 -> None ({why})" in changes
    assert [line for line in changes if line.startswith("training.teacher: ") and line.endswith(f"-> None ({why})")]
