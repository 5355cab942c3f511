"""Files that are either whole or absent: written aside, flushed to disk, renamed. Survives a kill at any moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write; when the block ends it is flushed to disk and renamed to
    ``path``, replacing it. If the block raises, ``path`` is left as it was and the temporary file is removed; a
    killed process leaves the temporary file (``.tmp``) behind."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        _fsync(aside)
        os.replace(aside, path)
        fsync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace ``path`` with ``content`` (text as UTF-8): a reader sees the old file or the new one, never a part."""
    with written_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries (files created, renamed, removed in it) to disk; not its files' content."""
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
