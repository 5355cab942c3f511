"""Norms against their definition in float64: outputs, gradients, and the parts of tensor-parallel ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megasparse import topology
from megasparse.layers.norms import FullWidthRMSNorm, HeadRMSNorm, LayerNorm, RMSNorm
from megasparse.layout import Layout
from tests.helpers import assert_close, run_distributed

SEQ, BATCH, HEADS, HEAD_DIM = 5, 3, 4, 8


def config(dtype: torch.dtype = torch.float32, sequence_parallel: bool = False, tp: int = 1) -> Any:
    return SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence_parallel, tensor_model_parallel_size=tp)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (x - mean).pow(2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def check(norm: torch.nn.Module, x: Tensor, reference: Any, tolerance: float) -> None:
    """Output and every gradient, against ``reference`` on the same numbers in float64."""
    for parameter in norm.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x.requires_grad_()
    exact = [x.detach().double().requires_grad_(), *(p.detach().double().requires_grad_() for p in norm.parameters())]
    output, expected = norm(x), reference(*exact)
    assert output.dtype == x.dtype
    assert output.shape == x.shape
    upstream = torch.randn_like(x)
    output.backward(upstream)
    expected.backward(upstream.double())
    assert_close(output, expected, tolerance, "output")
    for name, ours, theirs in zip(
        ["x", *(n for n, _ in norm.named_parameters())], [x, *norm.parameters()], exact, strict=True
    ):
        assert_close(ours.grad, theirs.grad, tolerance, name)


PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(dtype: torch.dtype, tolerance: float, eps: float) -> None:
    norm = RMSNorm(config(dtype), 16, eps)
    check(norm, torch.randn(SEQ, BATCH, 16).to(dtype), lambda x, w: rms(x, w, eps), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_layer_norm(dtype: torch.dtype, tolerance: float, eps: float) -> None:
    norm = LayerNorm(config(dtype), 16, eps)
    check(norm, (torch.randn(SEQ, BATCH, 16) + 1).to(dtype), lambda x, w, b: layer_norm(x, w, b, eps), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
def test_head_norm_sees_one_head(dtype: torch.dtype, tolerance: float) -> None:
    norm = HeadRMSNorm(config(dtype), HEAD_DIM, 1e-2)
    x = torch.randn(SEQ, BATCH, HEADS, HEAD_DIM) * torch.tensor([1.0, 10.0, 0.1, 1.0])[:, None]
    check(norm, x.to(dtype), lambda x, w: rms(x, w, 1e-2), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
def test_full_width_norm_sees_all_heads(dtype: torch.dtype, tolerance: float) -> None:
    norm = FullWidthRMSNorm(config(dtype), HEAD_DIM, 1e-2, heads=HEADS)
    assert norm.weight.shape == (HEADS * HEAD_DIM,)
    x = torch.randn(SEQ, BATCH, HEADS, HEAD_DIM) * torch.tensor([1.0, 10.0, 0.1, 1.0])[:, None]
    check(norm, x.to(dtype), lambda x, w: rms(x.flatten(-2), w, 1e-2).view_as(x), tolerance)


def test_large_and_small_values_do_not_overflow() -> None:
    """Squares of 1000 overflow in float16: statistics are taken in float32."""
    for norm in (RMSNorm(config(torch.float16), 16), FullWidthRMSNorm(config(torch.float16), 4, heads=4)):
        x = torch.full((1, 1, 4, 4), 1000.0, dtype=torch.float16)
        x = x.flatten(2) if isinstance(norm, RMSNorm) else x
        assert_close(norm(x), torch.ones_like(x), 1e-3)


def full_width(tp: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """This rank's heads: output, gradient of the input, gradient of its part of the weight."""
    place = topology.initialize(Layout(tp=tp))
    norm = FullWidthRMSNorm(config(dtype, tp=tp), HEAD_DIM, 1e-2, heads=HEADS)
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(SEQ, BATCH, HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    x = x * torch.tensor([1.0, 10.0, 0.1, 1.0])[:, None]
    weight = 1 + 0.3 * torch.randn(HEADS * HEAD_DIM, generator=generator)
    x, upstream = (t.chunk(tp, 2)[place.tp_rank].to(dtype) for t in (x, upstream))
    norm.weight.data.copy_(weight.chunk(tp)[place.tp_rank])
    x.requires_grad_()
    output = norm(x)
    output.backward(upstream)
    return {"output": output.detach(), "dx": x.grad, "weight": norm.weight.grad}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("tp", [2, 4])
def test_full_width_over_tensor_parallel(tp: int, dtype: torch.dtype, tolerance: float) -> None:
    """The heads of one rank are normed with everybody's, forward and backward."""
    whole = run_distributed(full_width, 1, 1, torch.float64)[0]
    parts = run_distributed(full_width, tp, tp, dtype)
    for key, dim in (("output", 2), ("dx", 2), ("weight", 0)):
        assert_close(torch.cat([part[key] for part in parts], dim), whole[key], tolerance, key)


def test_who_holds_a_part_of_the_gradient() -> None:
    """The engine sums over tensor parallel the gradients so marked, and no others."""
    marked = {}
    for name, settings in {"tp": config(tp=2), "tp-sp": config(sequence_parallel=True, tp=2), "one": config()}.items():
        norms = [RMSNorm(settings, 8), LayerNorm(settings, 8), HeadRMSNorm(settings, 8)]
        marked[name] = [all(p.sequence_parallel for p in norm.parameters()) for norm in norms]
    assert marked == {
        "tp": [False, False, True],  # a head norm's weight is shared by heads on every rank
        "tp-sp": [True, True, True],
        "one": [False, False, False],
    }
    full = FullWidthRMSNorm(config(tp=2), HEAD_DIM, heads=HEADS)
    assert full.weight.tensor_model_parallel
    assert full.weight.shape == (HEADS * HEAD_DIM // 2,)
