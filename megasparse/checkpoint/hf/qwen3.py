"""Qwen3: Llama with norms of each query and key head."""

from __future__ import annotations

from megasparse.checkpoint.hf.family import Family
from megasparse.checkpoint.hf.llama import ATTENTION, FIELDS, MLP, OURS, PRE_NORM, QK_NORM, TOP
from megasparse.checkpoint.hf.qwen2 import WINDOWS, full_attention, no_window

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=FIELDS,
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
    ours={**OURS, "qk_norm": "head"},
    top=TOP,
    layer={**PRE_NORM, **ATTENTION, **QK_NORM, **MLP},
    read=full_attention,
    write=no_window,
    reads=WINDOWS,
)
