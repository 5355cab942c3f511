"""Saving: every rank writes what it holds to one file, beside the run or before it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megasparse import topology
from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint.ranks import together
from megasparse.checkpoint.state import SavePlanner, Sharded, numbers, random_state, tensors
from megasparse.checkpoint.writer import disk_errors
from megasparse.data.tokenizer import FILES as TOKENIZER_FILES
from megasparse.data.tokenizer import Tokenizer
from megasparse.engine import Engine
from megasparse.files import sha256_of_file, sync

WRITE_TIMEOUT = timedelta(hours=1)  # how long ranks wait for the slowest one's disk


class Saver:
    """Saves an engine's state into ``folder`` as the recipe's training section says; every rank has one.

    With ``training.async_save`` the state is copied and a thread writes it while training goes on; what goes wrong
    there is raised by the next ``save`` or by ``wait``, which must be called at the end."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        fingerprint: str,
        tokenizer: Tokenizer | None = None,
        sets: Sequence[dict[str, Any]] = (),
    ) -> None:
        """``fingerprint``: of the data. ``tokenizer``: written into each checkpoint, if known. ``sets``: what the
        manifest says of each data set (TrainingData.sets)."""
        self.engine, self.folder, self.fingerprint = engine, folder, fingerprint
        self.tokenizer, self.sets = tokenizer, sets
        self._group = topology.background_group(WRITE_TIMEOUT)
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self.has_saved = False  # so that there should be checkpoints

    def save(self, step: int, faults: dict[str, Any] | None = None) -> None:
        """Save the state after ``step`` optimizer steps, with what the manifest says of ``faults``. ValueError, on
        every rank, if it cannot be written."""
        self.wait()
        self.has_saved = True
        engine, recipe = self.engine, self.engine.recipe
        state = {**tensors(engine, copies=False), **random_state(dist.get_rank())}
        manifest = {
            "step": step,
            "samples": step * recipe.training.global_batch_size,
            "layout": str(engine.topology),
            "world_size": dist.get_world_size(),
            "data_fingerprint": self.fingerprint,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.hash,
            "data": list(self.sets),
            "faults": faults or {},
            **numbers(engine),
            "recipe": recipe.model_dump(mode="json"),
        }
        if recipe.training.async_save:
            state = {name: sharded.copied() for name, sharded in state.items()}
            self._pending = self._thread.submit(self._write, state, manifest)
        else:
            self._write(state, manifest)

    def wait(self) -> None:
        """Until the last save is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, state: dict[str, Sharded], manifest: dict[str, Any]) -> None:
        final = self.folder / f"step_{manifest['step']}"
        partial = final.with_name(f"{final.name}.partial")
        try:
            sizes = {name: sharded.bytes for name, sharded in state.items()}
            together(self._group, lambda: sizes, lambda parts: _make_room(partial, parts))
            together(
                self._group,
                lambda: self._write_own(state, partial),
                lambda parts: self._publish(partial, final, manifest, parts),
            )
        except ValueError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(f"could not save {final}: {error}. {self._what_is_there()}") from None

    def _what_is_there(self) -> str:
        if not self.folder.is_dir():
            return f"{self.folder} is no longer there"
        last = checkpoints.latest(self.folder)
        free = shutil.disk_usage(self.folder).free
        return f"{free:,} bytes are free there; the last whole checkpoint is {last.name if last else 'none'}"

    def _write_own(self, state: dict[str, Sharded], partial: Path) -> dict[str, Any]:
        """Write this rank's part; returns its files' sizes and hashes."""
        dcp.save(state, storage_writer=_Writer(partial), planner=SavePlanner(), process_group=self._group)
        return {file.name: _describe(file) for file in partial.glob(f"__{dist.get_rank()}_*")}

    def _publish(self, partial: Path, final: Path, manifest: dict[str, Any], parts: list[dict[str, Any]]) -> None:
        """On rank 0, when every rank's files are on disk."""
        files = {name: file for part in parts for name, file in part.items()}
        files[".metadata"] = _describe(partial / ".metadata")
        if self.tokenizer is not None:
            files |= _write_tokenizer(self.tokenizer, partial)
        checkpoints.write_manifest(partial, {**manifest, "files": files})
        checkpoints.publish(partial, final)
        training = self.engine.recipe.training
        checkpoints.prune(self.folder, training.keep_checkpoints, training.keep_every, manifest["step"])


class _Writer(dcp.FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        with disk_errors():
            return super().write_data(plan, planner)


def _make_room(partial: Path, parts: list[dict[str, int]]) -> None:
    """On rank 0: an empty folder, on a disk that has room for the tensors of all ranks."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    needed = sum({name: size for part in parts for name, size in part.items()}.values())
    if needed > shutil.disk_usage(partial).free:
        raise ValueError(f"no space left on the device: {needed:,} bytes are needed")


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    tokenizer.save(folder)
    written = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    for file in written:
        sync(file)
    return {file.name: _describe(file) for file in written}


def _describe(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
