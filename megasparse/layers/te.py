"""The one door to Transformer Engine: whether it runs here, its layers for megatron-core's slots, its FP8 recipes.

The layers are megatron-core's wrappers, which take the arguments of its own layers. megatron-core opens TE's autocast
itself, around each layer or, for delayed scaling, around all (``TransformerBlock.forward``). Layers that are not TE's
stay out of it, wherever they are: so model.py keeps single layers, of any part of the model, in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megasparse import platform
from megasparse.config import Fp8, Recipe
from megasparse.layers.fp8 import Fp8State
from megasparse.layers.linear import Product
from megasparse.sparsity.weight import SparseWeight

Fp8Recipe = Literal["delayed", "current", "block"]
MEGATRON_NAMES = {"delayed": "delayed", "current": "tensorwise", "block": "blockwise"}
ROWS = 16
SLOTS = {"scaling_fwd": 3, "scaling_bwd": 2}
INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.9'"


@dataclass(frozen=True)
class Layers:
    """What goes where megatron-core's own classes stand in a layer's spec."""

    column: type  # ColumnParallelLinear
    norm_column: type  # the norm and the ColumnParallelLinear after it; the slot of the norm becomes IdentityOp
    row: type  # RowParallelLinear


def missing(recipe: Fp8Recipe | None = None) -> str | None:
    """What keeps Transformer Engine, or FP8 by this recipe, from running here; None if nothing does."""
    if not platform.has_cuda():
        return "there is no CUDA device"
    try:
        import transformer_engine.pytorch as te  # type: ignore[import-not-found]
    except (ImportError, OSError) as error:  # OSError: its compiled half is not there or does not fit
        return f"transformer_engine.pytorch cannot be imported ({error}); to install it: {INSTALL}"
    if recipe is None:
        return None
    if recipe == "block":
        available, reason = te.is_fp8_block_scaling_available(return_reason=True)
    else:
        available, reason = te.is_fp8_available(return_reason=True)
    return None if available else f"FP8 with {recipe} scaling: {reason}"


def layers() -> Layers:
    """megatron-core's Transformer Engine layers. ValueError where TE does not run."""
    reason = missing()
    if reason is not None:
        raise ValueError(f"Transformer Engine's layers are asked for, but {reason}")
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    return Layers(TEColumnParallelLinear, TELayerNormColumnParallelLinear, TERowParallelLinear)


def linear(layer: type, product: Product, tp_group: Any) -> type | ModuleSpec:
    """One of ``layers``: where the weight is 2:4, that is what it quantises; the scales of delayed scaling are in
    checkpoints. tp_group: the ranks with parts of the matrix."""
    sparsity, fp8 = product.sparsity, product.fp8
    assert fp8 is not None
    if sparsity is None and fp8.recipe != "delayed":
        return layer

    class Linear(layer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.sparsity = None if sparsity is None else SparseWeight(product.name, self.weight, sparsity, tp_group)
            if fp8.recipe == "delayed":
                self.fp8_scales = DelayedScales(fp8, self, self.config)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.sparsity is None:
                return super().forward(x, *args, **kwargs)
            dense = self._parameters["weight"]
            self._parameters["weight"] = self.sparsity(dense)
            try:
                return super().forward(x, *args, **kwargs)
            finally:
                self._parameters["weight"] = dense

    return ModuleSpec(module=Linear)


class DelayedScales(Fp8State):
    """A layer's scales and amaxes of delayed scaling, which TE has: ``take`` brings them into our checkpoints' terms,
    ``give`` back.

    TE's slots are, for each matrix, x, weight and y forward, dy and dx backward. A slot has one amax over the ranks of
    a tensor-, context- and data-parallel group: experts that are in the same place on their ranks share it.
    """

    def __init__(self, fp8: Fp8, layer: Any, config: Any, experts: tuple[int, range] | None = None) -> None:
        """config: megatron-core's."""
        super().__init__(fp8, experts)
        self._te = (layer, config)  # in a tuple: no child

    @torch.no_grad()
    def take(self, unit: float) -> None:
        """unit: by how much TE's gradients are larger than ours."""
        if "scaling_fwd" in self._te[0].fp8_meta:  # made by the first forward
            for operand, factor, scale, history in self._slots(unit):
                self.scale[..., operand].copy_(scale * factor)
                self.history[..., operand].copy_(history / factor)

    @torch.no_grad()
    def give(self, unit: float) -> None:
        layer, config = self._te
        if "scaling_fwd" not in layer.fp8_meta:
            from megatron.core.fp8_utils import get_fp8_recipe

            layer.fp8_meta["num_gemms"] = math.prod(self.here)
            layer.init_fp8_meta_tensors(get_fp8_recipe(config))
        for operand, factor, scale, history in self._slots(unit):
            scale.copy_(self.scale[..., operand] / factor)
            history.copy_(self.history[..., operand] * factor)

    def _slots(self, unit: float) -> Iterator[tuple[int, float, Tensor, Tensor]]:
        """(our operand, by how much TE's is larger, TE's scale [experts] and history [length, experts])."""
        meta = self._te[0].fp8_meta
        for operand, (key, slot) in enumerate((("scaling_fwd", 0), ("scaling_fwd", 1), ("scaling_bwd", 0))):
            tensors = (meta[key].scale, meta[key].amax_history)
            scale, history = (t.unflatten(-1, (*self.here, SLOTS[key]))[..., slot] for t in tensors)
            yield operand, unit if key == "scaling_bwd" else 1.0, scale, history


def delayed_scales(module: nn.Module) -> list[DelayedScales]:
    return [child for child in module.modules() if isinstance(child, DelayedScales)]


def gradient_unit(recipe: Recipe, replicas: int, loss_scale: float) -> float:
    """``DelayedScales``' of full batches, rounded to a power of two: what is restored is what was saved, to the bit."""
    tokens = recipe.training.global_batch_size * recipe.data.seq_length
    return 2.0 ** round(math.log2(replicas * loss_scale / tokens))


class GroupedLinear:
    """Of all local experts, by a TE layer without weights of its own: rows by expert times the weights it is given.

    It runs where no expert has rows, too: the amaxes of delayed scaling are reduced over ranks that must all have them.
    """

    def __init__(self, experts: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        import transformer_engine.pytorch as te  # type: ignore[import-not-found]

        self.linear = te.GroupedLinear(
            experts, in_features, out_features, bias=False, params_dtype=dtype, device="meta"
        )
        self.pad, self.unpad = te.Fp8Padding(experts), te.Fp8Unpadding(experts)

    def __call__(self, rows: Tensor, counts: list[int], weights: Tensor) -> Tensor:
        """rows [sum(counts), in], in the order of experts, weights [experts, out, in] -> [sum(counts), out]. Padded, as
        FP8 kernels want a multiple of ROWS for each."""
        own = {f"weight{i}": weight for i, weight in enumerate(weights.unbind())}
        if not len(rows):
            sizes = [ROWS] * len(counts)
            return torch.func.functional_call(self.linear, own, (rows.new_zeros(sum(sizes), rows.shape[1]), sizes))[:0]
        padded, sizes = self.pad(rows, counts)
        return self.unpad(torch.func.functional_call(self.linear, own, (padded, sizes)), counts)


def grouped_swiglu(
    rows: Tensor, counts: Tensor, weights: dict[str, Tensor], linears: dict[str, GroupedLinear]
) -> Tensor:
    """As ops.experts.grouped_swiglu, by TE: w1, w2, w3 of ``weights`` and of ``linears``."""
    sizes = counts.tolist()
    gate, up = (linears[name](rows, sizes, weights[name]) for name in ("w1", "w3"))
    return linears["w2"](F.silu(gate) * up, sizes, weights["w2"])


def attention_missing(recipe: Recipe) -> str | None:
    """What keeps its fused attention from dense layers of this recipe; None if nothing does."""
    if (reason := missing()) is not None:
        return reason
    if recipe.training.precision == "fp32":
        return "it takes float16 and bfloat16, not training.precision=fp32"
    if recipe.data.document_mask:
        return "it would not see documents' ends (data.document_mask=true)"
    return "its dropout would follow the ranks" if recipe.model.attention_dropout > 0 else None


def attention(heads: int, kv_heads: int, head_dim: int, scale: float) -> Callable[..., Tensor]:
    """Fused causal attention, of no weights, for so many heads of this process, where it is not ``attention_missing``.

    query [seq, batch, heads, head_dim], key and value [keys, batch, kv_heads, head_dim] and ``attn_mask_type``,
    "causal" or, of queries at the end of the keys, "causal_bottom_right" -> [seq, batch, heads * head_dim].
    """
    import transformer_engine.pytorch as te  # type: ignore[import-not-found]

    return te.DotProductAttention(  # type: ignore[no-any-return]
        num_attention_heads=heads,
        kv_channels=head_dim,
        num_gqa_groups=kv_heads,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        softmax_scale=scale,
    )


def trains(recipe: Recipe) -> bool:
    """Is it TE that multiplies in FP8 here, and not ops/fp8?"""
    return recipe.training.fp8 is not None and platform.has_cuda() and not recipe.training.fp8.emulate


def checked_fields(recipe: Recipe, tp: int, cp: int) -> dict[str, Any]:
    """``fp8_fields`` of a recipe that TE trains here, split over tp x cp. ValueError, with the reason and what to do,
    where it cannot do what the recipe asks for."""
    fp8, weights = recipe.training.fp8, recipe.fp8_weights
    assert fp8 is not None
    reason, cure = missing(fp8.recipe), "set emulate=true"
    if reason is None and fp8.rounding == "smooth":
        reason = "rounding=smooth is not Transformer Engine's"
    sparsity = recipe.sparsity.weights
    if reason is None and sparsity is not None and set(weights) & set(recipe.sparse_weights):
        if sparsity.mvue != "none":
            reason = "Transformer Engine makes dW of dy itself, not of the estimate that sparsity.weights.mvue asks for"
        elif sparsity.score == "wanda":
            reason = "Transformer Engine's layers do not show what sparsity.weights.score=wanda measures"
        elif sparsity.products == "semi_structured":
            reason = "sparsity.weights.products=semi_structured has no FP8"
            cure = "unset one of them"
    if reason is None and (reason := misfit(recipe, tp, cp)) is not None:
        cure = "change the size or the number of ranks that share it, or set emulate=true"
    if reason is not None:
        raise ValueError(f"training.fp8.recipe={fp8.recipe} on a GPU: {reason}; {cure}")
    return fp8_fields(fp8.recipe, fp8.gradients, fp8.margin, fp8.amax_history_len, fp8.amax_compute_algo)


def misfit(recipe: Recipe, tp: int, cp: int) -> str | None:
    """What TE's assert_dim_for_fp8_exec refuses of a process's products: rows of no multiple of 8, columns of 16."""
    model, training = recipe.model, recipe.training
    heads = model.num_attention_heads + 2 * model.kv_heads
    sizes = [
        ("model.hidden_size", model.hidden_size, 16),
        ("the heads' width", model.num_attention_heads * model.head_size // tp, 16),
        ("the width of queries, keys and values", heads * model.head_size // tp, 16),
        ("micro_batch_size * seq_length", training.micro_batch_size * recipe.data.seq_length // cp, 8),
    ]
    if any(".mlp.linear" in name for name in recipe.fp8_weights):
        sizes.append(("model.ffn_hidden_size", model.ffn_size // tp, 16))
    if any(".experts." in name for name in recipe.fp8_weights) and model.moe is not None:
        sizes.append(("model.moe.ffn_hidden_size", model.moe.ffn_hidden_size, 16))
    if any(".shared_experts." in name for name in recipe.fp8_weights) and model.moe is not None:
        sizes.append(("model.moe.shared_expert_ffn_hidden_size", model.moe.shared_expert_ffn_hidden_size // tp, 16))
    for what, size, of in sizes:
        if size % of:
            return f"a process has {size} of {what}, no multiple of {of}"
    return None


def fp8_fields(
    recipe: Fp8Recipe,
    gradients: Literal["e5m2", "e4m3"] = "e5m2",
    margin: int = 0,
    amax_history_len: int = 1024,
    amax_compute_algo: Literal["max", "most_recent"] = "max",
    bf16_layers: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """megatron-core's TransformerConfig fields for FP8 by this recipe.

    gradients: the type of dy; x and weights are e4m3. TE's own default is e5m2 ("hybrid"), but e4m3 for block scaling.
    margin, amax_history_len, amax_compute_algo: of delayed scaling, with TE's defaults; megatron-core's own are 1 step
    and "most_recent". bf16_layers: how many at the start and at the end of the model stay in bf16; megatron-core wants
    no more than a pipeline stage has. ValueError for an unknown recipe, and with delayed scaling, which opens one
    autocast for all layers, for bf16_layers.
    """
    if recipe not in MEGATRON_NAMES:
        raise ValueError(f"recipe={recipe!r}: use 'delayed', 'current' or 'block'")
    fields: dict[str, Any] = {
        "fp8": "hybrid" if gradients == "e5m2" else "e4m3",
        "fp8_recipe": MEGATRON_NAMES[recipe],
    }
    if recipe == "delayed":
        if any(bf16_layers):
            raise ValueError(f"bf16_layers={bf16_layers}: delayed scaling has all layers in FP8; use (0, 0)")
        fields |= {
            "fp8_margin": margin,
            "fp8_amax_history_len": amax_history_len,
            "fp8_amax_compute_algo": amax_compute_algo,
        }
    if any(bf16_layers):
        fields |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": bf16_layers[0],
            "num_layers_at_end_in_bf16": bf16_layers[1],
        }
    return fields
