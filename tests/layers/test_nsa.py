"""Native sparse attention against the paper's equations, one query at a time in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megasparse.config import SparseAttention
from megasparse.layers.attention import CoreAttention, Part
from megasparse.layers.nsa import Compression, NativeSparseAttention, importance
from megasparse.layers.step import StepState
from megasparse.model import build_model
from tests import small
from tests.helpers import assert_close, relative_error, run_distributed

HEADS, KV_HEADS, DIM, GROUP = 4, 2, 8, 2
EPSILON = 1e-3
SIZE, STRIDE, BLOCK, WINDOW, BLOCKS = 8, 4, 8, 3, 5
OPTIONS: dict[str, Any] = {
    **{"selector": "nsa", "block_size": BLOCK, "blocks": BLOCKS, "window_blocks": WINDOW},
    **{"compression_size": SIZE, "compression_stride": STRIDE},
}


def made(state: StepState | None = None, norm_keys: bool = False, **options: Any) -> NativeSparseAttention:
    config: Any = SimpleNamespace(
        **{"kv_channels": DIM, "num_attention_heads": HEADS, "params_dtype": torch.float64, "attention_dropout": 0.0},
        **{"context_parallel_size": 1, "tensor_model_parallel_size": 1, "layernorm_epsilon": EPSILON},
    )
    layer = NativeSparseAttention(
        config,
        1,
        AttnMaskType.causal,
        "self",
        sparse=SparseAttention(**{**OPTIONS, **options}),
        state=state or StepState(),
        tp_rank=0,
        kv_heads=KV_HEADS,
        norm_keys=norm_keys,
    )
    torch.manual_seed(0)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return layer


def tensors(seq: int = 75) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key and value of the three branches [seq, batch, heads, head_dim], gates [seq, batch, heads * 3]"""
    random = torch.Generator().manual_seed(1)
    shapes = [(HEADS, DIM), (3 * KV_HEADS, DIM), (3 * KV_HEADS, DIM), (3 * HEADS,)]
    query, key, value, gates = (
        torch.randn(seq, 2, *shape, generator=random, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    return query, key, value, gates


def compress(compression: Compression, x: Tensor, h: int, i: int) -> Tensor:
    """x [seq, head_dim] of head h -> compressed key i"""
    part = x[i * STRIDE : i * STRIDE + SIZE]
    inner = F.gelu(compression.hidden[h] @ (part + compression.position[h]).flatten())
    return part.mean(0) + compression.output[h] @ inner


def softmax_attention(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(torch.stack([q @ k for k in keys]) / math.sqrt(DIM), 0)
    return weights @ torch.stack(values), weights


def reference(
    layer: NativeSparseAttention, inputs: Any, documents: Tensor | None, sparse: bool, normed: bool = False
) -> Tensor:
    query, key, value, gates = inputs
    seq, batch = query.shape[:2]
    keys, values = key.chunk(3, 2), value.chunk(3, 2)
    output = torch.zeros(seq, batch, HEADS * DIM, dtype=torch.float64)
    for b in range(batch):
        doc = documents[b].tolist() if documents is not None else [0] * seq
        for h in range(KV_HEADS):
            coarse = [
                [compress(c, x[:, b, h], h, i) for i in range((seq - SIZE) // STRIDE + 1)]
                for c, x in ((layer.compress_key, keys[2]), (layer.compress_value, values[2]))
            ]
            if normed:
                coarse[0] = [key / (key.square().mean() + EPSILON).sqrt() for key in coarse[0]]
            for t in range(seq):
                heads = range(h * GROUP, (h + 1) * GROUP)
                seen = [i for i in range(len(coarse[0])) if i * STRIDE + SIZE <= t + 1 and doc[i * STRIDE] == doc[t]]
                compressed, share = {}, torch.zeros(seq // BLOCK + 2, dtype=torch.float64)
                for head in heads:
                    compressed[head] = torch.zeros(DIM, dtype=torch.float64)
                    if seen:
                        compressed[head], weights = softmax_attention(
                            query[t, b, head], [coarse[0][i] for i in seen], [coarse[1][i] for i in seen]
                        )
                        for i, weight in zip(seen, weights.tolist(), strict=True):
                            for stride in range(i, i + SIZE // STRIDE):
                                share[stride * STRIDE // BLOCK] += weight
                own = t // BLOCK
                chosen = {0, own, max(0, own - 1)}
                best = sorted(set(range(own)) - chosen, key=lambda j: (-float(share[j]), j))
                chosen |= {j for j in best[: BLOCKS - len(chosen)] if share[j] > 0}
                if not sparse:
                    chosen = set(range(own + 1))
                allowed = [s for s in range(t + 1) if doc[s] == doc[t]]
                for head in heads:
                    branches = [compressed[head]]
                    for branch, blocks in ((0, chosen), (1, set(range(own - WINDOW + 1, own + 1)))):
                        there = [s for s in allowed if s // BLOCK in blocks]
                        branches.insert(
                            branch,
                            softmax_attention(
                                query[t, b, head],
                                [keys[branch][s, b, h] for s in there],
                                [values[branch][s, b, h] for s in there],
                            )[0],
                        )
                    gate = gates[t, b].view(HEADS, 3)[head].sigmoid()
                    output[t, b, head * DIM : (head + 1) * DIM] = sum(
                        g * o for g, o in zip(gate, branches, strict=True)
                    )
    return output


@pytest.mark.parametrize(
    ("phase", "documents", "normed"),
    [
        *((phase, documents, False) for phase in ("sparse", "dense") for documents in (False, True)),
        ("sparse", True, True),
    ],
)
def test_against_the_equations(documents: bool, phase: str, normed: bool) -> None:
    """Output and the gradients of every input and weight; in a dense phase the selected branch sees all blocks."""
    state = StepState(progress=0.1)
    layer = made(state, normed, dense_start=0.2 if phase == "dense" else 0.0)
    ids = (torch.arange(75) // 29).expand(2, -1) if documents else None
    inputs = tensors()
    output = layer(*inputs[:3], ids, attention_bias=inputs[3])
    expected = reference(layer, inputs, ids, phase == "sparse", normed)

    assert_close(output, expected, 1e-12)
    wanted = [*inputs, *layer.parameters()]
    weights = torch.randn_like(output)
    assert_close(torch.autograd.grad(output, wanted, weights), torch.autograd.grad(expected, wanted, weights), 1e-11)


def test_the_compressed_branch_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries at a time: the same output and gradients, in documents as well."""
    layer, inputs, ids = made(), tensors(), (torch.arange(75) // 29).expand(2, -1)

    def results() -> list[Tensor]:
        output = layer(*inputs[:3], ids, attention_bias=inputs[3])
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
        return [output, *torch.autograd.grad(output, [*inputs, *layer.parameters()], weights)]

    whole = results()
    monkeypatch.setattr("megasparse.layers.selectors.CHUNK", 250)  # 7 queries with 18 compressed keys of 2 sequences
    assert_close(results(), whole, 1e-12)


def test_a_short_sequence_has_no_compressed_keys() -> None:
    inputs = tensors(5)
    layer = made()
    output = layer(*inputs[:3], None, attention_bias=inputs[3])
    assert_close(output, reference(layer, inputs, None, True), 1e-12)


@pytest.mark.parametrize("t", [1, 8, 40, 74])
def test_no_output_knows_the_future(t: int) -> None:
    layer = made()
    inputs = [x.detach() for x in tensors()]
    before = layer(*inputs[:3], None, attention_bias=inputs[3])
    changed = [torch.cat([x[:t], torch.randn_like(x[t:]) * 9]) for x in inputs]
    assert torch.equal(layer(*changed[:3], None, attention_bias=changed[3])[:t], before[:t])


def test_a_cache_gives_the_same() -> None:
    """Single queries after 40 keys, and some at once, from the start of a block and from within one."""
    layer = made()
    query, key, value, gates = (x.detach() for x in tensors())
    whole = layer(query, key, value, None, attention_bias=gates)
    for start, stop in ((40, 41), (33, 34), (64, 75), (35, 59)):
        q, k, v = (x[a:stop].permute(1, 2, 0, 3) for x, a in ((query, start), (key, 0), (value, 0)))
        branches = layer._attend(q, k, v, Part(start, None)).unflatten(-1, (3, DIM))  # [batch, heads, n, 3, head_dim]
        gate = gates[start:stop].view(-1, 2, HEADS, 3, 1).permute(1, 2, 0, 3, 4).sigmoid()
        part = (branches * gate).sum(3).permute(2, 0, 1, 3).flatten(2)
        assert_close(part, whole[start:stop], 1e-12)


def test_scores_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in any number at a time, memory within CHUNK."""
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, HEADS, 40, DIM, generator=random)
    compressed = torch.randn(2, KV_HEADS, 9, DIM, generator=random)

    def visible(rows: slice) -> Tensor:
        reach = max(0, (rows.stop - SIZE) // STRIDE + 1)
        seen = torch.arange(rows.start, rows.stop).unsqueeze(1) >= torch.arange(reach) * STRIDE + SIZE - 1
        return seen[None, None]

    score = importance(query, compressed, visible, 0.3, SparseAttention(**OPTIONS), 5)
    whole = score(slice(0, 40))
    monkeypatch.setattr("megasparse.layers.selectors.CHUNK", 300)
    parts = torch.cat([score(slice(0, 7)), score(slice(7, 40))], 2)
    assert_close(parts.exp(), whole.exp(), 1e-6)
    assert whole.shape == (2, KV_HEADS, 40, 5)
    assert torch.equal(whole[:, :, 0], torch.full((2, KV_HEADS, 5), -math.inf))


def test_density_counts_all_branches() -> None:
    """Blocks of the lists and the window, and compressed keys over the block size; of causal blocks."""
    state = StepState()
    layer = made(state)
    state.begin(0, 10, 1)
    inputs = tensors(80)
    layer(*inputs[:3], None, attention_bias=inputs[3])
    lists = window = coarse = every = 0.0
    for t in range(80):
        own = t // BLOCK
        window += min(own + 1, WINDOW)
        lists += min(own + 1, BLOCKS)
        coarse += max(0, (t + 1 - SIZE) // STRIDE + 1) / BLOCK
        every += own + 1
    density = float(state.blocks["listed"] / state.blocks["all"])
    assert density == pytest.approx((lists + window + coarse) / every, rel=1e-6)


def test_dense_core_attention_is_its_dense_phase() -> None:
    """With the other gates shut, a dense phase is CoreAttention over the selected branch."""
    state = StepState(progress=0.0)
    layer = made(state, dense_start=0.5)
    query, key, value, _ = tensors()
    gates = torch.tensor([100.0, -1000.0, -1000.0], dtype=torch.float64).repeat(HEADS).expand(75, 2, -1)
    dense = CoreAttention(layer.config, 1, AttnMaskType.causal, "self")
    expected = dense(query, key[:, :, :KV_HEADS], value[:, :, :KV_HEADS], None)
    assert_close(layer(query, key, value, None, attention_bias=gates), expected, 1e-12)


def change_by_larger_compressed_keys(qk_norm: str) -> float:
    """How much a model's output changes when the keys of the compressed branch, whose MLP begins as zeros, grow."""
    sparse = {**OPTIONS, "block_size": 4, "compression_size": 4, "compression_stride": 2, "blocks": 4}
    recipe = small.recipe({"sparse_attention": sparse, "qk_norm": qk_norm, "init_std": 0.5, "norm_epsilon": 1e-12})
    chunks, _ = build_model(recipe, small.start(recipe), small.VOCAB)
    chunk: Any = chunks[0]
    batch = small.batches(recipe, 0)[0]
    before = chunk(batch.tokens, batch.position_ids, None)
    for layer in chunk.decoder.layers:
        weight = layer.self_attention.linear_branches.weight
        weight.data.view(recipe.model.kv_heads, 4, recipe.model.head_size, -1)[:, 1] *= 8  # window, compressed, values
    return relative_error(chunk(batch.tokens, batch.position_ids, None), before)


def test_with_qk_norm_the_size_of_compressed_keys_does_not_count() -> None:
    none, head, full = (
        run_distributed(change_by_larger_compressed_keys, 1, norm)[0] for norm in ("none", "head", "full")
    )
    assert max(head, full) < 1e-6
    assert none > 1e-3
