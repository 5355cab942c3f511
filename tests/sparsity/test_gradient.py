"""Gradients from estimates: unbiased, 2:4 along tokens, the same draw for the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megasparse.config import WeightSparsity
from megasparse.layers.step import StepState
from megasparse.ops.two_four import mvue_24
from megasparse.sparsity.gradient import GradientEstimate
from tests.helpers import assert_close

SEQ, BATCH, OUT = 16, 3, 8


def estimate_of(state: StepState, method: Any = "exact", name: str = "layer") -> GradientEstimate:
    sparsity = WeightSparsity(method="s_ste", mvue=method)
    estimate = GradientEstimate.of(name, torch.empty(OUT, 4), sparsity, state, None)
    assert estimate is not None
    return estimate


def state_of(first_sequence: int = 0, **changes: Any) -> StepState:
    numbers = (first_sequence + torch.arange(BATCH))[:, None] * SEQ + torch.arange(SEQ)
    return StepState(**{"seed": 1, "seq_length": SEQ, "token_index": numbers, **changes})


def gradient() -> torch.Tensor:
    return torch.randn(SEQ, BATCH, OUT, generator=torch.Generator().manual_seed(0))


def test_none_is_none() -> None:
    assert GradientEstimate.of("layer", torch.empty(8, 4), WeightSparsity(method="s_ste"), state_of(), None) is None


@pytest.mark.parametrize("method", ["exact", "approx"])
def test_at_most_two_of_four_tokens_of_a_sequence_and_right_on_average(method: str) -> None:
    dy, state = gradient(), state_of()
    estimate = estimate_of(state, method)
    draws = []
    for step in range(3000):
        state.step = step
        draws.append(estimate.of_these_tokens()(dy))
        assert (draws[-1] != 0).view(SEQ // 4, 4, BATCH, OUT).sum(1).max() <= 2
    stacked = torch.stack(draws).double()
    deviation = stacked.std(0) / len(draws) ** 0.5
    assert ((stacked.mean(0) - dy).abs() <= 5 * deviation + 1e-6).all()
    assert len({draw.sum().item() for draw in draws}) > 2990, "each step draws anew"


def test_what_a_draw_depends_on() -> None:
    dy = gradient()
    first = estimate_of(state_of()).of_these_tokens()(dy)
    assert torch.equal(estimate_of(state_of()).of_these_tokens()(dy), first)
    for other in (
        estimate_of(state_of(seed=2)),
        estimate_of(state_of(step=1)),
        estimate_of(state_of(first_sequence=5)),
        estimate_of(state_of(), name="another layer"),
    ):
        assert not torch.equal(other.of_these_tokens()(dy), first)
    same = dy[:, :1].expand(-1, BATCH, -1)
    each = estimate_of(state_of()).of_these_tokens()(same)
    assert not torch.equal(each[:, 0], each[:, 1]), "each sequence has draws of its own"


def test_the_tokens_are_those_of_the_forward_pass() -> None:
    """Other micro-batches and layers may have come before backward."""
    dy, state = gradient(), state_of()
    estimate = estimate_of(state)
    later = estimate.of_these_tokens()
    expected = estimate.of_these_tokens()(dy)
    state.token_index = state_of(first_sequence=9).token_index
    assert torch.equal(later(dy), expected)


def test_parts_of_a_sequence_and_of_a_layer_are_drawn_as_in_the_whole() -> None:
    """Context parallelism's two parts; the gate and up halves of a layer on the second of two tensor ranks."""
    dy = gradient()
    whole = estimate_of(state_of()).of_these_tokens()(dy)
    for rank, parts in ((0, [0, 3]), (1, [1, 2])):
        tokens = torch.cat([torch.arange(4 * part, 4 * part + 4) for part in parts])
        state = state_of(context_parallel=2, context_rank=rank)
        state.token_index = state.token_index[:, tokens]  # type: ignore[index]
        assert torch.equal(estimate_of(state).of_these_tokens()(dy[tokens]), whole[tokens])
    halves = GradientEstimate("exact", state_of(), estimate_of(state_of()).key, [(0, 2, 2), (2, 2, 6)])
    features = torch.tensor([2, 3, 6, 7])
    assert torch.equal(halves.of_these_tokens()(dy[:, :, features]), whole[:, :, features])


def test_it_is_mvue_of_each_sequence() -> None:
    dy = gradient()
    found = estimate_of(state_of()).of_these_tokens()(dy)
    kept = found[:, 0].unflatten(0, (-1, 4)) != 0
    reference = mvue_24(dy[:, 0], 0, seed=0)
    assert_close(found[:, 0].abs().sum(), reference.abs().sum(), 1e-5)  # of the exact method: total / 2, twice
    assert kept.any()
