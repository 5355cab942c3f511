"""Mixture of experts: order tokens by expert, multiply by each expert's weights, sum a token's results.

``routing`` chooses the experts; ``naive`` has the obvious form of every op.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from megasparse.ops.experts import cpu, grouped, naive
from megasparse.ops.experts.permute import combine, gather, sort_by_expert

__all__ = ["combine", "gather", "grouped_swiglu", "sort_by_expert"]


def grouped_swiglu(
    x: Tensor,
    counts: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    backend: Literal["auto", "naive", "cpu", "grouped"] = "auto",
) -> Tensor:
    """y = w2 (silu(w1 x) * (w3 x)), each row with the weights of its expert.

    x: [rows, hidden], rows sorted by expert. counts: [experts] int, rows of each expert, on the same device, summing
    to rows. w1 (gate), w3 (up): [experts, ffn, hidden]; w2 (down): [experts, hidden, ffn]: DeepSpeed GroupedExperts'
    names and layout. Returns [rows, hidden]. The gradient of an expert without rows is zero.

    backend: "cpu" (any float type), "grouped" (torch's grouped matmul: CUDA, and CPU for tests), "naive", or "auto":
    "cpu" for CPU tensors, else "grouped".
    """
    if backend == "auto":
        backend = "cpu" if x.device.type == "cpu" else "grouped"
    match backend:
        case "naive":
            return naive.grouped_swiglu(x, counts, w1, w2, w3)
        case "cpu":
            return cpu.grouped_swiglu(x, counts, w1, w2, w3)
        case "grouped":
            return grouped.grouped_swiglu(x, counts, w1, w2, w3)
    raise ValueError(f"backend={backend!r}: use 'auto', 'naive', 'cpu' or 'grouped'")
