"""Native sparse attention (NSA, arXiv 2502.11089): compressed, selected and window attention, each with its own keys
and values, in a gated sum.

Every ``compression_stride`` keys, ``compression_size`` of them become one compressed key. Attention to the compressed
keys is a coarse view of the whole sequence; how much of it falls into a block, summed over the heads of a group, is
that block's score, and the best blocks are seen in full. Choosing has no gradient: what chooses learns through the
output of the compressed branch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megasparse.config import SparseAttention
from megasparse.layers import selectors
from megasparse.layers.attention import Part, PostNormSelfAttention
from megasparse.layers.block_sparse import BlockSparseAttention
from megasparse.layers.selectors import Grid, Score
from megasparse.ops.block_sparse import block_sparse_attention


class Branches(SelfAttention):
    """Self-attention with keys and values for the compressed and the window branch, and a gate for each of the three.

    What the core attention gets: keys and values of all branches, one after the other along the heads, and as
    ``attention_bias`` the gates [seq, batch, heads * 3], before their sigmoid.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.linear_branches = self._linear(4 * self.kv_projection_size)
        self.linear_gate = self._linear(3 * config.num_attention_heads)

    def _linear(self, width: int) -> ColumnParallelLinear:
        config: Any = self.config
        return ColumnParallelLinear(
            config.hidden_size,
            width,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.pg_collection.tp,
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:  # type: ignore[override]
        kwargs["attention_bias"] = self.linear_gate(hidden_states)[0]
        return super().forward(hidden_states, *args, **kwargs)

    def get_query_key_value_tensors(  # type: ignore[override]
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The queries; and keys and values [seq, batch, 3 * kv_heads, head_dim]: selected, window, compressed."""
        query, key, value = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        others, _ = self.linear_branches(hidden_states)
        window, compressed, *values = others.unflatten(-1, (key.shape[2], 4, -1)).unbind(3)
        if self.k_layernorm is not None:
            window = self.k_layernorm(window)  # compressed keys are normed when they are compressed
        return query, torch.cat([key, window, compressed], 2), torch.cat([value, *values], 2)


class PostNormBranches(Branches, PostNormSelfAttention):
    """The same with a norm on the output (OLMo2)."""


class NativeSparseAttention(BlockSparseAttention):
    """The three branches over what ``Branches`` gives. norm_keys: compressed keys are scaled to a root mean square of
    1, as QK-norm scales the others: the mean of normed keys that differ is short, and attention to it flat."""

    def __init__(
        self, config: Any, *args: Any, sparse: SparseAttention, norm_keys: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, sparse=sparse, **kwargs)
        self.norm_epsilon = config.layernorm_epsilon if norm_keys else None
        heads = self.kv_heads // config.tensor_model_parallel_size
        self.compress_key = Compression(config, heads, sparse)
        self.compress_value = Compression(config, heads, sparse)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        outputs = super().forward(query, key, value, attention_mask, *args, **kwargs)
        seq, batch, heads, _ = query.shape
        gates = kwargs["attention_bias"].view(seq, batch, heads, 3, 1).sigmoid()
        return (outputs.view(seq, batch, heads, 3, -1) * gates).sum(3).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, part: Part, score: Score | None = None) -> Tensor:
        """-> [batch, heads, n, 3 * head_dim]: selected, window and compressed, one after the other."""
        keys, values = key.chunk(3, 1), value.chunk(3, 1)
        compressed = self.compress_key(keys[2])
        if self.norm_epsilon is not None:
            compressed = F.rms_norm(compressed, compressed.shape[-1:], eps=self.norm_epsilon)
        visible: Visible = functools.partial(self._visible, part, key.device)
        score = importance(query, compressed, visible, self.scale, self.sparse, self.grid.blocks(key.shape[2]))
        outputs = [
            super()._attend(query, keys[0], values[0], part, score),
            self._window(query, keys[1], values[1], part),
            compressed_attention(query, compressed, self.compress_value(values[2]), visible, self.scale),
        ]
        if self.training and self.budget() is not None:
            own = torch.arange(part.start, key.shape[2], device=key.device) // self.sparse.block_size
            window = (own + 1).clamp(max=self.sparse.window_blocks).sum()
            seen = [x.sum() / len(x) for x in map(visible, parts(query, compressed.shape[2]))]
            coarse = torch.stack(seen).sum() / self.sparse.block_size
            self.state.count_blocks((window + coarse) * len(query) * keys[0].shape[1], torch.zeros_like(coarse))
        return torch.cat(outputs, -1)

    def _window(self, query: Tensor, key: Tensor, value: Tensor, part: Part) -> Tensor:
        size = self.sparse.block_size
        # A query's window starts with a block: all queries of a block have the same.
        grid = Grid(size, size if part.start % size == 0 else 1, self.sparse.window_blocks, 0)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        masked = {"scale": self.scale, "document_ids": part.document_ids}
        output = block_sparse_attention(q, k, v, selectors.local(grid, q, k), **masked)
        assert isinstance(output, Tensor)
        return output.transpose(1, 2)

    def _visible(self, part: Part, device: torch.device, rows: slice) -> Tensor:
        """See ``Visible``: a query sees the compressed keys all of whose keys it may see."""
        size, stride = self.sparse.compression_size, self.sparse.compression_stride
        positions = torch.arange(part.start + rows.start, part.start + rows.stop, device=device)
        first = torch.arange(max(0, (part.start + rows.stop - size) // stride + 1), device=device) * stride
        visible = (first + size <= positions.unsqueeze(1) + 1).unsqueeze(0)
        if part.document_ids is not None:
            own, theirs = part.document_ids[:, positions], part.document_ids[:, first]
            visible = visible & (own.unsqueeze(2) == theirs.unsqueeze(1))
        return visible.unsqueeze(1)


Visible = Callable[[slice], Tensor]
"""Some queries -> bool [1 or batch, 1, len(rows), n]: which of the first n compressed keys, as far as the last of these
queries sees, they see."""


class Compression(nn.Module):
    """``compression_size`` keys or values to one: their mean, and an MLP of them with their places.

    x_0 .. x_{l-1} -> mean(x) + output gelu(hidden [x_0 + position_0, .., x_{l-1} + position_{l-1}]).
    position [kv_heads, l, head_dim], hidden [kv_heads, head_dim, l * head_dim], output [kv_heads, head_dim, head_dim]:
    of this tensor-parallel rank's K/V heads. The paper has the MLP alone; here ``output`` begins as zeros: compressed
    keys are means at first, by which scores mean something.
    """

    def __init__(self, config: Any, kv_heads: int, sparse: SparseAttention) -> None:
        super().__init__()
        self.size, self.stride = sparse.compression_size, sparse.compression_stride
        dim, dtype = config.kv_channels, config.params_dtype
        self.position = nn.Parameter(torch.empty(kv_heads, self.size, dim, dtype=dtype))
        self.hidden = nn.Parameter(torch.empty(kv_heads, dim, self.size * dim, dtype=dtype))
        self.output = nn.Parameter(torch.empty(kv_heads, dim, dim, dtype=dtype))
        for weight in (self.position, self.hidden, self.output):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, kv_heads, keys, head_dim] -> [batch, kv_heads, (keys - l) // stride + 1, head_dim]; none for fewer
        than l keys."""
        if x.shape[2] < self.size:
            return x[:, :, :0]
        windows = x.unfold(2, self.size, self.stride).transpose(-1, -2)  # [batch, kv_heads, n, l, head_dim]
        placed = (windows + self.position.unsqueeze(1)).flatten(-2)
        inner = F.gelu(torch.einsum("bhne,hde->bhnd", placed, self.hidden))
        return windows.mean(-2) + torch.einsum("bhne,hde->bhnd", inner, self.output)


def parts(query: Tensor, compressed: int, heads: int = 1) -> list[slice]:
    """All queries [batch, heads, n, head_dim], some at a time, so that a part's pairs with the compressed keys, of so
    many heads, are no more than selectors.CHUNK."""
    step = max(1, selectors.CHUNK // max(1, query.shape[0] * heads * compressed))
    return [slice(i, min(i + step, query.shape[2])) for i in range(0, query.shape[2], step)]


def compressed_attention(query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float) -> Tensor:
    """Softmax attention [batch, heads, n, head_dim] to the visible keys [batch, kv_heads, compressed, head_dim]; 0 for
    a query that sees none. Masks are made for a part of the queries at a time, in backward once more."""

    def attend(query: Tensor, key: Tensor, value: Tensor, rows: slice) -> Tensor:
        seen = visible(rows)
        reach = seen.shape[-1]
        if reach == 0:
            return torch.zeros_like(query)
        none, grouped = ~seen.any(-1, keepdim=True), query.shape[1] != key.shape[1]
        output = F.scaled_dot_product_attention(
            query, key[:, :, :reach], value[:, :, :reach], attn_mask=seen | none, scale=scale, enable_gqa=grouped
        )
        return output.masked_fill(none, 0)

    outputs = [
        checkpoint(attend, query[:, :, rows], key, value, rows, use_reentrant=False, preserve_rng_state=False)
        for rows in parts(query, key.shape[2])
    ]
    return torch.cat(outputs, 2)


def importance(
    query: Tensor, compressed: Tensor, visible: Visible, scale: float, sparse: SparseAttention, blocks: int
) -> Score:
    """score(t, j) = log of the attention to compressed keys that falls into block j of ``blocks``, summed over the
    group's heads. Shapes as in ``compressed_attention``.

    A compressed key counts for a block as often as strides of it lie there (the paper's equation 9).
    """
    group = query.shape[1] // compressed.shape[1]
    strides = sparse.block_size // sparse.compression_stride  # of a block
    keys = compressed.detach().float()

    def score(part: slice) -> Tensor:
        queries, scores = query[:, :, part].detach(), []
        for rows in parts(queries, compressed.shape[2], query.shape[1]):
            seen = visible(slice(part.start + rows.start, part.start + rows.stop))
            count = seen.shape[-1]
            grouped = queries[:, :, rows].unflatten(1, (-1, group)).float()
            logits = torch.einsum("bhgqd,bhkd->bhgqk", grouped, keys[:, :, :count]) * scale
            weights = logits.masked_fill(~seen.unsqueeze(2), -torch.inf).softmax(-1).nan_to_num().sum(2)
            by_stride = weights.new_zeros(*weights.shape[:-1], blocks * strides)
            for n in range(sparse.compression_size // sparse.compression_stride):
                by_stride[..., n : n + count] += weights
            scores.append(by_stride.unflatten(-1, (blocks, strides)).sum(-1).log())
        return torch.cat(scores, 2)

    return score
