"""Checkpoints in DeepSpeed's own format: exact, for the layout that wrote them.

A checkpoint is the folder ``checkpoints/step_N``. It is written aside as ``step_N.partial``, flushed to disk and
renamed; ``latest`` moves last. Whatever moment a run is killed at, ``latest`` names a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megasparse import platform
from megasparse.config import Recipe
from megasparse.engine import Engine
from megasparse.files import sync, write_atomic

FORMAT = 1
# What a run may not change when it resumes: the first three make it another model on other data, the last ones are
# how DeepSpeed's files are cut.
FIXED = ("model", "data", "training.seed", "training.global_batch_size", "training.precision", "parallel")


def save(engine: Engine, folder: Path, recipe: Recipe, step: int, fingerprint: str, keep: int) -> Path:
    """Write the state after ``step`` optimizer steps; every rank calls it. Keeps the newest ``keep`` checkpoints."""
    name = f"step_{step}"
    partial, final = folder / f"{name}.partial", folder / name
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    with contextlib.redirect_stdout(io.StringIO()):
        engine.deepspeed.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    torch.save(random_state(), partial / f"rng_rank_{dist.get_rank()}.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {
            "format": FORMAT,
            "step": step,
            "samples": step * recipe.training.global_batch_size,
            "world_size": dist.get_world_size(),
            "data_fingerprint": fingerprint,
            "recipe": recipe.model_dump(mode="json"),
            "bytes": {str(path.relative_to(partial)): path.stat().st_size for path in files},
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*files, partial / "manifest.json"]:
            sync(path)
        sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(folder)
        write_atomic(folder / "latest", name + "\n")
        _prune(folder, keep, step)
    dist.barrier()
    return final


def load(engine: Engine, path: Path) -> int:
    """Restore the state saved at ``path``; returns the number of optimizer steps done. Every rank calls it."""
    manifest = read_manifest(path)
    with contextlib.redirect_stdout(io.StringIO()):
        loaded, _ = engine.deepspeed.load_checkpoint(str(path.parent), tag=path.name, load_lr_scheduler_states=False)
    assert loaded is not None, f"DeepSpeed found no checkpoint in {path}"
    set_random_state(torch.load(path / f"rng_rank_{dist.get_rank()}.pt", weights_only=False))
    return manifest["step"]


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint under ``folder``; None where there is none. ValueError if it was taken away."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    path = folder / pointer.read_text().strip()
    if not path.is_dir():
        raise ValueError(f"{pointer} names {path.name}, which is not there: write one that is into it, or delete it")
    return path


def check_resumable(path: Path, recipe: Recipe, world_size: int, fingerprint: str) -> None:
    """ValueError, naming the field, if ``recipe`` cannot go on from this checkpoint. Reads no weights."""
    manifest = read_manifest(path)
    for section in FIXED:
        then, now = _dig(manifest["recipe"], section), _dig(recipe.model_dump(mode="json"), section)
        difference = _first_difference(section, then, now)
        if difference:
            raise ValueError(f"cannot resume from {path}: {difference}. Use the recipe it was saved with or a new run")
    if manifest["world_size"] != world_size:
        raise ValueError(
            f"cannot resume from {path}: it was saved by {manifest['world_size']} processes, {world_size} are running"
        )
    if manifest["data_fingerprint"] != fingerprint:
        raise ValueError(f"cannot resume from {path}: the data sets were prepared anew since it was saved")
    if manifest["step"] >= recipe.training.steps:
        raise ValueError(
            f"{path} has all of training.steps={recipe.training.steps} behind it: "
            f"pass training.steps={2 * recipe.training.steps}, say, to train on"
        )


def read_manifest(path: Path) -> dict[str, Any]:
    """The checkpoint's manifest; ValueError if it is of another format, or a file is missing or has another size."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError):
        raise ValueError(f"{path} is not a whole checkpoint: it has no readable manifest.json") from None
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} has format {manifest['format']}, this version of megasparse reads {FORMAT}")
    for name, size in manifest["bytes"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
            raise ValueError(f"{path} is damaged: {name} should have {size} bytes, found {found}")
    return manifest


def random_state() -> dict[str, Any]:
    """Every generator a training step draws from."""
    state = {"torch": torch.get_rng_state(), "tensor_parallel": get_cuda_rng_tracker().get_states()}
    if platform.has_cuda():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tensor_parallel"])
    if platform.has_cuda():
        torch.cuda.set_rng_state(state["cuda"])


def _prune(folder: Path, keep: int, step: int) -> None:
    """Remove what is older than the newest ``keep`` up to ``step``, and what was never finished.

    Steps beyond it are left: a run that was killed before it named them in ``latest`` will write them anew."""
    steps = {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(r"step_(\d+)", path.name))}
    for old in sorted(s for s in steps if s <= step)[:-keep]:
        shutil.rmtree(steps[old])
    for path in folder.glob("step_*.partial"):
        shutil.rmtree(path)


def _dig(mapping: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        mapping = mapping[key]
    return mapping


def _first_difference(path: str, then: Any, now: Any) -> str | None:
    """``path was THEN, is NOW`` of the first leaf that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            found = _first_difference(f"{path}.{key}", then.get(key), now.get(key))
            if found:
                return found
        return None
    return None if then == now else f"{path} was {then}, is {now}"
