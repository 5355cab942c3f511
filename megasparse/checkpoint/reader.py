"""Reading a checkpoint in one process: no process group, no model, and never more in memory than one piece."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint.memory import Memory


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the whole model."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: int  # rectangles it is stored in
    elements: int  # of all pieces


class Reader:
    """The checkpoint at ``path``. ValueError as folder.read_manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = checkpoints.read_manifest(path)
        self._metadata = dcp.FileSystemReader(path).read_metadata()
        self._stored: Any = self._metadata.state_dict_metadata
        self.tensors = {
            name: TensorInfo(
                shape=tuple(stored.size),
                dtype=stored.properties.dtype,
                pieces=len(stored.chunks),
                elements=sum(math.prod(chunk.sizes) for chunk in stored.chunks),
            )
            for name, stored in sorted(self._stored.items())
        }
        self._memory = Memory()
        self._kinds: dict[bytes, Tensor] = {}  # what is pickled of a piece -> its type, shape and strides

    def verify(self) -> None:
        """Damaged, naming the file, if one does not have the SHA-256 it was written with."""
        checkpoints.verify(self.path, self.manifest)

    def pieces(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(offsets in the whole, rectangle) of one tensor, a piece at a time."""
        stored: TensorStorageMetadata = self._stored[name]
        for chunk in stored.chunks:
            yield tuple(chunk.offsets), self._part(name, chunk, (0,) * len(chunk.sizes), tuple(chunk.sizes))

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        shape = self.tensors[name].shape
        return self.region(name, (0,) * len(shape), shape)

    def region(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A rectangle of one tensor, contiguous."""
        region: Tensor | None = None
        stored: TensorStorageMetadata = self._stored[name]
        for chunk in stored.chunks:
            sizes = zip(offsets, shape, chunk.offsets, chunk.sizes, strict=True)
            common = [(max(a, b), min(a + n, b + m)) for a, n, b, m in sizes]
            if all(first < last for first, last in common):
                start = tuple(first - offset for (first, _), offset in zip(common, chunk.offsets, strict=True))
                part = self._part(name, chunk, start, tuple(last - first for first, last in common))
                if part.shape == shape and part.is_contiguous():
                    return part
                region = self._memory.empty(shape, part.dtype) if region is None else region
                here = zip(common, offsets, strict=True)
                region[tuple(slice(first - offset, last - offset) for (first, last), offset in here)] = part
        return torch.empty(shape, dtype=self.tensors[name].dtype) if region is None else region

    def _part(self, name: str, chunk: ChunkStorageMetadata, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A rectangle of one piece. The file is read from its first element to its last."""
        place = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        path = self.path / place.relative_path
        start, described = self._describe(path, place.offset, place.length)
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=described.dtype)
        strides = described.stride()
        first = int(described.storage_offset()) + sum(i * n for i, n in zip(offsets, strides, strict=True))
        span = 1 + sum((size - 1) * n for size, n in zip(shape, strides, strict=True))
        elements = read_elements(path, start + first * described.itemsize, (span,), described.dtype, self._memory)
        return elements.as_strided(shape, strides)

    def _describe(self, path: Path, start: int, length: int) -> tuple[int, Tensor]:
        """Where the elements are of the tensor that torch.save wrote at ``start`` of a file; one like it on meta."""
        with path.open("rb") as file:
            view: Any = _create_file_view(file, start, length)
            archive: Any = torch._C.PyTorchFileReader(view)
            pickled = archive.get_record("data.pkl")
            if pickled not in self._kinds:
                view.seek(0)
                self._kinds[pickled] = torch.load(view, map_location="meta", weights_only=True)
            return start + archive.get_record_offset("data/0"), self._kinds[pickled]


def read_elements(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype, memory: Memory) -> Tensor:
    """A contiguous tensor, in ``memory``, from the byte ``start`` on of a file. ValueError if it ends too early."""
    tensor = memory.empty(shape, dtype)
    elements: Any = tensor.view(-1).view(torch.uint8).numpy()
    content = memoryview(elements)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while content:
            read = file.readinto(content)
            if not read:
                raise ValueError(f"{path} ends {len(content):,} bytes too early: copy it again")
            content = content[read:]
    return tensor
