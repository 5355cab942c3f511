"""Native checkpoints: saved and loaded is never interrupted, to the bit; what is partial or damaged is never used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from megasparse import topology
from megasparse.checkpoint import native
from megasparse.config import Recipe, parse_recipe
from megasparse.engine import Engine
from tests import small
from tests.helpers import run_distributed
from tests.test_engine import engine_of

FINGERPRINT = "abc"
# Everything that has state: dropout and jitter (generators), bias and load of the routers, moments.
MOE = {"bias_update_rate": 0.01, "jitter": 0.05, "aux_loss_scope": "global_batch", "layers": [0, 1]}
MODEL = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "bias": "qkv"}


def recipe_of(precision: str = "fp32", zero_stage: int = 1, **parallel: Any) -> Recipe:
    # fp16: the scale doubles after every fourth good step, so its counter is state too
    training = {"precision": precision, "loss_scale": 256.0, "loss_scale_window": 4}
    return small.recipe(MODEL, MOE, training, parallel={"zero_stage": zero_stage, **parallel})


def run(engine: Engine, first: int, last: int) -> list[tuple[Any, ...]]:
    place, results = engine.topology, []
    for step in range(first, last):
        batches = small.batches(engine.recipe, step, place.dp_rank, place.dp)
        r = engine.train_step(batches, step, 3e-3 / (step + 1))
        results.append((r.loss, r.grad_norm, r.aux_losses, r.loss_scale, r.skipped, r.expert_tokens.tolist()))
    return results


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Weights and buffers, copied."""
    named = {**dict(engine.gpt.named_parameters()), **dict(engine.gpt.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def disturb(engine: Engine) -> None:
    """Leave nothing as a fresh process would happen to have it: what load does not restore, shows."""
    with torch.no_grad():
        for tensor in engine.gpt.state_dict().values():
            if tensor is not None:  # mcore's empty _extra_state
                tensor.add_(1)
    torch.manual_seed(99)
    model_parallel_cuda_manual_seed(99, force_reset_rng=True)


def interrupted_or_not(raw: dict[str, Any], folder: Path) -> int:
    """3 steps, save, 3 steps; then load into another engine and do the last 3 again."""
    recipe = parse_recipe(raw)
    parallel = recipe.parallel
    place = topology.initialize(parallel.tp, parallel.pp, parallel.ep, parallel.sequence_parallel)
    try:
        resume_and_compare(recipe, place, folder)
    finally:
        topology.shutdown()
    return place.rank


def resume_and_compare(recipe: Recipe, place: topology.Topology, folder: Path) -> None:
    engine = engine_of(recipe, place)
    run(engine, 0, 3)
    saved = native.save(engine, folder, recipe, 3, FINGERPRINT, keep=2)
    at_save, random = state_of(engine), native.random_state()
    expected = run(engine, 3, 6)
    final = state_of(engine)

    resumed = engine_of(recipe, place)
    disturb(resumed)
    assert native.load(resumed, saved) == 3
    assert_same(state_of(resumed), at_save)
    restored = native.random_state()
    assert torch.equal(restored["torch"], random["torch"])
    for name, value in random["tensor_parallel"].items():
        assert torch.equal(restored["tensor_parallel"][name], value), name
    assert run(resumed, 3, 6) == expected
    assert_same(state_of(resumed), final)
    assert len({result[0] for result in expected}) == 3, "the steps do something"


@pytest.mark.parametrize(
    ("precision", "zero_stage"), [("fp32", 0), ("fp32", 1), ("bf16", 1), ("fp16", 1)], ids=lambda value: str(value)
)
def test_resumed_is_never_interrupted(tmp_path: Path, precision: str, zero_stage: int) -> None:
    interrupted_or_not(recipe_of(precision, zero_stage).model_dump(mode="json"), tmp_path)
    if precision == "fp16":
        place = topology.initialize()
        engine = engine_of(recipe_of("fp16"), place)
        assert native.load(engine, tmp_path / "step_3") == 3
        scales = [result[3] for result in run(engine, 3, 6)]
        assert len(set(scales)) == 2, "the scale moves within these steps, so its counter was restored"
        topology.shutdown()


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {"ep": 2, "zero_stage": 0}),
        (2, {"ep": 2, "zero_stage": 1}),
        (2, {"tp": 2, "ep": 2, "sequence_parallel": True}),
        (2, {"pp": 2}),
    ],
    ids=["ep2-zero0", "ep2-zero1", "tp2sp-ep2", "pp2"],
)
def test_resumed_is_never_interrupted_on_two_ranks(tmp_path: Path, world_size: int, parallel: dict[str, Any]) -> None:
    recipe = recipe_of(**parallel)
    assert run_distributed(interrupted_or_not, world_size, recipe.model_dump(mode="json"), tmp_path) == [0, 1]


def test_bf16_experts_on_two_ranks(tmp_path: Path) -> None:
    run_distributed(interrupted_or_not, 2, recipe_of("bf16", ep=2).model_dump(mode="json"), tmp_path)


def test_random_state_round_trip(single: topology.Topology) -> None:
    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        ordinary = torch.rand(4)
        with get_cuda_rng_tracker().fork():
            return ordinary, torch.rand(4)

    draw()
    state = native.random_state()
    first = draw()
    native.set_random_state(state)
    second = draw()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])


# The folder


def names_in(folder: Path) -> list[str]:
    """Without the scripts that DeepSpeed puts beside its checkpoints."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".py")


class Killed(BaseException):
    """Stands in for the end of the process."""


@pytest.fixture
def saved(single: topology.Topology, tmp_path: Path) -> tuple[Engine, Path]:
    """An engine whose step 1 is saved."""
    engine = engine_of(small.recipe(moe={}), single)
    run(engine, 0, 1)
    native.save(engine, tmp_path, engine.recipe, 1, FINGERPRINT, keep=2)
    return engine, tmp_path


@pytest.mark.parametrize(
    "place",
    ["torch.save", "random_state", "json.dumps", "sync", "Path.rename", "write_atomic", "_prune"],
)
def test_killed_while_saving(saved: tuple[Engine, Path], monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Wherever it ends, ``latest`` names a whole checkpoint, and the next save finishes the work."""
    engine, folder = saved

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        owner, name = {
            "torch.save": (torch, "save"),
            "json.dumps": (native.json, "dumps"),
            "Path.rename": (Path, "rename"),
        }.get(place, (native, place))
        patch.setattr(owner, name, die)
        with pytest.raises(Killed):
            native.save(engine, folder, engine.recipe, 2, FINGERPRINT, keep=2)
    newest = native.latest(folder)
    assert newest == folder / ("step_2" if place == "_prune" else "step_1")
    native.read_manifest(newest)
    native.check_resumable(newest, engine.recipe, 1, FINGERPRINT)
    before = state_of(engine)
    native.load(engine, newest)
    assert_same(state_of(engine), before)  # no step between the two saves

    native.save(engine, folder, engine.recipe, 2, FINGERPRINT, keep=2)
    assert native.latest(folder) == folder / "step_2"
    assert names_in(folder) == ["latest", "step_1", "step_2"]


def test_keeps_the_newest(saved: tuple[Engine, Path]) -> None:
    """By number, not by name: step_10 is newer than step_9."""
    engine, folder = saved
    for step in (8, 9, 10, 11):
        native.save(engine, folder, engine.recipe, step, FINGERPRINT, keep=2)
    assert names_in(folder) == ["latest", "step_10", "step_11"]
    native.save(engine, folder, engine.recipe, 12, FINGERPRINT, keep=1)
    assert names_in(folder) == ["latest", "step_12"]


def test_what_latest_names_is_never_pruned(saved: tuple[Engine, Path]) -> None:
    """A checkpoint of a higher step that the run never got to name (killed between rename and ``latest``)."""
    engine, folder = saved
    shutil.copytree(folder / "step_1", folder / "step_12")
    native.save(engine, folder, engine.recipe, 2, FINGERPRINT, keep=1)
    newest = native.latest(folder)
    assert newest == folder / "step_2"
    native.read_manifest(newest)


def test_strangers_stay(saved: tuple[Engine, Path]) -> None:
    engine, folder = saved
    (folder / "step_0_mine").mkdir()
    (folder / "notes.txt").write_text("mine")
    native.save(engine, folder, engine.recipe, 2, FINGERPRINT, keep=1)
    assert names_in(folder) == ["latest", "notes.txt", "step_0_mine", "step_2"]


def test_latest(tmp_path: Path) -> None:
    assert native.latest(tmp_path / "nowhere") is None
    assert native.latest(tmp_path) is None
    (tmp_path / "latest").write_text("step_7\n")
    with pytest.raises(ValueError, match=r"latest.*step_7"):
        native.latest(tmp_path)
    (tmp_path / "step_7").mkdir()
    assert native.latest(tmp_path) == tmp_path / "step_7"


def test_damage_is_refused_by_name(saved: tuple[Engine, Path]) -> None:
    """Every file of a checkpoint in turn: cut short, grown, gone."""
    engine, folder = saved
    path = folder / "step_1"
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json")
    assert len(files) >= 3
    for file in files:
        content = file.read_bytes()
        for damaged, found in (
            (content[:-1], f"{len(content) - 1} bytes"),
            (content + b"x", "bytes"),
            (None, "nothing"),
        ):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            with pytest.raises(ValueError, match=found) as error:
                native.check_resumable(path, engine.recipe, 1, FINGERPRINT)
            assert file.name in str(error.value)
            assert str(path) in str(error.value)
            with pytest.raises(ValueError, match=file.name):
                native.load(engine, path)
        file.write_bytes(content)
    native.check_resumable(path, engine.recipe, 1, FINGERPRINT)


@pytest.mark.parametrize("content", [None, "", '{"format": 1, '])
def test_a_manifest_that_says_nothing(saved: tuple[Engine, Path], content: str | None) -> None:
    engine, folder = saved
    manifest = folder / "step_1" / "manifest.json"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_text(content)
    with pytest.raises(ValueError, match=r"step_1 is not a whole checkpoint.*manifest\.json"):
        native.check_resumable(folder / "step_1", engine.recipe, 1, FINGERPRINT)


def test_a_manifest_of_another_format(saved: tuple[Engine, Path]) -> None:
    path = saved[1] / "step_1" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ValueError, match="step_1 has format 2, this version of megasparse reads 1"):
        native.read_manifest(path.parent)


def test_the_manifest(saved: tuple[Engine, Path]) -> None:
    engine, folder = saved
    manifest = json.loads((folder / "step_1" / "manifest.json").read_text())
    assert manifest["step"] == 1
    assert manifest["samples"] == engine.recipe.training.global_batch_size
    assert manifest["world_size"] == 1
    assert parse_recipe(manifest["recipe"]) == engine.recipe
    files = {str(f.relative_to(folder / "step_1")) for f in (folder / "step_1").rglob("*") if f.is_file()}
    assert set(manifest["bytes"]) == files - {"manifest.json"}


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
        ({"parallel": {"zero_stage": 0}}, "parallel.zero_stage was 1, is 0"),
        ({"model": {"moe": None}}, "model.moe was"),
        ({"training": {"steps": 1}}, "all of training.steps=1 behind it"),
    ],
    ids=str,
)
def test_what_cannot_change_is_named(saved: tuple[Engine, Path], change: dict[str, Any], said: str) -> None:
    engine, folder = saved
    raw = engine.recipe.model_dump(mode="json")
    merge(raw, change)
    with pytest.raises(ValueError, match=r"step_1") as error:
        native.check_resumable(folder / "step_1", parse_recipe(raw), 1, FINGERPRINT)
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
    native.check_resumable(folder / "step_1", parse_recipe(raw), 1, FINGERPRINT)


def test_other_processes_and_other_data(saved: tuple[Engine, Path]) -> None:
    engine, folder = saved
    with pytest.raises(ValueError, match="saved by 1 processes, 2 are running"):
        native.check_resumable(folder / "step_1", engine.recipe, 2, FINGERPRINT)
    with pytest.raises(ValueError, match="data sets were prepared anew"):
        native.check_resumable(folder / "step_1", engine.recipe, 1, "other")
