"""Made-up inputs of the op, and all that comes out of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megasparse.ops.block_sparse import BlockMask, block_sparse_attention


def tensors(
    batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    return (
        normal(batch, queries, heads, dim),
        normal(batch, keys, kv_heads, dim),
        normal(batch, keys, kv_heads, dim),
    )


def results(backend: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, **options: Any) -> dict[str, Tensor]:
    """Output, log-sum-exp, and the gradients of a weighted sum of both."""
    inputs = {"q": q, "k": k, "v": v}
    if options.get("block_bias") is not None:
        inputs["block_bias"] = options["block_bias"]
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    output, lse = block_sparse_attention(
        **inputs,
        mask=mask,
        backend=backend,
        return_lse=True,
        **{name: value for name, value in options.items() if name != "block_bias"},
    )
    random = torch.Generator().manual_seed(2)
    seen = lse > -torch.inf
    loss = (output.double() * torch.randn(output.shape, generator=random, dtype=torch.float64)).sum()
    loss = loss + (lse[seen].double() * torch.randn(lse.shape, generator=random, dtype=torch.float64)[seen]).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    found = {"output": output, "empty": ~seen, "lse": lse.where(seen, 0)}
    return {**found, **{f"d{name}": g for name, g in zip(inputs, gradients, strict=True)}}


def random_mask(q: Tensor, k: Tensor, block: int, query_block: int, density: float = 0.5) -> BlockMask:
    shape = (len(q), k.shape[2], -(-q.shape[1] // query_block), -(-k.shape[1] // block))
    dense = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < density
    return BlockMask.from_dense(dense, block, query_block)
