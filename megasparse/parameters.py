"""The weights of a model, by the recipe alone: names in the whole model and shapes, without building anything."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from megasparse.config import Model, MoE, SparseAttention

Shapes = dict[str, tuple[int, ...]]
FP8_SCALES = ".fp8_scales."  # in the names of what layers in FP8 keep


def parameters(model: Model, vocab_size: int, seq_length: int) -> Shapes:
    """Every weight of the model in the order of its layers; a tied embedding is there once.

    ``seq_length`` is the size of a learned position table whose size the recipe leaves open."""
    hidden = model.hidden_size
    shapes: Shapes = {"embedding.word_embeddings.weight": (vocab_size, hidden)}
    if model.position_embedding == "learned":
        shapes["embedding.position_embeddings.weight"] = (model.max_position_embeddings or seq_length, hidden)
    for index in range(model.num_layers):
        shapes |= {f"decoder.layers.{index}.{name}": shape for name, shape in _layer(model, index).items()}
    shapes |= _norm(model, "decoder.final_layernorm")
    if not model.tie_embeddings:
        shapes["output_layer.weight"] = (vocab_size, hidden)
    return shapes


def router_buffers(model: Model) -> Shapes:
    """What routers keep besides their weights, all float32: selection biases and the last step's loads."""
    layers = [index for index, moe in enumerate(model.moe_layers) if moe]
    experts = model.moe.num_experts if model.moe else 0
    return {f"decoder.layers.{layer}.mlp.router.{name}": (experts,) for layer in layers for name in ("bias", "load")}


class Count(NamedTuple):
    """Weights of the whole model."""

    total: int
    active: int  # used by one token: top_k of num_experts experts, everything else


def parameter_count(model: Model, vocab_size: int, seq_length: int) -> Count:
    """Weights of the model, embeddings included (``parameters``)."""
    total = experts = 0
    for name, shape in parameters(model, vocab_size, seq_length).items():
        total += math.prod(shape)
        experts += math.prod(shape) if ".mlp.experts." in name else 0
    idle = experts - experts * model.moe.top_k // model.moe.num_experts if model.moe else 0
    return Count(total, total - idle)


def _layer(model: Model, index: int) -> Shapes:
    hidden, head = model.hidden_size, model.head_size
    query, key_value = head * model.num_attention_heads, head * model.kv_heads
    post = model.norm_placement == "post"
    shapes: Shapes = {} if post else _norm(model, "input_layernorm")
    qkv, everywhere = model.bias != "none", model.bias == "all"
    shapes |= _linear("self_attention.linear_qkv", query + 2 * key_value, hidden, qkv)
    shapes |= _linear("self_attention.linear_proj", hidden, query, everywhere)
    if model.qk_norm != "none":
        widths = (head, head) if model.qk_norm == "head" else (query, key_value)
        for name, width in zip("qk", widths, strict=True):
            shapes[f"self_attention.{name}_layernorm.weight"] = (width,)
    if model.sparse_attention is not None and model.sparse_layers[index]:
        shapes |= {f"self_attention.{name}": shape for name, shape in _selector(model, model.sparse_attention).items()}
    shapes |= _norm(model, "self_attention.post_layernorm" if post else "pre_mlp_layernorm")
    if model.moe is not None and model.moe_layers[index]:
        shapes |= _experts(hidden, model.moe)
    else:
        shapes |= _mlp("mlp", hidden, model.ffn_size, gated=model.activation == "swiglu", bias=everywhere)
    return shapes | (_norm(model, "mlp.post_layernorm") if post else {})


def _norm(model: Model, name: str) -> Shapes:
    kinds = ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)
    return {f"{name}.{kind}": (model.hidden_size,) for kind in kinds}


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _mlp(name: str, hidden: int, width: int, gated: bool, bias: bool = False) -> Shapes:
    first = _linear(f"{name}.linear_fc1", 2 * width if gated else width, hidden, bias)
    return first | _linear(f"{name}.linear_fc2", hidden, width, bias)


def _experts(hidden: int, moe: MoE) -> Shapes:
    up, down = (moe.num_experts, moe.ffn_hidden_size, hidden), (moe.num_experts, hidden, moe.ffn_hidden_size)
    shapes: Shapes = {"mlp.router.weight": (moe.num_experts, hidden)}
    shapes |= {"mlp.experts.w1": up, "mlp.experts.w2": down, "mlp.experts.w3": up}
    if moe.shared_expert_ffn_hidden_size:
        shapes |= _mlp("mlp.shared_experts", hidden, moe.shared_expert_ffn_hidden_size, gated=True)
    return shapes


def _selector(model: Model, sparse: SparseAttention) -> Shapes:
    """What a block-sparse layer has besides a dense one's."""
    head, heads, kv_heads = model.head_size, model.num_attention_heads, model.kv_heads
    match sparse.selector:
        case "gate":
            return {
                "core_attention.gate.query": (kv_heads, sparse.gate_dim, heads // kv_heads * head),
                "core_attention.gate.key": (kv_heads, sparse.gate_dim, 3 * head),
            }
        case "clusters":
            return {"core_attention.centroids.weight": (kv_heads, sparse.clusters, head)}
        case "nsa":
            shapes: Shapes = {}
            for name in ("compress_key", "compress_value"):
                shapes |= {
                    f"core_attention.{name}.position": (kv_heads, sparse.compression_size, head),
                    f"core_attention.{name}.hidden": (kv_heads, head, sparse.compression_size * head),
                    f"core_attention.{name}.output": (kv_heads, head, head),
                }
            shapes["linear_branches.weight"] = (4 * kv_heads * head, model.hidden_size)
            shapes["linear_gate.weight"] = (3 * heads, model.hidden_size)
            return shapes
        case _:
            return {}
