"""Rotary frequencies against transformers' own, and the angles that a whole model turns by."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megasparse import topology
from megasparse.config import Rope
from megasparse.layers.rope import attention_factor, inverse_frequencies
from megasparse.model import build_model
from tests import oracle, small

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"original_max_position_embeddings": 4096}


@pytest.mark.parametrize("head_dim", [2, 64, 96])
@pytest.mark.parametrize("theta", [100.0, 10_000.0, 500_000.0])
@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        ("none", {}),
        ("linear", {"factor": 4.0}),
        ("linear", {"factor": 0.5}),
        ("llama3", {"factor": 8.0, **LLAMA3}),
        ("llama3", {"factor": 32.0, **LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 3.0}),
        ("llama3", {"factor": 2.0, **LLAMA3, "original_max_position_embeddings": 16}),
        ("yarn", {"factor": 16.0, **YARN}),
        ("yarn", {"factor": 40.0, **YARN, "beta_fast": 8.0, "beta_slow": 2.0}),
        ("yarn", {"factor": 4.0, **YARN, "attention_factor": 1.3}),
        ("yarn", {"factor": 4.0, **YARN, "original_max_position_embeddings": 16}),
        ("yarn", {"factor": 1.0, **YARN}),
    ],
    ids=str,
)
def test_frequencies_equal_transformers(
    scaling: str, parameters: dict[str, float], theta: float, head_dim: int
) -> None:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=2**20,
        rope_parameters={"rope_theta": theta, "rope_type": "default" if scaling == "none" else scaling, **parameters},
    )
    if scaling == "none":
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[scaling](config)
    rope = Rope(theta=theta, scaling=scaling, **parameters)  # type: ignore[arg-type]
    ours = inverse_frequencies(rope, head_dim)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0.0)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)


def test_frequencies_by_definition() -> None:
    """theta^(-2i/d): the fastest pair turns by one radian a token."""
    ours = inverse_frequencies(Rope(theta=10_000.0), 8)
    torch.testing.assert_close(ours, torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_llama3_keeps_fast_pairs_and_slows_slow_ones() -> None:
    original, factor = 8192, 8.0
    plain = inverse_frequencies(Rope(theta=500_000.0), 128)
    scaled = inverse_frequencies(Rope(theta=500_000.0, scaling="llama3", factor=factor, **LLAMA3), 128)
    turns = plain * original / (2 * math.pi)  # over the original context
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / factor)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / factor))[between].all()


SHORT = {"original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        ("none", {}),
        ("linear", {"factor": 3.0}),
        ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SHORT}),
        ("yarn", {"factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.1, **SHORT}),
        ("yarn", {"factor": 4.0, "attention_factor": 0.7, **SHORT}),
    ],
    ids=str,
)
def test_logits_equal_transformers(single: topology.Topology, scaling: str, parameters: dict[str, Any]) -> None:
    """Also beyond the original length; and the scaling matters: without it the logits are others."""
    theta = {"rope_theta": 50.0, "rope_type": "default" if scaling == "none" else scaling}
    theirs = oracle.llama(rope_parameters={**theta, **parameters}).eval()
    logits = {}
    ids = torch.randint(0, small.VOCAB, (2, small.SEQ))
    for name, rope in (("scaled", {"scaling": scaling, **parameters}), ("plain", {})):
        recipe = small.recipe({"rope": {"theta": 50.0, **rope}})
        (gpt,), _ = build_model(recipe, single, small.VOCAB)
        oracle.copy_weights(gpt, theirs)
        with torch.no_grad():
            logits[name] = gpt.eval()(ids, torch.arange(small.SEQ).expand(2, -1), None)
    with torch.no_grad():
        expected = theirs(ids).logits
    error = {name: (value - expected).abs().max() / expected.abs().max() for name, value in logits.items()}
    assert error["scaled"] < 1e-5
    assert scaling == "none" or error["plain"] > 1e-4
