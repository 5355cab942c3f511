"""Files that are counted while they are written, as megasparse.checkpoint.writer wants them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


class CountedFile:
    def __init__(self, file: BinaryIO) -> None:
        self.file, self.bytes = file, 0

    def write(self, data: Any) -> int:
        self.bytes += self.file.write(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()

    def hold(self, owner: Any) -> None:
        pass


@contextmanager
def counted(path: Path) -> Iterator[CountedFile]:
    with path.open("wb") as file:
        yield CountedFile(file)
