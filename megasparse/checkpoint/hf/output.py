"""A folder that is written a file at a time, goes on where it was stopped, and appears when all of it is there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import Progress

from megasparse.files import sync, write_atomic

JOURNAL = "progress.json"
LARGE = 2**20  # bytes that are not copied
BACKLOG = 2**24  # bytes that are written and not yet hashed


class Sink:
    """A binary file that hashes what is written to it, in another thread, while more is written."""

    def __init__(self, file: BinaryIO, thread: ThreadPoolExecutor) -> None:
        self._file, self._thread, self._digest = file, thread, hashlib.sha256()
        self._pending = deque[tuple[Any, Future[None]]]()  # what has the memory, and its hashing
        self._owner: Any = None
        self.bytes = 0

    def hold(self, owner: Any) -> None:
        """What is written from now on is memory of ``owner`` if it is large, and not to be used again if not."""
        self._owner = owner

    def write(self, data: bytes | memoryview) -> int:
        if len(data) < LARGE or (self._owner is None and isinstance(data, memoryview) and data.obj is None):
            data = bytes(data)  # the caller may use its memory again
        self._pending.append(((self._owner, data), self._thread.submit(self._digest.update, data)))
        self._file.write(data)
        self.bytes += len(data)
        self._wait(BACKLOG)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def sha256(self) -> str:
        self._wait(0)
        return self._digest.hexdigest()

    def _wait(self, backlog: int) -> None:
        while sum(len(data) for (_, data), _ in self._pending) > backlog:
            self._pending.popleft()[1].result()


@dataclass(frozen=True)
class File:
    """One to write: ``write`` fills the sink, and returns what has to be known of it in the end (JSON)."""

    name: str
    bytes: int  # about
    write: Callable[[Sink], Any]


class Output:
    """The folder ``final``, written as ``final.partial``. ``identity``: what it is made of, and how; what lies there of
    another one is thrown away. ValueError if ``final`` is there."""

    def __init__(self, final: Path, identity: dict[str, Any]) -> None:
        self.final, self.partial = final, final.with_name(f"{final.name}.partial")
        if final.exists():
            raise ValueError(f"{final} is there already: choose another folder or delete it")
        self._identity = json.loads(json.dumps(identity))
        self.done: dict[str, dict[str, Any]] = self._journal()

    def _journal(self) -> dict[str, dict[str, Any]]:
        """What a run before has finished."""
        journal = self.partial / JOURNAL
        if journal.is_file():
            found = json.loads(journal.read_text())
            if found["identity"] == self._identity:
                return found["files"]
        shutil.rmtree(self.partial, ignore_errors=True)
        return {}

    def write(self, files: list[File], console: Console) -> dict[str, dict[str, Any]]:
        """Write each file that is not there yet. Returns for each ``bytes``, ``sha256`` and ``about``, what its
        ``write`` returned. ValueError if the disk has no room or refuses."""
        missing = [file for file in files if file.name not in self.done]
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            needed, free = sum(file.bytes for file in missing), shutil.disk_usage(self.partial).free
            if needed > free:
                raise ValueError(f"no room for {self.final}: {needed:,} bytes are needed, {free:,} are free there")
            if len(missing) < len(files):
                console.print(f"going on after {len(files) - len(missing)} of {len(files)} files", highlight=False)
            with (
                Progress(console=console, transient=True) as progress,
                ThreadPoolExecutor(1) as hashing,
                ThreadPoolExecutor(1) as flushing,  # a file's, while the next one is written
            ):
                task = progress.add_task(f"writing {self.final.name}", total=needed)
                flushed: Future[None] | None = None
                for file in missing:
                    written = self._write(file, hashing)
                    if flushed is not None:
                        flushed.result()
                    flushed = flushing.submit(self._finish, file.name, written)
                    progress.advance(task, file.bytes)
                if flushed is not None:
                    flushed.result()
        except OSError as error:
            raise ValueError(
                f"could not write {self.partial}: {error.strerror or error}; run the same command again to go on"
            ) from None
        return {file.name: self.done[file.name] for file in files}

    def _write(self, file: File, hashing: ThreadPoolExecutor) -> dict[str, Any]:
        with self._aside(file.name).open("wb") as stream:
            sink = Sink(stream, hashing)
            about = file.write(sink)
            return {"bytes": sink.bytes, "sha256": sink.sha256(), "about": about}

    def _finish(self, name: str, written: dict[str, Any]) -> None:
        sync(self._aside(name))
        self._aside(name).rename(self.partial / name)
        self.done[name] = written
        write_atomic(self.partial / JOURNAL, json.dumps({"identity": self._identity, "files": self.done}))

    def _aside(self, name: str) -> Path:
        return self.partial / f"{name}.tmp"

    def publish(self) -> None:
        """All is written: the folder gets its name."""
        (self.partial / JOURNAL).unlink()
        for path in self.partial.rglob("*"):
            sync(path)
        sync(self.partial)
        self.partial.rename(self.final)
        sync(self.final.parent)
