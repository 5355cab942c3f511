"""The obvious form of every op in this folder: loops, any float type, plain autograd. Same signatures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_swiglu(x: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """See ``experts.grouped_swiglu``."""
    outputs = []
    for rows, gate, down, up in zip(x.split(counts.tolist()), w1, w2, w3, strict=True):
        outputs.append((F.silu(rows @ gate.T) * (rows @ up.T)) @ down.T)
    return torch.cat(outputs)


def sort_by_expert(experts: Tensor, num_experts: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``permute.sort_by_expert``."""
    flat = experts.flatten().tolist()
    kept = [True] * len(flat) if keep is None else keep.flatten().tolist()
    by_expert: list[list[int]] = [[] for _ in range(num_experts)]
    for copy, expert in enumerate(flat):
        if kept[copy]:
            by_expert[expert].append(copy)
    order = torch.tensor([copy for copies in by_expert for copy in copies], dtype=torch.int64)
    counts = torch.tensor([len(copies) for copies in by_expert], dtype=torch.int64)
    return order.to(experts.device), counts.to(experts.device)


def gather(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """See ``permute.gather``."""
    return x[order // top_k]


def combine(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """See ``permute.combine``."""
    tokens, top_k = weights.shape
    compute = torch.promote_types(y.dtype, torch.float32)
    weighted = weights.to(y.dtype).to(compute).flatten()[order, None] * y.to(compute)
    return weighted.new_zeros(tokens, y.shape[1]).index_add(0, order // top_k, weighted).to(y.dtype)


def best(scores: Tensor, k: int) -> Tensor:
    """See ``routing.best``."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]


def capacity_keep(experts: Tensor, weights: Tensor, num_experts: int, capacity: int, policy: str) -> Tensor:
    """See ``routing.capacity_keep``."""
    keep = torch.zeros_like(experts, dtype=torch.bool)
    tokens, choices = experts.shape
    for expert in range(num_experts):
        copies = [(t, j) for t in range(tokens) for j in range(choices) if experts[t, j] == expert]
        if policy == "probs":
            copies.sort(key=lambda copy: -weights[copy].item())  # sort() is stable: ties stay in token order
        for copy in copies[:capacity]:
            keep[copy] = True
    return keep
