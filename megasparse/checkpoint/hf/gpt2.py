"""GPT-2: learned positions, LayerNorm, biases everywhere, and weights of the shape [in, out]."""

from __future__ import annotations

from megasparse.checkpoint.hf.family import Family, Fields
from megasparse.checkpoint.hf.tensors import Entry, FusedQkv, Same, Transposed
from megasparse.config import Model


def _read(config: Fields) -> Fields:
    return {"num_query_groups": config["n_head"], "ffn_hidden_size": config["n_inner"] or 4 * config["n_embd"]}


def _write(model: Model) -> Fields:
    return {"n_inner": model.ffn_size}


def _layer() -> dict[str, Entry]:
    entries: dict[str, Entry] = {
        "self_attention.linear_qkv.weight": FusedQkv("attn.c_attn.weight"),
        "self_attention.linear_qkv.bias": FusedQkv("attn.c_attn.bias"),
    }
    for ours, theirs in (
        ("self_attention.linear_proj", "attn.c_proj"),
        ("mlp.linear_fc1", "mlp.c_fc"),
        ("mlp.linear_fc2", "mlp.c_proj"),
    ):
        entries |= {f"{ours}.weight": Transposed(f"{theirs}.weight"), f"{ours}.bias": Same(f"{theirs}.bias")}
    for ours, theirs in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
        entries |= {f"{ours}.{kind}": Same(f"{theirs}.{kind}") for kind in ("weight", "bias")}
    return entries


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields={
        "vocab_size": "vocab_size",
        "n_embd": "hidden_size",
        "n_layer": "num_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "norm_epsilon",
        "tie_word_embeddings": "tie_embeddings",
        "activation_function": (
            "activation",
            {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
        ),
    },
    fixed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    ours={"normalization": "LayerNorm", "position_embedding": "learned", "bias": "all"},
    top={
        "embedding.word_embeddings.weight": Same("transformer.wte.weight"),
        "embedding.position_embeddings.weight": Same("transformer.wpe.weight"),
        "decoder.final_layernorm.weight": Same("transformer.ln_f.weight"),
        "decoder.final_layernorm.bias": Same("transformer.ln_f.bias"),
        "output_layer.weight": Same("lm_head.weight"),
    },
    layer=_layer(),
    read=_read,
    write=_write,
    reads=("n_inner",),
    neutral=(
        *("resid_pdrop", "embd_pdrop", "attn_pdrop", "reorder_and_upcast_attn", "n_ctx", "task_specific_params"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    ),
    prefix="transformer.h.{}.",
    root="transformer.",
    unsaved=r"\.attn\.(bias|masked_bias)$",
)
