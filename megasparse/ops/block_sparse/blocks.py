"""The one format of block-sparse attention: for each block of queries, the list of key blocks that it sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockMask:
    """Lists of key blocks, one for each K/V head and block of queries; the heads of a group share a list.

    count: [batch, kv_heads, q_blocks] int32, the lengths of the lists. index: [batch, kv_heads, q_blocks, max_blocks]
    int32, packed left: entries from count on mean nothing. A list names a key block at most once. Query block i is
    queries [i * query_block_size, (i + 1) * query_block_size), the last one ragged; key block j likewise with
    block_size. query_block_size=1: a list for each query.
    """

    count: Tensor
    index: Tensor
    block_size: int
    query_block_size: int
    num_key_blocks: int = 0  # 0: as many as whole query blocks' tokens fill

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.query_block_size < 1:
            raise ValueError(f"block_size={self.block_size}, query_block_size={self.query_block_size}: must be >= 1")
        if self.count.dim() != 3 or self.index.shape[:3] != self.count.shape or self.index.dim() != 4:
            raise ValueError(
                f"count {list(self.count.shape)} must be [batch, kv_heads, q_blocks] and index "
                f"{list(self.index.shape)} [batch, kv_heads, q_blocks, max_blocks]"
            )
        if self.count.dtype != torch.int32 or self.index.dtype != torch.int32:
            raise ValueError(f"count is {self.count.dtype} and index {self.index.dtype}: both must be torch.int32")
        if self.num_key_blocks == 0:
            tokens = self.count.shape[2] * self.query_block_size
            object.__setattr__(self, "num_key_blocks", -(-tokens // self.block_size))

    @staticmethod
    def from_dense(dense: Tensor, block_size: int, query_block_size: int | None = None) -> BlockMask:
        """dense: bool [batch, kv_heads, q_blocks, k_blocks]; query_block_size=None: block_size. Lists ascend."""
        if dense.dim() != 4 or dense.dtype != torch.bool:
            raise ValueError(
                f"dense is {dense.dtype} {list(dense.shape)}: must be bool [batch, kv_heads, q_blocks, k_blocks]"
            )
        blocks = torch.arange(dense.shape[-1], device=dense.device).expand_as(dense)
        return BlockMask.from_index(blocks, dense, dense.shape[-1], block_size, query_block_size)

    @staticmethod
    def from_index(
        index: Tensor, keep: Tensor, num_key_blocks: int, block_size: int, query_block_size: int | None = None
    ) -> BlockMask:
        """The entries of ``index`` [batch, kv_heads, q_blocks, n] (any integer type) where ``keep`` (bool, the same
        shape) is true, in their order. None of a list's kept entries may be named twice."""
        count = keep.sum(-1, dtype=torch.int32)
        longest = max(1, int(count.max())) if count.numel() else 1
        order = torch.sort(keep.logical_not().to(torch.uint8), stable=True, dim=-1).indices[..., :longest]
        packed = index.gather(-1, order).to(torch.int32)
        packed = packed.masked_fill(torch.arange(longest, device=packed.device) >= count.unsqueeze(-1), 0)
        query_block_size = block_size if query_block_size is None else query_block_size
        return BlockMask(count, packed, block_size, query_block_size, num_key_blocks)

    def listed(self) -> Tensor:
        """bool [batch, kv_heads, q_blocks, max_blocks]: which entries of ``index`` mean something."""
        return torch.arange(self.index.shape[-1], device=self.index.device) < self.count.unsqueeze(-1)

    def to_dense(self) -> Tensor:
        """bool [batch, kv_heads, q_blocks, k_blocks]."""
        dense = torch.zeros(*self.count.shape, self.num_key_blocks + 1, dtype=torch.bool, device=self.index.device)
        entries = torch.where(self.listed(), self.index.long(), self.num_key_blocks)  # the rest to a column of its own
        return dense.scatter_(-1, entries, torch.ones_like(entries, dtype=torch.bool))[..., :-1]

    def transpose(self) -> BlockMask:
        """For each key block the query blocks that list it, ascending: the order of the gradients of K and V."""
        batch, heads, q_blocks, longest = self.index.shape
        listed = self.listed().reshape(-1)
        rows = torch.arange(batch * heads, device=self.index.device).repeat_interleave(q_blocks * longest)[listed]
        queries = torch.arange(q_blocks, device=self.index.device).repeat_interleave(longest).repeat(batch * heads)
        key = rows * self.num_key_blocks + self.index.reshape(-1)[listed]
        order = torch.sort(key, stable=True).indices  # entries are in the order of their query blocks
        key = key[order]
        count = torch.bincount(key, minlength=batch * heads * self.num_key_blocks)
        place = torch.arange(len(key), device=key.device) - (count.cumsum(0) - count)[key]
        index = torch.zeros(len(count), max(1, int(count.max())), dtype=torch.int32, device=key.device)
        index[key, place] = queries[listed][order].to(torch.int32)
        return BlockMask(
            count.to(torch.int32).view(batch, heads, -1),
            index.view(batch, heads, self.num_key_blocks, -1),
            self.query_block_size,
            self.block_size,
            q_blocks,
        )

    def density(self, causal: bool = False) -> float:
        """The share of all pairs of blocks that are listed; causal: of those with a key not after all queries."""
        batch, heads, q_blocks = self.count.shape
        if not causal:
            return self.count.sum().item() / (batch * heads * q_blocks * self.num_key_blocks)
        last = (torch.arange(q_blocks) + 1) * self.query_block_size - 1
        pairs = (last // self.block_size + 1).clamp(max=self.num_key_blocks).sum().item()
        return self.count.sum().item() / (batch * heads * pairs)
