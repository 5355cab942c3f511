"""Scales and amaxes of delayed scaling, which Transformer Engine has, in checkpoints: with stand-ins of its layers that
quantise x, weight and dy by scales of their own, and by its sources for where it has them."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megasparse import topology
from megasparse.checkpoint.load import load
from megasparse.checkpoint.reader import Reader
from megasparse.checkpoint.save import Saver
from megasparse.checkpoint.weights import load_teacher, teacher_source
from megasparse.config import Fp8, Recipe
from megasparse.engine import Engine
from megasparse.layers import te
from megasparse.layers.fp8 import Fp8Scales
from tests import small
from tests.checkpoint.runs import FINGERPRINT, disturb, engine_of, run
from tests.helpers import run_distributed
from tests.layers.te_sources import Offer, Uses
from tests.layers.te_stand_ins import HISTORY, Column, transformer_engine

DELAYED = {"recipe": "delayed", "amax_history_len": HISTORY}


def recipe_of(ep: int = 1, zero_stage: int = 0) -> Recipe:
    """A dense layer and one with experts."""
    return small.recipe(
        {"norm_placement": "post"},
        {"layers": [0, 1], "ffn_hidden_size": 16},
        {"fp8": DELAYED, "micro_batch_size": 4},
        parallel={"ep": ep, "zero_stage": zero_stage},
        sparsity={"weights": {"method": "s_ste", "targets": [r"layers\.0\.mlp"]}},
    )


def metadata(engine: Engine) -> list[Tensor]:
    states = [scales._te[0].fp8_meta[key] for scales in te.delayed_scales(engine.chunks) for key in te.SLOTS]
    return [tensor.clone() for state in states for tensor in (state.scale, state.amax_history)]


def test_a_run_goes_on_to_the_bit(single: topology.Topology, tmp_path: Path) -> None:
    """Its scales decide what its steps return: without them, it does not."""
    recipe = recipe_of()
    with transformer_engine():
        engine = engine_of(recipe, single)
        assert len(te.delayed_scales(engine.chunks)) == 4 + 2 + 3
        run(engine, 0, 3)
        Saver(engine, tmp_path, FINGERPRINT).save(3)
        saved, expected = metadata(engine), run(engine, 3, 5)
        final = metadata(engine)
        resumed = engine_of(recipe, single)
        disturb(resumed)
        load(resumed, tmp_path / "step_3")
        restored = metadata(resumed)
        assert run(resumed, 3, 5) == expected
        forgetful = engine_of(recipe, single)
        load(forgetful, tmp_path / "step_3")
        for scales in te.delayed_scales(forgetful.chunks):
            scales._te[0].init_fp8_meta_tensors(None)
        assert run(forgetful, 3, 5) != expected
    assert len(saved) == 9 * 4
    for a, b in zip(saved, restored, strict=True):
        used = a.clone()
        used[..., unused(a)] = b[..., unused(a)]  # of y and dx, which are no operands
        assert torch.equal(used, b)
    for a, b in zip(final, metadata(resumed), strict=True):
        assert torch.equal(a, b)
    assert all((state != 0).any() for state in saved)


def unused(state: Tensor) -> Tensor:
    """The slots of y and dx: forward states have three for each matrix, backward two; 8 experts, or one matrix."""
    size = state.shape[-1]
    slots = 3 if size in (3, 24) else 2
    return torch.arange(size) % slots == slots - 1


def test_the_checkpoint_has_them_in_any_layouts_terms(single: topology.Topology, tmp_path: Path) -> None:
    """Of x and weight as they are; of dy in terms of the sum over tokens: 8 sequences of 24 are near 2^8 tokens."""
    recipe = recipe_of()
    with transformer_engine():
        engine = engine_of(recipe, single)
        run(engine, 0, 2)
        Saver(engine, tmp_path, FINGERPRINT).save(2)
        layer: Any = engine.chunks[0].decoder.layers[0].self_attention.linear_proj  # type: ignore[union-attr]
        experts: Any = engine.chunks[0].decoder.layers[1].mlp.te["w2"].linear  # type: ignore[union-attr]
    reader = Reader(tmp_path / "step_2")
    for name, meta, here in (
        ("0.self_attention.linear_proj.fp8_scales", layer.fp8_meta, ()),
        ("1.mlp.experts.fp8_scales.w2", experts.fp8_meta, (8,)),
    ):
        scale, history = (reader.read(f"model.decoder.layers.{name}.{part}") for part in ("scale", "history"))
        assert scale.shape == (*here, 4)
        assert history.shape == (HISTORY, *here, 4)
        forward, backward = meta["scaling_fwd"], meta["scaling_bwd"]
        x, weight, dy, none = (part.reshape(-1) for part in scale.unbind(-1))
        assert torch.equal(x, forward.scale[0::3])
        assert torch.equal(weight, forward.scale[1::3])
        assert torch.equal(dy, backward.scale[0::2] / 2**8)
        assert torch.equal(none, torch.ones_like(none))
        x, weight, dy, none = (part.reshape(HISTORY, -1) for part in history.unbind(-1))
        assert torch.equal(x, forward.amax_history[:, 0::3])
        assert torch.equal(weight, forward.amax_history[:, 1::3])
        assert torch.equal(dy, backward.amax_history[:, 0::2] * 2**8)
        assert not none.any()
        assert (scale[..., :3] != 1).any()


def test_emulated_runs_go_on_with_them_and_the_other_way(single: topology.Topology, tmp_path: Path) -> None:
    recipe = recipe_of()

    def buffers(engine: Engine) -> list[tuple[str, Tensor]]:
        return [(n, b) for n, b in engine.chunks.named_buffers() if ".fp8_scales." in n and not n.endswith("amax")]

    with transformer_engine():
        theirs = engine_of(recipe, single)
        run(theirs, 0, 2)
        Saver(theirs, tmp_path / "te", FINGERPRINT).save(2)
    ours = engine_of(recipe, single)
    assert any(isinstance(module, Fp8Scales) for module in ours.chunks.modules())
    load(ours, tmp_path / "te/step_2")
    for (name, a), (also, b) in zip(buffers(theirs), buffers(ours), strict=True):
        assert name == also
        assert torch.equal(a, b)
    run(ours, 2, 4)
    Saver(ours, tmp_path / "ours", FINGERPRINT).save(4)
    with transformer_engine():
        again = engine_of(recipe, single)
        load(again, tmp_path / "ours/step_4")  # before its layers ran for the first time
        for scales in te.delayed_scales(again.chunks):
            meta = scales._te[0].fp8_meta
            assert torch.equal(meta["scaling_fwd"].scale[1::3], scales.scale[..., 1].flatten())
            assert torch.equal(meta["scaling_bwd"].scale[0::2], scales.scale[..., 2].flatten() * 2**8)
        run(again, 4, 5)


def test_a_teacher_computes_with_its_scales(single: topology.Topology, tmp_path: Path) -> None:
    with transformer_engine():
        author = engine_of(recipe_of(), single)
        run(author, 0, 3)
        Saver(author, tmp_path, FINGERPRINT).save(3)
        student = small.recipe(training={"teacher": {"checkpoint": str(tmp_path / "step_3")}})
        source = teacher_source(student, small.VOCAB - 1, "", 1)
        assert source is not None
        teacher = load_teacher(student, source, single, small.VOCAB - 1)
        batches = small.batches(student, 5)
        logits = [teacher._logits(batches)[0].clone()]
        found = te.delayed_scales(teacher.chunks)
        for theirs, own in zip(found, te.delayed_scales(author.chunks), strict=True):
            assert torch.equal(theirs.scale, own.scale)
            theirs._te[0].init_fp8_meta_tensors(None)
        logits.append(teacher._logits(batches)[0])
    assert len(found) == 9
    assert not torch.equal(*logits), "without them it computes otherwise"


def in_another_layout(raw: dict[str, Any], folder: Path, save: bool) -> list[Tensor]:
    recipe = Recipe.model_validate(raw)
    with transformer_engine():
        engine = engine_of(recipe, small.start(recipe))
        if save:
            run(engine, 0, 2)
            Saver(engine, folder, FINGERPRINT).save(2)
        else:
            load(engine, folder / "step_2")
        return metadata(engine)


def test_they_go_to_another_layout(tmp_path: Path) -> None:
    """From one process to two with half of the experts each, where gradients of a rank are twice as large."""
    (before,) = run_distributed(in_another_layout, 1, recipe_of().model_dump(mode="json"), tmp_path, True)
    after = run_distributed(
        in_another_layout, 2, recipe_of(ep=2, zero_stage=1).model_dump(mode="json"), tmp_path, False
    )
    for rank, found in enumerate(after):
        for i, (old, new) in enumerate(zip(before, found, strict=True)):
            scale, backward = i % 2 == 0, i % 4 >= 2
            if old.shape[-1] in (16, 24):
                old = old.tensor_split(2, dim=-1)[rank]
            factor = (0.5 if scale else 2.0) if backward else 1.0
            used = ~unused(old) if old.shape[-1] != 12 else torch.arange(12) % 3 != 2
            assert torch.equal(old[..., used] * factor, new[..., used]), (rank, i)


def test_an_expert_without_rows_runs(single: topology.Topology) -> None:
    """On a rank without any: its amaxes are a part of what all ranks reduce, and its weights have gradients of 0."""
    with transformer_engine():
        linear = te.GroupedLinear(4, 8, 16, torch.float32)
        weights = torch.randn(4, 16, 8, requires_grad=True)
        y = linear(torch.empty(0, 8), [0, 0, 0, 0], weights)
        assert y.shape == (0, 16)
        y.sum().backward()
    assert weights.grad is not None
    assert not weights.grad.any()
    assert "scaling_bwd" in linear.linear.fp8_meta


# Where TE has them ----------------------------------------------------------------------------------------------------


def test_the_sources_have_them_there(offer: Offer) -> None:
    """Methods and attributes that DelayedScales uses, and the order of grouped slots. (That of single layers is an enum
    in its compiled half: x, weight, y and dy, dx, as in grouped ones.)"""
    source = """
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.quantization import DelayedScalingRecipeState
TransformerEngineBaseModule.init_fp8_meta_tensors(recipe)
DelayedScalingRecipeState.scale
DelayedScalingRecipeState.amax_history
"""
    found = Uses(source, "transformer_engine").found
    assert len(found) == 6  # imports, a call and its name, attributes
    assert [problem for use in found if (problem := offer.problem(use))] == []
    tree = offer.module("transformer_engine.pytorch.module.grouped_linear")
    assert tree is not None
    assigned = {
        node.targets[0].attr: ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Attribute)
        and node.targets[0].attr in ("_offsets", "_num_fp8_tensors_per_gemm")
    }
    offsets = assigned["_offsets"]
    assert [offsets[slot] for slot in ("input", "weight", "output", "grad_output", "grad_input")] == [0, 1, 2, 0, 1]
    assert assigned["_num_fp8_tensors_per_gemm"] == {"fwd": te.SLOTS["scaling_fwd"], "bwd": te.SLOTS["scaling_bwd"]}


def test_it_keeps_what_it_is_given_before_its_first_forward(offer: Offer) -> None:
    """set_meta_tensor returns before it makes states anew, for the same recipe."""
    tree = offer.module("transformer_engine.pytorch.module.base")
    assert tree is not None
    (method,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "set_meta_tensor"]
    text = ast.unparse(method)
    kept = text.index("if recipe.delayed() and isinstance(recipe_state, DelayedScalingRecipeState)")
    assert text.index("if self.fp8_meta_tensors_initialized") < kept < text.index("RecipeState.create(")
    assert "return" in text[kept : text.index("recipe.mxfp8()")]


@pytest.mark.parametrize(("replicas", "scale", "unit"), [(1, 1, 2**-8), (4, 1, 2**-6), (1, 2**16, 2**8)])
def test_the_unit_is_a_power_of_two(replicas: int, scale: float, unit: float) -> None:
    assert te.gradient_unit(recipe_of(), replicas, scale) == unit


def test_other_recipes_have_no_state() -> None:
    assert not hasattr(te.linear(Column, SimpleNamespace(sparsity=None, fp8=Fp8(recipe="current")), None), "fp8_scales")  # type: ignore[arg-type]
