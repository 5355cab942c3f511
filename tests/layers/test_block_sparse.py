"""Block-sparse attention in the model: dense where every block is chosen, and what its selector says elsewhere."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megasparse.config import SparseAttention, parse_recipe
from megasparse.layers.attention import CoreAttention
from megasparse.layers.block_sparse import BlockSparseAttention
from megasparse.layers.step import StepState
from megasparse.ops.block_sparse import block_sparse_attention
from tests import small
from tests.helpers import assert_close

KV_HEADS = 2
SELECTORS: list[dict[str, Any]] = [
    {"selector": "local"},
    {"selector": "strided", "stride": 3},
    {"selector": "pooled", "blocks": 5},
    {"selector": "pooled", "blocks": 5, "mass": 0.5},
    {"selector": "clusters", "blocks": 5, "clusters": 4},
]
GATE = {"selector": "gate", "blocks": 5, "gate_dim": 8}  # for single queries


def modules(state: StepState | None = None, **sparse: Any) -> tuple[CoreAttention, BlockSparseAttention]:
    """Dense and block-sparse core attention of the same size."""
    config = SimpleNamespace(
        **{"kv_channels": 8, "num_attention_heads": 4, "params_dtype": torch.float32, "attention_dropout": 0.0},
        **{"context_parallel_size": 1, "tensor_model_parallel_size": 1},
    )
    arguments: Any = (config, 1, AttnMaskType.causal, "self")
    made = SparseAttention(**{"block_size": 8, **sparse})
    block_sparse = BlockSparseAttention(
        *arguments, sparse=made, state=state or StepState(), tp_rank=0, kv_heads=KV_HEADS
    )
    generator = torch.Generator().manual_seed(3)
    for weight in block_sparse.parameters():
        torch.nn.init.normal_(weight, generator=generator)
    return CoreAttention(*arguments), block_sparse


def tensors(seq: int = 75) -> list[Tensor]:
    """query, key, value [seq, batch, heads, head_dim]"""
    random = torch.Generator().manual_seed(0)
    return [
        torch.randn(seq, 2, heads, 8, generator=random, dtype=torch.float64).requires_grad_()
        for heads in (4, KV_HEADS, KV_HEADS)
    ]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("query_block_size", [1, 16])
def test_with_all_blocks_it_is_dense_attention(query_block_size: int, documents: bool) -> None:
    dense, sparse = modules(selector="pooled", blocks=1000, query_block_size=query_block_size)
    ids = (torch.arange(75) // 20).expand(2, -1) if documents else None
    inputs = tensors()
    a, b = (module(*inputs, ids) for module in (sparse, dense))
    assert_close(a, b, 1e-12)
    weights = torch.randn_like(a)
    assert_close(torch.autograd.grad(a, inputs, weights), torch.autograd.grad(b, inputs, weights), 1e-11)


@pytest.mark.parametrize("query_block_size", [1, 16])
@pytest.mark.parametrize("options", SELECTORS, ids=str)
def test_it_attends_to_what_the_selector_lists(options: dict[str, Any], query_block_size: int) -> None:
    dense, sparse = modules(**options, query_block_size=query_block_size)
    query, key, value = inputs = tensors()
    q, k, v = (x.transpose(0, 1) for x in inputs)
    mask = sparse.select(q, k, 5, sparse.score(q, k))
    expected = block_sparse_attention(q, k, v, mask, scale=1 / math.sqrt(8), backend="naive")
    assert isinstance(expected, Tensor)
    output = sparse(query, key, value, None)
    assert_close(output, expected.flatten(2).transpose(0, 1), 1e-12)
    assert (output - dense(query, key, value, None)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "query_block_size"),
    [*((options, size) for options in SELECTORS for size in (1, 8)), (GATE, 1)],
    ids=str,
)
def test_no_output_knows_the_future(options: dict[str, Any], query_block_size: int) -> None:
    _, sparse = modules(**options, query_block_size=query_block_size)
    inputs = [x.detach().float() for x in tensors()]
    before = sparse(*inputs, None)
    for t in (1, 8, 40, 74):
        changed = [torch.cat([x[:t], torch.randn_like(x[t:]) * 9]) for x in inputs]
        assert torch.equal(sparse(*changed, None)[:t], before[:t])


def test_schedule_and_density() -> None:
    """Dense, fewer and fewer blocks, sparse, dense; each step's blocks are counted, once under recompute, and those of
    evaluation are not."""
    state = StepState(recompute=True, seq_length=80)
    dense, sparse = modules(state, selector="pooled", blocks=4, dense_start=0.2, ramp=0.4, dense_end=0.2)
    inputs = tensors(80)
    expected = dense(*inputs, None)
    densities = []
    for step in range(10):
        state.begin(step, 10, 1)
        with torch.no_grad():
            sparse(*inputs, None)
        output = sparse(*inputs, None)
        assert (step in (0, 1, 8, 9)) == torch.equal(output, expected)
        densities.append(float(state.blocks["listed"] / state.blocks["all"]) if state.blocks else None)
    lists = [min(j + 1, budget) for j in range(10) for budget in (4,)]
    assert densities[:2] == densities[8:] == [None, None]
    assert densities[5:8] == pytest.approx([sum(lists) / 55] * 3)
    ramp = [x for x in densities[2:6] if x is not None]
    assert 1 > ramp[0] > ramp[1] > ramp[2] > ramp[3]
    state.begin(6, 10, 1)
    with torch.no_grad():
        sparse.eval()(*inputs, None)
    assert not state.blocks


def test_a_shrinking_budget_does_not_know_how_many_follow() -> None:
    state = StepState(seq_length=75)
    _, sparse = modules(state, selector="pooled", blocks=4, ramp=0.5)
    inputs = [x.detach() for x in tensors()]
    state.begin(4, 16, 1)
    assert sparse.budget() == 6  # 10 - 5/8 * (10 - 4)
    whole = sparse.eval()(*inputs, None)
    for t in (1, 30, 50, 58, 74):
        assert_close(sparse(*(x[:t] for x in inputs), None), whole[:t], 1e-12)


@pytest.mark.parametrize(
    ("sparse", "error"),
    [
        ({"selector": "pooled"}, r"model\.sparse_attention: selector=pooled needs blocks"),
        ({"selector": "local", "blocks": 4}, "blocks=4 with selector=local"),
        ({"selector": "local", "mass": 0.5}, "mass=0.5 with selector=local: its pattern is fixed"),
        ({"selector": "pooled", "blocks": 3}, "blocks=3 leaves none to choose: 3 are always seen"),
        ({"selector": "pooled", "blocks": 4, "block_size": 8, "query_block_size": 16}, "4 are always seen"),
        ({"selector": "local", "layers": [1, 0, 1]}, r"sparse_attention\.layers has 3 flags for num_layers=2"),
        ({"selector": "local", "ramp": 0.1}, "ramp=0.1 with selector=local: its pattern is fixed"),
        ({"selector": "local", "dense_start": 0.6, "dense_end": 0.5}, "are more than the run"),
        ({"selector": "gate", "blocks": 9, "query_block_size": 2}, "gate chooses for single queries, set 1"),
        ({"selector": "nsa", "blocks": 9, "query_block_size": 2}, "nsa chooses for single queries, set 1"),
        ({"selector": "nsa", "blocks": 9, "compression_stride": 24}, "block_size=64 is not divisible by"),
        ({"selector": "nsa", "blocks": 9, "compression_size": 40}, "compression_size=40 is not divisible by"),
        ({"selector": "moba"}, r"model\.sparse_attention\.selector = 'moba'"),
    ],
)
def test_what_cannot_be(sparse: dict[str, Any], error: str) -> None:
    raw = small.recipe().model_dump(mode="json")
    raw["model"]["sparse_attention"] = sparse
    with pytest.raises(ValueError, match=error):
        parse_recipe(raw)


def test_no_dropout() -> None:
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1 is not possible with sparse_attention"):
        small.recipe({"attention_dropout": 0.1, "sparse_attention": {"selector": "local"}})
