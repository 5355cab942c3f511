"""What is exported of each weight, and which checkpoints are refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megasparse import schedule
from megasparse.checkpoint.folder import set_latest
from megasparse.checkpoint.hf.export import open_export
from megasparse.config import Recipe
from megasparse.sparsity.weight import forward_weight
from tests.checkpoint.hf import made
from tests.checkpoint.hf.conversion import export
from tests.checkpoint.hf.made import make, rewritten, state_of, tensors_of, write
from tests.checkpoint.hf.trained import STEPS, VOCAB, recipe_of

FC2 = "decoder.layers.1.mlp.linear_fc2.weight"
W1 = "decoder.layers.1.mlp.experts.w1"


def sparse_recipe(method: str, moe: dict[str, Any] | None = None, precision: str = "bf16", **changes: Any) -> Recipe:
    weights = {"method": method, "targets": [r"\."], **({"decay": 0.01} if method in ("sr_ste", "ast") else {})}
    return recipe_of(
        {"bias": "qkv"}, moe, sparsity={"weights": {**weights, **changes}}, training={"precision": precision}
    )


METHODS: dict[str, tuple[Recipe, int]] = {
    "sr_ste": (sparse_recipe("sr_ste"), 4),
    "sr_ste, dense yet": (sparse_recipe("sr_ste", dense_start=0.5), 2),
    "s_ste": (sparse_recipe("s_ste"), 4),
    "s_ste of experts": (sparse_recipe("s_ste", {}, "fp32"), 4),
    "ast, boost": (sparse_recipe("ast", boost=8), 4),
    "ast, boost of experts": (sparse_recipe("ast", {}, boost=4), 4),
    "mdgf, half faded": (sparse_recipe("mdgf", {}, "fp16", ramp=0.9), 2),
    "dense": (sparse_recipe("dense"), 4),
    "asp": (sparse_recipe("asp", {"layers": 2}, dense_start=0.2), 4),
}


def expected(recipe: Recipe, tensors: dict[str, Tensor], name: str, step: int, dtype: torch.dtype) -> Tensor:
    """Of the whole weight."""
    weight, sparsity, state = tensors[f"model.{name}"].to(dtype), recipe.sparsity.weights, state_of(name)
    if f"{state}mask" not in tensors:
        return weight
    assert sparsity is not None
    boost = tensors[f"{state}boost"].to(dtype) if sparsity.boost else None
    masked = schedule.masked_share(step / STEPS, sparsity)
    return forward_weight(weight, sparsity, tensors[f"{state}mask"], tensors.get(f"{state}scale"), boost, masked)


@pytest.mark.parametrize("case", METHODS)
def test_some_rows_are_those_of_the_whole(tmp_path: Path, case: str) -> None:
    """Rows, or rows of some experts, with all their columns."""
    (recipe, step), rng = METHODS[case], random.Random(0)
    tensors = tensors_of(recipe)
    opened = open_export(write(tmp_path / "x", recipe, tensors, step), None, None)
    assert {name for name in opened.tensors if f"{state_of(name)}mask" in tensors} == set(recipe.sparse_weights)
    for name, (shape, pieces) in opened.tensors.items():
        if not pieces:
            continue
        whole = expected(recipe, tensors, name, step, opened.dtype_of(name))
        assert torch.equal(opened.weight(name, (0,) * len(shape), shape), whole), name
        for _ in range(3):
            cut = shape[:-1] if len(shape) > 1 else shape
            starts = [rng.randrange(size) for size in cut]
            sizes = [rng.randrange(1, size - start + 1) for size, start in zip(cut, starts, strict=True)]
            rest = shape[len(cut) :]
            found = opened.weight(name, (*starts, *[0] * len(rest)), (*sizes, *rest))
            here = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
            assert torch.equal(found, whole[here]), name
            assert found.dtype == opened.dtype


def test_masks_are_in_the_weights(tmp_path: Path) -> None:
    """By hand: the weight where its mask is true, and zero."""
    recipe = sparse_recipe("sr_ste", {})
    tensors = tensors_of(recipe)
    opened = open_export(write(tmp_path / "x", recipe, tensors), "fp32", None)
    weight, mask = tensors[f"model.{W1}"], tensors["model.decoder.layers.1.mlp.experts.sparsity.w1.mask"]
    assert torch.equal(opened.weight(W1, (0, 0, 0), tuple(weight.shape)), weight * mask)
    assert opened.beside == [
        f"model.decoder.layers.{layer}.mlp.router.{kind}" for layer in (0, 1) for kind in ("bias", "load")
    ]


@pytest.mark.parametrize(
    ("method", "changes", "step", "is_24"),
    [
        ("sr_ste", {}, 4, True),
        ("sr_ste", {"dense_start": 0.5}, 2, False),
        ("sr_ste", {"dense_start": 0.5}, 3, True),
        ("ste", {"dense_end": 0.3}, 4, False),
        ("ste", {"dense_end": 0.3}, 2, True),
        ("s_ste", {}, 4, True),
        ("asp", {"dense_start": 0.5}, 4, True),
        ("ast", {}, 4, True),
        ("ast", {"boost": 8}, 4, False),
        ("dense", {}, 4, False),
        ("mdgf", {"ramp": 0.9}, 2, False),
        ("mdgf", {"ramp": 0.5}, 4, True),
        ("mdgf", {"pattern": "1:8"}, 4, False),
        ("sdgf", {"ramp": 0.9}, 1, False),
        ("sdgf", {"ramp": 0.5}, 4, True),
    ],
)
def test_which_weights_are_24(tmp_path: Path, method: str, changes: dict[str, Any], step: int, is_24: bool) -> None:
    recipe = sparse_recipe(method, **{"targets": [r"\.mlp\."], **changes})
    opened = open_export(make(tmp_path / "x", recipe, step), None, None)
    found = {name for name in opened.tensors if opened.is_24(name)}
    assert found == ({name for name in opened.tensors if ".linear_fc" in name} if is_24 else set())
    for name in found if method != "s_ste" else ():
        weight = opened.weight(name, (0, 0), opened.tensors[name][0])
        assert ((weight.unflatten(-1, (-1, 4)) == 0).sum(-1) >= 2).all()


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "step_4", recipe_of({}, {"layers": [1, 0]}))


def refused(path: Path, reason: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=reason):
        export(path, path.with_name("theirs"), run=None, **options)
    assert not path.with_name("theirs").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, -1])
def test_a_value_that_is_not_finite(checkpoint: Path, tmp_path: Path, value: float, place: int) -> None:
    weight = tensors_of(recipe_of({}, {"layers": [1, 0]}))[f"model.{FC2}"]
    weight.view(-1)[place] = value
    path = rewritten(checkpoint, tmp_path / "x", {f"model.{FC2}": weight})
    refused(path, rf"{FC2} has values that are not finite: convert an earlier checkpoint")


@pytest.mark.parametrize("name", [FC2, "decoder.layers.0.mlp.experts.w2", "output_layer.weight"])
def test_a_tensor_that_is_missing(checkpoint: Path, tmp_path: Path, name: str) -> None:
    refused(rewritten(checkpoint, tmp_path / "x", {f"model.{name}": None}), rf"has no {name} \[.*which its recipe's")


@pytest.mark.parametrize("name", ["decoder.layers.1.mlp.linear_fc1.bias", "decoder.layers.2.mlp.linear_fc2.weight"])
def test_a_tensor_too_many(checkpoint: Path, tmp_path: Path, name: str) -> None:
    path = rewritten(checkpoint, tmp_path / "x", {f"model.{name}": torch.ones(2)})
    refused(path, rf"has {name}, which its recipe's model has not")


def test_a_tensor_of_another_shape(checkpoint: Path, tmp_path: Path) -> None:
    path = rewritten(checkpoint, tmp_path / "x", {f"model.{FC2}": torch.ones(32, 47)})
    refused(path, rf"{FC2} is \[32, 47\], its recipe makes it \[32, 48\]")


def test_a_tensor_of_which_a_piece_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_block = made.write_block

    def written(sink: Any, name: str, offsets: tuple[int, ...], block: Tensor) -> list[Any]:
        rows = 10 if name.endswith(FC2) and offsets[0] else len(block)
        return write_block(sink, name, offsets, block[:rows].clone())

    monkeypatch.setattr(made, "write_block", written)
    refused(make(tmp_path / "x", recipe_of({})), rf"{FC2} \[32, 48\] has only 1,248 elements")


def test_what_training_alone_has_is_no_model(checkpoint: Path, tmp_path: Path) -> None:
    path = rewritten(
        checkpoint, tmp_path / "x", {"optimizer.exp_avg.x": torch.ones(2), "random.0.torch": torch.ones(2)}
    )
    assert open_export(path, None, None).family.model_type == "megasparse"  # a mixture of experts every other layer


def test_precisions(checkpoint: Path) -> None:
    assert open_export(checkpoint, None, None).dtype == torch.float32
    opened = open_export(checkpoint, "bf16", None)
    assert opened.dtype == torch.bfloat16
    assert opened.dtype_of("decoder.layers.0.mlp.router.bias") == torch.float32
    refused(checkpoint, "--dtype int8: give one of", precision="int8")


def test_a_run_folder_is_its_latest_checkpoint(tmp_path: Path) -> None:
    for step in (2, 4):
        make(tmp_path / "checkpoints" / f"step_{step}", recipe_of({}), step)
    set_latest(tmp_path / "checkpoints" / "step_2")
    assert open_export(tmp_path, None, None).reader.manifest["step"] == 2


@pytest.mark.parametrize(("step", "blocks"), [(1, None), (2, 5), (3, 3), (4, None)])
def test_attention_is_as_it_was_then(tmp_path: Path, step: int, blocks: int | None) -> None:
    """6 blocks of 4 keys in a sequence; from a quarter of the run on they become 3 within half of it."""
    sparse = {"selector": "pooled", "block_size": 4, "blocks": 3, "local_blocks": 1}
    sparse |= {"dense_start": 0.25, "ramp": 0.5, "dense_end": 0.25}
    opened = open_export(make(tmp_path / "x", recipe_of({"sparse_attention": sparse}), step), None, None)
    now = opened.model.sparse_attention
    assert (now.blocks if now else None) == (4 if step == 2 else blocks)
    assert opened.family.model_type == ("llama" if blocks is None else "megasparse")
    assert opened.model.vocab_size == VOCAB
    if now is not None:
        assert (now.dense_start, now.ramp, now.dense_end) == (0, 0, 0)
