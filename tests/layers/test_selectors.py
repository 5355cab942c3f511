"""Selectors against loops over queries and blocks, and that no list depends on what comes after its first query."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.layers import selectors
from megasparse.layers.selectors import Grid
from megasparse.ops.block_sparse import BlockMask

HEADS, KV_HEADS, DIM, STRIDE = 4, 2, 8, 3
GRIDS = [Grid(8, 1, 2, 1), Grid(8, 8, 2, 1), Grid(8, 16, 1, 2), Grid(16, 8, 1, 0), Grid(4, 1, 1, 0)]
CENTROIDS = F.normalize(torch.randn(KV_HEADS, 5, DIM, generator=torch.Generator().manual_seed(7)), dim=-1)


def budget(grid: Grid) -> int:
    """Two more than the most blocks that are always on."""
    return grid.sink_blocks + grid.local_blocks + max(1, grid.query_block_size // grid.block_size) + 1


Selector = Callable[[Grid, Tensor, Tensor], BlockMask]
SELECTORS: dict[str, Selector] = {
    "local": lambda grid, q, k: selectors.local(grid, q, k),
    "strided": lambda grid, q, k: selectors.strided(grid, q, k, STRIDE),
    "pooled": lambda grid, q, k: selectors.choose(grid, selectors.pooled(grid, q, k), q, k, budget(grid)),
    "mass": lambda grid, q, k: selectors.choose(grid, selectors.pooled(grid, q, k), q, k, budget(grid) + 2, mass=0.6),
    "clusters": lambda grid, q, k: selectors.choose(
        grid, selectors.clusters(grid, q, k, CENTROIDS), q, k, budget(grid)
    ),
}


def tensors(seq: int = 75) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, seq, HEADS, DIM, generator=random)
    return q, torch.randn(2, seq, KV_HEADS, DIM, generator=random)


def always(grid: Grid, i: int, j: int) -> bool:
    first, last = i * grid.query_block_size // grid.block_size, ((i + 1) * grid.query_block_size - 1) // grid.block_size
    return j <= last and (j > first - grid.local_blocks or j < grid.sink_blocks)


def scorer(grid: Grid, q: Tensor, b: int, h: int, i: int) -> Tensor:
    """The query that scores for query block i, summed over the group."""
    size = grid.query_block_size
    rows = q[b, i : i + 1] if size == 1 else q[b, max(0, (i - 1) * size) : i * size]
    group = HEADS // KV_HEADS
    if not len(rows):
        return torch.zeros(DIM)
    return rows[:, h * group : (h + 1) * group].sum(1).mean(0)


def reference(name: str, grid: Grid, q: Tensor, k: Tensor) -> Tensor:
    """bool [batch, kv_heads, q_blocks, k_blocks], one entry at a time."""
    seq = q.shape[1]
    q_blocks, k_blocks = math.ceil(seq / grid.query_block_size), math.ceil(seq / grid.block_size)
    dense = torch.zeros(2, KV_HEADS, q_blocks, k_blocks, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, dense.shape[:3])).tolist():
        start, stop = i * grid.query_block_size, min((i + 1) * grid.query_block_size, seq)
        chosen = {j for j in range(k_blocks + 9) if always(grid, i, j)}  # also those that do not exist yet
        others = [j for j in range(start // grid.block_size) if j not in chosen]
        if name == "strided":
            last = (stop - 1) // grid.block_size
            chosen |= {j for j in range(last + 1) if (j + h * max(1, STRIDE // KV_HEADS)) % STRIDE == 0}
        elif name != "local":
            query, scores = scorer(grid, q, b, h, i), {}
            for j in others:
                block = k[b, j * grid.block_size : (j + 1) * grid.block_size, h]
                if name == "clusters":
                    own = (query @ CENTROIDS[h].T).argmax()
                    scores[j] = float(((block @ CENTROIDS[h].T).argmax(-1) == own).sum())
                else:
                    scores[j] = float(query @ block.mean(0)) / math.sqrt(DIM)
            most = budget(grid) + 2 if name == "mass" else budget(grid)
            best = sorted(others, key=lambda j: -scores[j])[: max(0, most - len(chosen))]
            if name == "mass":
                total, kept = sum(math.exp(s) for s in scores.values()), 0.0
                for j in best:
                    if kept < 0.6:
                        chosen.add(j)
                    kept += math.exp(scores[j]) / total
            else:
                chosen |= set(best)
        dense[b, h, i, [j for j in chosen if j < k_blocks]] = True
    return dense


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", SELECTORS)
def test_against_a_loop(name: str, grid: Grid) -> None:
    q, k = tensors()
    mask = SELECTORS[name](grid, q, k)
    expected = reference(name, grid, q, k)
    assert torch.equal(mask.to_dense(), expected)
    assert expected.any(-1).all()
    if name != "local":
        assert not torch.equal(expected, reference("local", grid, q, k))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", SELECTORS)
def test_a_list_does_not_know_the_future(name: str, grid: Grid) -> None:
    """Other tokens from t on change no list of a query before t, nor any list of the query block that t is in."""
    q, k = tensors()
    before = SELECTORS[name](grid, q, k).to_dense()
    for t in (1, 7, 8, 9, 40, 63, 74):
        other_q, other_k = q.clone(), k.clone()
        other_q[:, t:], other_k[:, t:] = torch.randn_like(q[:, t:]) * 9, torch.randn_like(k[:, t:]) * 9
        after = SELECTORS[name](grid, other_q, other_k).to_dense()
        blocks = math.ceil(t / grid.query_block_size)
        assert torch.equal(after[:, :, :blocks], before[:, :, :blocks])
    if name in ("pooled", "mass", "clusters"):
        assert not torch.equal(SELECTORS[name](grid, other_q * 0 + 3, k.flip(1)).to_dense(), before)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", SELECTORS)
def test_a_list_does_not_know_how_many_follow(name: str, grid: Grid) -> None:
    """Also that of a block of queries of which only the first are there yet."""
    q, k = tensors()
    whole = SELECTORS[name](grid, q, k).to_dense()
    for t in (1, 7, 8, 33, 49, 74):
        mask = SELECTORS[name](grid, q[:, :t], k[:, :t])
        assert (mask.index[mask.listed()] < mask.num_key_blocks).all()
        part = mask.to_dense()
        assert torch.equal(part, whole[:, :, : part.shape[2], : part.shape[3]])


@pytest.mark.parametrize("name", SELECTORS)
def test_with_a_cache_the_last_queries_choose_as_in_training(name: str) -> None:
    """Single queries after 40 keys choose what they choose in the whole sequence."""
    grid = GRIDS[0]
    q, k = tensors()
    whole = SELECTORS[name](grid, q, k).to_dense()
    assert torch.equal(SELECTORS[name](grid, q[:, 40:], k).to_dense(), whole[:, :, 40:])


@pytest.mark.parametrize("name", ["pooled", "clusters"])
def test_a_later_part_chooses_by_the_queries_before_it(name: str) -> None:
    """Blocks of 8 queries from 40 on, given the mean query of 32 .. 40: lists as in the whole sequence."""
    grid = Grid(4, 8, 2, 1)
    q, k = tensors()
    before = selectors.mean_queries(grid, q[:, 32:40], KV_HEADS)[:, :, 0]

    def lists(queries: Tensor, before: Tensor | None) -> Tensor:
        centroids = () if name == "pooled" else (CENTROIDS,)
        score = getattr(selectors, name)(grid, queries, k, *centroids, before)
        return selectors.choose(grid, score, queries, k, 6).to_dense()

    whole = lists(q, None)
    assert torch.equal(lists(q[:, 40:], before), whole[:, :, 5:])
    assert not torch.equal(lists(q[:, 40:], None), whole[:, :, 5:])


def test_scores_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays within CHUNK scores; the choice does not change."""
    q, k = tensors()
    whole = SELECTORS["pooled"](GRIDS[0], q, k)
    monkeypatch.setattr(selectors, "CHUNK", 200)
    assert torch.equal(SELECTORS["pooled"](GRIDS[0], q, k).index, whole.index)


def test_strided_heads_of_a_rank() -> None:
    """A tensor-parallel rank's heads have the offsets that they have in the whole layer."""
    q, k = tensors()
    whole = selectors.strided(GRIDS[0], q, k, STRIDE).to_dense()
    rank = selectors.strided(GRIDS[0], q[:, :, 2:], k[:, :, 1:], STRIDE, first_head=1, all_heads=KV_HEADS).to_dense()
    assert torch.equal(rank, whole[:, 1:])
    assert not torch.equal(whole[:, 0], whole[:, 1])
