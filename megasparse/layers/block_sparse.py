"""Block-sparse attention for mcore's core-attention slot."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from megasparse.config import SparseAttention
from megasparse.layers import selectors
from megasparse.layers.attention import CoreAttention
from megasparse.layers.selectors import Grid
from megasparse.layers.step import StepState
from megasparse.ops.block_sparse import BlockMask, block_sparse_attention
from megasparse.schedule import attention_blocks


class BlockSparseAttention(CoreAttention):
    """CoreAttention over the key blocks that a selector lists, as ``sparse`` says."""

    def __init__(
        self,
        config: Any,
        *args: Any,
        sparse: SparseAttention,
        state: StepState,
        tp_rank: int,
        kv_heads: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.sparse, self.state, self.kv_heads = sparse, state, kv_heads
        self.first_head = tp_rank * (kv_heads // config.tensor_model_parallel_size)
        self.grid = Grid(sparse.block_size, sparse.query_block_size, sparse.local_blocks, sparse.sink_blocks)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None, start: int) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [batch, seq, heads, head_dim]
        whole = k.shape[1] if self.context_parallel == 1 else 2 * self.context_parallel * q.shape[1]
        budget = attention_blocks(self.state.progress, self.sparse, math.ceil(whole / self.grid.block_size))
        if budget is None:
            return super()._attend(query, key, value, document_ids, start)
        mask = self.select(q, k, budget)
        if self.training:
            _, last = self.grid.own(q.shape[1], k.shape[1] - q.shape[1], k.device)
            self.state.count_blocks(mask.count.sum(), (last + 1).sum() * len(k) * k.shape[2])
        documents = None if document_ids is None else document_ids[:, : k.shape[1]]
        output = block_sparse_attention(q, k, v, mask, scale=self.scale, document_ids=documents)
        assert isinstance(output, Tensor)
        return output.transpose(1, 2)

    def select(self, q: Tensor, k: Tensor, budget: int) -> BlockMask:
        """The blocks that queries [batch, seq, heads, head_dim] see, the last ones of keys [batch, keys, kv_heads,
        head_dim]; ``budget`` of them for each query, if the selector has one."""
        match self.sparse.selector:
            case "local":
                return selectors.local(self.grid, q, k)
            case "strided":
                return selectors.strided(self.grid, q, k, self.sparse.stride, self.first_head, self.kv_heads)
            case "pooled":
                return selectors.pooled(self.grid, q, k, budget, self.sparse.mass)
