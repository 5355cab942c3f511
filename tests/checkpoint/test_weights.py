"""A run that begins with another's weights has them to the bit in every layout, and nothing else of it; a teacher is as
it was saved. What does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint.reader import Reader
from megasparse.checkpoint.save import Saver
from megasparse.checkpoint.state import random_state
from megasparse.checkpoint.weights import (
    Source,
    about_initial,
    about_teacher,
    initial_source,
    load_initial,
    load_teacher,
    teacher_source,
)
from megasparse.config import Recipe, parse_recipe
from megasparse.engine import Engine
from megasparse.layout import Layout
from megasparse.placement import blocks, local_buffers, local_weights
from megasparse.topology import Topology
from tests import small
from tests.checkpoint.runs import FINGERPRINT, MOE, SPARSITY, assert_same, disturb, engine_of, run, state_of
from tests.helpers import run_distributed

VOCAB, TOKENIZER = small.VOCAB - 1, small.TOKENIZER.hash
MODEL = {"num_layers": 4, "bias": "qkv", "tie_embeddings": True}


def dense(layout: str = "single", model: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    training = {"micro_batch_size": 1, **sections.pop("training", {})}
    parallel = Layout.parse(layout).parallel()
    return small.recipe({**MODEL, **(model or {})}, MOE, training, parallel=parallel, **sections)


def beginning_with(path: Path, recipe: Recipe) -> Recipe:
    raw = recipe.model_dump(mode="json")
    raw["training"]["initial_checkpoint"] = str(path)
    return parse_recipe(raw)


@pytest.fixture(scope="module")
def saved(single: Topology, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a dense mixture of experts: step_2."""
    folder = tmp_path_factory.mktemp("dense")
    engine = engine_of(dense(), single)
    run(engine, 0, 2)
    Saver(engine, folder, FINGERPRINT, small.TOKENIZER).save(2)
    return folder / "step_2"


# The weights of a new run ---------------------------------------------------------------------------------------------


def begun_and_saved(path: Path, layout: str, precision: str, folder: Path) -> list[str]:
    """Begin with ``path`` where nothing is as a fresh process has it by chance, and save that as step 7."""
    recipe = dense(layout, training={"precision": precision}, sparsity={"weights": SPARSITY})
    recipe = beginning_with(path, recipe)
    engine = engine_of(recipe, small.start(recipe))
    disturb(engine)
    before = random_state(engine.topology.rank)
    source = initial_source(recipe, VOCAB, TOKENIZER)
    assert source is not None
    fresh = load_initial(engine, source)
    for name, state in random_state(engine.topology.rank).items():
        assert torch.equal(*(next(iter(s.views.values())) for s in (state, before[name]))), name
    Saver(engine, folder, FINGERPRINT).save(7)
    for fragment in engine.fragments:  # what the model computes with are the master weights, rounded
        held = fragment.weight.tensor.detach().view(-1)[fragment.start :][: len(fragment.master)]
        assert torch.equal(held, fragment.master.to(held.dtype)), fragment.weight.name
    return fresh


@pytest.mark.parametrize(
    ("layout", "precision"), [("tp2pp2ep2+sp", "fp32"), ("pp2vp2+offload", "fp32"), ("cp2ep2+zero2", "bf16")]
)
def test_weights_in_every_layout_and_nothing_else(saved: Path, tmp_path: Path, layout: str, precision: str) -> None:
    """Weights, router biases and loads to the bit, in float32 also for bf16; no moment, no step; masks start anew."""
    world = Layout.parse(layout).world_size
    fresh = run_distributed(begun_and_saved, world, saved, layout, precision, tmp_path)
    theirs, ours = Reader(saved), Reader(tmp_path / "step_7")
    masks = {name for name in ours.tensors if ".sparsity." in name}
    assert len(masks) == 4 * 2 + 2 * 2 + 2 * 3
    assert [sorted(masks)] * world == [sorted(names) for names in fresh]
    names = {name for name in ours.tensors if not name.startswith("random.")} - masks
    assert names == {name for name in theirs.tensors if not name.startswith("random.")}
    for name in names:
        if name.startswith("model."):
            assert torch.equal(ours.read(name), theirs.read(name)), name
        else:
            assert not ours.read(name).count_nonzero(), name
    assert theirs.read("model.decoder.layers.1.mlp.router.bias").count_nonzero()
    assert (theirs.manifest["adam_steps"], ours.manifest["adam_steps"]) == (2, 0)


FRESH = {
    "sparsity": {"sparsity": {"weights": {"method": "ast", "decay": 0.01, "boost": 4, "score": "wanda"}}},
    "fp8_scales": {"training": {"fp8": {"recipe": "delayed"}}},
    "gate": {"model": {"sparse_attention": {"selector": "gate", "blocks": 4, "block_size": 4}}},
    "centroids": {"model": {"sparse_attention": {"selector": "clusters", "blocks": 4, "block_size": 4}}},
}


@pytest.mark.parametrize("part", FRESH)
def test_what_starts_anew(single: Topology, saved: Path, part: str) -> None:
    """Of a model that has more than the one it begins with: as in a new model, and the first steps can be made."""
    recipe = beginning_with(saved, dense(**FRESH[part]))
    engine = engine_of(recipe, single)
    new = state_of(engine)
    source = initial_source(recipe, VOCAB, TOKENIZER)
    assert source is not None
    fresh = load_initial(engine, source)
    assert fresh
    assert all(f".{part}." in name for name in fresh)
    named = state_of(engine)
    for weight in (*local_weights(engine.chunks, single), *local_buffers(engine.chunks, single)):
        key = f"0.{weight.name}"
        expected = new[key] if f"model.{weight.name}" in fresh else Reader(saved).read(f"model.{weight.name}")
        assert torch.equal(named[key], expected), key
    run(engine, 0, 2)
    said = about_initial(recipe, source, fresh)
    assert said.startswith(f"weights from {saved} (small, step 2); {len(fresh)} tensors it has not start anew")


def test_what_else_of_the_model_changed_is_said(saved: Path) -> None:
    recipe = beginning_with(saved, dense(model={"rope": {"theta": 500.0}, "hidden_dropout": 0.1}))
    source = initial_source(recipe, VOCAB, TOKENIZER)
    assert source is not None
    assert about_initial(recipe, source, []) == (
        f"weights from {saved} (small, step 2); model.rope.theta was 10000.0, is 500.0; "
        "model.hidden_dropout was 0.0, is 0.1"
    )
    assert source.identity["path"] == str(saved)
    assert len(source.identity["sha256"]) == 64


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"qk_norm": "head"}, r"the model has model\.decoder\.\S*norm\.weight \(8,\), the checkpoint has not"),
        ({"bias": "none"}, r"it has model\.decoder\.\S*linear_qkv\.bias \(64,\), the model has not"),
        ({"ffn_hidden_size": 56}, r"linear_fc1\.weight is \(96, 32\) there, \(112, 32\) in the model"),
        ({"tie_embeddings": False}, r"the model has model\.output_layer\.weight \(95, 32\), the checkpoint has not"),
        (
            {"sparse_attention": {"selector": "nsa", "blocks": 4, "block_size": 32}},
            r"the model has model\.decoder\.layers\.0\.\S*\.compress_key\.\S* \(.*\), the checkpoint has not",
        ),
    ],
    ids=str,
)
def test_a_model_that_does_not_fit_is_refused_by_tensor(
    single: Topology, saved: Path, model: dict[str, Any], said: str
) -> None:
    engine = engine_of(dense(model=model), single)
    before = state_of(engine)
    with pytest.raises(ValueError, match=said):
        load_initial(engine, Source(saved, engine.recipe, 2))
    assert_same(state_of(engine), before)


def test_masks_are_not_dropped(single: Topology, tmp_path: Path) -> None:
    """Sparse weights as the start of a dense model would be another model."""
    author = engine_of(dense(sparsity={"weights": SPARSITY}), single)
    Saver(author, tmp_path, FINGERPRINT).save(1)
    with pytest.raises(ValueError, match=r"it has model\.\S*\.sparsity\.mask \(\d+, \d+\), the model has not"):
        load_initial(engine_of(dense(), single), Source(tmp_path / "step_1", dense(), 1))


def test_damage_is_refused_and_nothing_is_loaded(single: Topology, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "step_2"
    shutil.copytree(saved, path)
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(content)
    engine = engine_of(dense(), single)
    before = state_of(engine)
    with pytest.raises(ValueError, match=r"the SHA-256 of __0_0\.distcp is not that of .*; copy it again"):
        load_initial(engine, Source(path, engine.recipe, 2))
    assert_same(state_of(engine), before)


def other_manifest(saved: Path, path: Path, **changes: Any) -> Path:
    shutil.copytree(saved, path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    checkpoints.write_manifest(path, {**manifest, **changes})
    return path


@pytest.mark.parametrize("field", ["training.initial_checkpoint", "training.teacher.checkpoint"])
def test_before_any_work(saved: Path, tmp_path: Path, field: str) -> None:
    """What can be seen without a process group: no checkpoint, damage, another vocabulary or tokenizer."""

    def refused(path: Path, vocab_size: int = VOCAB, tokenizer: str = TOKENIZER) -> str:
        raw = dense().model_dump(mode="json")
        if field == "training.teacher.checkpoint":
            raw["training"]["teacher"] = {"checkpoint": str(path)}
        else:
            raw["training"]["initial_checkpoint"] = str(path)
        with pytest.raises(ValueError, match=f"{field}={path}: ") as error:
            sources(parse_recipe(raw), vocab_size, tokenizer)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is not a whole checkpoint: it has no readable manifest.json" in refused(tmp_path / "nowhere")
    assert "its vocabulary has 95 tokens, this run's 96: prepare the data with its tokenizer" in refused(saved, 96)
    assert "it has another tokenizer than data.sets" in refused(saved, tokenizer="another")
    damaged = shutil.copytree(saved, tmp_path / "damaged")
    metadata = bytearray((damaged / ".metadata").read_bytes())
    metadata[len(metadata) // 2] ^= 1
    (damaged / ".metadata").write_bytes(metadata)
    assert "the SHA-256 of .metadata" in refused(damaged)
    foreign = other_manifest(saved, tmp_path / "foreign", recipe={"name": "x"})
    assert "its recipe: data: missing" in refused(foreign)


def sources(recipe: Recipe, vocab_size: int, tokenizer: str) -> list[Source | None]:
    return [initial_source(recipe, vocab_size, tokenizer), teacher_source(recipe, vocab_size, tokenizer, 1)]


def test_a_tokenizer_that_is_not_known_and_other_data_will_do(saved: Path, tmp_path: Path) -> None:
    path = other_manifest(saved, tmp_path / "old", tokenizer=None, data_fingerprint="other")
    (source, none) = sources(beginning_with(path, dense()), VOCAB, TOKENIZER)
    assert source == Source(path, dense(), 2)
    assert none is None
    assert sources(dense(), VOCAB, TOKENIZER) == [None, None]


# A teacher ------------------------------------------------------------------------------------------------------------

FADING = {"method": "mdgf", "ramp": 0.3}  # what is masked is still a part of the product


def student_of(path: Path, layout: str = "single") -> Recipe:
    raw = dense(layout).model_dump(mode="json")
    raw["training"]["teacher"] = {"checkpoint": str(path), "temperature": 2.5, "weight": 0.75}
    return parse_recipe(raw)


def loaded_teacher(path: Path, layout: str) -> list[tuple[str, tuple[int, ...], torch.Tensor]]:
    recipe = student_of(path, layout)
    place = small.start(recipe)
    source = teacher_source(recipe, VOCAB, TOKENIZER, place.world_size)
    assert source is not None
    before = random_state(place.rank)
    teacher = load_teacher(recipe, source, place, VOCAB)
    for name, state in random_state(place.rank).items():
        assert torch.equal(*(next(iter(s.views.values())) for s in (state, before[name]))), name
    assert not any(parameter.requires_grad for parameter in teacher.chunks.parameters())
    assert {layer.state.progress for chunk in teacher.chunks for layer in chunk.decoder.layers} == {3 / 20}  # type: ignore[union-attr]
    held = (*local_weights(teacher.chunks, place), *local_buffers(teacher.chunks, place))
    return [(w.name, o, part.clone()) for w in held for o, part in blocks(w, 0, w.tensor.detach().view(-1))]


def test_a_teacher_is_as_it_was_saved(single: Topology, tmp_path: Path) -> None:
    """With its masks and router biases, in its place of the schedules, in a layout that splits everything."""
    author: Engine = engine_of(dense(sparsity={"weights": SPARSITY}, model={"num_layers": 4, "head_dim": 16}), single)
    run(author, 0, 3)
    Saver(author, tmp_path, FINGERPRINT, small.TOKENIZER).save(3)
    reader = Reader(tmp_path / "step_3")
    whole = {name: reader.read(name) for name in reader.tensors if name.startswith("model.")}
    covered = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in whole.items()}
    for rank in run_distributed(loaded_teacher, 4, tmp_path / "step_3", "tp2pp2ep2+sp"):
        for name, offsets, part in rank:
            place = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))
            assert torch.equal(whole[f"model.{name}"][place], part), name
            covered[f"model.{name}"][place] = True
    assert all(mask.all() for mask in covered.values())
    assert not all(mask.all() for name, mask in whole.items() if name.endswith(".mask"))
    source = teacher_source(student_of(tmp_path / "step_3"), VOCAB, TOKENIZER, 1)
    assert source is not None
    assert about_teacher(student_of(tmp_path / "step_3"), source) == (
        f"taught by {tmp_path / 'step_3'} (small, step 3): 0.25 of the cross-entropy and 0.75 of 2.5^2 "
        "KL(teacher || student) at temperature 2.5; mfu does not count the teacher"
    )


@pytest.mark.parametrize("weights", [SPARSITY, FADING], ids=["masked", "fading"])
def test_a_teacher_says_what_its_own_run_would(single: Topology, tmp_path: Path, weights: dict[str, Any]) -> None:
    """With 2:4 weights, in FP8, and with as many attention blocks as at that point of its ramp."""
    own = dense(
        model={"sparse_attention": {"selector": "pooled", "block_size": 4, "blocks": 4, "ramp": 0.3}, "init_std": 0.2},
        training={"fp8": {"recipe": "delayed"}},
        sparsity={"weights": weights},
    )
    author = engine_of(own, single)
    run(author, 0, 3)
    Saver(author, tmp_path, FINGERPRINT, small.TOKENIZER).save(3)
    recipe = student_of(tmp_path / "step_3")
    source = teacher_source(recipe, VOCAB, TOKENIZER, 1)
    assert source is not None
    batches = small.batches(recipe, 5)
    logits = load_teacher(recipe, source, single, VOCAB)._logits(batches)
    nats = sum(
        F.cross_entropy(x.flatten(0, 1), b.labels.flatten(), reduction="sum").item()
        for x, b in zip(logits, batches, strict=True)
    )
    assert author.evaluate(batches)[0] == pytest.approx(nats, rel=1e-6)


def test_a_teacher_lacks_nothing(single: Topology, saved: Path) -> None:
    """Masks, too, must be there."""
    recipe = student_of(saved)
    source = Source(saved, dense(sparsity={"weights": SPARSITY}), 2)
    with pytest.raises(ValueError, match=r"the model has model\.\S*\.sparsity\.mask \(\d+, \d+\), the checkpoint has"):
        load_teacher(recipe, source, single, VOCAB)
