"""Core attention against a softmax written out in float64, one query head at a time."""

from __future__ import annotations

import contextlib
import math
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megasparse.data.loader import zigzag
from megasparse.layers.attention import CoreAttention, Part, document_mask
from megasparse.layers.cache import KeyValueCache, Position
from megasparse.model import transformer_config
from tests import small
from tests.helpers import assert_close, run_distributed


def make(head_dim: int, dropout: float = 0.0, **arguments: Any) -> CoreAttention:
    config = SimpleNamespace(
        kv_channels=head_dim, attention_dropout=dropout, context_parallel_size=1, tensor_model_parallel_size=1
    )
    return CoreAttention(config, 1, AttnMaskType.causal, "self", **arguments)


def naive(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, scale: float) -> Tensor:
    """[seq, batch, heads, head_dim] -> [seq, batch, heads * head_dim]: every query by itself."""
    seq, batch, heads, head_dim = query.shape
    group = heads // key.shape[2]
    rows = []
    for i in range(seq):
        for b in range(batch):
            visible = [j for j in range(i + 1) if documents is None or documents[b, i] == documents[b, j]]
            for h in range(heads):
                scores = torch.stack([query[i, b, h] @ key[j, b, h // group] for j in visible]) * scale
                weights = (scores - scores.max()).exp()
                weights = weights / weights.sum()
                rows.append(sum(w * value[j, b, h // group] for w, j in zip(weights, visible, strict=True)))
    return torch.stack(rows).view(seq, batch, heads * head_dim)


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 2, 3, 4, 4, 4, 4, 4]])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (4, 2, 6), (6, 1, 16), (1, 1, 2)])
def test_equals_the_definition(
    heads: int, kv_heads: int, head_dim: int, documents: Tensor | None, dtype: torch.dtype, tolerance: float
) -> None:
    """Output and the gradients of query, key and value."""
    shapes = [(9, 2, heads, head_dim), (9, 2, kv_heads, head_dim), (9, 2, kv_heads, head_dim)]
    exact = [torch.randn(shape, dtype=torch.float64).to(dtype).double().requires_grad_() for shape in shapes]
    inputs = [t.detach().to(dtype).requires_grad_() for t in exact]
    expected = naive(*exact, documents, 1 / math.sqrt(head_dim))
    output = make(head_dim)(*inputs, documents)
    assert output.dtype == dtype
    upstream = torch.randn(output.shape, dtype=torch.float64).to(dtype)
    output.backward(upstream)
    expected.backward(upstream.double())
    assert_close(output, expected, tolerance, "output")
    for name, ours, reference in zip(("query", "key", "value"), inputs, exact, strict=True):
        assert_close(ours.grad, reference.grad, tolerance, name)


def test_gradients_by_finite_differences() -> None:
    attention = make(2)
    inputs = [torch.randn(5, 1, heads, 2, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, None), inputs)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, documents), inputs)


def test_a_given_scale_is_used() -> None:
    inputs = [torch.randn(6, 1, 2, 4, dtype=torch.float64) for _ in range(3)]
    for scale in (0.1, 2.0):
        assert_close(make(4, softmax_scale=scale)(*inputs, None), naive(*inputs, None, scale), 1e-12)


def test_document_mask() -> None:
    mask = document_mask(DOCUMENTS)
    assert mask.shape == (2, 1, 9, 9)
    assert mask.dtype == torch.bool
    for b in range(2):
        for i in range(9):
            for j in range(9):
                assert mask[b, 0, i, j] == (j <= i and DOCUMENTS[b, i] == DOCUMENTS[b, j])
    returning = torch.tensor([[7, 7, 3, 3]])
    assert document_mask(returning)[0, 0, 3].tolist() == [False, False, True, True]


def test_one_document_is_causal() -> None:
    inputs = [torch.randn(9, 2, heads, 4, dtype=torch.float64) for heads in (4, 2, 2)]
    attention = make(4)
    assert_close(attention(*inputs, torch.zeros(2, 9, dtype=torch.int64)), attention(*inputs, None), 1e-12)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
def test_dropout_is_for_training_only_and_keeps_the_mean(documents: Tensor | None) -> None:
    attention = make(4, dropout=0.3)
    inputs = [torch.randn(9, 2, heads, 4, dtype=torch.float64) for heads in (4, 2, 2)]
    exact = naive(*inputs, documents, 0.5)
    assert_close(attention.eval()(*inputs, documents), exact, 1e-12)
    attention.train()
    samples = torch.stack([attention(*inputs, documents) for _ in range(1500)])
    assert samples.std(0).max() > 0.1
    deviation = (samples.mean(0) - exact).abs() / (samples.std(0) / math.sqrt(1500) + 1e-12)
    assert deviation.max() < 6


def dropped_attention(sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    """(output of the core for the same heads on every rank, what torch's generator gives next)."""
    recipe = small.recipe(model={"attention_dropout": 0.5}, parallel={"tp": 2, "sequence_parallel": sequence_parallel})
    place = small.start(recipe)
    core = CoreAttention(transformer_config(recipe, place), 1, AttnMaskType.causal, "self").train()
    with get_cuda_rng_tracker().fork() if sequence_parallel else contextlib.nullcontext():  # as mcore's block does
        output = core(*(torch.ones(8, 2, 2, 4) for _ in range(3)), None)
    return output, torch.rand(3)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_heads_of_other_tensor_parallel_ranks_are_dropped_elsewhere(sequence_parallel: bool) -> None:
    (first, after_first), (second, after_second) = run_distributed(dropped_attention, 2, sequence_parallel)
    assert not torch.equal(first, second)
    assert torch.equal(after_first, after_second), "what is drawn for whole activations stays alike"


# Context parallelism --------------------------------------------------------------------------------------------------

LENGTH = 24


def attention_inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(LENGTH, 2, 4, 6), (LENGTH, 2, 2, 6), (LENGTH, 2, 2, 6), (LENGTH, 2, 24)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def on_a_part(documents: Tensor | None) -> list[Tensor]:
    """Output and gradients of this rank's part of the sequence."""
    recipe = small.recipe(parallel={"cp": int(os.environ["WORLD_SIZE"])})
    place = small.start(recipe)
    groups = SimpleNamespace(cp=place.cp_group)
    config = transformer_config(recipe, place)
    core = CoreAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=0.4, pg_collection=groups)
    parts = [zigzag(x.transpose(0, 1), place.cp_rank, place.cp).transpose(0, 1) for x in attention_inputs()]
    inputs = [part.clone().requires_grad_() for part in parts[:3]]
    output = core(*inputs, documents)
    output.backward(parts[3])
    return [output.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("documents", [None, torch.arange(LENGTH).expand(2, -1) // 7], ids=["causal", "documents"])
@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_parts_equal_the_whole(size: int, documents: Tensor | None) -> None:
    """Queries in two places of the sequence, keys and values of everywhere before them, in float64."""
    exact = [x.requires_grad_() for x in attention_inputs()[:3]]
    expected = naive(*exact, documents, 0.4)
    expected.backward(attention_inputs()[3])
    ranks = run_distributed(on_a_part, size, documents)
    for i, whole in enumerate([expected.detach(), *(x.grad for x in exact)]):
        found = torch.full_like(whole, torch.nan)
        for rank, parts in enumerate(ranks):
            first, second = parts[i].chunk(2)
            n = len(first)
            found[rank * n :][:n] = first
            found[LENGTH - (rank + 1) * n :][:n] = second
        assert_close(found, whole, 1e-12, f"tensor {i}")


@pytest.mark.parametrize("start", [0, 5])
def test_fused_attention_takes_what_it_can(start: int) -> None:
    """Queries at the beginning or the end of the keys, in megatron-core's shapes; not documents, and not a cache."""
    kinds = []

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask_type: str) -> Tensor:
        kinds.append(attn_mask_type)
        whole = torch.cat([torch.zeros(len(key) - len(query), *query.shape[1:]), query])
        return naive(whole, key, value, None, 0.3)[len(key) - len(query) :]

    plain, core = make(8, softmax_scale=0.3), make(8, softmax_scale=0.3, fused=fused)
    query, key, value = torch.randn(2, 4, 9 - start, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    part = Part(start, None)
    assert_close(core._attend(query, key, value, part), plain._attend(query, key, value, part), 1e-6)
    assert kinds == ["causal_bottom_right" if start else "causal"]
    documents = Part(start, DOCUMENTS)
    assert torch.equal(core._attend(query, key, value, documents), plain._attend(query, key, value, documents))
    if start == 0:
        q, k, v = (x.permute(2, 0, 1, 3) for x in (query, key, value))
        assert_close(core(q, k, v, None), plain(q, k, v, None), 1e-6)
        core.cache = KeyValueCache(Position(), 1)
        core(q, k, v, None)
        assert kinds == ["causal", "causal"]
