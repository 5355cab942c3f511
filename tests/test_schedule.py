"""Attention's schedule, and the learning rate against transformers' and torch's schedulers and its own end points."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from megasparse.config import Optimizer, Schedule, SparseAttention, WeightSparsity
from megasparse.schedule import (
    attention_blocks,
    learning_rate,
    mask_decay,
    masked_share,
    n_of_m,
    weights_are_sparse,
)

TOKENS_PER_STEP = 1024
STEPS, WARMUP, DECAY = 200, 20, 50
PEAK = 3e-4


def rates(kind: str, warmup: int = WARMUP, ratio: float = 0.1, steps: int = STEPS) -> list[float]:
    schedule = Schedule(
        type=kind,
        warmup_tokens=warmup * TOKENS_PER_STEP,
        decay_tokens=DECAY * TOKENS_PER_STEP if kind == "wsd" else 0,
        min_lr_ratio=ratio,
    )
    total = STEPS * TOKENS_PER_STEP
    return [learning_rate((i + 1) * TOKENS_PER_STEP, Optimizer(lr=PEAK), schedule, total) for i in range(steps)]


def scheduler_rates(make) -> list[float]:
    """What a torch scheduler gives at counts 1..STEPS: it counts steps done, we count tokens at the step's end."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(optimizer)
    values = []
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
        values.append(scheduler.get_last_lr()[0])
    return values


def test_cosine_is_transformers_cosine():
    expected = scheduler_rates(lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, WARMUP, STEPS, min_lr_rate=0.1))
    assert rates("cosine") == pytest.approx(expected, rel=1e-12)


def test_wsd_is_transformers_wsd_with_linear_decay():
    expected = scheduler_rates(
        lambda o: get_wsd_schedule(
            o, WARMUP, DECAY, num_training_steps=STEPS, decay_type="linear", min_lr_ratio=0.1, warmup_type="linear"
        )
    )
    # transformers raises its warm-up to start from the least rate too: compared from the peak on
    assert rates("wsd")[WARMUP - 1 :] == pytest.approx(expected[WARMUP - 1 :], rel=1e-12)


def test_linear_is_torch_linear():
    def make(optimizer):
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-12, 1.0, WARMUP)
        down = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS - WARMUP)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, down], [WARMUP])

    assert rates("linear") == pytest.approx(scheduler_rates(make), rel=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant"])
def test_end_points(kind: str):
    values = rates(kind)
    assert values[0] == pytest.approx(PEAK / WARMUP), "the first step learns"
    assert values[WARMUP - 1] == PEAK, "the step that completes the warm-up has the peak"
    assert values[-1] == pytest.approx(PEAK if kind == "constant" else 0.1 * PEAK, rel=1e-12)
    assert values[:WARMUP] == sorted(set(values[:WARMUP]))
    assert values[WARMUP:] == sorted(values[WARMUP:], reverse=True)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant"])
def test_stays_at_the_end_beyond_the_budget(kind: str):
    values = rates(kind, steps=STEPS + 10)
    assert set(values[STEPS:]) == {values[STEPS - 1]}


def test_warmup_may_take_the_whole_run():
    values = rates("cosine", warmup=STEPS)
    assert values[0] == pytest.approx(PEAK / STEPS)
    assert values[-1] == PEAK


def test_no_warmup_and_decay_to_zero():
    values = rates("linear", warmup=0, ratio=0.0)
    assert values[0] == pytest.approx(PEAK * (1 - 1 / STEPS))
    assert values[-1] == 0.0


def test_depends_on_tokens_alone():
    """Twice the batch: every rate of the half as many steps is one of the smaller batch's."""
    schedule, total = Schedule(type="cosine", warmup_tokens=4096), 65536
    small = [learning_rate(t, Optimizer(), schedule, total) for t in range(1024, total + 1, 1024)]
    large = [learning_rate(t, Optimizer(), schedule, total) for t in range(2048, total + 1, 2048)]
    assert large == small[1::2]


@pytest.mark.parametrize(
    ("progress", "blocks"),
    [(0.01, None), (0.2, None), (0.201, 99), (0.3, 58), (0.4, 16), (0.5, 16), (0.9, 16), (0.901, None), (1.0, None)],
)
def test_attention_is_dense_then_ever_sparser_then_dense(progress: float, blocks: int | None) -> None:
    sparse = SparseAttention(selector="pooled", blocks=16, dense_start=0.2, ramp=0.2, dense_end=0.1)
    found = attention_blocks(progress, sparse, 100)
    assert found == (blocks if blocks is None else pytest.approx(blocks, abs=1))


def test_the_budget_does_not_depend_on_the_length() -> None:
    """A sequence that grows by a token must not change what earlier ones saw."""
    assert attention_blocks(0.5, SparseAttention(selector="pooled", blocks=16), 5) == 16
    assert attention_blocks(1.0, SparseAttention(selector="local"), 7) == 7


@pytest.mark.parametrize(
    ("progress", "sparse", "decay"),
    [
        (0.2, False, 0.0),
        (0.201, True, 0.002),
        (0.25, True, 0.1),
        (0.3, True, 0.2),
        (0.8, True, 0.2),
        (0.801, False, 0.0),
    ],
)
def test_weights_are_dense_then_two_four_under_a_growing_decay_then_dense(
    progress: float, sparse: bool, decay: float
) -> None:
    weights = WeightSparsity(method="sr_ste", decay=0.2, dense_start=0.2, ramp=0.1, dense_end=0.2)
    assert weights_are_sparse(progress, weights) == sparse
    assert mask_decay(progress, weights) == pytest.approx(decay)


def test_what_fades_and_what_is_kept_of_each_m() -> None:
    fading = WeightSparsity(method="mdgf", dense_start=0.2, ramp=0.5)
    assert [masked_share(p, fading) for p in (0.1, 0.2, 0.45, 0.7, 1.0)] == pytest.approx([1, 1, 0.5, 0, 0])
    assert masked_share(0.5, WeightSparsity(method="ste")) == 0.0
    falling = WeightSparsity(method="sdgf", pattern="2:16", ramp=0.6)
    assert [n_of_m(p, falling)[0] for p in (0.1, 0.25, 0.5, 0.61, 1.0)] == [15, 8, 4, 2, 2]
    assert n_of_m(0.0, WeightSparsity(method="mdgf", pattern="1:4")) == (1, 4)


def test_decay_without_a_ramp_and_without_decay() -> None:
    assert mask_decay(0.001, WeightSparsity(method="sr_ste", decay=0.2)) == 0.2
    assert mask_decay(0.5, WeightSparsity(method="ste")) == 0.0
