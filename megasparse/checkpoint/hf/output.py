"""A folder that is written a file at a time, goes on where it was stopped, and appears when all of it is there."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

import torch
from rich.console import Console
from rich.progress import Progress

from megasparse.files import sync, write_atomic

JOURNAL, LOCK = "progress.json", "lock"
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # says a file system that has none
CHUNK = 2**20  # bytes; the page cache takes larger writes more slowly
PAUSE = 1e-3  # seconds until there may be more to hash


class ChunkedFile(io.FileIO):
    """A new file: what is written to it is there to be read, whole, when ``write`` returns. ``advance`` is told how
    many bytes."""

    def __init__(self, path: Path, advance: Callable[[int], Any]) -> None:
        super().__init__(path, "wb")
        self._advance = advance

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while rest:
            rest = rest[super().write(rest[:CHUNK]) :]
        self._advance(len(data))
        return len(data)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def hash_along(path: Path, ended: Event) -> str:
    """The SHA-256 of a file that is written meanwhile, until ``ended`` is set."""
    digest, content = hashlib.sha256(), bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        last = False
        while not last:
            last = ended.wait(PAUSE)
            while read := file.readinto(content):
                digest.update(memoryview(content)[:read])
    return digest.hexdigest()


@dataclass(frozen=True)
class File:
    """One to write: ``write`` fills it, and returns what has to be known of it in the end (JSON)."""

    name: str
    bytes: int  # about
    write: Callable[[BinaryIO], Any]


@dataclass(frozen=True)
class Written:
    about: Any
    bytes: int
    sha256: Future[str]


@contextmanager
def opened(final: Path, identity: dict[str, Any]) -> Iterator[Output]:
    """The folder ``final``, written as ``final.partial`` by one process at a time. ``identity``: what it is made of,
    and how; what lies there of another one is thrown away. ValueError if ``final`` is there, if ``final.partial`` is
    something else or being written, and if the disk refuses, whenever it does."""
    partial = final.with_name(f"{final.name}.partial")
    if final.exists():
        raise ValueError(f"{final} is there already: choose another folder or delete it")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if any(partial.iterdir()) and not (partial / LOCK).exists():
            raise ValueError(f"{partial} is there, and not of a conversion: choose another folder or delete it")
        with (partial / LOCK).open("w") as lock:
            _lock(lock, partial)
            yield Output(final, partial, json.loads(json.dumps(identity)))
    except OSError as error:
        file = "" if error.filename is None else f" ({error.filename})"
        raise ValueError(
            f"could not write {partial}: {error.strerror or error}{file}; run the same command again to go on"
        ) from None


def _lock(file: Any, partial: Path) -> None:
    """Until it is closed, or its process dies."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another conversion is writing {partial}: wait for it, or choose another folder") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


class Output:
    """A folder of ``opened``; ``done`` are the files that a run of the same ``identity`` (JSON) finished."""

    def __init__(self, final: Path, partial: Path, identity: dict[str, Any]) -> None:
        self.final, self.partial, self._identity = final, partial, identity
        self.done: dict[str, dict[str, Any]] = self._journal()

    def _journal(self) -> dict[str, dict[str, Any]]:
        """What a run before has finished."""
        journal = self.partial / JOURNAL
        if journal.is_file():
            found = json.loads(journal.read_text())
            if found["identity"] == self._identity:
                return found["files"]
        for path in self.partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        return {}

    def write(self, files: list[File], console: Console) -> dict[str, dict[str, Any]]:
        """Write each file that is not there yet. Returns for each ``bytes``, ``sha256`` and ``about``, what its
        ``write`` returned. ValueError if the disk has no room."""
        missing = [file for file in files if file.name not in self.done]
        needed, free = sum(file.bytes for file in missing), shutil.disk_usage(self.partial).free
        if needed > free:
            raise ValueError(f"no room for {self.final}: {needed:,} bytes are needed, {free:,} are free there")
        if len(missing) < len(files):
            console.print(f"going on after {len(files) - len(missing)} of {len(files)} files", highlight=False)
        with (
            Progress(console=console, transient=True) as progress,
            one_thread(),  # of torch: others wait for its next work on the core that hashes
            ThreadPoolExecutor(1) as hashing,
            ThreadPoolExecutor(1) as flushing,
        ):
            advance = functools.partial(progress.advance, progress.add_task(f"writing {self.final.name}", total=needed))
            flushed: Future[None] | None = None
            for file in missing:
                written = self._write(file, hashing, advance)
                if flushed is not None:
                    flushed.result()
                flushed = flushing.submit(self._finish, file.name, written)
            if flushed is not None:
                flushed.result()
        return {file.name: self.done[file.name] for file in files}

    def _write(self, file: File, hashing: ThreadPoolExecutor, advance: Callable[[int], Any]) -> Written:
        aside, ended = self._aside(file.name), Event()
        with ChunkedFile(aside, advance) as stream:
            hashed = hashing.submit(hash_along, aside, ended)
            try:
                return Written(about=file.write(stream), bytes=stream.tell(), sha256=hashed)
            finally:
                ended.set()

    def _finish(self, name: str, written: Written) -> None:
        sync(self._aside(name))
        self.done[name] = {"bytes": written.bytes, "sha256": written.sha256.result(), "about": written.about}
        self._aside(name).rename(self.partial / name)
        write_atomic(self.partial / JOURNAL, json.dumps({"identity": self._identity, "files": self.done}))

    def _aside(self, name: str) -> Path:
        return self.partial / f"{name}.tmp"

    def publish(self) -> None:
        """All is written: the folder gets its name."""
        for name in (JOURNAL, LOCK):
            (self.partial / name).unlink()
        for path in self.partial.rglob("*"):
            sync(path)
        sync(self.partial)
        self.partial.rename(self.final)
        sync(self.final.parent)
