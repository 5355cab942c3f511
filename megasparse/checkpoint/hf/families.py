"""All families, the ones with fewer features first: to_hf takes the first that can say a model."""

from __future__ import annotations

from megasparse.checkpoint.hf.family import Family, Fields
from megasparse.checkpoint.hf.glm4_moe import GLM4_MOE
from megasparse.checkpoint.hf.gpt2 import GPT2
from megasparse.checkpoint.hf.llama import LLAMA, MISTRAL
from megasparse.checkpoint.hf.megasparse import MEGASPARSE
from megasparse.checkpoint.hf.mixtral import MIXTRAL
from megasparse.checkpoint.hf.olmo2 import OLMO2
from megasparse.checkpoint.hf.olmoe import OLMOE
from megasparse.checkpoint.hf.qwen2 import QWEN2
from megasparse.checkpoint.hf.qwen3 import QWEN3
from megasparse.checkpoint.hf.qwen3_moe import QWEN3_MOE
from megasparse.config import Model

FAMILIES = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, MIXTRAL, OLMOE, QWEN3_MOE, GLM4_MOE, MEGASPARSE)
MLA = "kv_lora_rank"  # of multi-head latent attention, where keys and values are projected from a small latent


def family_of(model_type: str, config: Fields) -> Family:
    """The family of a ``model_type``; ValueError if it is none of ours."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    reason = (
        f" and has {MLA}={config[MLA]}, multi-head latent attention, which no recipe can say" if MLA in config else ""
    )
    raise ValueError(f"config.json has model_type={model_type!r}{reason}: only {known} can be converted")


def family_for(model: Model, vocab_size: int, positions: int, name: str | None = None) -> tuple[Family, Fields]:
    """The family called ``name``, or the first that can say ``model``, and its config; ValueError if it cannot."""
    if name is not None:
        family = family_of(name, {})
        return family, family.config(model, vocab_size, positions)
    for family in FAMILIES:
        try:
            return family, family.config(model, vocab_size, positions)
        except ValueError:
            if family is MEGASPARSE:
                raise
    raise AssertionError("MEGASPARSE says any model")
