"""Any layout, one answer: block-sparse attention, 2:4 weights and FP8. Each has the layouts in which something of its
own is split or added up; what it has in common with other methods, one of them shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megasparse.config import parse_recipe
from tests import small
from tests.helpers import assert_close, relative_error
from tests.parity import MOE, compare, reference_of, run

# Block-sparse attention -----------------------------------------------------------------------------------------------

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


# 2:4 weights ---------------------------------------------------------------------------------------------------------

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
        *[("transposable", layout) for layout in ("tp2+sp", "ep2", "dp2+zero2", "dp2+offload")],
        *[("ast", layout) for layout in ("tp2+sp", "pp2vp2", "cp2", "ep2", "dp2+zero0", "dp2+zero2", "tp2pp2ep2")],
        *[("mvue", layout) for layout in ("tp2+sp", "pp2vp2", "tp2cp2", "dp2")],
        ("s_ste", "ep2"),
    ],
)
def test_two_four_weights(sparsity: str, layout: str) -> None:
    """Masks made from each process's part of a weight, scales over all parts, decay before each of ZeRO's AdamWs."""
    compare(TWO_FOUR[sparsity], layout)


# FP8 ------------------------------------------------------------------------------------------------------------------


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
        *[("delayed", layout) for layout in ("tp2+sp", "pp2vp2", "ep2", "dp2+zero2")],
        *[("current", layout) for layout in ("tp2", "cp2", "ep2")],
        *[("block", layout) for layout in ("tp2+sp", "cp2", "ep2")],
        ("s_ste", "tp2pp2ep2"),
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
