"""Qwen2: Llama with biases of query, key and value."""

from __future__ import annotations

from megasparse.checkpoint.hf.family import Family, Fields
from megasparse.checkpoint.hf.llama import ATTENTION, FIELDS, MLP, OURS, PRE_NORM, QKV_BIAS, TOP
from megasparse.config import Model


def full_attention(config: Fields) -> Fields:
    """ValueError for windows, in either of the two ways that configs say them."""
    kinds = set(config.get("layer_types") or []) - {"full_attention"}
    if config.get("use_sliding_window") or kinds:
        what = f"layer_types with {', '.join(sorted(kinds))}" if kinds else "use_sliding_window=True"
        raise ValueError(f"config.json has {what}: only full attention can be converted")
    return {}


def no_window(_: Model) -> Fields:
    return {"use_sliding_window": False}


WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")  # what full_attention checks

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields={name: ours for name, ours in FIELDS.items() if name != "head_dim"},
    fixed={"hidden_act": ("silu",)},
    ours={**OURS, "bias": "qkv"},
    top=TOP,
    layer={**PRE_NORM, **ATTENTION, **QKV_BIAS, **MLP},
    read=full_attention,
    write=no_window,
    reads=WINDOWS,
    neutral=("use_mrope",),  # Qwen2.5's, which transformers does not read
)
