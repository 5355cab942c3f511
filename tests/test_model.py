"""The recipe's model against transformers' families: the same weights give the same logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from megasparse import topology
from megasparse.layers.moe import MoELayer
from megasparse.model import GPTModel, build_model, moe_layers
from megasparse.placement import local_weights
from tests import oracle, small
from tests.helpers import assert_close, relative_error, run_distributed


@dataclass
class Family:
    """A model of transformers, and the recipe that says the same."""

    model_type: str
    theirs: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] | None = None


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "llama": Family("llama", {"head_dim": 12}, {"head_dim": 12}),
    "llama-mha-tied": Family(
        "llama",
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_query_groups": 4, "tie_embeddings": True},
    ),
    "llama-mqa": Family("llama", {"num_key_value_heads": 1}, {"num_query_groups": 1}),
    "llama-3.1": Family(
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
        {"rope": {"theta": 500.0, "scaling": "llama3", **LLAMA3}},
    ),
    "qwen2": Family("qwen2", {}, {"bias": "qkv"}),
    "qwen3": Family("qwen3", {"head_dim": 16}, {"head_dim": 16, "qk_norm": "head"}),
    "olmo2": Family("olmo2", {}, {"norm_placement": "post", "qk_norm": "full"}),
    "mixtral": Family("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, {}, {}),
    "olmoe": Family("olmoe", EXPERTS, {"qk_norm": "full"}, {"normalize_scores": False}),
    "qwen3-moe": Family(
        "qwen3_moe",
        {**EXPERTS, "num_hidden_layers": 4, "mlp_only_layers": [0, 2], "norm_topk_prob": True, "head_dim": 16}
        | {"intermediate_size": 40, "moe_intermediate_size": 48},
        {"num_layers": 4, "qk_norm": "head", "head_dim": 16, "ffn_hidden_size": 40},
        {"layers": 2},
    ),
    "flex-olmo": Family(
        "flex_olmo", EXPERTS, {"norm_placement": "post", "qk_norm": "full"}, {"normalize_scores": False}
    ),
    "dots1": Family(  # DeepSeek-V3's router: sigmoid scores, groups, selection bias, shared experts
        "dots1",
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "n_shared_experts": 2}
        | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
        | {"num_hidden_layers": 3, "first_k_dense_replace": 1, "sliding_window": None, "head_dim": 8},
        {"num_layers": 3, "qk_norm": "head"},
        {"top_k": 3, "score_function": "sigmoid", "num_groups": 4, "top_k_groups": 2, "score_scale": 2.5}
        | {"layers": [0, 1, 1], "shared_expert_ffn_hidden_size": 96, "bias_update_rate": 0.001},
    ),
}


def logits_of(gpt: GPTModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return gpt.eval()(ids, torch.arange(ids.shape[1]).expand(len(ids), -1), None)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(single: topology.Topology, name: str) -> None:
    family = FAMILIES[name]
    theirs = oracle.decoder(family.model_type, **family.theirs).eval()
    for buffer_name, buffer in theirs.named_buffers():
        if "correction_bias" in buffer_name:
            buffer.copy_(0.2 * torch.randn(buffer.shape))
    (gpt,), _ = build_model(small.recipe(family.model, family.moe), single, small.VOCAB)
    oracle.copy_weights(gpt, theirs)
    ids = torch.randint(0, small.VOCAB, (3, small.SEQ))
    with torch.no_grad():
        expected = theirs(ids).logits
    assert relative_error(logits_of(gpt, ids), expected) < 1e-5


@pytest.mark.parametrize(("activation", "theirs"), [("gelu_tanh", "gelu_new"), ("gelu", "gelu")])
def test_gpt2_equals_transformers(single: topology.Topology, activation: str, theirs: str) -> None:
    hf = oracle.gpt2(activation_function=theirs, initializer_range=0.15).eval()
    model = {"position_embedding": "learned", "normalization": "LayerNorm", "bias": "all", "tie_embeddings": True}
    model |= {"activation": activation, "num_query_groups": 4, "ffn_hidden_size": 128}
    (gpt,), _ = build_model(small.recipe(model), single, small.VOCAB)
    oracle.copy_weights(gpt, hf)
    ids = torch.randint(0, small.VOCAB, (3, small.SEQ))
    with torch.no_grad():
        expected = hf(ids).logits
    assert relative_error(logits_of(gpt, ids), expected) < 1e-5


def test_every_gradient_equals_transformers(single: topology.Topology) -> None:
    """Of the mixed dense and sparse model with query norms: what a wrong backward would hide from the logits."""
    family = FAMILIES["qwen3-moe"]
    theirs = oracle.decoder(family.model_type, **family.theirs)
    recipe = small.recipe(family.model, {**(family.moe or {}), "aux_loss_coefficient": 0.0})
    (gpt,), _ = build_model(recipe, single, small.VOCAB)
    oracle.copy_weights(gpt, theirs)
    batch = small.batches(recipe, 0)[0]
    gpt(batch.tokens, batch.position_ids, None, labels=batch.labels).mean().backward()
    logits = theirs(batch.tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
    ours = {name: parameter.grad for name, parameter in gpt.named_parameters()}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    oracle.copy_weights(gpt, theirs)
    for name, parameter in gpt.named_parameters():
        assert_close(ours[name], parameter, 1e-4, name)


def test_document_ids_reach_every_layer(single: topology.Topology) -> None:
    """Tokens of one document do not move when another document changes."""
    recipe = small.recipe({"num_layers": 3}, {"layers": [0, 1, 1]})
    (gpt,), _ = build_model(recipe, single, small.VOCAB)
    ids = torch.randint(0, small.VOCAB, (2, small.SEQ))
    documents = (torch.arange(small.SEQ) >= 10).long().expand(2, -1)
    positions = torch.arange(small.SEQ).expand(2, -1)
    changed = ids.clone()
    changed[:, 3] = (ids[:, 3] + 1) % small.VOCAB
    with torch.no_grad():
        before, after = (gpt.eval()(t, positions, documents) for t in (ids, changed))
        free = gpt(changed, positions, None)
    torch.testing.assert_close(before[:, 10:], after[:, 10:], rtol=1e-6, atol=1e-6)
    assert (free[:, 10:] - before[:, 10:]).abs().max() > 1e-4
    assert torch.equal(before[:, :3], after[:, :3]), "causal"


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_evaluation_is_causal(single: topology.Topology, policy: str) -> None:
    """A token's logits depend on nothing after it and on no other sequence, whatever capacity training has."""
    (gpt,), _ = build_model(small.recipe(moe={"capacity_factor": 0.5, "drop_policy": policy}), single, small.VOCAB)
    for parameter in gpt.parameters():
        if parameter.dim() > 1:
            parameter.data *= 5
    ids = torch.randint(0, small.VOCAB, (3, small.SEQ))
    other = ids.clone()
    other[0, 12:], other[1:] = other[0, 12:].flip(0), other[1:].flip(1)
    ours, theirs = logits_of(gpt, ids), logits_of(gpt, other)
    assert relative_error(theirs[0, :12], ours[0, :12]) < 1e-6
    assert relative_error(theirs[0, 12:], ours[0, 12:]) > 1e-3


def test_reset_positions_reach_the_learned_table(single: topology.Topology) -> None:
    """A packed document at its own positions, masked, equals the document alone."""
    model = {"position_embedding": "learned", "max_position_embeddings": 32}
    (gpt,), _ = build_model(small.recipe(model), single, small.VOCAB)
    ids = torch.randint(0, small.VOCAB, (1, small.SEQ))
    documents = (torch.arange(small.SEQ) >= 9).long().unsqueeze(0)
    positions = torch.cat([torch.arange(9), torch.arange(small.SEQ - 9)]).unsqueeze(0)
    with torch.no_grad():
        packed = gpt.eval()(ids, positions, documents)[:, 9:]
    assert relative_error(packed, logits_of(gpt, ids[:, 9:])) < 1e-5


def test_weights_follow_the_initialisation(single: topology.Topology) -> None:
    """Normal(0, std), output projections narrower, norms 1, biases 0, no two alike."""
    recipe = small.recipe(
        {"num_layers": 4, "hidden_size": 64, "bias": "qkv", "qk_norm": "head"},
        {"layers": [0, 1, 1, 1], "shared_expert_ffn_hidden_size": 48},
    )
    chunks, _ = build_model(recipe, single, 200)
    seen: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for weight in local_weights(chunks, single):
        name, parameter = weight.name, weight.tensor
        if parameter.dim() == 1:
            expected = 0.0 if name.endswith("bias") else 1.0
            assert (parameter == expected).all(), name
            continue
        output = name.endswith(("linear_proj.weight", "linear_fc2.weight", "w2"))
        std = 0.02 / 8**0.5 if output else 0.02
        count = parameter.numel()
        assert parameter.std().item() == pytest.approx(std, rel=6 / (2 * count) ** 0.5), name
        assert abs(parameter.mean().item()) < 6 * std / count**0.5, name
        matrices = list(parameter) if parameter.dim() == 3 else [parameter]
        for matrix in matrices:
            others = seen.setdefault(tuple(matrix.shape), [])
            assert not any(torch.equal(matrix, other) for other in others), f"{name} is a copy of another weight"
            others.append(matrix)
    (other_seed,), _ = build_model(small.recipe(recipe.model.model_dump(), training={"seed": 5}), single, 200)
    assert not torch.equal(other_seed.embedding.word_embeddings.weight, chunks[0].embedding.word_embeddings.weight)


def test_the_pattern_of_layers(single: topology.Topology) -> None:
    for pattern, expected in (("all", [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), ([1, 0, 0, 1], [0, 3])):
        chunks, _ = build_model(small.recipe({"num_layers": 4}, {"layers": pattern}), single, small.VOCAB)
        assert [layer for layer, _ in moe_layers(chunks)] == expected
        routers = [moe.router for _, moe in moe_layers(chunks)]
        assert [r.is_last_moe_layer for r in routers] == [False] * (len(expected) - 1) + [True]
        assert {r.num_moe_layers for r in routers} == {len(expected)}
        assert [r.layer_number for r in routers] == [layer + 1 for layer in expected]


def padded(tp: int) -> dict[str, Any]:
    """Loss, next-token logits and gradient of the embedding with 95 tokens in the vocabulary, which tp=2 pads."""
    recipe = small.recipe({"tie_embeddings": True}, {}, parallel={"tp": tp})
    place = small.start(recipe)
    (gpt,), _ = build_model(recipe, place, small.VOCAB - 1)
    ids = torch.arange(2 * small.SEQ).view(2, -1) % (small.VOCAB - 1)
    positions = torch.arange(small.SEQ).expand(2, -1)
    losses = gpt(ids, positions, None, labels=ids.roll(-1, 1))
    losses.mean().backward()
    weight = gpt.shared_embedding_or_output_weight()
    topology.shutdown()
    return {"losses": losses.detach(), "grad": weight.grad, "rows": weight.shape[0]}


def test_a_padded_vocabulary_has_no_probability() -> None:
    whole = run_distributed(padded, 1, 1)[0]
    halves = run_distributed(padded, 2, 2)
    assert whole["rows"] == 95
    assert [half["rows"] for half in halves] == [48, 48]
    for half in halves:
        assert relative_error(half["losses"], whole["losses"]) < 1e-6
    grad = torch.cat([half["grad"] for half in halves])
    assert (grad[95:] == 0).all()
    assert relative_error(grad[:95], whole["grad"]) < 1e-5


def test_moe_layers_have_the_groups_deepspeed_looks_for(single: topology.Topology) -> None:
    (gpt,), _ = build_model(small.recipe(moe={"layers": [0, 1]}), single, small.VOCAB)
    experts = {name for name, p in gpt.named_parameters() if not getattr(p, "allreduce", True)}
    assert experts == {f"decoder.layers.1.mlp.experts.w{i}" for i in (1, 2, 3)}
    assert isinstance(gpt.decoder.layers[1].mlp, MoELayer)
