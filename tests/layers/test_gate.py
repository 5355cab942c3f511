"""The gate's scores and loss against loops, and that it learns where attention goes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megasparse.layers.attention import Part
from megasparse.layers.block_sparse import BlockSparseAttention
from megasparse.layers.gate import AttentionGate, gate_loss, pooled_keys
from megasparse.layers.selectors import CHUNK, Grid
from megasparse.layers.step import StepState
from megasparse.ops.block_sparse import BlockMask, block_mass, block_sparse_attention
from tests.helpers import assert_close
from tests.layers.test_block_sparse import modules

HEADS, KV_HEADS, DIM, GATE_DIM = 4, 2, 8, 6


def gate() -> AttentionGate:
    torch.manual_seed(0)
    made = AttentionGate(
        SimpleNamespace(kv_channels=DIM, params_dtype=torch.float64), KV_HEADS, HEADS // KV_HEADS, GATE_DIM
    )
    for weight in made.parameters():
        torch.nn.init.normal_(weight)
    return made


def tensors(seq: int = 75) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    q = torch.randn(2, seq, HEADS, DIM, generator=random, dtype=torch.float64)
    return q, torch.randn(2, seq, KV_HEADS, DIM, generator=random, dtype=torch.float64)


def test_scores_one_by_one() -> None:
    q, k = tensors()
    made = gate()
    queries, keys = made(q.requires_grad_(), k.requires_grad_(), 16)
    scores = torch.einsum("bhqd,bhkd->bhqk", queries, keys)
    for b, h, t, j in [(0, 0, 0, 0), (1, 1, 74, 3), (0, 1, 40, 2), (1, 0, 33, 1)]:
        block = k[b, 16 * j : 16 * (j + 1), h]
        key = made.key[h] @ torch.cat([block.amax(0), block.amin(0), block.mean(0)])
        query = made.query[h] @ q[b, t, 2 * h : 2 * h + 2].flatten()
        assert scores[b, h, t, j].item() == pytest.approx((query @ key).item() / math.sqrt(GATE_DIM), rel=1e-5)
    scores.sum().backward()
    assert q.grad is None
    assert k.grad is None
    assert made.query.grad is not None


def test_pooled_keys_of_a_ragged_sequence() -> None:
    _, k = tensors(20)
    assert pooled_keys(k, 16).shape == (2, 2, KV_HEADS, 3 * DIM)


@pytest.mark.parametrize("chunk", [CHUNK, 100])
def test_loss_and_its_gradients_one_list_at_a_time(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL over the listed blocks before the own one; the gradient of a score is softmax - target. All queries at once
    and some at a time."""
    monkeypatch.setattr("megasparse.layers.gate.CHUNK", chunk)
    random = torch.Generator().manual_seed(2)
    dense = torch.rand(2, KV_HEADS, 32, 4, generator=random) < 0.7
    dense[0, 0, 31] = False
    mask = BlockMask.from_dense(dense, 8, 1)
    queries, keys = (
        torch.randn(2, KV_HEADS, n, GATE_DIM, generator=random, dtype=torch.float64).requires_grad_() for n in (32, 4)
    )
    scores = (queries @ keys.mT).detach()
    mass = torch.rand(mask.index.shape, generator=random, dtype=torch.float64).where(mask.listed(), 0)
    mass[0, 1, 30] = 0.0  # no attention to any of them
    first, _ = Grid(8, 1).own(32, 0, torch.device("cpu"))
    loss = gate_loss(queries, keys, mask, mass, first)
    gradients = torch.autograd.grad(3 * loss, (queries, keys))
    total, expected = 0.0, torch.zeros_like(scores)
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(KV_HEADS), torch.arange(32)).tolist():
        entries = [e for e in range(int(mask.count[b, h, t])) if mask.index[b, h, t, e] < t // 8]
        blocks = mask.index[b, h, t, entries].tolist()
        target = mass[b, h, t, entries]
        if not blocks or target.sum() == 0:
            continue
        target, predicted = target / target.sum(), scores[b, h, t, blocks].softmax(0)
        total += (target * (target / predicted).log()).sum().item()
        expected[b, h, t, blocks] = predicted - target
    assert loss.item() == pytest.approx(total, rel=1e-9)
    assert_close(gradients, (3 * expected @ keys, 3 * expected.mT @ queries), 1e-9)
    with torch.no_grad():
        assert gate_loss(queries, keys, mask, mass, first) == loss


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("start", [0, 16, 20])
def test_a_dense_phase_is_dense_attention(start: int, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a part of a sequence, wherever it starts; and the gate's loss is over each query's list of all its blocks."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    state = StepState()
    state.begin(0, 10, 1)
    dense, sparse = modules(state, selector="gate", blocks=4, dense_start=0.5, gate_dim=8)
    q, k = (x.float() for x in tensors())
    part = Part(start, (torch.arange(75) // 20).expand(2, -1) if documents else None)
    inputs = [x.transpose(1, 2).requires_grad_() for x in (q[:, start:], k, k.flip(1))]
    output, expected = (module._attend(*inputs, part) for module in (sparse, dense))
    assert_close(output, expected, 1e-6)
    weights = torch.randn_like(output)
    gradients = (torch.autograd.grad(x, inputs, weights) for x in (output, expected))
    assert_close(*gradients, 1e-5)

    assert sparse.gate is not None
    gated = sparse.gate(q[:, start:], k, 8)
    mask = sparse.select(q[:, start:], k, 10, sparse.score(q[:, start:], k, gated))
    options: Any = {"scale": sparse.scale, "document_ids": part.document_ids, "backend": "naive"}
    _, lse = block_sparse_attention(q[:, start:], k, k, mask, return_lse=True, **options)
    mass = block_mass(q[:, start:], k, lse, mask, **options)
    loss = gate_loss(*gated, mask, mass, torch.arange(start, 75) // 8) / (2 * KV_HEADS * 75)
    assert float(state.means["gate_loss"]) == pytest.approx(loss.item(), rel=1e-5)


def test_it_learns_to_find_what_attention_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """From dense attention's shares: most of the mass that the best blocks hold is in those that it chooses."""
    # A backward outside of a schedule leaves a scale there that schedules cannot change.
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    torch.manual_seed(0)
    state = StepState()
    _, sparse = modules(state, selector="gate", blocks=4, dense_start=0.99, gate_dim=8, local_blocks=1)
    assert sparse.gate is not None
    for weight in sparse.gate.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    optimizer = torch.optim.Adam(sparse.gate.parameters(), lr=1e-2)
    losses = []
    for step in range(150):
        state.begin(step, 1000, 1)
        inputs = topics(step)
        optimizer.zero_grad()
        sparse(*inputs, None).sum().backward()
        optimizer.step()
        losses.append(float(state.means["gate_loss"]))
    assert losses[-1] < 0.3 * losses[0]
    q, k, v = (x.transpose(0, 1) for x in topics(1000))
    assert recall(sparse, q, k, v) > 0.9
    for weight in sparse.gate.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    assert recall(sparse, q, k, v) < 0.8


def topics(seed: int) -> list[Tensor]:
    """query, key, value [96, 2, heads, 8]: a block of 8 keys is of one of eight topics, a query asks for one."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.eye(8) * 4
    of_blocks = torch.randint(0, 8, (12, 2), generator=random).repeat_interleave(8, 0)
    of_queries = torch.randint(0, 8, (96, 2), generator=random)
    query, key = (directions[of].unsqueeze(2) for of in (of_queries, of_blocks))
    noise = torch.randn(3, 96, 2, HEADS, 8, generator=random)
    return [query + noise[0], (key + noise[1])[:, :, :KV_HEADS], noise[2][:, :, :KV_HEADS]]


def recall(sparse: BlockSparseAttention, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The share of a query's dense attention that its 4 blocks hold, of what the best 4 would."""
    score = sparse.score(q, k, None if sparse.gate is None else sparse.gate(q, k, 8))
    full: Any = sparse.select(q, k, 12, score)
    _, lse = block_sparse_attention(q, k, v, full, scale=sparse.scale, return_lse=True)
    chosen = sparse.select(q, k, 4, score)
    held = block_mass(q, k, lse, chosen, scale=sparse.scale).sum(-1)
    best = block_mass(q, k, lse, full, scale=sparse.scale).topk(4).values.sum(-1)
    return (held[:, :, 40:].sum() / best[:, :, 40:].sum()).item()
