"""Top-k routing, its losses and its limits: functions of the router's logits."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megasparse.ops.experts.permute import stable_order


class Routing(NamedTuple):
    """Where each token goes."""

    weights: Tensor  # [tokens, top_k], float32 at least
    experts: Tensor  # [tokens, top_k] int64, best first
    probs: Tensor  # [tokens, experts]: scores that sum to 1, for the load-balancing loss
    selection: Tensor  # [tokens, experts]: what the best are chosen by: biased, -inf outside a token's best groups


def route(
    logits: Tensor,
    top_k: int,
    score_function: Literal["softmax", "sigmoid"] = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
    num_groups: int | None = None,
    top_k_groups: int | None = None,
    bias: Tensor | None = None,
) -> Routing:
    """Choose ``top_k`` experts a token and weigh them.

    logits: [tokens, experts]. Scores are the softmax over all experts (Mixtral, Qwen, OLMoE) or the sigmoid
    (DeepSeek-V3) in float32, or float64 if the logits are. ``bias`` [experts] is added for the selection only
    (arXiv:2408.15664). With groups, a token's experts come from its ``top_k_groups`` best groups, a group's score
    being the sum of its two best biased scores (DeepSeek-V3, arXiv:2412.19437). Of equal scores the lower expert
    wins. The chosen (unbiased) scores are divided by their sum if ``normalize``, and multiplied by ``scale``.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    match score_function:
        case "softmax":
            scores = probs = logits.softmax(-1)
        case "sigmoid":
            scores = logits.sigmoid()
            probs = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        case _:
            raise ValueError(f"score_function={score_function!r}: use 'softmax' or 'sigmoid'")
    selection = scores.detach()
    if bias is not None:
        selection = selection + bias
    if num_groups is not None and top_k_groups is not None:
        selection = _within_best_groups(selection, num_groups, top_k_groups)
    experts = best(selection, top_k)
    weights = scores.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(weights * scale if scale != 1.0 else weights, experts, probs, selection)


def best(scores: Tensor, k: int) -> Tensor:
    """Indices [tokens, k] of the largest of ``scores`` [tokens, n], in descending order, of equals the lowest first.

    torch.topk leaves the order of equals open; argmax takes the first (its documentation), a pass for each choice.
    """
    if k == 1:
        return scores.argmax(-1, keepdim=True)
    left, chosen = scores.clone(), []
    for _ in range(k):
        chosen.append(left.argmax(-1, keepdim=True))
        left.scatter_(1, chosen[-1], -math.inf)
    return torch.cat(chosen, 1)


def _within_best_groups(scores: Tensor, num_groups: int, top_k_groups: int) -> Tensor:
    """-inf outside each token's best groups."""
    grouped = scores.unflatten(1, (num_groups, -1))
    groups = best(grouped.topk(2, -1).values.sum(-1), top_k_groups)
    outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, groups, False)
    return grouped.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(1)


def load_balance_loss(probs: Tensor, fraction: Tensor) -> Tensor:
    """Switch loss (arXiv:2101.03961): experts * sum_e fraction_e * mean over tokens of probs_e; 1 at even load.

    probs: [tokens, experts]. fraction: [experts], each expert's share of the copies; sums to 1.
    """
    return probs.shape[1] * (fraction * probs.mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """ST-MoE (arXiv:2202.08906): mean over tokens of logsumexp(logits)^2. logits: [tokens, experts]."""
    return logits.logsumexp(-1).square().mean()


def capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Copies an expert may take, as megatron.core's moe_utils.get_capacity."""
    return math.ceil((tokens * top_k / num_experts) * factor)


@torch.no_grad()
def capacity_keep(
    experts: Tensor, weights: Tensor, num_experts: int, capacity: int, policy: Literal["probs", "position"]
) -> Tensor:
    """Which copies are within the capacity of their expert: bool [tokens, top_k].

    experts, weights: [tokens, top_k]. An expert keeps its ``capacity`` copies of largest weight, of equals those of
    the earlier tokens ("probs"), or its earliest tokens ("position"), as megatron.core's
    moe_utils.apply_router_token_dropping: whether an expert was a token's first or second choice does not matter
    (GShard serves all first choices before the second ones).
    """
    flat = experts.reshape(-1)
    match policy:
        case "probs":
            preference = torch.sort(weights.reshape(-1), descending=True, stable=True).indices
            order = preference[stable_order(flat[preference], num_experts)]
        case "position":
            order = stable_order(flat, num_experts)
        case _:
            raise ValueError(f"policy={policy!r}: use 'probs' or 'position'")
    counts = torch.bincount(flat, minlength=num_experts)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(flat), device=flat.device) - starts[flat[order]]
    return torch.empty_like(flat, dtype=torch.bool).scatter_(0, order, rank < capacity).view_as(experts)


@torch.no_grad()
def bias_update(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Auxiliary-loss-free balancing (arXiv:2408.15664): bias + rate * sign(mean(counts) - counts). All [experts]."""
    counts = counts.to(torch.float64)
    return bias + rate * torch.sign(counts.mean() - counts).to(bias.dtype)


@torch.no_grad()
def jitter_noise(token_index: Tensor, hidden: int, epsilon: float, key: int) -> Tensor:
    """Uniform noise in (1 - epsilon, 1 + epsilon), float32 [tokens, hidden], for the router's input (Switch).

    token_index: [tokens] int64. A hash of (key, token_index, channel) without any state: a token gets the same noise
    on every rank, in every layout and when recomputed.
    """
    device = token_index.device
    seed = _splitmix64(key)
    by_token = _splitmix64_high(token_index + _signed(seed))
    by_channel = _splitmix64_high(torch.arange(hidden, device=device) + _signed(_splitmix64(seed)))
    bits = by_token.unsqueeze(1) ^ by_channel
    # Two rounds of a 32-bit finaliser ("lowbias32", Wellons 2018); >> keeps the sign, so the mask
    bits *= 0x7FEB352D
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x846CA68B - 2**32
    bits >>= 8  # the 24 best bits, in [-2^23, 2^23)
    return bits.to(torch.float32).add_(0.5).mul_(epsilon * 2**-23).add_(1.0)


def _splitmix64(x: int) -> int:
    """Vigna's splitmix64 on a Python integer."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def _splitmix64_high(x: Tensor) -> Tensor:
    """The high 32 bits of splitmix64 of an int64 tensor, as int32 (int64 products wrap)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return ((x ^ ((x >> 31) & (2**33 - 1))) >> 32).to(torch.int32)


def _signed(x: int) -> int:
    """The same 64 bits as a signed integer."""
    return x - 2**64 if x >= 2**63 else x
