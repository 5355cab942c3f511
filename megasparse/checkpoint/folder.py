"""The folder ``checkpoints``: what lies in it, which is the latest, and whether one is whole.

A checkpoint is the folder ``step_N``. It is written aside as ``step_N.partial``, flushed to disk and renamed;
``latest`` moves last. Whatever moment a run is killed at, ``latest`` names a whole checkpoint. ``manifest.json`` has
the size and the SHA-256 of every other file, and its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megasparse.files import sha256_of_file, sync, write_atomic

FORMAT = 2


class Damaged(ValueError):
    """A checkpoint that is not as it was written; the message names the file."""


# One checkpoint -------------------------------------------------------------------------------------------------------


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest`` (which has ``files``) and the format number into the checkpoint at ``path``."""
    manifest = {"format": FORMAT, **manifest}
    file = path / "manifest.json"
    file.write_text(json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1))
    sync(file)


def read_manifest(path: Path) -> dict[str, Any]:
    """The checkpoint's manifest. ValueError if it is of another format; Damaged if it, or the size of any file, is
    not as it was written. Reads no other file."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        format_number, written = manifest["format"], manifest.pop("sha256")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise Damaged(f"{path} is not a whole checkpoint: it has no readable manifest.json") from None
    if format_number != FORMAT:
        raise ValueError(f"{path} has format {format_number}, this version of megasparse reads {FORMAT}")
    if written != _digest(manifest):
        raise Damaged(f"{path} is damaged: manifest.json is not as it was written")
    for name, file in manifest["files"].items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != file["bytes"]:
            what = "nothing" if found is None else f"{found} bytes"
            raise Damaged(f"{path} is damaged: {name} should have {file['bytes']} bytes, found {what}")
    return manifest


def verify(path: Path, manifest: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Damaged if a file (of ``names``; None: any of the checkpoint) does not have the SHA-256 it was written with."""
    for name in manifest["files"] if names is None else names:
        if sha256_of_file(path / name) != manifest["files"][name]["sha256"]:
            raise Damaged(f"{path} is damaged: the SHA-256 of {name} is not that of the file that was written")


def whole_before(path: Path) -> str:
    """What to do instead of using the damaged checkpoint at ``path``: the newest older one that is whole."""
    step = _step(path)
    for older in sorted((s for s in _steps(path.parent) if step is None or s < step), reverse=True):
        candidate = path.parent / f"step_{older}"
        try:
            verify(candidate, read_manifest(candidate))
        except (ValueError, OSError):
            continue
        return f"{candidate.name} before it is whole, resume from it: --resume --checkpoint {candidate.name}"
    return "there is no whole checkpoint before it"


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# Several --------------------------------------------------------------------------------------------------------------


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint under ``folder``; None where there is none. ValueError if it was taken away."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    path = folder / pointer.read_text().strip()
    if not path.is_dir():
        raise ValueError(f"{pointer} names {path.name}, which is not there: write one that is into it, or delete it")
    return path


def newest_before(folder: Path, step: int) -> Path | None:
    """The newest checkpoint after no more than ``step`` steps; None where there is none."""
    steps = [saved for saved in _steps(folder) if saved <= step] if folder.exists() else []
    return folder / f"step_{max(steps)}" if steps else None


def set_latest(path: Path) -> None:
    """Let a run that is resumed go on from ``path``."""
    write_atomic(path.parent / "latest", path.name + "\n")


def publish(partial: Path, final: Path) -> None:
    """Make the checkpoint written to ``partial`` the one at ``final`` and the latest."""
    sync(partial)
    if final.exists():  # of a run that went on from an earlier step: never the latest
        assert latest(final.parent) != final
        remove(final)
    partial.rename(final)
    sync(final.parent)
    set_latest(final)


def prune(folder: Path, keep: int, keep_every: int, step: int) -> None:
    """Remove what is older than the newest ``keep`` up to ``step``, but for every step that ``keep_every`` divides
    (0: none); and what was never finished.

    Steps beyond it are left: a run that was killed before it named them in ``latest`` will write them anew."""
    for old in sorted(s for s in _steps(folder) if s <= step)[:-keep]:
        if keep_every == 0 or old % keep_every:
            remove(folder / f"step_{old}")
    for pattern in ("step_*.partial", "step_*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def remove(path: Path) -> None:
    """A checkpoint that is killed while it is removed is none."""
    aside = path.with_name(f"{path.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def _steps(folder: Path) -> list[int]:
    return [step for path in folder.iterdir() if (step := _step(path)) is not None]


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"step_(\d+)", path.name)
    return int(match[1]) if match else None
