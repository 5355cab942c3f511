"""apex's door: what is missing is said; with stand-ins of its functions, norms and gradients are torch's."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import layers as megatron
from torch import Tensor

from megasparse import topology
from megasparse.config import Recipe
from megasparse.engine import Engine
from megasparse.layers import apex
from megasparse.layers.norms import LayerNorm, RMSNorm
from megasparse.layout import Layout
from megasparse.model import build_model
from tests import small
from tests.helpers import assert_close, run_distributed
from tests.layers.test_norms import config


def module(name: str, **functions: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(functions)
    return made


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert apex.norms_missing() == apex.gradients_missing() == "there is no CUDA device"
    assert apex.norms() is None
    monkeypatch.setattr(apex.platform, "has_cuda", lambda: True)
    assert str(apex.norms_missing()).startswith("apex has no fused_layer_norm_cuda here (No module named")
    assert str(apex.gradients_missing()).startswith("apex has no fused_weight_gradient_mlp_cuda here (No module named")


def test_norms_are_apexs_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With apex's signatures: fused_rms_norm_affine and fused_layer_norm_affine of its fused_layer_norm.py."""
    called = []

    def fused_rms_norm_affine(
        input: Tensor, weight: Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
    ) -> Tensor:
        called.append("rms")
        return F.rms_norm(input, normalized_shape, weight, eps)

    def fused_layer_norm_affine(
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        normalized_shape: Any,
        eps: float = 1e-6,
        memory_efficient: bool = False,
    ) -> Tensor:
        called.append("layer")
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    plain = [norm(config(), 16, 1e-3) for norm in (RMSNorm, LayerNorm)]
    monkeypatch.setattr(apex.platform, "has_cuda", lambda: True)
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", module("fused_layer_norm_cuda"))
    for name in ("apex", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, module(name))
    functions = {f.__name__: f for f in (fused_rms_norm_affine, fused_layer_norm_affine)}
    name = "apex.normalization.fused_layer_norm"
    monkeypatch.setitem(sys.modules, name, module(name, **functions))
    fused = [norm(config(), 16, 1e-3) for norm in (RMSNorm, LayerNorm)]
    x = torch.randn(3, 2, 16)
    for ours, torchs in zip(fused, plain, strict=True):
        for parameter in torchs.parameters():
            torch.nn.init.normal_(parameter)
        ours.load_state_dict(torchs.state_dict())  # of the same names
        assert torch.equal(ours(x), torchs(x))
    assert called == ["rms", "layer"]


@contextlib.contextmanager
def apex_with_gradients(calls: list[torch.dtype]) -> Iterator[None]:
    """Its product adds what torch's would be, rounded as that is, to where gradients are summed."""

    def wgrad_gemm_accum_fp32(x: Tensor, dy: Tensor, main_grad: Tensor) -> None:
        assert main_grad.dtype == torch.float32
        calls.append(x.dtype)
        main_grad.add_((dy.t() @ x).float())

    kernels = module(apex.GRADIENTS, wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32)
    with (
        mock.patch.object(apex, "gradients_missing", return_value=None),
        mock.patch.object(megatron, apex.GRADIENTS, kernels, create=True),
    ):
        yield


def trained(raw: dict[str, Any], in_place: bool) -> tuple[list[tuple[float, float]], list[Tensor], int]:
    """Losses and norms of four steps in this rank, its weights after them, and the products that added in place."""
    recipe = Recipe.model_validate(raw)
    place, calls = small.start(recipe), []
    with apex_with_gradients(calls) if in_place else contextlib.nullcontext():
        chunks, state = build_model(recipe, place, small.VOCAB)
        engine = Engine(recipe, place, chunks, state)
        results = [
            engine.train_step(small.batches(recipe, step, place.dp_rank, place.dp), step, 1e-3) for step in range(4)
        ]
    return (
        [(result.loss, result.grad_norm) for result in results],
        [parameter.detach().clone() for parameter in chunks.parameters()],
        len(calls),
    )


@pytest.mark.parametrize(
    ("layout", "recompute"), [("single", "none"), ("single", "full"), ("tp2+sp", "none"), ("pp2", "full")]
)
def test_gradients_added_in_place_are_the_same_to_the_bit(layout: str, recompute: str) -> None:
    """Of a model with 2:4 MLPs in one layer, which stay as they are, tied embeddings and biases."""
    parsed = Layout.parse(layout)
    recipe = small.recipe(
        {"tie_embeddings": True, "bias": "qkv"},
        training={"precision": "bf16", "recompute": recompute},
        sparsity={"weights": {"method": "ste", "targets": [r"layers\.1\.mlp"]}},
        parallel={**parsed.parallel(), "zero_stage": 1},
    )
    raw = recipe.model_dump(mode="json")
    apart, together = (run_distributed(trained, parsed.world_size, raw, in_place) for in_place in (False, True))
    for (results, weights, calls), (expected, theirs, none) in zip(together, apart, strict=True):
        assert results == expected
        assert all(torch.equal(a, b) for a, b in zip(weights, theirs, strict=True))
        assert none == 0 < calls


def test_other_layers_keep_their_gradients(single: topology.Topology) -> None:
    """FP8's and 2:4 ones are made otherwise."""
    for sections in ({"training": {"fp8": {"recipe": "current"}}}, {"sparsity": {"weights": {"method": "ste"}}}):
        chunks, _ = build_model(small.recipe(**sections), single, small.VOCAB)
        apex.add_gradients_in_place(chunks, {p: torch.zeros_like(p) for p in chunks.parameters()})
        chunk: Any = chunks[0]
        assert not hasattr(chunk.decoder.layers[0].mlp.linear_fc1.weight, "main_grad")
        plain = chunk.decoder.layers[0].self_attention.linear_qkv
        assert hasattr(plain.weight, "main_grad") == plain.gradient_accumulation_fusion == ("sparsity" in sections)
    assert_close(plain.weight.main_grad, torch.zeros_like(plain.weight), 1e-9)
