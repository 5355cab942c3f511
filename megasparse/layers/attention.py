"""Attention: the core product for mcore's slot, and self-attention with a norm on its output."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megasparse.layers.norms import LayerNorm, RMSNorm


class CoreAttention(MegatronModule):
    """Causal softmax attention with grouped K/V heads, through torch's scaled_dot_product_attention.

    ``attention_mask`` carries document ids [batch, seq] (or None): a query sees the keys of its own document only.
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
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal
        assert config.context_parallel_size == 1
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
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
        seq, batch, heads, head_dim = query.shape
        with get_cuda_rng_tracker().fork() if self.forks else contextlib.nullcontext():
            output = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=None if attention_mask is None else document_mask(attention_mask),
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=attention_mask is None,
                scale=self.scale,
                enable_gqa=heads != key.shape[2],
            )
        return output.permute(2, 0, 1, 3).reshape(seq, batch, heads * head_dim)


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
