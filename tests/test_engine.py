"""The engine against transformers under torch's AdamW: same weights, same batches, the same losses for 20 steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse import topology
from megasparse.config import Recipe
from megasparse.data.loader import Batch
from megasparse.engine import Engine
from megasparse.generate import generate
from megasparse.model import build_model
from megasparse.placement import local_weights
from tests import oracle, small
from tests.helpers import assert_close

GPT2 = {
    "num_query_groups": 4,
    "position_embedding": "learned",
    "normalization": "LayerNorm",
    "activation": "gelu_tanh",
    "bias": "all",
    "tie_embeddings": True,
    "ffn_hidden_size": 128,
}
OLMOE = {"qk_norm": "full"}
OLMOE_ROUTER = {"normalize_scores": False, "aux_loss_scope": "all_layers", "aux_loss_coefficient": 0.01}


def engine_of(recipe: Recipe, place: topology.Topology) -> Engine:
    return Engine(recipe, place, *build_model(recipe, place, small.VOCAB))


def reference_step(hf: Any, optimizer: torch.optim.Optimizer, batches: list[Any], aux_coefficient: float) -> tuple:
    """One step of transformers' model: mean cross-entropy over micro-batches + its own auxiliary loss; clipped."""
    optimizer.zero_grad()
    total, total_aux = 0.0, 0.0
    for batch in batches:
        extra = {"output_router_logits": True} if aux_coefficient else {}
        output = hf(input_ids=batch.tokens, labels=batch.labels, **extra)
        loss = F.cross_entropy(output.logits.flatten(0, 1), batch.labels.flatten())
        aux = output.aux_loss if aux_coefficient else torch.zeros(())
        ((loss + aux_coefficient * aux) / len(batches)).backward()
        total, total_aux = total + loss.item() / len(batches), total_aux + aux.item() / len(batches)
    norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0).item()
    optimizer.step()
    return total, total_aux, norm


@pytest.mark.parametrize(
    ("hf", "model", "moe"),
    [(oracle.llama, {}, None), (oracle.gpt2, GPT2, None), (oracle.olmoe, OLMOE, OLMOE_ROUTER)],
    ids=["Llama", "GPT-2", "OLMoE"],
)
def test_twenty_steps_equal_transformers(single: topology.Topology, hf: Any, model: dict, moe: dict | None) -> None:
    theirs = hf()
    recipe = small.recipe(model, moe, parallel={"zero_stage": 0})
    ours = engine_of(recipe, single)
    oracle.copy_weights(ours.chunks[0], theirs)
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    first = None
    for step in range(20):
        batches = small.batches(recipe, step)
        result = ours.train_step(batches, step, 3e-3)
        loss, aux, norm = reference_step(theirs, optimizer, batches, 0.01 if moe else 0.0)
        assert result.loss == pytest.approx(loss, rel=1e-5), step
        assert result.grad_norm == pytest.approx(norm, rel=1e-4), step
        if moe:
            assert result.aux_losses["load_balance_loss"] == pytest.approx(aux, rel=1e-5), step
        first = first or loss
    assert loss < 0.9 * first, "the batches are learnable: without learning the comparison says little"

    prompt = [5, 6, 8]
    theirs.eval()
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generate(ours.chunks, recipe, single, prompt, 12) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_low_precision_follows_fp32(single: topology.Topology, precision: str, tolerance: float) -> None:
    """bf16 has 8 bits of mantissa and fp16 11: losses of the first steps agree to a few of their roundings."""
    losses = {}
    for name in ("fp32", precision):
        recipe = small.recipe(moe={}, training={"precision": name})
        engine = engine_of(recipe, single)
        losses[name] = [engine.train_step(small.batches(recipe, s), s, 3e-3).loss for s in range(8)]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=tolerance)
    assert losses[precision] != losses["fp32"]


def test_fp16_overflow_is_skipped_and_the_scale_falls_then_rises(single: topology.Topology) -> None:
    recipe = small.recipe(
        moe={"bias_update_rate": 0.01},
        training={"precision": "fp16", "loss_scale": 2.0**36, "loss_scale_window": 4},
    )
    engine = engine_of(recipe, single)
    before = [p.detach().clone() for p in engine.chunks.parameters()]
    biases = [moe.router.bias.clone() for _, moe in engine._moe]
    results = [engine.train_step(small.batches(recipe, 0), 0, 3e-3)]
    assert results[0].skipped
    for parameter, value in zip(engine.chunks.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    assert all(torch.equal(moe.router.bias, bias) for (_, moe), bias in zip(engine._moe, biases, strict=True))
    results += [engine.train_step(small.batches(recipe, s), s, 3e-3) for s in range(1, 40)]
    scales = [r.loss_scale for r in results]
    good = next(i for i, r in enumerate(results) if not r.skipped)
    assert scales[: good + 1] == [2.0 ** (36 - i) for i in range(good + 1)], "each overflow halves the scale"
    assert any(later == 2 * earlier for earlier, later in zip(scales[good:], scales[good + 1 :], strict=False))
    assert results[-1].loss < results[0].loss


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_step_that_is_not_finite_changes_nothing(single: topology.Topology, zero_stage: int) -> None:
    recipe = small.recipe(moe={"bias_update_rate": 0.01}, parallel={"zero_stage": zero_stage})
    engine = engine_of(recipe, single)
    engine.train_step(small.batches(recipe, 0), 0, 3e-3)
    poisoned = next(engine.chunks.parameters())
    value = poisoned.detach().clone()
    poisoned.data.view(-1)[0] = float("nan")
    before = [p.detach().clone() for p in engine.chunks.parameters()]
    assert engine.train_step(small.batches(recipe, 1), 1, 3e-3).skipped
    for parameter, kept in zip(engine.chunks.parameters(), before, strict=True):
        assert torch.equal(parameter.nan_to_num(7.0), kept.nan_to_num(7.0))
    poisoned.data.copy_(value)
    result = engine.train_step(small.batches(recipe, 1), 1, 3e-3)
    assert not result.skipped

    clean = engine_of(recipe, single)
    clean.train_step(small.batches(recipe, 0), 0, 3e-3)
    assert clean.train_step(small.batches(recipe, 1), 1, 3e-3).loss == result.loss


def test_uneven_masks_weigh_every_token_the_same(single: topology.Topology) -> None:
    """Micro-batches with different numbers of scored tokens: loss and gradient are those of one mean over tokens."""
    recipe = small.recipe(optimizer={"clip_grad": 0.0}, parallel={"zero_stage": 0})
    engine = engine_of(recipe, single)
    batches = small.batches(recipe, 0, masked=True)
    whole = {n: p.detach().clone().requires_grad_() for n, p in engine.chunks[0].named_parameters()}
    total, tokens = torch.zeros(()), 0.0
    for b in batches:
        losses = torch.func.functional_call(
            engine.chunks[0], whole, (b.tokens, b.position_ids, None), {"labels": b.labels}
        )
        total, tokens = total + (losses * b.loss_mask).sum(), tokens + b.loss_mask.sum()
    (total / tokens).backward()
    norm = torch.stack([p.grad.norm() for p in whole.values() if p.grad is not None]).norm().item()
    result = engine.train_step(batches, 0, 0.0)
    assert result.loss == pytest.approx((total / tokens).item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)


def test_document_mask_equals_documents_apart(single: topology.Topology) -> None:
    """With document ids, a document's losses are those it has alone (rotary attention sees distances only)."""
    recipe = small.recipe(data={"document_mask": True})
    (gpt,), _ = build_model(recipe, single, small.VOCAB)
    batch = small.batches(recipe, 0)[0]
    gpt.eval()
    with torch.no_grad():
        packed = gpt(batch.tokens, batch.position_ids, batch.document_ids, labels=batch.labels)
        for start in (0, 9, 18):
            part = slice(start, min(start + 9, small.SEQ))
            alone = gpt(batch.tokens[:, part], batch.position_ids[:, part], None, labels=batch.labels[:, part])
            torch.testing.assert_close(packed[:, part], alone, rtol=1e-5, atol=1e-5)


def test_recompute_changes_nothing_and_counts_once(single: topology.Topology) -> None:
    results = []
    for recompute in ("none", "full"):
        recipe = small.recipe(
            moe={"jitter": 0.1, "bias_update_rate": 0.01, "z_loss_coefficient": 0.001},
            training={"recompute": recompute},
        )
        engine = engine_of(recipe, single)
        results.append([engine.train_step(small.batches(recipe, s), s, 3e-3) for s in range(3)])
    for plain, recomputed in zip(*results, strict=True):
        assert recomputed.loss == pytest.approx(plain.loss, rel=1e-6)
        assert recomputed.aux_losses == pytest.approx(plain.aux_losses, rel=1e-6)
        assert torch.equal(recomputed.expert_tokens, plain.expert_tokens)
        assert plain.expert_tokens.sum() == 2 * 2 * 8 * small.SEQ  # layers x top_k x tokens of the global batch


def test_a_gate_of_a_dense_model_has_its_loss_times_the_scale(single: topology.Topology) -> None:
    """In fp16 its gradients over the scale are float32's."""
    found = {}
    for name in ("fp16", "fp32"):
        recipe = small.recipe(
            {"sparse_attention": {"selector": "gate", "blocks": 4, "block_size": 4}, "init_std": 0.3},
            training={"precision": name, "loss_scale": 512.0},
            optimizer={"clip_grad": 0.0},
        )
        engine = engine_of(recipe, single)
        found[name] = gradients = {}

        def before_step(engine: Engine = engine, gradients: dict[str, Tensor] = gradients) -> None:
            for fragment in engine.fragments:
                if ".gate." in fragment.weight.name and fragment.gradient is not None:
                    gradients[fragment.weight.name] = fragment.gradient.float() / engine.loss_scale()

        engine.before_step = before_step
        engine.train_step(small.batches(recipe, 0), 0, 1e-3)
    assert len(found["fp32"]) == 4
    assert_close(found["fp16"], found["fp32"], 5e-3)


def test_weights_do_not_depend_on_build_order(single: topology.Topology) -> None:
    recipe = small.recipe(moe={})
    first, _ = build_model(recipe, single, small.VOCAB)
    torch.rand(7)
    second, _ = build_model(recipe, single, small.VOCAB)
    for a, b in zip(local_weights(first, single), local_weights(second, single), strict=True):
        assert torch.equal(a.tensor, b.tensor), a.name


def divided(batch: Batch, size: int) -> list[Batch]:
    """The same sequences as micro-batches of ``size``."""
    parts = {name: None if value is None else value.split(size) for name, value in vars(batch).items()}
    return [Batch(**{n: v and v[j] for n, v in parts.items()}) for j in range(len(batch.tokens) // size)]


def test_global_batch_balance_does_not_depend_on_accumulation(single: topology.Topology) -> None:
    """The same global batch in micro-batches of 1, 2 and 8 sequences: the same losses and gradient norms. (With
    micro_batch statistics they differ: each micro-batch balances itself.)"""
    sequences = small.batches(small.recipe(training={"micro_batch_size": 8}), 0)[0]
    scopes = {}
    for scope in ("global_batch", "micro_batch"):
        runs = []
        for size in (8, 1, 2):
            recipe = small.recipe(
                moe={"aux_loss_scope": scope, "aux_loss_coefficient": 0.1, "z_loss_coefficient": 0.001},
                training={"micro_batch_size": size},
            )
            engine = engine_of(recipe, single)
            batches = divided(sequences, size)
            results = [engine.train_step(batches, step, 3e-3) for step in range(4)]
            runs.append([(r.loss, r.grad_norm, r.aux_losses["load_balance_loss"]) for r in results])
        scopes[scope] = runs
    for run in scopes["global_batch"][1:]:
        for ours, reference in zip(run, scopes["global_batch"][0], strict=True):
            assert ours == pytest.approx(reference, rel=1e-6)
    assert scopes["micro_batch"][1][0][2] != pytest.approx(scopes["micro_batch"][0][0][2], rel=1e-4)


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 0), ("fp32", 1), ("bf16", 1), ("fp16", 1)])
def test_gradients_are_clipped_by_the_recipe_alone(single: topology.Topology, precision: str, zero_stage: int) -> None:
    """DeepSpeed clips to 1 where it is not told otherwise. With a huge epsilon AdamW's step is the gradient times a
    constant, so the length of the step is that of the clipped gradient."""
    lengths = {}
    for clip in (0.0, 0.5, 2.0, 1e6):
        recipe = small.recipe(
            {"init_std": 0.3},
            {"aux_loss_coefficient": 0.0},
            {"precision": precision, "loss_scale": 1.0},
            optimizer={"eps": 100.0, "weight_decay": 0.0, "clip_grad": clip},
            parallel={"zero_stage": zero_stage},
        )
        engine = engine_of(recipe, single)
        before = [p.detach().clone().double() for p in engine.chunks.parameters()]
        result = engine.train_step(small.batches(recipe, 0), 0, 1e4)
        steps = [p.double() - b for p, b in zip(engine.chunks.parameters(), before, strict=True)]
        lengths[clip] = torch.stack([s.norm() for s in steps]).norm().item() / 100  # lr / eps
        assert result.grad_norm > 3
        assert not result.skipped
    tolerance = 0.02 if precision == "fp32" else 0.05
    assert lengths[0.0] == pytest.approx(result.grad_norm, rel=tolerance)
    assert lengths[1e6] == pytest.approx(result.grad_norm, rel=tolerance)
    assert lengths[0.5] == pytest.approx(0.5, rel=tolerance)
    assert lengths[2.0] == pytest.approx(2.0, rel=tolerance)
