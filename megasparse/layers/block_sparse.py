"""Block-sparse attention for mcore's core-attention slot."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megasparse.config import SparseAttention
from megasparse.layers import selectors
from megasparse.layers.attention import CoreAttention, Part
from megasparse.layers.clusters import Centroids
from megasparse.layers.gate import AttentionGate, gate_loss
from megasparse.layers.recall import SAMPLE, attention_recall, sampled
from megasparse.layers.selectors import Grid, Score
from megasparse.layers.step import StepState
from megasparse.ops.block_sparse import BlockMask, block_mass, block_sparse_attention
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
        num_sparse_layers: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.sparse, self.state, self.kv_heads = sparse, state, kv_heads
        self.query_block_size = sparse.query_block_size
        self.num_sparse_layers = num_sparse_layers
        self.first_head = tp_rank * (kv_heads // config.tensor_model_parallel_size)
        self.grid = Grid(sparse.block_size, sparse.query_block_size, sparse.local_blocks, sparse.sink_blocks)
        local_heads = kv_heads // config.tensor_model_parallel_size
        group = config.num_attention_heads // kv_heads
        self.gate = AttentionGate(config, local_heads, group, sparse.gate_dim) if sparse.selector == "gate" else None
        self.centroids = Centroids(config, local_heads, sparse.clusters) if sparse.selector == "clusters" else None

    def _before(self, queries: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What chooses for the first query block of each part: the mean query of the block before (selectors.py),
        float32 [batch, kv_heads, head_dim]. Another rank may have it; the sequence's first block has none."""
        if self.query_block_size == 1 or not self.sparse.chooses:
            return None, None
        kv_heads = self.kv_heads // self.config.tensor_model_parallel_size
        last = [
            selectors.mean_queries(self.grid, q[:, :, -self.query_block_size :].transpose(1, 2), kv_heads)[:, :, 0]
            for q in queries.chunk(2, 2)
        ]
        ranks, rank = self.context_parallel, dist.get_rank(self.cp_group)
        gathered = torch.empty(2 * ranks, *last[0].shape, device=queries.device)
        dist.all_gather_into_tensor(gathered, torch.stack(last), group=self.cp_group)
        parts = [*gathered[0::2], *gathered[1::2].flip(0)]  # rank r has part r and part 2 * ranks - 1 - r
        return parts[rank - 1] if rank > 0 else None, parts[2 * ranks - 2 - rank]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, part: Part, score: Score | None = None) -> Tensor:
        """``score``: of blocks, where the selector has none of its own."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [batch, seq, heads, head_dim]
        budget = self.budget()
        if budget is None and (self.gate is None or not self.training):
            output = super()._attend(query, key, value, part)
            return self._learn_clusters(output, q, k)
        gated = self.gate(q, k, self.grid.block_size) if self.gate is not None else None
        score = score or self.score(q, k, gated, part.before)
        if budget is None:  # the gate learns from all blocks; attention takes them in lists of many queries, faster
            mask, attended = self._all(q, k, 1), self._all(q, k, self.grid.block_size)
        else:
            mask = attended = self.select(q, k, budget, score)
        first, last = self.grid.own(q.shape[1], part.start, k.device)
        masked = {"scale": self.scale, "document_ids": part.document_ids}
        output, lse = block_sparse_attention(q, k, v, attended, return_lse=True, **masked)
        if self.training:
            self.state.count_blocks(
                mask.count.sum(), (last + 1).clamp(max=mask.num_key_blocks).sum() * len(k) * k.shape[2]
            )
            self._observe(q, k, mask, score, part.document_ids)
        if self.training and gated is not None:
            mass = block_mass(q, k, lse, mask, **masked)
            share = len(q) * self.kv_heads * self._seq(q.shape[1], k.shape[1])
            loss = gate_loss(gated[0], gated[1], mask, mass, first) / share
            output = self._add_loss(output, "gate_loss", loss, self.sparse.gate_loss_coefficient)
        return self._learn_clusters(output.transpose(1, 2), q, k)

    def _all(self, q: Tensor, k: Tensor, query_block_size: int) -> BlockMask:
        blocks = self.grid.blocks(k.shape[1])
        return selectors.local(Grid(self.grid.block_size, query_block_size, blocks, 0), q, k)

    def _learn_clusters(self, output: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Queries, and keys of the same tokens: each token counts once, on the rank that has it."""
        if self.centroids is None or not self.training:
            return output
        share = 2 * len(q) * self.kv_heads * self._seq(q.shape[1], k.shape[1])
        loss = self.centroids.loss(q, k[:, -q.shape[1] :]) / share
        return self._add_loss(output, "cluster_loss", loss, self.sparse.cluster_loss_coefficient)

    def _observe(self, q: Tensor, k: Tensor, mask: BlockMask, score: Score | None, documents: Tensor | None) -> None:
        """Recall and entropy over the last queries of the sequence: the part of their means that this rank has."""
        seq = self._seq(q.shape[1], k.shape[1])
        rows = sampled(q, k.shape[1] - q.shape[1], seq)
        if len(rows) == 0 or not self.state.first_pass():
            return
        parts = len(q) * self.kv_heads * self.num_sparse_layers * min(SAMPLE, seq)
        recall = attention_recall(q, k, mask, self.scale, documents, rows)
        self.state.record("attention_recall", recall.sum() / parts)
        if score is not None:
            lists = rows // self.grid.query_block_size
            first = int(lists[0])
            entropy = selectors.entropy(self.grid, score, q, k, slice(first, int(lists[-1]) + 1))
            self.state.record("selector_entropy", entropy[:, :, lists - first].sum() / parts)

    def _seq(self, queries: int, keys: int) -> int:
        """Length of the sequence of which this rank has ``queries`` in one call, and ``keys`` from its start on."""
        return keys if self.context_parallel == 1 else 2 * self.context_parallel * queries

    def budget(self) -> int | None:
        """How many blocks a query may see in this step, in a sequence of any length; None: dense attention."""
        return attention_blocks(self.state.progress, self.sparse, self.grid.blocks(self.state.seq_length))

    def _add_loss(self, output: Tensor, name: str, loss: Tensor, coefficient: float) -> Tensor:
        """``loss`` is the part of this rank's heads and queries: parts sum to the micro-batch's mean."""
        self.state.record(name, loss / self.num_sparse_layers)
        scale = self.state.context_parallel / self.state.num_micro_batches  # DeepSpeed's average divides by the first
        if not loss.requires_grad:
            return output
        return MoEAuxLossAutoScaler.apply(output, loss * (coefficient * scale))

    def score(
        self, q: Tensor, k: Tensor, gated: tuple[Tensor, Tensor] | None = None, before: Tensor | None = None
    ) -> Score | None:
        """How the selector scores blocks: queries [batch, seq, heads, head_dim], the last ones of keys [batch, keys,
        kv_heads, head_dim]. None: its pattern is fixed. gated: what the gate makes of q and k. before: see _before."""
        match self.sparse.selector:
            case "pooled":
                return selectors.pooled(self.grid, q, k, before)
            case "clusters":
                assert self.centroids is not None
                return selectors.clusters(self.grid, q, k, self.centroids(), before)
            case "gate":
                assert gated is not None
                return selectors.product(*gated)
            case _:
                return None

    def select(self, q: Tensor, k: Tensor, budget: int, score: Score | None) -> BlockMask:
        """The blocks that the queries see; ``budget`` of them for each query by ``score``, if there is one."""
        if score is not None:
            return selectors.choose(self.grid, score, q, k, budget, self.sparse.mass)
        if self.sparse.selector == "local":
            return selectors.local(self.grid, q, k)
        return selectors.strided(self.grid, q, k, self.sparse.stride, self.first_head, self.kv_heads)
