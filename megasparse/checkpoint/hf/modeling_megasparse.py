"""megasparse models for transformers: ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.

This file goes along with an exported checkpoint and needs torch and transformers alone. It is the trained model as
megasparse evaluates it: no dropout, experts take every token, attention is block-sparse as at the end of the run.
Written to be read, not for speed: sparse layers make a mask of [heads, seq, seq], and there is no cache of keys and
values, so that each step of ``generate`` sees the whole text.

Hidden states are [batch, seq, hidden]; queries, keys and values [batch, heads, seq, head_dim].
"""
# ruff: noqa: RUF012

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import can_return_tuple

Pair = tuple[Tensor, Tensor]
ROPE = {
    **{"theta": 10_000.0, "percent": 1.0, "scaling": "none", "factor": 1.0, "original_max_position_embeddings": None},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None},
}


class MegasparseConfig(PreTrainedConfig):
    """The ``model`` section of the recipe, by its own names; ``moe`` and ``sparse_attention`` are whole sections."""

    model_type = "megasparse"
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "num_key_value_heads": "num_query_groups",
        "intermediate_size": "ffn_hidden_size",
        "tie_word_embeddings": "tie_embeddings",
    }

    vocab_size: int = 50_304
    num_layers: int = 12
    hidden_size: int = 768
    num_attention_heads: int = 12
    num_query_groups: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    ffn_hidden_size: int | None = None  # of dense layers; None: 4 x hidden_size
    activation: str = "swiglu"  # gelu, gelu_tanh
    normalization: str = "RMSNorm"  # LayerNorm
    norm_epsilon: float = 1e-5
    norm_placement: str = "pre"  # post: of a sublayer's output, before the residual (OLMo2)
    qk_norm: str = "none"  # head: of each head (Qwen3); full: of all heads together (OLMo2)
    bias: str = "none"  # qkv, all
    tie_embeddings: bool = False
    position_embedding: str = "rope"  # learned
    max_position_embeddings: int | None = None  # rows of the learned table
    rope: dict[str, Any] | None = None  # what is not given is as in ROPE
    moe: dict[str, Any] | None = None
    sparse_attention: dict[str, Any] | None = None
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_query_groups = self.num_query_groups or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.ffn_hidden_size = self.ffn_hidden_size or 4 * self.hidden_size
        self.rope = {**ROPE, **(self.rope or {})}
        super().__post_init__(**kwargs)


def in_layer(section: dict[str, Any] | None, index: int) -> bool:
    """Does layer ``index`` have it? By section.layers: "all"; n: every n-th, the n-th first; or a list of 0 and 1."""
    if section is None or section["layers"] == "all":
        return section is not None
    if isinstance(section["layers"], int):
        return (index + 1) % section["layers"] == 0
    return bool(section["layers"][index])


# Rotary embedding (RoFormer, arXiv 2104.09864) ------------------------------------------------------------------------


def rotary_angles(config: Any, seq: int, device: torch.device) -> Pair | None:
    """cos and sin, float32 [seq, rotated channels]; None with a learned table. Made anew in each forward pass.

    Scalings divide each frequency by the factor or keep it, or a share of both: linear; llama3, by wavelength; yarn
    (arXiv 2309.00071), by rotations within the original length.
    """
    if config.position_embedding != "rope":
        return None
    rope, dim = config.rope, int(config.head_dim * config.rope["percent"])
    frequency = 1.0 / (rope["theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    original, kept, scale = rope["original_max_position_embeddings"], torch.ones(dim // 2), 1.0
    match rope["scaling"]:
        case "linear":
            kept = torch.zeros(dim // 2)
        case "llama3":
            turns, low, high = original * frequency / (2 * math.pi), rope["low_freq_factor"], rope["high_freq_factor"]
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        case "yarn":
            fast, slow = (
                dim * math.log(original / (rope[beta] * 2 * math.pi)) / (2 * math.log(rope["theta"]))
                for beta in ("beta_fast", "beta_slow")
            )
            low, high = max(math.floor(fast), 0), min(math.ceil(slow), dim - 1)
            high = high + 0.001 if low == high else high
            kept = 1 - ((torch.arange(dim // 2) - low) / (high - low)).clamp(0, 1)
            scale = rope["attention_factor"] or 0.1 * math.log(max(rope["factor"], 1.0)) + 1.0
    frequency = frequency / rope["factor"] * (1 - kept) + frequency * kept
    angles = torch.outer(torch.arange(seq, device=device).float(), frequency.to(device)).repeat(1, 2)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, angles: Pair | None) -> Tensor:
    """The first channels of each head, in pairs (i, i + half of them); the others pass."""
    if angles is None:
        return x
    cos, sin = (part.to(x.dtype) for part in angles)
    rotated, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, -1)
    return torch.cat([rotated * cos + torch.cat([-second, first], -1) * sin, passed], -1)


# Which blocks of keys a query sees ------------------------------------------------------------------------------------


@torch.no_grad()
def listed_keys(sparse: dict[str, Any], k: Tensor, scores: Tensor | None) -> Tensor | None:
    """bool [1 or batch, 1 or kv_heads, seq, seq]: which keys a query sees; None: all, as ``dense_end`` has it.

    Query block i is queries i * query_block_size and on, a ragged last one as if it were whole. Its own key blocks,
    ``local_blocks`` with those right before them, and the first ``sink_blocks`` are always seen. scores: of blocks,
    float32 [batch, kv_heads, q_blocks, k_blocks]; None where the selector has a fixed pattern.
    """
    if sparse["dense_end"] > 0 or sparse["dense_start"] == 1:
        return None
    kv_heads, seq = k.shape[1:3]
    size, rows = sparse["block_size"], sparse["query_block_size"]
    start = torch.arange(0, seq, rows, device=k.device).unsqueeze(1)
    first, last = start // size, (start + rows - 1) // size  # [q_blocks, 1]: the own key blocks
    blocks = torch.arange(int(last.max()) + 1, device=k.device)
    always = (blocks <= last) & ((blocks > first - sparse["local_blocks"]) | (blocks < sparse["sink_blocks"]))
    if scores is not None:
        listed = choose(sparse, scores, always, (blocks < first) & ~always)
    elif sparse["selector"] == "strided":
        heads = torch.arange(kv_heads, device=k.device).view(-1, 1, 1)
        strides = (blocks + heads * max(1, sparse["stride"] // kv_heads)) % sparse["stride"] == 0
        listed = (always | (strides & (blocks <= last))).unsqueeze(0)
    else:
        listed = always.expand(1, 1, -1, -1)
    by_query = listed.repeat_interleave(rows, 2)[:, :, :seq]
    return by_query.repeat_interleave(size, 3)[..., :seq].tril()


def choose(sparse: dict[str, Any], scores: Tensor, always: Tensor, others: Tensor) -> Tensor:
    """bool [batch, kv_heads, q_blocks, k_blocks]: ``always`` and the best of ``others``, ``blocks`` in all; the earlier
    block wins a tie, and one whose score is -inf is never chosen.

    mass: of the others the fewest whose softmax adds up to it (FlexPrefill, arXiv 2502.20766), within the budget.
    """
    scores = F.pad(scores, (0, always.shape[1] - scores.shape[-1])).masked_fill(~others, -torch.inf)
    best = torch.sort(scores.masked_fill(always, torch.inf), dim=-1, descending=True, stable=True)
    index, keep = best.indices[..., : sparse["blocks"]], best.values[..., : sparse["blocks"]] > -torch.inf
    if sparse["mass"] is not None:
        weights = scores.softmax(-1).nan_to_num().gather(-1, index)  # of what is always seen: zero
        keep &= weights.cumsum(-1) - weights < sparse["mass"]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, keep)


def choosers(sparse: dict[str, Any], q: Tensor, kv_heads: int) -> Tensor:
    """Who scores for each query block, summed over the group's heads: float32 [batch, kv_heads, q_blocks, head_dim].

    The query itself, or the mean query of the block before; the first block has nothing to choose.
    """
    means = by_block(q.float().unflatten(1, (kv_heads, -1)).sum(2), sparse["query_block_size"]).mean(-2)
    if sparse["query_block_size"] == 1:
        return means
    return torch.cat([torch.zeros_like(means[:, :, :1]), means[:, :, :-1]], 2)


def by_block(x: Tensor, size: int) -> Tensor:
    """[..., seq, dim] -> [..., blocks, size, dim], a ragged last block filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))


# Attention ------------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Like q: softmax attention, causal or, in float32 as megasparse's kernels have it, to the keys that ``seen`` says,
    bool [1 or batch, 1 or kv_heads, seq, keys]."""
    group = q.shape[1] // k.shape[1]
    if seen is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
    seen = seen.repeat_interleave(group if seen.shape[1] > 1 else 1, 1)
    output = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=seen, enable_gqa=group > 1)
    return output.to(q.dtype)


class BlockSparseAttention(nn.Module):
    """Attention to the blocks of keys that a selector lists, one list for the heads of a group:

    local     a window and the first blocks (StreamingLLM, arXiv 2309.17453)
    strided   a window and every n-th block, shifted by head (S2-Attention, arXiv 2407.17678)
    pooled    best by <q_t, mean of block j's keys> / sqrt(head_dim) (MoBA, arXiv 2502.13189)
    gate      best by <W_q q_t, W_k [max, min, mean of block j's keys]> / sqrt(gate_dim) (SeerAttention-R, 2506.08889)
    clusters  best by how many keys have the query's nearest centroid (Routing Transformer, arXiv 2003.05997)
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        sparse = self.sparse = config.sparse_attention
        kv_heads, width = config.num_query_groups, config.num_attention_heads * config.head_dim
        if sparse["selector"] == "gate":
            query = torch.empty(kv_heads, sparse["gate_dim"], width // kv_heads)
            key = torch.empty(kv_heads, sparse["gate_dim"], 3 * config.head_dim)
            self.gate = nn.ParameterDict({"query": query, "key": key})
        if sparse["selector"] == "clusters":
            weight = torch.empty(kv_heads, sparse["clusters"], config.head_dim)
            self.centroids = nn.ParameterDict({"weight": weight})

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, listed_keys(self.sparse, k, self.scores(q, k)))

    @torch.no_grad()
    def scores(self, q: Tensor, k: Tensor) -> Tensor | None:
        blocks = by_block(k, self.sparse["block_size"])  # [batch, kv_heads, k_blocks, block_size, head_dim]
        match self.sparse["selector"]:
            case "pooled":
                queries = choosers(self.sparse, q, k.shape[1]) / math.sqrt(q.shape[-1])
                return queries @ blocks.float().mean(-2).mT
            case "gate":
                grouped = q.unflatten(1, (k.shape[1], -1)).transpose(2, 3).flatten(3)
                pooled = torch.cat([blocks.amax(-2), blocks.amin(-2), blocks.mean(-2)], -1)
                queries = torch.einsum("bhqe,hge->bhqg", grouped, self.gate["query"]).float()
                keys = torch.einsum("bhke,hge->bhkg", pooled, self.gate["key"]).float()
                return queries / math.sqrt(keys.shape[-1]) @ keys.mT
            case "clusters":
                centroids = F.normalize(self.centroids["weight"].float(), dim=-1)
                wanted, have = (
                    F.one_hot((x.float() @ centroids.mT).argmax(-1), centroids.shape[1]).float()
                    for x in (choosers(self.sparse, q, k.shape[1]), k)
                )
                return wanted @ by_block(have, self.sparse["block_size"]).mean(-2).mT
        return None


class NativeSparseAttention(BlockSparseAttention):
    """NSA (arXiv 2502.11089): selected blocks, a window and compressed keys, each with keys and values of its own, in a
    gated sum. A block's score is how much of the attention to compressed keys falls into it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm_epsilon = config.norm_epsilon if config.qk_norm != "none" else None
        self.compress_key, self.compress_value = Compression(config), Compression(config)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, near: Pair, coarse: Pair, gates: Tensor) -> Tensor:
        """near, coarse: keys and values, like k and v, of the window and to be compressed; gates, before their sigmoid:
        [batch, heads, seq, 3]."""
        keys, values = self.compress_key(coarse[0]), self.compress_value(coarse[1])
        if self.norm_epsilon is not None:  # the mean of normed keys is short
            keys = F.rms_norm(keys, keys.shape[-1:], eps=self.norm_epsilon)
        stride, size = self.compress_key.stride, self.compress_key.size
        positions = torch.arange(q.shape[2], device=q.device).unsqueeze(1)
        # [seq, compressed]: a query sees those all of whose keys it may see.
        seen = torch.arange(keys.shape[2], device=q.device) * stride + size <= positions + 1
        some = seen.any(-1, keepdim=True)
        own = positions // self.sparse["block_size"]
        in_window = (own - own.T < self.sparse["window_blocks"]).tril()
        selected = attend(q, k, v, listed_keys(self.sparse, k, self.importance(q, keys, seen)))
        window = attend(q, near[0], near[1], in_window.expand(1, 1, -1, -1))
        summary = torch.zeros_like(q)
        if some.any():
            mask, grouped = seen | ~some, q.shape[1] != keys.shape[1]
            summary = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=grouped).where(some, 0)
        return (torch.stack([selected, window, summary], -2) * gates.sigmoid().unsqueeze(-1)).sum(-2)

    @torch.no_grad()
    def importance(self, q: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
        """float32 [batch, kv_heads, seq, k_blocks]: log of the attention to compressed keys, summed over the group's
        heads; a compressed key counts for a block as often as strides of it lie there (the paper's equation 9)."""
        stride, size = self.compress_key.stride, self.compress_key.size
        blocks, strides = math.ceil(q.shape[2] / self.sparse["block_size"]), self.sparse["block_size"] // stride
        grouped = q.unflatten(1, (keys.shape[1], -1)).float()
        logits = grouped @ keys.float().unsqueeze(2).mT / math.sqrt(q.shape[-1])
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num().sum(2)
        by_stride = weights.new_zeros(*weights.shape[:-1], blocks * strides)
        for n in range(size // stride):
            by_stride[..., n : n + keys.shape[2]] += weights
        return by_stride.unflatten(-1, (blocks, strides)).sum(-1).log()


class Compression(nn.Module):
    """``size`` keys or values to one, every ``stride``: their mean, and an MLP of them with their places.

    x_0 .. x_{l-1} -> mean(x) + output gelu(hidden [x_0 + position_0, .., x_{l-1} + position_{l-1}])
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.size, self.stride = (config.sparse_attention[f"compression_{name}"] for name in ("size", "stride"))
        heads, dim = config.num_query_groups, config.head_dim
        self.position = nn.Parameter(torch.empty(heads, self.size, dim))
        self.hidden = nn.Parameter(torch.empty(heads, dim, self.size * dim))
        self.output = nn.Parameter(torch.empty(heads, dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, kv_heads, seq, head_dim] -> [batch, kv_heads, n, head_dim]; none for fewer than ``size`` keys."""
        if x.shape[2] < self.size:
            return x[:, :, :0]
        windows = x.unfold(2, self.size, self.stride).mT  # [batch, kv_heads, n, size, head_dim]
        placed = (windows + self.position.unsqueeze(1)).flatten(-2)
        return windows.mean(-2) + F.gelu(placed @ self.hidden.mT) @ self.output.mT


class SelfAttention(nn.Module):
    """Grouped-query attention: dense, or as ``sparse_attention`` says where it has this layer."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.head_dim, self.kv_heads = config.head_dim, config.num_query_groups
        width, kv_width = config.num_attention_heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.bias != "none")
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.bias != "none")
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.bias != "none")
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.bias == "all")
        self.q_norm = self.k_norm = self.core_attention = self.linear_branches = self.linear_gate = None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = nn.RMSNorm(width if full else self.head_dim, eps=config.norm_epsilon)
            self.k_norm = nn.RMSNorm(kv_width if full else self.head_dim, eps=config.norm_epsilon)
        if in_layer(config.sparse_attention, index):
            nsa = config.sparse_attention["selector"] == "nsa"
            self.core_attention = NativeSparseAttention(config) if nsa else BlockSparseAttention(config)
            if nsa:  # Megatron's order: for each K/V head the window's key, the compressed key, and their values
                self.linear_branches = nn.Linear(config.hidden_size, 4 * kv_width, bias=False)
                self.linear_gate = nn.Linear(config.hidden_size, 3 * config.num_attention_heads, bias=False)

    def forward(self, x: Tensor, angles: Pair | None) -> Tensor:
        q = rotate(self._heads(self.q_proj(x), self.q_norm), angles)
        k = rotate(self._heads(self.k_proj(x), self.k_norm), angles)
        v = self._heads(self.v_proj(x))
        if self.core_attention is None:
            y = attend(q, k, v)
        elif self.linear_branches is None or self.linear_gate is None:
            y = self.core_attention(q, k, v)
        else:
            branches = self.linear_branches(x).unflatten(-1, (self.kv_heads, 4, self.head_dim))
            near, coarse, *values = (part.flatten(2) for part in branches.unbind(3))
            near, coarse = rotate(self._heads(near, self.k_norm), angles), rotate(self._heads(coarse), angles)
            v_near, v_coarse = map(self._heads, values)
            gates = self.linear_gate(x).unflatten(-1, (-1, 3)).transpose(1, 2)
            y = self.core_attention(q, k, v, (near, v_near), (coarse, v_coarse), gates)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
        """[batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]; norms are as wide as a head or as all."""
        if norm is not None:
            x = norm(x.unflatten(-1, (-1, len(norm.weight)))).flatten(2)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


# MLP and mixture of experts -------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """down(silu(gate x) * up x), the SwiGLU, or down(gelu(up x))."""

    def __init__(self, hidden: int, width: int, activation: str = "swiglu", bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias) if activation == "swiglu" else None
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.approximate = "tanh" if activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate=self.approximate))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Top-k routing in float32: softmax (Mixtral, OLMoE), or sigmoid with groups of experts (DeepSeek-V3, arXiv
    2412.19437), and a bias for the selection alone (arXiv 2408.15664)."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: Any) -> None:
        super().__init__()
        moe = self.moe = config.moe
        self.weight = nn.Parameter(torch.empty(moe["num_experts"], config.hidden_size))
        bias = torch.zeros(moe["num_experts"], dtype=torch.float32) if moe["bias_update_rate"] > 0 else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] -> weights, float32, and experts, int64, both [tokens, top_k]."""
        moe, bias = self.moe, self.e_score_correction_bias
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.softmax(-1) if moe["score_function"] == "softmax" else logits.sigmoid()
        selection = scores if bias is None else scores + bias
        if moe["num_groups"] is not None:  # a group's score is that of its two best experts
            grouped = selection.unflatten(1, (moe["num_groups"], -1))
            groups = best(grouped.topk(2, -1).values.sum(-1), moe["top_k_groups"])
            outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, groups, False)
            selection = grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(1)
        experts = best(selection, moe["top_k"])
        weights = scores.gather(1, experts)
        if moe["normalize_scores"]:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * moe["score_scale"], experts


def best(scores: Tensor, k: int) -> Tensor:
    """Indices [tokens, k] of the largest of [tokens, n], of equals the lowest first."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]


class MoE(nn.Module):
    """Every token through its top_k experts, none dropped, and the shared ones (DeepSeekMoE, arXiv 2401.06066)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        moe, hidden = config.moe, config.hidden_size
        shared = moe["shared_expert_ffn_hidden_size"]
        self.gate = Router(config)
        self.experts = nn.ModuleList(MLP(hidden, moe["ffn_hidden_size"]) for _ in range(moe["num_experts"]))
        self.shared_experts = MLP(hidden, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, experts = self.gate(flat)
        weights, total = weights.to(x.dtype).float(), torch.zeros_like(flat, dtype=torch.float32)
        for index, expert in enumerate(self.experts):
            token, choice = (experts == index).nonzero(as_tuple=True)
            total.index_add_(0, token, expert(flat[token]).float() * weights[token, choice].unsqueeze(-1))
        y = total.to(x.dtype).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)


# The model ------------------------------------------------------------------------------------------------------------


def norm(config: Any) -> nn.Module:
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_epsilon)


class DecoderLayer(nn.Module):
    """Attention and MLP with a norm before each (names as in Llama) or, placed "post", after (as in OLMo2)."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.post, dense = config.norm_placement == "post", not in_layer(config.moe, index)
        mlp = config.hidden_size, config.ffn_hidden_size, config.activation, config.bias == "all"
        self.self_attn = SelfAttention(config, index)
        self.mlp = MLP(*mlp) if dense else MoE(config)
        self.post_attention_layernorm = norm(config)
        if self.post:
            self.post_feedforward_layernorm = norm(config)
        else:
            self.input_layernorm = norm(config)

    def forward(self, x: Tensor, angles: Pair | None) -> Tensor:
        if self.post:
            x = x + self.post_attention_layernorm(self.self_attn(x, angles))
            return x + self.post_feedforward_layernorm(self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, positions = config, config.max_position_embeddings
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position_embedding == "learned"
        self.embed_positions = nn.Embedding(positions, config.hidden_size) if learned else None
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = norm(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, seq] -> [batch, seq, hidden]. ValueError where the learned table ends."""
        x, seq = self.embed_tokens(input_ids), input_ids.shape[1]
        if self.embed_positions is not None:
            if seq > (rows := len(self.embed_positions.weight)):
                raise ValueError(f"{seq} tokens are more than max_position_embeddings={rows}: shorten the input")
            x = x + self.embed_positions.weight[:seq]
        angles = rotary_angles(self.config, seq, x.device)
        for layer in self.layers:
            x = layer(x, angles)
        return self.norm(x)


class MegasparseForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of the next token. No cache of keys and values: ``use_cache`` changes nothing."""

    config_class = MegasparseConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keep_in_fp32_modules_strict = {"e_score_correction_bias"}

    def __init__(self, config: MegasparseConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = None,
    ) -> CausalLMOutput:
        """input_ids [batch, seq] -> logits [batch, seq, vocab], or of the last ``logits_to_keep`` tokens; with labels
        [batch, seq] (-100: not scored) the mean cross-entropy of each token given those before it.

        attention_mask [batch, seq]: zeros after the text change nothing for it; before it they are a ValueError.
        """
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError(
                "attention_mask has zeros before ones: sequences must not be padded on the left (pad on the right; "
                "those that generate continues must be of one length)"
            )
        logits = self.lm_head(self.model(input_ids)[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Any = None, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.ParameterDict | Compression | Router):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=0.02)
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)
