"""FLOPs against transformers' models, the device's rate against a plain loop."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megasparse.config import Model, MoE, SparseAttention
from megasparse.flops import flops_per_token, matmul_flops
from megasparse.parameters import parameter_count

VOCAB, SEQ = 96, 24
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQ,
    "attn_implementation": "eager",
}


def llama() -> tuple[Model, torch.nn.Module]:
    model = Model(num_layers=3, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48)
    return model, LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48))


def qwen3() -> tuple[Model, torch.nn.Module]:
    """head_dim free of hidden / heads, QK-norm per head, tied embeddings."""
    model = Model(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=16,
        ffn_hidden_size=48,
        qk_norm="head",
        tie_embeddings=True,
    )
    return model, Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, intermediate_size=48, tie_word_embeddings=True))


def gpt2() -> tuple[Model, torch.nn.Module]:
    """Biases everywhere, LayerNorm, learned positions, GELU."""
    model = Model(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=48,
        activation="gelu_tanh",
        normalization="LayerNorm",
        bias="all",
        position_embedding="learned",
        tie_embeddings=True,
    )
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=SEQ, n_embd=32, n_layer=3, n_head=4, n_inner=48, attn_implementation="eager"
    )
    return model, GPT2LMHeadModel(config)


def olmoe() -> tuple[Model, torch.nn.Module]:
    """8 experts top-2, QK-norm over the full width."""
    model = Model(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        qk_norm="full",
        moe=MoE(num_experts=8, top_k=2, ffn_hidden_size=40),
    )
    config = OlmoeConfig(
        **SIZES, intermediate_size=40, num_experts=8, num_experts_per_tok=2, experts_implementation="eager"
    )
    return model, OlmoeForCausalLM(config)


MODELS = [llama, qwen3, gpt2, olmoe]


@pytest.mark.parametrize("make", MODELS)
def test_flops_are_those_counted_in_transformers(make):
    """Sequences of one token: causal and full attention, which eager attention computes, are then the same."""
    model, reference = make()
    tokens = torch.randint(VOCAB, (64, 1))
    with FlopCounterMode(display=False) as counter:
        reference(input_ids=tokens, labels=tokens, use_cache=False).logits.sum().backward()
    by_module = counter.get_flop_counts()
    rotary = sum(sum(flops.values()) for name, flops in by_module.items() if name.endswith("rotary_emb"))
    assert flops_per_token(model, VOCAB, 1) * 64 == counter.get_total_flops() - rotary


def test_attention_flops_are_causal():
    """Each of 3 layers: 4 * query width * mean context, and backward twice that."""
    model, _ = qwen3()
    context = sum(range(1, SEQ + 1)) / SEQ - 1  # seen beyond the token itself
    extra = flops_per_token(model, VOCAB, SEQ) - flops_per_token(model, VOCAB, 1)
    assert extra == pytest.approx(3 * 3 * 4 * (4 * 16) * context)


def test_attention_flops_of_sparse_layers_follow_their_density():
    dense, _ = qwen3()
    sparse = dense.model_copy(update={"sparse_attention": SparseAttention(selector="local", layers=[1, 0, 1])})
    context = sum(range(1, SEQ + 1)) / SEQ
    saved = flops_per_token(dense, VOCAB, SEQ) - flops_per_token(sparse, VOCAB, SEQ, 0.25)
    assert saved == pytest.approx(0.75 * 2 * 3 * 4 * (4 * 16) * context)
    assert flops_per_token(sparse, VOCAB, SEQ) == flops_per_token(dense, VOCAB, SEQ)


def test_shared_expert_and_dense_layers_among_sparse_ones():
    plain = Model(num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48)
    moe = MoE(num_experts=8, top_k=2, ffn_hidden_size=40, shared_expert_ffn_hidden_size=56, layers=2)
    mixed = plain.model_copy(update={"moe": moe})
    of_sparse = 32 * 8 + 3 * 32 * (56 + 2 * 40)
    dense, sparse = parameter_count(plain, VOCAB, SEQ), parameter_count(mixed, VOCAB, SEQ)
    assert sparse.active - dense.active == 2 * (of_sparse - 3 * 32 * 48)
    assert sparse.total - sparse.active == 2 * 6 * 3 * 32 * 40
    assert flops_per_token(mixed, VOCAB, SEQ) - flops_per_token(plain, VOCAB, SEQ) == 6 * 2 * (of_sparse - 3 * 32 * 48)


def test_matmul_flops_is_near_a_plain_loop():
    rate = matmul_flops(torch.float32, seconds=0.2)
    a = torch.randn(512, 512)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    assert rate / 5 < 2 * 512**3 / sorted(times)[15] < rate * 5


def test_matmul_flops_ends_in_time_where_a_dtype_is_slow():
    start = time.perf_counter()
    assert matmul_flops(torch.float16, seconds=0.1) > 0
    assert time.perf_counter() - start < 5
