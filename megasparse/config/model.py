"""``model``: the transformer, its experts, positions and sparse attention."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megasparse.config.section import Fraction, NonNegative, Section


class Rope(Section):
    """Rotary position embedding (RoFormer) and the scalings of HF's ``modeling_rope_utils``."""

    theta: PositiveFloat = 10_000.0
    percent: Annotated[float, Field(gt=0, le=1)] = 1.0  # of a head's channels are rotated, the first ones (Megatron)
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: PositiveFloat = 1.0
    original_max_position_embeddings: PositiveInt | None = None  # llama3, yarn
    low_freq_factor: PositiveFloat = 1.0  # llama3
    high_freq_factor: PositiveFloat = 4.0  # llama3
    beta_fast: PositiveFloat = 32.0  # yarn
    beta_slow: PositiveFloat = 1.0  # yarn
    attention_factor: PositiveFloat | None = None  # yarn; None: 0.1 ln(factor) + 1

    @model_validator(mode="after")
    def _check(self) -> Rope:
        if self.scaling in ("llama3", "yarn") and self.original_max_position_embeddings is None:
            raise ValueError(f"scaling={self.scaling} needs original_max_position_embeddings")
        return self


class MoE(Section):
    """Top-k mixture of experts: which layers, how tokens are routed, how the load is balanced."""

    num_experts: PositiveInt
    top_k: PositiveInt = 2
    ffn_hidden_size: PositiveInt  # of one expert
    layers: Literal["all"] | PositiveInt | list[Literal[0, 1]] = "all"
    """"all"; n: every n-th layer, the n-th first; or one 0/1 per layer (Megatron's moe_layer_freq)."""
    shared_expert_ffn_hidden_size: int = Field(default=0, ge=0)  # 0: none
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize_scores: bool = True  # the k scores of a token are divided by their sum
    score_scale: PositiveFloat = 1.0  # multiplies the scores (DeepSeek-V3's routed_scaling_factor)
    num_groups: PositiveInt | None = None  # group-limited routing (DeepSeek-V2/V3): experts in this many groups,
    top_k_groups: PositiveInt | None = None  # of which a token may use only this many
    aux_loss_coefficient: NonNegative = 0.01
    aux_loss_scope: Literal["micro_batch", "global_batch", "all_layers"] = "micro_batch"
    """Where the load statistics f of the Switch loss E * sum(f_e * P_e) are taken. micro_batch: over the
    sequences of one micro-batch. global_batch: f is the whole previous optimizer step's, so that the loss is a
    plain sum over tokens and the same under any split. all_layers: as transformers does, counts and
    probabilities pooled over layers and not divided by top_k (one pipeline stage only)."""
    z_loss_coefficient: NonNegative = 0.0  # ST-MoE
    bias_update_rate: NonNegative = 0.0  # auxiliary-loss-free balancing (DeepSeek-V3); 0: no bias
    jitter: Fraction = 0.0  # input is multiplied by uniform(1 - jitter, 1 + jitter) before the router (Switch)
    capacity_factor: PositiveFloat | None = None  # in training; None: dropless, as evaluation always is
    drop_policy: Literal["probs", "position"] = "probs"  # which tokens an expert over capacity keeps: best or first

    @model_validator(mode="after")
    def _check(self) -> MoE:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}: lower top_k")
        if (self.num_groups is None) != (self.top_k_groups is None):
            raise ValueError("num_groups and top_k_groups go together: set both or neither")
        if self.num_groups is not None and self.top_k_groups is not None:
            if self.num_experts % self.num_groups:
                raise ValueError(f"num_experts={self.num_experts} is not divisible by num_groups={self.num_groups}")
            if self.top_k_groups > self.num_groups:
                raise ValueError(f"top_k_groups={self.top_k_groups} is more than num_groups={self.num_groups}")
            if self.num_experts // self.num_groups < 2:
                raise ValueError("a group is scored by its two best experts: num_experts / num_groups must be >= 2")
            if self.top_k > self.top_k_groups * (self.num_experts // self.num_groups):
                raise ValueError(
                    f"top_k={self.top_k} is more than the experts in top_k_groups={self.top_k_groups} groups"
                )
        return self


class SparseAttention(Section):
    """Block-sparse attention: each query, or block of queries, sees some blocks of keys (layers/selectors.py)."""

    selector: Literal["local", "strided", "pooled", "gate", "nsa", "clusters"]
    block_size: PositiveInt = 64  # keys of a block
    query_block_size: PositiveInt = 1  # queries that share a list; 1: each has its own
    blocks: PositiveInt | None = None  # that a query sees in all; none for the fixed patterns, local and strided
    mass: Annotated[float, Field(gt=0, le=1)] | None = None
    """No more of the chosen blocks than have this share of the softmax over scores; None: all."""
    stride: PositiveInt = 8  # strided: every so many blocks, shifted by head
    local_blocks: PositiveInt = 2  # always seen: the own one and those right before it
    sink_blocks: int = Field(default=1, ge=0)  # always seen: the first of the sequence
    gate_dim: PositiveInt = 64  # gate: width of its queries and keys
    gate_loss_coefficient: PositiveFloat = 0.1
    compression_size: PositiveInt = 32  # nsa: keys that become one compressed key,
    compression_stride: PositiveInt = 16  # every so many keys
    window_blocks: PositiveInt = 8  # nsa: of the window branch, which has keys of its own
    clusters: PositiveInt = 16  # clusters: of queries and keys, for each K/V head
    cluster_loss_coefficient: PositiveFloat = 0.1
    layers: Literal["all"] | list[Literal[0, 1]] = "all"  # one flag per layer; the others are dense
    dense_start: Fraction = 0.0  # share of the run's steps, at its beginning, with dense attention
    dense_end: Fraction = 0.0  # and at its end
    ramp: Fraction = 0.0  # with a budget: share of the steps, after dense_start, in which all blocks become ``blocks``

    @property
    def chooses(self) -> bool:
        """Does it choose blocks by a score, up to a budget?"""
        return self.selector not in ("local", "strided")

    @model_validator(mode="after")
    def _check(self) -> SparseAttention:
        if self.dense_start + self.ramp + self.dense_end > 1:
            raise ValueError(
                f"dense_start={self.dense_start} + ramp={self.ramp} + dense_end={self.dense_end} are more than the run"
            )
        if not self.chooses:
            for field, value in (("blocks", self.blocks), ("mass", self.mass), ("ramp", self.ramp or None)):
                if value is not None:
                    raise ValueError(f"{field}={value} with selector={self.selector}: its pattern is fixed, unset it")
        elif self.blocks is None:
            raise ValueError(f"selector={self.selector} needs blocks: how many a query sees in all")
        if self.selector in ("gate", "nsa") and self.query_block_size > 1:
            raise ValueError(
                f"query_block_size={self.query_block_size}: selector={self.selector} chooses for single queries, set 1"
            )
        always = self.sink_blocks + self.local_blocks + max(0, math.ceil(self.query_block_size / self.block_size) - 1)
        if self.blocks is not None and self.blocks <= always:
            raise ValueError(
                f"blocks={self.blocks} leaves none to choose: {always} are always seen (sink_blocks={self.sink_blocks}"
                f", local_blocks={self.local_blocks}, query_block_size={self.query_block_size})"
            )
        if self.selector == "nsa":
            for field in ("block_size", "compression_size"):
                if getattr(self, field) % self.compression_stride:
                    raise ValueError(
                        f"{field}={getattr(self, field)} is not divisible by "
                        f"compression_stride={self.compression_stride}"
                    )
        return self


class Model(Section):
    """The transformer: enough to say GPT-2, Llama, Qwen2/3, OLMo2, Mixtral and OLMoE."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = None  # K/V heads of grouped-query attention; None: as many as heads
    head_dim: PositiveInt | None = None  # None: hidden_size / num_attention_heads
    ffn_hidden_size: PositiveInt | None = None  # of dense layers; None: 4 x hidden_size
    vocab_size: PositiveInt | None = None  # None: the tokenizer's
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: PositiveFloat = 1e-5
    norm_placement: Literal["pre", "post"] = "pre"  # post: norms the sublayer's output, before the residual (OLMo2)
    qk_norm: Literal["none", "head", "full"] = "none"  # per head (Qwen3) or over all heads together (OLMo2, OLMoE)
    bias: Literal["none", "qkv", "all"] = "none"
    tie_embeddings: bool = False
    position_embedding: Literal["rope", "learned"] = "rope"
    max_position_embeddings: PositiveInt | None = None  # rows of the learned table; None: data.seq_length
    rope: Rope = Rope()
    attention_dropout: Fraction = 0.0
    hidden_dropout: Fraction = 0.0
    init_std: PositiveFloat = 0.02  # output projections: divided by sqrt(2 * num_layers) (GPT-2)
    moe: MoE | None = None
    sparse_attention: SparseAttention | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_size * self.rope.percent)

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def moe_layers(self) -> list[bool]:
        """One flag per layer: is it a mixture of experts?"""
        if self.moe is None:
            return [False] * self.num_layers
        if self.moe.layers == "all":
            return [True] * self.num_layers
        if isinstance(self.moe.layers, int):
            return [(i + 1) % self.moe.layers == 0 for i in range(self.num_layers)]
        return [bool(flag) for flag in self.moe.layers]

    @property
    def sparse_layers(self) -> list[bool]:
        """One flag per layer: is its attention block-sparse?"""
        if self.sparse_attention is None:
            return [False] * self.num_layers
        if self.sparse_attention.layers == "all":
            return [True] * self.num_layers
        return [bool(flag) for flag in self.sparse_attention.layers]

    @property
    def linear_weights(self) -> list[str]:
        """Names of the matrices that can be 2:4: of attention, MLPs and experts."""
        names = []
        for index, moe in enumerate(self.moe_layers):
            attention, mlp = (f"decoder.layers.{index}.{part}" for part in ("self_attention", "mlp"))
            names += [f"{attention}.linear_qkv.weight", f"{attention}.linear_proj.weight"]
            if moe:
                names += [f"{mlp}.experts.{name}" for name in ("w1", "w2", "w3")]
                if self.moe and self.moe.shared_expert_ffn_hidden_size:
                    names += [f"{mlp}.shared_experts.{name}.weight" for name in ("linear_fc1", "linear_fc2")]
            else:
                names += [f"{mlp}.linear_fc1.weight", f"{mlp}.linear_fc2.weight"]
        return names

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}: "
                "change one or set head_dim"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by num_query_groups={self.kv_heads}"
            )
        if self.position_embedding == "rope" and (self.rotary_dim == 0 or self.rotary_dim % 2):
            raise ValueError(
                f"head_dim={self.head_size} with rope.percent={self.rope.percent:g} rotates {self.rotary_dim} "
                "channels: rotary embedding needs pairs"
            )
        if self.qk_norm != "none" and self.normalization != "RMSNorm":
            raise ValueError(f"qk_norm={self.qk_norm} needs normalization=RMSNorm")
        if self.sparse_attention is not None:
            if len(self.sparse_layers) != self.num_layers:
                raise ValueError(
                    f"sparse_attention.layers has {len(self.sparse_layers)} flags for num_layers={self.num_layers}"
                )
            if self.attention_dropout > 0:
                raise ValueError(f"attention_dropout={self.attention_dropout} is not possible with sparse_attention")
        if self.moe is not None:
            if isinstance(self.moe.layers, list) and len(self.moe.layers) != self.num_layers:
                raise ValueError(f"moe.layers has {len(self.moe.layers)} flags for num_layers={self.num_layers}")
            if not any(self.moe_layers):
                raise ValueError("moe.layers selects no layer: remove the moe section or select one")
            if self.activation != "swiglu" or self.bias == "all":
                raise ValueError("moe experts are bias-free SwiGLU: set activation=swiglu and bias to none or qkv")
        return self
