"""The one door to Transformer Engine: whether it runs here, its layers for megatron-core's slots, its FP8 recipes.

The layers are megatron-core's wrappers, which take the arguments of its own layers. megatron-core opens TE's autocast
itself, around each layer or, for delayed scaling, around all (``TransformerBlock.forward``). Layers that are not TE's
stay out of it, wherever they are: so model.py keeps single layers, of any part of the model, in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megasparse import platform
from megasparse.config import Recipe

Fp8Recipe = Literal["delayed", "current", "block"]
MEGATRON_NAMES = {"delayed": "delayed", "current": "tensorwise", "block": "blockwise"}
INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.9'"


@dataclass(frozen=True)
class Layers:
    """What goes where megatron-core's own classes stand in a layer's spec."""

    column: type  # ColumnParallelLinear
    norm_column: type  # the norm and the ColumnParallelLinear after it; the slot of the norm becomes IdentityOp
    row: type  # RowParallelLinear
    grouped_column: type  # the same of all local experts
    grouped_row: type
    norm: type
    attention: type  # causal, of dense layers; it does not read the document ids that CoreAttention takes as its mask


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
        TEColumnParallelGroupedLinear,
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelGroupedLinear,
        TERowParallelLinear,
    )

    return Layers(
        column=TEColumnParallelLinear,
        norm_column=TELayerNormColumnParallelLinear,
        row=TERowParallelLinear,
        grouped_column=TEColumnParallelGroupedLinear,  # type: ignore[arg-type]  # None before TE 1.9
        grouped_row=TERowParallelGroupedLinear,  # type: ignore[arg-type]
        norm=TENorm,
        attention=TEDotProductAttention,
    )


def trains(recipe: Recipe) -> bool:
    """Is it TE that multiplies in FP8 here, and not ops/fp8?"""
    return recipe.training.fp8 is not None and platform.has_cuda() and not recipe.training.fp8.emulate


def checked_fields(recipe: Recipe) -> dict[str, Any]:
    """``fp8_fields`` of a recipe that TE trains here. ValueError, with the reason and what to do, where it cannot do
    what the recipe asks for."""
    fp8, weights = recipe.training.fp8, recipe.fp8_weights
    assert fp8 is not None
    reason, cure = missing(fp8.recipe), "set emulate=true"
    if reason is None and fp8.recipe == "delayed":
        reason = "Transformer Engine keeps its scales where our checkpoints do not reach, in units of one layout"
        cure = "use recipe=current or block, or set emulate=true"
    if reason is None and fp8.rounding == "smooth":
        reason = "rounding=smooth is not Transformer Engine's"
    if reason is None and set(weights) & set(recipe.sparse_weights):
        reason = "Transformer Engine multiplies its own weight, not the 2:4 one that sparsity.weights puts in its place"
    if reason is None and any(".mlp.experts." in name for name in weights):
        reason = "the experts' weights are one tensor for all, Transformer Engine's grouped linear has one for each"
        cure = "set experts=false or emulate=true"
    if reason is not None:
        raise ValueError(f"training.fp8.recipe={fp8.recipe} on a GPU: {reason}; {cure}")
    return fp8_fields(fp8.recipe, fp8.gradients)


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
