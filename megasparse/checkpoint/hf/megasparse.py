"""What no other family can say: the recipe's model as it is, by modeling_megasparse.py, which goes along.

Its config has the fields of the recipe's model by their own names. Its tensors have Llama's names, but for those that
only we have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.checkpoint.hf.family import Family, Fields, resolved
from megasparse.checkpoint.hf.glm4_moe import GLM4_MOE
from megasparse.checkpoint.hf.llama import TOP
from megasparse.checkpoint.hf.olmo2 import POST_NORM
from megasparse.checkpoint.hf.tensors import Entry, Halves, Same
from megasparse.config import Model, parse_model

MODELING = Path(__file__).with_name("modeling_megasparse.py")
AUTO_MAP = {
    "AutoConfig": "modeling_megasparse.MegasparseConfig",
    "AutoModelForCausalLM": "modeling_megasparse.MegasparseForCausalLM",
}
SELECTORS = (
    *("core_attention.gate.query", "core_attention.gate.key", "core_attention.centroids.weight"),
    *(
        f"core_attention.{c}.{part}"
        for c in ("compress_key", "compress_value")
        for part in ("position", "hidden", "output")
    ),
    *("linear_branches.weight", "linear_gate.weight"),
)


@dataclass(frozen=True)
class Ours(Family):
    """Its config is the recipe's model."""

    def model(self, config: Fields, ignored: frozenset[str] = frozenset()) -> Model:
        raw = {name: config[name] for name in Model.model_fields if name in config}
        return parse_model(raw, "the model of config.json")

    def config(self, model: Model, vocab_size: int, positions: int) -> Fields:
        return {**resolved(model, vocab_size, positions), "auto_map": AUTO_MAP}


def _layer() -> dict[str, Entry]:
    entries: dict[str, Any] = {**GLM4_MOE.layer, **POST_NORM}
    for name in ("input_layernorm", "pre_mlp_layernorm", "self_attention.post_layernorm", "mlp.post_layernorm"):
        entries[f"{name}.bias"] = Same(entries[f"{name}.weight"].name.replace("weight", "bias"))
    entries["self_attention.linear_proj.bias"] = Same("self_attn.o_proj.bias")
    entries["mlp.linear_fc1.bias"] = Halves("mlp.gate_proj.bias", "mlp.up_proj.bias")
    entries["mlp.linear_fc2.bias"] = Same("mlp.down_proj.bias")
    entries |= {f"self_attention.{name}": Same(f"self_attn.{name}") for name in SELECTORS}
    return entries


MEGASPARSE = Ours(
    model_type="megasparse",
    architecture="MegasparseForCausalLM",
    fields={},
    ours={},
    top={
        **TOP,
        "embedding.position_embeddings.weight": Same("model.embed_positions.weight"),
        "decoder.final_layernorm.bias": Same("model.norm.bias"),
    },
    layer=_layer(),
)
