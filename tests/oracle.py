"""transformers as an independent oracle: the same weights in a Hugging Face model and in ours."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from megasparse.model import GPTModel, moe_layers

VOCAB, HIDDEN, LAYERS, HEADS, SEQ = 96, 32, 2, 4, 24


def olmoe(**changes: object) -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        pad_token_id=None,  # else that row of the embedding gets no gradient
        **changes,
    )
    torch.manual_seed(0)
    return perturb(OlmoeForCausalLM(config))


def llama(**changes: object) -> LlamaForCausalLM:
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return perturb(LlamaForCausalLM(LlamaConfig(**{**settings, **changes})))


def decoder(model_type: str, **changes: object) -> torch.nn.Module:
    """A tiny random model of any Llama-like family of transformers, by its model_type."""
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.15,  # weights that matter: at 0.02 attention and routing are all but uniform
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    torch.manual_seed(0)
    return perturb(AutoModelForCausalLM.from_config(config))


def gpt2(**changes: object) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=SEQ,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        **changes,
    )
    torch.manual_seed(0)
    return perturb(GPT2LMHeadModel(config))


def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """Norms and biases start at 1 and 0, where a swapped or forgotten one would not show: move them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def copy_weights(gpt: GPTModel, hf: torch.nn.Module) -> None:
    """Every parameter of ours from the Hugging Face model's; each of theirs is used, or this fails."""
    source = dict(hf.named_parameters())
    take = _gpt2_tensor if "transformer.wte.weight" in source else _llama_tensor
    used: set[str] = set()
    for name, parameter in gpt.named_parameters():
        value = take(name, source, used, hf.config)
        assert value.shape == parameter.shape, (name, value.shape, parameter.shape)
        parameter.copy_(value)
    assert used == set(source), f"not used: {sorted(set(source) - used)}"
    for layer, moe in moe_layers(torch.nn.ModuleList([gpt])):  # a buffer in both: DeepSeek-V3's selection bias
        bias = dict(hf.named_buffers()).get(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")
        if bias is not None:
            moe.router.bias.copy_(bias)


def _llama_tensor(name: str, source: dict[str, Tensor], used: set[str], config: object) -> Tensor:
    def get(key: str) -> Tensor:
        used.add(key)
        return source[key]

    top = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
    }
    if name in top:
        return get(top[name])
    _, _, layer, rest = name.split(".", 3)
    prefix = f"model.layers.{layer}."
    if rest in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        kind = rest.rsplit(".", 1)[1]
        return interleave_qkv(*(get(f"{prefix}self_attn.{part}_proj.{kind}") for part in "qkv"), config)
    if rest == "mlp.linear_fc1.weight":
        return torch.cat([get(prefix + "mlp.gate_proj.weight"), get(prefix + "mlp.up_proj.weight")])
    if rest == "mlp.shared_experts.linear_fc1.weight":
        return torch.cat([get(f"{prefix}mlp.shared_experts.{part}_proj.weight") for part in ("gate", "up")])
    if rest == "mlp.experts.w1":
        return get(prefix + "mlp.experts.gate_up_proj").chunk(2, 1)[0]
    if rest == "mlp.experts.w3":
        return get(prefix + "mlp.experts.gate_up_proj").chunk(2, 1)[1]
    simple = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.post_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.post_layernorm.weight": "post_feedforward_layernorm.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "mlp.router.weight": "mlp.gate.weight",
        "mlp.experts.w2": "mlp.experts.down_proj",
        "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
    }
    return get(prefix + simple[rest])


def _gpt2_tensor(name: str, source: dict[str, Tensor], used: set[str], config: object) -> Tensor:
    def get(key: str) -> Tensor:  # GPT-2's Conv1D weights are [in, out]
        used.add(key)
        return source[key].t() if source[key].dim() == 2 and ".h." in key else source[key]

    top = {
        "embedding.word_embeddings.weight": "transformer.wte.weight",
        "embedding.position_embeddings.weight": "transformer.wpe.weight",
        "decoder.final_layernorm.weight": "transformer.ln_f.weight",
        "decoder.final_layernorm.bias": "transformer.ln_f.bias",
    }
    if name in top:
        return get(top[name])
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    names = {
        "input_layernorm": "ln_1",
        "pre_mlp_layernorm": "ln_2",
        "self_attention.linear_qkv": "attn.c_attn",
        "self_attention.linear_proj": "attn.c_proj",
        "mlp.linear_fc1": "mlp.c_fc",
        "mlp.linear_fc2": "mlp.c_proj",
    }
    value = get(f"transformer.h.{layer}.{names[module]}.{kind}")
    return interleave_qkv(*value.chunk(3), config) if module == "self_attention.linear_qkv" else value


def interleave_qkv(q: Tensor, k: Tensor, v: Tensor, config: object) -> Tensor:
    """Megatron's fused order: for each K/V head its query heads, then its key, then its value."""
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return torch.cat([part.reshape(groups, -1, *q.shape[1:]) for part in (q, k, v)], dim=1).reshape(-1, *q.shape[1:])
