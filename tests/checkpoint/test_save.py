"""Saving: whatever happens meanwhile, ``latest`` names a whole checkpoint; what cannot be written is said clearly."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint import save as saving
from megasparse.checkpoint.load import load
from megasparse.checkpoint.reader import Reader
from megasparse.checkpoint.save import Saver
from megasparse.checkpoint.state import tensors
from megasparse.config import parse_recipe
from megasparse.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megasparse.engine import Engine
from megasparse.layout import Layout
from megasparse.processes import RankError, Workers
from megasparse.sparsity.weight import sparse_weights
from megasparse.topology import Topology
from tests import small
from tests.checkpoint.runs import FINGERPRINT, assert_same, engine_of, recipe_of, run, state_of
from tests.helpers import files_of_at_most, run_distributed


@pytest.fixture
def saver(single: Topology, tmp_path: Path) -> Saver:
    """Of an engine whose step 1 is saved."""
    saver = Saver(engine_of(recipe_of(), single), tmp_path, FINGERPRINT)
    run(saver.engine, 0, 1)
    saver.save(1)
    return saver


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_manifest(saver: Saver) -> None:
    path = saver.folder / "step_1"
    manifest = checkpoints.read_manifest(path)
    assert manifest["step"] == manifest["adam_steps"] == 1
    assert manifest["samples"] == 8
    assert (manifest["world_size"], manifest["layout"]) == (1, "single")
    assert parse_recipe(manifest["recipe"]) == saver.engine.recipe
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {"manifest.json"}
    checkpoints.verify(path, manifest)


def test_a_checkpoint_has_its_tokenizer_and_names_its_data(single: Topology, tmp_path: Path) -> None:
    """As the file that was given, hashed like the others; the manifest has what TrainingData says of its sets."""
    engine = engine_of(recipe_of(), single)
    sentencepiece = train_sentencepiece(["def f(x):\n    return x\n"], vocab_size=280)
    given: list[tuple[Tokenizer, set[str]]] = [
        (small.TOKENIZER, {"tokenizer.json", "tokenizer_config.json"}),
        (sentencepiece, {"tokenizer.model"}),
    ]
    for step, (tokenizer, names) in enumerate(given, 1):
        sets = [{"path": "/data/a", "weight": 1.0, "tokens": 7}]
        Saver(engine, tmp_path, FINGERPRINT, tokenizer, sets).save(step)
        path = tmp_path / f"step_{step}"
        manifest = checkpoints.read_manifest(path)
        assert (manifest["tokenizer"], manifest["data"]) == (tokenizer.hash, sets)
        assert set(manifest["files"]) == {".metadata", "__0_0.distcp", *names}
        checkpoints.verify(path, manifest)
        assert load(engine, path) == step
        again = load_tokenizer(path)
        assert (again.hash, again.eod, again.vocab_size) == (tokenizer.hash, tokenizer.eod, tokenizer.vocab_size)
    damaged = bytearray((path / "tokenizer.model").read_bytes())
    damaged[100] ^= 1
    (path / "tokenizer.model").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"the SHA-256 of tokenizer\.model .* step_1 before it is whole"):
        load(engine, path)


def test_a_checkpoint_of_before_is_loaded(saver: Saver) -> None:
    """Without a tokenizer's files, and without ``tokenizer`` and ``data`` in its manifest."""
    path = saver.folder / "step_1"
    manifest = checkpoints.read_manifest(path)
    assert manifest["tokenizer"] is None
    checkpoints.write_manifest(path, {k: v for k, v in manifest.items() if k not in ("tokenizer", "data")})
    assert load(saver.engine, path) == 1


def test_bytes_are_three_floats_a_parameter(saver: Saver) -> None:
    """A byte for each place of a mask, and what a piece's frame costs: about a kilobyte."""
    parameters = sum(p.numel() for p in saver.engine.chunks.parameters()) - 32  # the embedding has a row of padding
    reader = Reader(saver.folder / "step_1")
    size = sum(file["bytes"] for file in reader.manifest["files"].values())
    pieces = sum(info.pieces for info in reader.tensors.values())
    masks = sum(sparse.mask.numel() for sparse in sparse_weights(saver.engine.chunks))
    assert 12 * parameters + masks < size < 12 * parameters + masks + 2200 * pieces


def test_retention_is_the_recipes(single: Topology, tmp_path: Path) -> None:
    recipe = recipe_of(keep_checkpoints=2, keep_every=4, save_interval=2)
    saver = Saver(engine_of(recipe, single), tmp_path, FINGERPRINT)
    for step in (2, 4, 6, 8, 10, 12):
        saver.save(step)
    assert names_in(tmp_path) == ["latest", "step_10", "step_12", "step_4", "step_8"]


# Beside the run -------------------------------------------------------------------------------------------------------


def test_beside_the_run_the_state_is_that_of_the_step(
    single: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on before a byte is written, and what is written is what was."""
    engine = engine_of(recipe_of(async_save=True), single)
    saver = Saver(engine, tmp_path, FINGERPRINT)
    run(engine, 0, 1)
    write, gate = saver._write, ThreadPoolExecutor(1).submit(time.sleep, 0.5)
    monkeypatch.setattr(saver, "_write", lambda *args: (gate.result(), write(*args))[1])
    saver.save(1)
    at_save = state_of(engine)
    run(engine, 1, 3)
    assert checkpoints.latest(tmp_path) is None, "not written yet"
    later = state_of(engine)
    assert any(not torch.equal(at_save[name], later[name]) for name in later)
    saver.save(3)  # waits for the first
    assert checkpoints.latest(tmp_path) == tmp_path / "step_1"
    saver.wait()
    assert checkpoints.latest(tmp_path) == tmp_path / "step_3"
    for step, state in ((1, at_save), (3, later)):
        fresh = engine_of(engine.recipe, single)
        assert load(fresh, tmp_path / f"step_{step}") == step
        assert_same(state_of(fresh), state)


def saved_twice(layout: str, folder: Path) -> int:
    """The same state, before the run goes on and beside it."""
    recipe = recipe_of(layout)
    engine = engine_of(recipe, small.start(recipe))
    for name in ("sync", "async"):
        engine.recipe = recipe_of(layout, async_save=name == "async")
        saver = Saver(engine, folder / name, FINGERPRINT)
        saver.save(1)
        saver.wait()
    return engine.topology.rank


def test_both_ways_write_the_same(tmp_path: Path) -> None:
    run_distributed(saved_twice, 2, "ep2", tmp_path)
    a, b = Reader(tmp_path / "sync" / "step_1"), Reader(tmp_path / "async" / "step_1")
    assert a.tensors == b.tensors
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.tensors)


# Failures -------------------------------------------------------------------------------------------------------------


def disk_full(layout: str, asynchronous: bool, full_rank: int, size: int, folder: Path) -> str:
    """Step 1 is saved, step 2 cannot be, step 3 can again: what step 2 said."""
    recipe = recipe_of(layout, async_save=asynchronous)
    engine = engine_of(recipe, small.start(recipe))
    saver = Saver(engine, folder, FINGERPRINT)
    saver.save(1)
    saver.wait()
    with files_of_at_most(size) if engine.topology.rank == full_rank else contextlib.nullcontext():
        with pytest.raises(ValueError, match="could not save") as error:  # noqa: PT012  # the one or the other
            saver.save(2)
            saver.wait()
        torch.distributed.barrier()
    if engine.topology.rank == 0:
        assert names_in(folder) == ["latest", "step_1"]
        checkpoints.verify(folder / "step_1", checkpoints.read_manifest(folder / "step_1"))
    saver.save(3)
    saver.wait()
    assert load(engine, folder / "step_3") == 3
    return str(error.value)


@pytest.mark.parametrize("size", [0, 3000, 200_000])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_disk_full(tmp_path: Path, asynchronous: bool, size: int) -> None:
    (said,) = run_distributed(disk_full, 1, "single", asynchronous, 0, size, tmp_path)
    assert str(tmp_path / "step_2") in said
    assert "File too large" in said
    assert "bytes are free there" in said
    assert "the last whole checkpoint is step_1" in said


@pytest.mark.parametrize("full_rank", [0, 1])
def test_disk_full_on_one_rank_is_said_by_all(tmp_path: Path, full_rank: int) -> None:
    first, second = run_distributed(disk_full, 2, "ep2", False, full_rank, 100_000, tmp_path)
    assert f"rank {full_rank}: [Errno 27] File too large" in first
    assert first.split(". ")[0] == second.split(". ")[0]


def test_no_room_is_seen_before_writing(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = sum(p.numel() for p in saver.engine.chunks.parameters())
    usage = shutil.disk_usage(saver.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12 * parameters - 1000))
    monkeypatch.setattr(saver, "_write_own", pytest.fail)
    with pytest.raises(ValueError, match=r"no space left.* the last whole checkpoint is step_1") as error:
        saver.save(2)
    assert f"{12 * parameters - 1000:,} bytes are free" in str(error.value)
    assert names_in(saver.folder) == ["latest", "step_1"]


def test_a_folder_that_cannot_be_written(single: Topology, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    saver = Saver(engine_of(recipe_of(), single), tmp_path / "file", FINGERPRINT)
    with pytest.raises(ValueError, match=r"could not save .*file/step_1"):
        saver.save(1)


class Killed(BaseException):
    """Stands in for the end of the process."""


def die(*_: Any, **__: Any) -> None:
    raise Killed


@pytest.mark.parametrize("place", ["dcp.save", "_describe", "write_manifest", "sync", "rename", "set_latest", "prune"])
def test_killed_while_saving(saver: Saver, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Wherever it ends, ``latest`` names a whole checkpoint, and the next save finishes the work."""
    rename = Path.rename
    with monkeypatch.context() as patch:
        match place:
            case "dcp.save":
                patch.setattr(saving.dcp, "save", die)
            case "_describe":
                patch.setattr(saving, "_describe", die)
            case "rename":  # of the folder, not of torch's file in it
                patch.setattr(Path, "rename", lambda a, b: die() if a.is_dir() else rename(a, b))
            case _:
                patch.setattr(checkpoints, place, die)
        with pytest.raises(Killed):
            saver.save(2)
    newest = checkpoints.latest(saver.folder)
    assert newest is not None
    assert newest.name == ("step_2" if place == "prune" else "step_1")
    before = state_of(saver.engine)
    load(saver.engine, newest)
    assert_same(state_of(saver.engine), before)  # no step between the two saves

    if newest.name == "step_1":
        saver.save(2)
    else:
        saver.save(3)
    assert names_in(saver.folder)[0] == "latest"
    assert len(names_in(saver.folder)) == 3, "no leftovers"


# Killed in earnest ----------------------------------------------------------------------------------------------------


def fill(engine: Engine, step: int) -> None:
    """Every weight, moment and buffer is the step's number, every mask whether that is odd."""
    for sharded in tensors(engine, copies=True).values():
        for view in sharded.views.values():
            view.fill_(step % 2 if view.dtype == torch.bool else step)


def save_for_ever(layout: str, asynchronous: bool, folder: Path) -> None:
    recipe = recipe_of(layout, async_save=asynchronous)
    engine = engine_of(recipe, small.start(recipe))
    saver = Saver(engine, folder, FINGERPRINT)
    (folder / f"pid_{engine.topology.rank}").write_text(str(os.getpid()))
    with torch.no_grad():
        for step in itertools.count(1):
            fill(engine, step)
            saver.save(step)


def kill_while_saving(layout: str, asynchronous: bool, folder: Path, after: float) -> str:
    """kill -9 of the last rank, ``after`` seconds from the first whole checkpoint; what lies there then."""
    folder.mkdir()
    world = Layout.parse(layout).world_size
    with Workers() as workers, ThreadPoolExecutor(1) as thread:
        running = thread.submit(workers.run, save_for_ever, world, layout, asynchronous, folder)
        while checkpoints.latest(folder) is None and not running.done():
            time.sleep(0.002)
        time.sleep(after)
        os.kill(int((folder / f"pid_{world - 1}").read_text()), signal.SIGKILL)
        with pytest.raises(RankError, match="died with exit code -9"):
            running.result()
    return " ".join(names_in(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "asynchronous"), [("single", False), ("single", True), ("ep2", False), ("ep2", True)]
)
def test_killed_at_random_moments(single: Topology, tmp_path: Path, layout: str, asynchronous: bool) -> None:
    """5 moments each. ``latest`` is whole, its hashes are right, every tensor is that step's, and it can be loaded."""
    generator = random.Random(f"{layout} {asynchronous}")
    engine, partial = engine_of(recipe_of(), single), 0
    for i in range(5):
        folder = tmp_path / str(i)
        left = kill_while_saving(layout, asynchronous, folder, generator.uniform(0.0, 0.3))
        partial += ".partial" in left or ".removed" in left
        newest = checkpoints.latest(folder)
        assert newest is not None
        reader = Reader(newest)
        reader.verify()
        step = reader.manifest["step"]
        assert newest.name == f"step_{step}"
        for name in reader.tensors:
            if not name.startswith("random."):
                tensor = reader.read(name)
                assert (tensor == (step % 2 if tensor.dtype == torch.bool else step)).all(), name
        assert load(engine, newest) == step
    assert partial, "at least one was killed in the middle of a save"
