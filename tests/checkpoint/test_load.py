"""Saved in one layout and resumed in another, the run goes on as if never interrupted; on the same one, to the bit.
What is damaged, foreign or incomplete is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse.checkpoint.load import check_resumable, load
from megasparse.checkpoint.reader import Reader
from megasparse.checkpoint.save import Saver
from megasparse.checkpoint.state import random_state
from megasparse.config import Recipe, parse_recipe
from megasparse.engine import Engine
from megasparse.layout import Layout
from megasparse.topology import Topology
from tests import small
from tests.checkpoint.runs import FINGERPRINT, MODEL, MOE, assert_same, disturb, engine_of, recipe_of, run, state_of
from tests.helpers import run_distributed

SAVED, END = 3, 8  # steps
BATCH = {"global_batch_size": 4}  # at least two micro-batches a rank

# The same layout: to the bit -----------------------------------------------------------------------------------------


def interrupted_or_not(
    layout: str,
    precision: str,
    folder: Path,
    sparse: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> list[float]:
    """3 steps, save, 3 steps; then load into another engine and do the last 3 again."""
    training = {**BATCH, **(training or {})}
    recipe = recipe_of(layout, precision, **training)
    if sparse is not None:
        model = {**MODEL, "sparse_attention": sparse}
        recipe = small.recipe(model, MOE, {**BATCH, "micro_batch_size": 1}, parallel=Layout.parse(layout).parallel())
    place = small.start(recipe)
    engine = engine_of(recipe, place)
    run(engine, 0, SAVED)
    Saver(engine, folder, FINGERPRINT).save(SAVED)
    at_save, random = state_of(engine), random_state(place.rank)
    expected = run(engine, SAVED, 6)
    final = state_of(engine)

    resumed = engine_of(recipe, place)
    disturb(resumed)
    assert load(resumed, folder / "step_3") == SAVED
    assert_same(state_of(resumed), at_save)
    for name, state in random_state(place.rank).items():
        ((_, restored),) = state.views.items()
        ((_, saved),) = random[name].views.items()
        assert torch.equal(restored, saved), name
    assert run(resumed, SAVED, 6) == expected
    assert_same(state_of(resumed), final)
    assert len({result[0] for result in expected}) == 3, "the steps do something"
    return [result[3] for result in expected]


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ("single+zero0", "fp32"),
        ("single", "fp32"),
        ("single", "bf16"),
        ("single", "fp16"),
        ("ep2", "fp32"),
        ("ep2", "bf16"),
        ("tp2ep2+sp", "fp32"),
        ("pp2vp2", "fp32"),
        ("cp2+zero2", "fp32"),
        ("ep2+offload", "bf16"),
    ],
)
def test_resumed_is_never_interrupted(tmp_path: Path, layout: str, precision: str) -> None:
    """With dropout, jitter, router biases and loss scale."""
    scales = run_distributed(interrupted_or_not, Layout.parse(layout).world_size, layout, precision, tmp_path)[0]
    if precision == "fp16":
        assert len(set(scales)) == 2, "the scale moves within these steps, so its counter was restored"


@pytest.mark.parametrize(("layout", "precision"), [("tp2ep2+sp", "fp32"), ("ep2", "bf16")])
def test_histories_of_fp8_are_resumed(tmp_path: Path, layout: str, precision: str) -> None:
    """Of experts on each rank, in float32 whatever the precision; a history that is not yet full, and then is."""
    training = {"fp8": {"recipe": "delayed", "amax_history_len": 5, "margin": 1}}
    run_distributed(interrupted_or_not, 2, layout, precision, tmp_path, None, training)
    reader = Reader(tmp_path / "step_3")
    names = [name for name in reader.tensors if ".fp8_scales." in name]
    assert len(names) == 2 * len(recipe_of(**training).fp8_weights)
    history = reader.read("model.decoder.layers.1.mlp.experts.fp8_scales.w2.history")
    assert (history.shape, history.dtype) == ((5, 8, 4), torch.float32)
    assert (history[:2] == 0).all()
    assert (history[2:, :, :2] > 0).any((1, 2)).all()
    with pytest.raises(ValueError, match=r"training.fp8.margin was 1, is 0"):
        check_resumable(
            tmp_path / "step_3",
            recipe_of(layout, precision, fp8={**training["fp8"], "margin": 0}, **BATCH),
            FINGERPRINT,
        )
    elsewhere = recipe_of(layout, precision, fp8={**training["fp8"], "emulate": True}, **BATCH)
    check_resumable(tmp_path / "step_3", elsewhere, FINGERPRINT)


@pytest.mark.parametrize("selector", ["gate", "nsa", "clusters"])
def test_selectors_that_learn_are_resumed(tmp_path: Path, selector: str) -> None:
    """Saved in a ramp from dense to sparse."""
    sizes = {"block_size": 4, "blocks": 4, "compression_size": 4, "compression_stride": 2, "gate_dim": 8, "clusters": 3}
    sparse = {"selector": selector, **sizes, "dense_start": 0.1, "ramp": 0.1}  # of 20 steps
    run_distributed(interrupted_or_not, 2, "tp2", "fp32", tmp_path, sparse)


# Another layout ------------------------------------------------------------------------------------------------------

# Vocabulary padded by tp, tied embeddings on two stages, interleaved stages, experts and ranges of ZeRO split.
LAYOUTS = ("single+zero0", "tp2pp2ep2+sp", "pp2vp2+offload", "cp2ep2+zero2")
BF16_LAYOUTS = ("tp2", "ep2")


def stable(layout: str, precision: str) -> Recipe:
    """No dropout, and an eps at which AdamW does not make rounding into updates."""
    recipe = recipe_of(layout, precision, dropout=False, **BATCH)
    return recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"eps": 1e-5})})


def never_interrupted(layout: str, precision: str, folder: Path) -> list[tuple[Any, ...]]:
    recipe = stable(layout, precision)
    engine = engine_of(recipe, small.start(recipe))
    run(engine, 0, SAVED)
    Saver(engine, folder / layout, FINGERPRINT).save(SAVED)
    return run(engine, SAVED, END)


def resumed_from_each(layout: str, precision: str, folder: Path, layouts: tuple[str, ...]) -> dict[str, Any]:
    """The steps after each of the checkpoints; each is also saved again before."""
    recipe = stable(layout, precision)
    engine = engine_of(recipe, small.start(recipe))
    results = {}
    for saved in layouts:
        disturb(engine)
        check_resumable(folder / saved / "step_3", recipe, FINGERPRINT)
        assert load(engine, folder / saved / "step_3") == SAVED
        Saver(engine, folder / f"{saved} in {layout}", FINGERPRINT).save(SAVED)
        results[saved] = run(engine, SAVED, END)
    return results


def assert_same_content(a: Path, b: Path) -> None:
    """Every weight, moment and buffer, to the bit."""
    first, second = Reader(a), Reader(b)
    names = [name for name in first.tensors if not name.startswith("random.")]
    assert names == [name for name in second.tensors if not name.startswith("random.")]
    assert [name for name in names if not torch.equal(first.read(name), second.read(name))] == []
    assert [first.manifest[key] for key in ("step", "adam_steps")] == [SAVED, SAVED]
    assert second.manifest["adam_steps"] == SAVED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "layouts", "tolerance"), [("fp32", LAYOUTS, 1e-6), ("bf16", BF16_LAYOUTS, 2e-3)], ids=["fp32", "bf16"]
)
def test_saved_in_each_layout_and_resumed_in_each(
    tmp_path: Path, precision: str, layouts: tuple[str, ...], tolerance: float
) -> None:
    """The next 5 losses are those of the run that was not interrupted, and the state is the saved one to the bit."""
    world = {layout: Layout.parse(layout).world_size for layout in layouts}
    expected = {x: run_distributed(never_interrupted, world[x], x, precision, tmp_path)[0] for x in layouts}
    worst = 0.0
    for y in layouts:
        resumed = run_distributed(resumed_from_each, world[y], y, precision, tmp_path, layouts)
        for x in layouts:
            assert_same_content(tmp_path / x / "step_3", tmp_path / f"{x} in {y}" / "step_3")
            for ours, theirs in zip(resumed[0][x], expected[x], strict=True):
                worst = max(worst, abs(ours[0] - theirs[0]) / theirs[0])
                assert ours[0] == pytest.approx(theirs[0], rel=tolerance), f"saved in {x}, resumed in {y}"
                assert ours[1] == pytest.approx(theirs[1], rel=20 * tolerance), f"norm: saved in {x}, resumed in {y}"
            if x == y:
                assert resumed[0][x] == expected[x], f"{x}: to the bit"
    print(f"{precision}: losses differ by {worst:.1e} at most")


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(single: Topology, tmp_path: Path) -> tuple[Engine, Path]:
    """An engine whose steps 1 and 2 are saved."""
    engine = engine_of(recipe_of(), single)
    saver = Saver(engine, tmp_path, FINGERPRINT, small.TOKENIZER)
    for step in (1, 2):
        run(engine, step - 1, step)
        saver.save(step)
    return engine, tmp_path


def test_damage_is_refused_by_name_and_nothing_is_loaded(saved: tuple[Engine, Path]) -> None:
    """Every file in turn: a byte flipped at its ends or in the middle, cut short, grown, gone."""
    engine, folder = saved
    path, before = folder / "step_2", state_of(engine)
    files = sorted(path.iterdir())
    tokenizer = ["tokenizer.json", "tokenizer_config.json"]
    assert [file.name for file in files] == [".metadata", "__0_0.distcp", "manifest.json", *tokenizer]
    for file in files:
        content = file.read_bytes()
        flips = [flipped(content, i) for i in (len(content) // 8, len(content) // 2, len(content) - 4)]
        for damaged in (*flips, content[:-1], content + b"x" * 100, None):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            with pytest.raises(ValueError, match="step_1 before it is whole") as error:
                load(engine, path)
            assert file.name in str(error.value)
            assert "--resume --checkpoint step_1" in str(error.value)
            assert str(path) in str(error.value)
            assert "\n" not in str(error.value)
            if damaged is None or len(damaged) != len(content):  # seen before any process group
                with pytest.raises(ValueError, match="step_1 before it is whole"):
                    check_resumable(path, engine.recipe, FINGERPRINT)
        file.write_bytes(content)
    assert_same(state_of(engine), before)
    assert load(engine, path) == 2


def flipped(content: bytes, i: int) -> bytes:
    return content[:i] + bytes([content[i] ^ 16]) + content[i + 1 :]


def refused_on_both_ranks(folder: Path) -> str:
    """With a damaged file: what this rank says."""
    recipe = recipe_of("ep2")
    engine = engine_of(recipe, small.start(recipe))
    Saver(engine, folder, FINGERPRINT).save(1)
    if engine.topology.rank == 0:
        file = folder / "step_1" / "__1_0.distcp"
        file.write_bytes(flipped(file.read_bytes(), 1000))
    torch.distributed.barrier()
    with pytest.raises(ValueError, match="step_1") as error:
        load(engine, folder / "step_1")
    return str(error.value)


def test_every_rank_refuses_alike(tmp_path: Path) -> None:
    first, second = run_distributed(refused_on_both_ranks, 2, tmp_path)
    assert first == second
    assert "the SHA-256 of __1_0.distcp" in first
    assert "no whole checkpoint before it" in first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"bias": "none"},
            r"it has model\.decoder\.layers\.0\.self_attention\.linear_qkv\.bias \(64,\), the model has",
        ),
        ({"qk_norm": "head"}, r"the model has model\.decoder\.\S*norm\.weight \(8,\), the checkpoint has not"),
        ({"ffn_hidden_size": 56}, r"linear_fc1\.sparsity\.mask is \(96, 32\) there, \(112, 32\) in the model"),
        ({"tie_embeddings": False}, r"the model has model\.output_layer\.weight \(95, 32\), the checkpoint has not"),
    ],
    ids=str,
)
def test_a_foreign_model_is_refused_by_tensor(
    saved: tuple[Engine, Path], single: Topology, change: dict[str, Any], said: str
) -> None:
    engine, folder = saved
    raw = engine.recipe.model_dump(mode="json")
    merge(raw, {"model": change})
    other = engine_of(parse_recipe(raw), single)
    before = state_of(other)
    with pytest.raises(ValueError, match=said):
        load(other, folder / "step_2")
    assert_same(state_of(other), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"hidden_size": 64}}, "model.hidden_size was 32, is 64"),
        ({"model": {"moe": {"top_k": 3}}}, "model.moe.top_k was 2, is 3"),
        ({"model": {"rope": {"theta": 500.0}}}, "model.rope.theta was 10000.0, is 500.0"),
        ({"data": {"seq_length": 12}}, "data.seq_length was 24, is 12"),
        ({"data": {"sets": [{"path": "other"}]}}, "data.sets"),
        ({"training": {"seed": 5}}, "training.seed was 1234, is 5"),
        ({"training": {"global_batch_size": 16}}, "training.global_batch_size was 8, is 16"),
        ({"training": {"precision": "bf16"}}, "training.precision was fp32, is bf16"),
        ({"model": {"moe": None}}, "model.moe was"),
        ({"sparsity": {"weights": {"method": "ste", "decay": None}}}, "sparsity.weights.method was sr_ste, is ste"),
        ({"training": {"steps": 1}}, "all of training.steps=1 behind it"),
    ],
    ids=str,
)
def test_what_cannot_change_is_named(saved: tuple[Engine, Path], change: dict[str, Any], said: str) -> None:
    engine, folder = saved
    raw = engine.recipe.model_dump(mode="json")
    merge(raw, change)
    with pytest.raises(ValueError, match="step_1") as error:
        check_resumable(folder / "step_1", parse_recipe(raw), FINGERPRINT)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def merge(raw: dict[str, Any], change: dict[str, Any]) -> None:
    for key, value in change.items():
        if isinstance(value, dict):
            merge(raw[key], value)
        else:
            raw[key] = value


def test_what_can_change(saved: tuple[Engine, Path]) -> None:
    engine, folder = saved
    raw = engine.recipe.model_dump(mode="json")
    merge(raw, {"optimizer": {"lr": 1.0}, "training": {"steps": 99, "save_interval": 7}, "name": "other"})
    merge(raw, {"parallel": {"tp": 2, "ep": 2, "zero_stage": 2}})
    check_resumable(folder / "step_1", parse_recipe(raw), FINGERPRINT)


def test_other_data(saved: tuple[Engine, Path]) -> None:
    engine, folder = saved
    with pytest.raises(ValueError, match="data sets were prepared anew"):
        check_resumable(folder / "step_1", engine.recipe, "other")
