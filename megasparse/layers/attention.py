"""Attention: the core product for mcore's slot, and self-attention with a norm on its output."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megasparse.layers.cache import KeyValueCache
from megasparse.layers.norms import LayerNorm, RMSNorm


@dataclass(frozen=True)
class Part:
    """Where in a sequence the queries of one call are: at ``start`` and on. Keys are those from 0 to the last query."""

    start: int
    document_ids: Tensor | None  # [batch, keys]
    before: Tensor | None = None  # what CoreAttention._before says of the queries that are not here


class CoreAttention(MegatronModule):
    """Causal softmax attention with grouped K/V heads, through torch's scaled_dot_product_attention.

    ``attention_mask`` carries document ids [batch, seq] (or None): a query sees the keys of its own document only.
    Under context parallelism each rank has the queries of two parts of the sequence (data.loader.zigzag) and gathers
    the keys and values of all.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        fused: Callable[..., Tensor] | None = None,
    ) -> None:
        """``fused``: te.attention, for what it can do."""
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal
        self.context_parallel = config.context_parallel_size
        self.cp_group: Any = pg_collection.cp if self.context_parallel > 1 else None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.query_block_size = 1  # queries that share what they attend to
        self.cache: KeyValueCache | None = None  # while text is generated
        self.fused = (fused,)  # in a tuple: it is a module, of which this one's state has nothing
        # Tensor-parallel ranks have other heads, so other masks; with sequence parallelism mcore forks for the block.
        self.forks = self.dropout > 0 and config.tensor_model_parallel_size > 1 and not config.sequence_parallel

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [seq, batch, heads, head_dim], key and value [seq, batch, kv_heads, head_dim]

        -> [seq, batch, heads * head_dim].
        """
        seq, batch = query.shape[:2]
        queries = query.permute(1, 2, 0, 3)
        if self.context_parallel > 1:
            key, value = gather_sequence(torch.cat([key, value], 2), self.cp_group).chunk(2, 2)
        keys, values = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        with get_cuda_rng_tracker().fork() if self.forks else contextlib.nullcontext():
            if self.cache is not None:
                assert attention_mask is None  # generation writes one document
                queries, keys, values, start = self.cache.extend(queries, keys, values)
                output = self._attend(queries, keys, values, Part(start, None))[:, :, -seq:]
            elif self.context_parallel == 1:
                output = self._attend(queries, keys, values, Part(0, attention_mask))
            else:
                rank, outputs = dist.get_rank(self.cp_group), []
                places = (rank, 2 * self.context_parallel - 1 - rank)
                for q, before, place in zip(queries.chunk(2, 2), self._before(queries), places, strict=True):
                    start = place * (seq // 2)
                    end = start + seq // 2
                    documents = None if attention_mask is None else attention_mask[:, :end]
                    part = Part(start, documents, before)
                    outputs.append(self._attend(q, keys[:, :, :end], values[:, :, :end], part))
                output = torch.cat(outputs, 2)
        return output.permute(2, 0, 1, 3).reshape(seq, batch, -1)

    def _before(self, queries: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Under context parallelism, what each of this rank's two parts has to know of the queries before it."""
        return None, None

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, part: Part) -> Tensor:
        """query [batch, heads, n, head_dim], key and value [batch, kv_heads, keys, head_dim] -> like query."""
        mask: Any = None
        (fused,) = self.fused
        if fused is not None and part.document_ids is None and self.cache is None:
            kind = "causal_bottom_right" if part.start > 0 else "causal"
            output = fused(*(x.permute(2, 0, 1, 3) for x in (query, key, value)), attn_mask_type=kind)
            return output.unflatten(-1, (-1, self.config.kv_channels)).permute(1, 2, 0, 3)
        if part.document_ids is not None:
            mask = document_mask(part.document_ids)[:, :, part.start :]
        elif part.start > 0:
            mask = causal_lower_right(query.shape[2], key.shape[2])
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The context-parallel ranks' parts [local seq, ...] -> the whole sequence [seq, ...] in order.

    In backward each rank gets the sum of all ranks' gradients of its part."""
    size = dist.get_world_size(group)
    halves = gather_from_sequence_parallel_region(x.contiguous(), group=group).chunk(2 * size, 0)
    return torch.cat([*halves[0::2], *reversed(halves[1::2])], 0)


def document_mask(document_ids: Tensor) -> Tensor:
    """[batch, seq] -> bool [batch, 1, seq, seq]: may query i see key j? Causal, within one document."""
    same = document_ids.unsqueeze(-1) == document_ids.unsqueeze(-2)
    return torch.tril(same).unsqueeze(1)


class PostNormSelfAttention(SelfAttention):
    """Self-attention whose output is normed before the residual is added (OLMo2)."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_layernorm = post_norm(config)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        output, bias = super().forward(*args, **kwargs)
        return self.post_layernorm(output if bias is None else output + bias), None


def post_norm(config: Any) -> RMSNorm | LayerNorm:
    """The norm of a sublayer's output."""
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    return norm(config, config.hidden_size, config.layernorm_epsilon)
