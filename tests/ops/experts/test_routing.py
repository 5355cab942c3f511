"""Routing against loops over tokens and experts in plain Python, and against transformers and megatron-core."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    get_capacity,
    topk_routing_with_score_function,
)
from torch import Tensor

from megasparse.ops.experts import naive, routing


def route_by_loops(
    logits: Tensor,
    top_k: int,
    score_function: str,
    normalize: bool,
    scale: float,
    num_groups: int | None,
    top_k_groups: int | None,
    bias: Tensor | None,
) -> tuple[list[list[float]], list[list[int]], list[list[float]]]:
    """The definition, token by token."""
    all_weights, all_experts, all_probs = [], [], []
    for row in logits.tolist():
        if score_function == "softmax":
            total = sum(math.exp(v) for v in row)
            scores = [math.exp(v) / total for v in row]
        else:
            scores = [1 / (1 + math.exp(-v)) for v in row]
        biased = [s + b for s, b in zip(scores, bias.tolist() if bias is not None else [0.0] * len(row), strict=True)]
        allowed = list(range(len(row)))
        if num_groups is not None:
            size = len(row) // num_groups
            group_scores = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
            groups = sorted(range(num_groups), key=lambda g: (-group_scores[g], g))[:top_k_groups]
            allowed = [e for e in allowed if e // size in groups]
        experts = sorted(allowed, key=lambda e: (-biased[e], e))[:top_k]
        weights = [scores[e] for e in experts]
        if normalize:
            weights = [w / sum(weights) for w in weights]
        all_weights.append([w * scale for w in weights])
        all_experts.append(experts)
        all_probs.append([s / sum(scores) for s in scores])
    return all_weights, all_experts, all_probs


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("groups", [(None, None), (4, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_route_by_definition(score_function: str, normalize: bool, groups: tuple, biased: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 12, dtype=torch.float64)
    bias = 0.3 * torch.randn(12, dtype=torch.float64) if biased else None
    routed = routing.route(logits, 3, score_function, normalize, 2.5, *groups, bias)
    weights, experts, probs = route_by_loops(logits, 3, score_function, normalize, 2.5, *groups, bias)
    assert routed.experts.tolist() == experts
    torch.testing.assert_close(routed.weights, torch.tensor(weights, dtype=torch.float64))
    torch.testing.assert_close(routed.probs, torch.tensor(probs, dtype=torch.float64))


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_route_gradients(score_function: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64)

    def weights_and_probs(t: Tensor) -> tuple[Tensor, Tensor]:
        routed = routing.route(t, 2, score_function, bias=bias)
        return routed.weights, routed.probs

    assert torch.autograd.gradcheck(weights_and_probs, logits)


def test_route_computes_in_float32() -> None:
    logits = torch.randn(20, 8).bfloat16()
    routed, expected = routing.route(logits, 2), routing.route(logits.float(), 2)
    assert routed.weights.dtype == routed.probs.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(routed, expected, strict=True))


@pytest.mark.parametrize(("score_function", "pre_softmax"), [("softmax", False), ("softmax", True), ("sigmoid", False)])
def test_route_equals_megatron(score_function: str, pre_softmax: bool) -> None:
    """Softmax after top-k (Megatron's default) is softmax before it, normalised."""
    logits = torch.randn(64, 16)
    bias = torch.randn(16) if score_function == "sigmoid" else None
    expected, _ = topk_routing_with_score_function(
        logits, 4, use_pre_softmax=pre_softmax, score_function=score_function, expert_bias=bias, scaling_factor=1.5
    )
    routed = routing.route(logits, 4, score_function, normalize=not pre_softmax, scale=1.5, bias=bias)
    torch.testing.assert_close(torch.zeros_like(logits).scatter(1, routed.experts, routed.weights), expected)


def test_ties_go_to_the_lower_expert() -> None:
    scores = torch.randint(0, 4, (500, 32)).float()
    for k in (1, 2, 8, 32):
        assert torch.equal(routing.best(scores, k), naive.best(scores, k))
    assert routing.route(torch.zeros(3, 8), 2, num_groups=4, top_k_groups=2).experts.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("limit", [0, 1, 7, 13, 100])
@pytest.mark.parametrize("ties", [False, True])
def test_capacity_keep_equals_naive(policy: str, limit: int, ties: bool) -> None:
    torch.manual_seed(limit)
    weights, experts = (torch.randn(60, 6) + torch.arange(6)).softmax(-1).topk(2)
    if ties:
        weights = (weights * 4).round() / 4
    keep = routing.capacity_keep(experts, weights, 6, limit, policy)
    assert torch.equal(keep, naive.capacity_keep(experts, weights, 6, limit, policy))
    kept_per_expert = torch.bincount(experts[keep], minlength=6)
    assert torch.equal(kept_per_expert, torch.bincount(experts.flatten(), minlength=6).clamp(max=limit))


def test_capacity_keep_by_hand() -> None:
    experts = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1]])
    weights = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5], [1.6, 1.4]])
    best = routing.capacity_keep(experts, weights, 3, 2, "probs")
    assert best.tolist() == [[False, False], [True, True], [True, False], [True, True]]
    first = routing.capacity_keep(experts, weights, 3, 2, "position")
    assert first.tolist() == [[True, True], [True, True], [True, False], [False, False]]


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_capacity_keep_equals_megatron(policy: str) -> None:
    torch.manual_seed(0)
    weights, experts = (torch.randn(128, 8) + 0.3 * torch.arange(8)).softmax(-1).topk(2)
    dense = torch.zeros(128, 8).scatter(1, experts, weights)
    _, kept_map = apply_router_token_dropping(dense, dense > 0, 2, 1.0, policy)
    limit = routing.capacity(128, 2, 8, 1.0)
    keep = routing.capacity_keep(experts, weights, 8, limit, policy)
    if policy == "probs":
        assert torch.equal(torch.zeros(128, 8, dtype=torch.bool).scatter(1, experts, keep), kept_map)
    else:  # torch.topk of a 0/1 map leaves open which of the equal tokens are first: only the numbers can agree
        assert torch.equal(torch.bincount(experts[keep], minlength=8), kept_map.sum(0))


@pytest.mark.parametrize("arguments", [(100, 2, 8, 1.0), (100, 2, 16, 1.25), (7, 1, 3, 1.1), (4096, 8, 64, 1.5)])
def test_capacity(arguments: tuple[int, int, int, float]) -> None:
    tokens, top_k, experts, factor = arguments
    assert routing.capacity(*arguments) == get_capacity(tokens * top_k, experts, factor)
    assert routing.capacity(*arguments) == math.ceil(tokens * top_k / experts * factor)


def test_losses() -> None:
    logits = torch.randn(30, 5, dtype=torch.float64)
    probs = logits.softmax(-1)
    fraction = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], dtype=torch.float64)
    expected = 5 * sum(fraction[e] * sum(probs[t, e] for t in range(30)) / 30 for e in range(5))
    torch.testing.assert_close(routing.load_balance_loss(probs, fraction), expected)
    even = torch.full((30, 5), 0.2, dtype=torch.float64)
    torch.testing.assert_close(routing.load_balance_loss(even, fraction).item(), 1.0)
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 30
    torch.testing.assert_close(routing.z_loss(logits).item(), expected)


def test_bias_update() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
    updated = routing.bias_update(bias, torch.tensor([10, 0, 5, 5]), 0.01)
    torch.testing.assert_close(updated, torch.tensor([0.49, 0.01, -0.5, 0.0]))


def test_bias_evens_out_the_load() -> None:
    torch.manual_seed(0)
    preference, bias = torch.randn(16), torch.zeros(16)
    loads = []
    for _ in range(300):
        routed = routing.route(torch.randn(512, 16) + preference, 2, "sigmoid", bias=bias)
        counts = torch.bincount(routed.experts.flatten(), minlength=16)
        loads.append((counts.max() / counts.float().mean()).item())
        bias = routing.bias_update(bias, counts, 0.01)
    assert loads[0] > 3
    assert sum(loads[-20:]) / 20 < 1.35  # with 64 copies an expert, chance alone gives about 1.2


class TestJitterNoise:
    def test_depends_on_token_and_key_only(self) -> None:
        tokens = torch.randint(2**40, (300,))
        noise = routing.jitter_noise(tokens, 32, 0.1, key=7)
        shuffle = torch.randperm(300)
        assert torch.equal(routing.jitter_noise(tokens[shuffle], 32, 0.1, key=7), noise[shuffle])
        assert torch.equal(torch.cat([routing.jitter_noise(t, 32, 0.1, 7) for t in tokens.split(77)]), noise)
        assert torch.equal(routing.jitter_noise(tokens, 16, 0.1, 7), noise[:, :16])
        assert not torch.equal(routing.jitter_noise(tokens, 32, 0.1, 8), noise)

    def test_is_uniform(self) -> None:
        noise = routing.jitter_noise(torch.arange(4096), 256, 0.25, key=3)
        assert noise.dtype == torch.float32
        assert noise.min() >= 0.75
        assert noise.max() <= 1.25
        unit = (noise.double().flatten() - 0.75) / 0.5
        counts = torch.histc(unit, bins=256, min=0, max=1)
        chi2 = ((counts - 4096) ** 2 / 4096).sum().item()
        assert abs(chi2 - 255) < 6 * math.sqrt(2 * 255)
        for moment in (1, 2, 3, 4):
            assert unit.pow(moment).mean().item() == pytest.approx(1 / (moment + 1), abs=2e-3)

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("lag", [1, 2, 16])
    def test_neighbours_are_independent(self, axis: int, lag: int) -> None:
        noise = routing.jitter_noise(torch.arange(2048), 512, 1.0, key=0).double() - 1
        a, b = noise.narrow(axis, lag, noise.shape[axis] - lag), noise.narrow(axis, 0, noise.shape[axis] - lag)
        assert abs((a * b).mean() / (1 / 3)) < 6 / math.sqrt(a.numel())
        assert abs((a.square() * b.square()).mean() - 1 / 9) < 1e-3

    @pytest.mark.parametrize("other", [1, 2, 4096, 2**32])
    def test_keys_are_independent(self, other: int) -> None:
        tokens = torch.arange(1024)
        a, b = (routing.jitter_noise(tokens, 256, 1.0, key).double() - 1 for key in (5, 5 + other))
        assert abs((a * b).mean() / (1 / 3)) < 6 / math.sqrt(a.numel())
        assert len(torch.unique(torch.cat([a, b]).float())) > 0.95 * 2 * a.numel()

    def test_large_keys_and_rank(self) -> None:
        """No low-rank structure: token and channel are not merely added."""
        noise = routing.jitter_noise(torch.arange(256), 256, 1.0, key=2**70 + 3).double() - 1
        singular = torch.linalg.svdvals(noise)
        assert singular[0] < 2.3 * math.sqrt(256 / 3)  # random matrix: 2 sqrt(n variance)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="score_function='tanh'"):
        routing.route(torch.zeros(1, 2), 1, "tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="policy='last'"):
        routing.capacity_keep(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), 1, 1, "last")  # type: ignore[arg-type]
