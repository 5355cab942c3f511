"""Stand-ins of Transformer Engine's layers, whose delayed scaling decides what they return."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import megatron.core.tensor_parallel as megatron
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from megasparse.layers import te
from megasparse.ops.fp8 import E4M3, E5M2, dequantize, quantize, update_history

HISTORY = 3  # amax_history_len


def pad(rows: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
    """As TE's Fp8Padding: sixteens of rows."""
    sizes = [-(-size // 16) * 16 for size in m_splits]
    parts = zip(rows.split(m_splits), sizes, strict=True)
    return torch.cat([F.pad(part, (0, 0, 0, size - len(part))) for part, size in parts]), sizes


def unpad(rows: Tensor, m_splits: list[int]) -> Tensor:
    parts = rows.split([-(-size // 16) * 16 for size in m_splits])
    return torch.cat([part[:size] for part, size in zip(parts, m_splits, strict=True)])


class State(nn.Module):
    """TE's metadata of a layer with ``num_gemms`` matrices: made when asked for, noted and used in forward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp8_meta: dict[str, Any] = {}

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        del recipe
        for key, slots in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            size = self.fp8_meta["num_gemms"] * slots
            self.fp8_meta[key] = SimpleNamespace(scale=torch.ones(size), amax_history=torch.zeros(HISTORY, size))

    def quantised(self, x: Tensor, key: str, slot: int) -> Tensor:
        """By the slot's scale; the amax goes into its history at once, as if this were the step's only micro-batch."""
        state, dtype = self.fp8_meta[key], E4M3 if key == "scaling_fwd" else E5M2
        with torch.no_grad():
            result = dequantize(quantize(x, dtype, state.scale[slot].clone()), x.dtype)
            history, scale = state.amax_history[:, [slot]], state.scale[[slot]]
            history, scale = update_history(history, scale, x.abs().max().float()[None], dtype)
            state.amax_history[:, [slot]], state.scale[[slot]] = history, scale
        return result

    def product(self, x: Tensor, w: Tensor, gemm: int) -> Tensor:
        x = x + (self.quantised(x, "scaling_fwd", 3 * gemm) - x).detach()
        w = w + (self.quantised(w, "scaling_fwd", 3 * gemm + 1) - w).detach()
        y = x @ w.t()
        if y.requires_grad:
            y.register_hook(lambda dy: self.quantised(dy, "scaling_bwd", 2 * gemm))
        return y


class Column(State, megatron.ColumnParallelLinear):
    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Any = None, **_: Any) -> Tensor:
        if "scaling_fwd" not in self.fp8_meta:
            self.fp8_meta["num_gemms"] = 1
            self.init_fp8_meta_tensors(None)
        return self.product(input, weight, 0)


class Row(State, megatron.RowParallelLinear):
    _forward_impl = Column._forward_impl


class Grouped(State):
    def __init__(self, num_gemms: int, in_features: int, out_features: int, **kwargs: Any) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        for i in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=kwargs["params_dtype"], device=kwargs["device"])
            self.register_parameter(f"weight{i}", nn.Parameter(weight))

    def forward(self, rows: Tensor, m_splits: list[int]) -> Tensor:
        assert not any(size % 16 for size in m_splits)
        assert sum(m_splits) == len(rows) > 0
        if "scaling_fwd" not in self.fp8_meta:
            self.fp8_meta["num_gemms"] = self.num_gemms
            self.init_fp8_meta_tensors(None)
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        parts = zip(rows.split(m_splits), weights, strict=True)
        return torch.cat([self.product(x, w, i) if len(x) else x @ w.t() for i, (x, w) in enumerate(parts)])


@contextlib.contextmanager
def transformer_engine() -> Iterator[None]:
    pytorch: Any = type(sys)("transformer_engine.pytorch")
    pytorch.GroupedLinear, pytorch.Fp8Padding, pytorch.Fp8Unpadding = Grouped, lambda _: pad, lambda _: unpad
    modules = {"transformer_engine": type(sys)("transformer_engine"), "transformer_engine.pytorch": pytorch}
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(te, "trains", lambda recipe: recipe.training.fp8 is not None),
        mock.patch.object(te, "checked_fields", return_value={}),  # the stand-ins need no autocast
        mock.patch.object(te, "layers", return_value=te.Layers(Column, Column, Row)),
        mock.patch("megatron.core.fp8_utils.get_fp8_recipe", return_value=None),
    ):
        yield
