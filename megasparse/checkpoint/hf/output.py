"""A folder that is written a file at a time, goes on where it was stopped, and appears when all of it is there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import Progress

from megasparse.files import sync, write_atomic

JOURNAL = "progress.json"


class Sink:
    """A binary file that hashes what is written to it, in another thread while it is written."""

    def __init__(self, file: BinaryIO, thread: ThreadPoolExecutor) -> None:
        self._file, self._thread, self._digest = file, thread, hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        hashed = self._thread.submit(self._digest.update, data)
        self._file.write(data)
        hashed.result()  # the caller may use its memory again
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def sha256(self) -> str:
        return self._digest.hexdigest()


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
            with Progress(console=console, transient=True) as progress, ThreadPoolExecutor(1) as thread:
                task = progress.add_task(f"writing {self.final.name}", total=needed)
                for file in missing:
                    self._write(file, thread)
                    progress.advance(task, file.bytes)
        except OSError as error:
            raise ValueError(
                f"could not write {self.partial}: {error.strerror or error}; run the same command again to go on"
            ) from None
        return {file.name: self.done[file.name] for file in files}

    def _write(self, file: File, thread: ThreadPoolExecutor) -> None:
        aside = self.partial / f"{file.name}.tmp"
        with aside.open("wb") as stream:
            sink = Sink(stream, thread)
            about = file.write(sink)
            written = {"bytes": sink.bytes, "sha256": sink.sha256(), "about": about}
        sync(aside)
        aside.rename(self.partial / file.name)
        self.done[file.name] = written
        write_atomic(self.partial / JOURNAL, json.dumps({"identity": self._identity, "files": self.done}))

    def publish(self) -> None:
        """All is written: the folder gets its name."""
        (self.partial / JOURNAL).unlink()
        for path in self.partial.rglob("*"):
            sync(path)
        sync(self.partial)
        self.partial.rename(self.final)
        sync(self.final.parent)
