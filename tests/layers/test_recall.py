"""Recall and entropy of the sampled queries against loops over their keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megasparse.layers import selectors
from megasparse.layers.recall import SAMPLE, attention_recall, sampled
from megasparse.layers.selectors import Grid
from megasparse.layers.step import StepState
from megasparse.ops.block_sparse import BlockMask
from tests.helpers import assert_close
from tests.layers.test_block_sparse import modules
from tests.layers.test_block_sparse import tensors as layer_inputs

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 8, 0.7


def tensors(seq: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    return (torch.randn(2, seq, heads, DIM, generator=random, dtype=torch.float64) for heads in (HEADS, KV_HEADS))  # type: ignore[return-value]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("seq", "queries", "size"), [(75, 75, 1), (75, 75, 16), (75, 3, 1), (9, 9, 1)])
def test_recall_one_query_at_a_time(seq: int, queries: int, size: int, documents: bool) -> None:
    q, k = tensors(seq)
    q = q[:, seq - queries :]
    random = torch.Generator().manual_seed(3)
    dense = torch.rand(2, KV_HEADS, math.ceil(queries / size), math.ceil(seq / 8), generator=random) < 0.4
    mask = BlockMask.from_dense(dense, 8, size)
    ids = (torch.arange(seq) // 20).expand(2, -1) if documents else None
    rows = sampled(q, seq - queries, seq)
    assert rows.tolist() == list(range(max(0, queries - SAMPLE), queries))
    recall = attention_recall(q, k, mask, SCALE, ids, rows)
    for b in range(2):
        for h in range(KV_HEADS):
            for row, i in enumerate(rows.tolist()):
                shares, t = [], seq - queries + i
                keys = [s for s in range(t + 1) if ids is None or ids[b, s] == ids[b, t]]
                for head in (2 * h, 2 * h + 1):
                    weights = torch.softmax(SCALE * k[b, keys, h] @ q[b, i, head], 0).tolist()
                    shares.append(sum(w for w, s in zip(weights, keys, strict=True) if dense[b, h, i // size, s // 8]))
                assert recall[b, h, row].item() == pytest.approx(sum(shares) / len(shares), rel=1e-5)


def test_a_part_of_the_sequence_has_its_share_of_the_sample() -> None:
    q, _ = tensors(10)
    assert sampled(q, 20, 40).tolist() == [4, 5, 6, 7, 8, 9]
    assert sampled(q, 30, 40).tolist() == list(range(10))
    assert sampled(q, 0, 40).tolist() == []


def test_entropy_one_query_at_a_time() -> None:
    grid = Grid(8, 1, 2, 1)
    q, k = tensors(75)
    score = selectors.pooled(grid, q, k)
    entropy = selectors.entropy(grid, score, q, k, slice(59, 75))
    scores = score(slice(0, 75))
    for t in range(59, 75):
        others = list(range(1, t // 8 - 1))  # without the first, the own and the one before
        p = torch.softmax(scores[1, 0, t, others].double(), 0)
        assert entropy[1, 0, t - 59].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)
    assert torch.equal(selectors.entropy(grid, score, q, k, slice(0, 9)), torch.zeros(2, KV_HEADS, 9))


@pytest.mark.parametrize("seq", [75, 9])
def test_a_layer_records_them_once(seq: int) -> None:
    """All blocks have all of the attention; under recompute each layer runs twice and counts once."""
    state = StepState(recompute=True)
    _, sparse = modules(state, selector="pooled", blocks=1000, sink_blocks=0, local_blocks=1)
    state.begin(0, 10, 2)
    inputs = layer_inputs(seq)
    with torch.no_grad():
        sparse(*inputs, None)
    sparse(*inputs, None)
    assert_close(float(state.means["attention_recall"]), 0.5, 1e-6)  # of one of two micro-batches
    assert 0 <= float(state.means["selector_entropy"]) < 0.5 * math.log(10)
    _, local = modules(state, selector="local")
    state.begin(0, 10, 1)
    with torch.no_grad():
        local(*inputs, None)
    assert 0 < float(state.means["attention_recall"]) < 1 + 1e-6
    assert seq == 9 or float(state.means["attention_recall"]) < 0.9
    assert "selector_entropy" not in state.means
