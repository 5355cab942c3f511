"""Reading a checkpoint in one process: no process group, no model, and never more in memory than one piece."""

from __future__ import annotations

import math
import mmap
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

    def verify(self) -> None:
        """Damaged, naming the file, if one does not have the SHA-256 it was written with."""
        checkpoints.verify(self.path, self.manifest)

    def pieces(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(offsets in the whole, rectangle) of one tensor, a piece at a time. Their memory is the file's."""
        stored: TensorStorageMetadata = self._stored[name]
        for chunk in stored.chunks:
            yield tuple(chunk.offsets), self._piece(name, chunk)

    def _piece(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        return _mapped(self.path / place.relative_path, place.offset, place.length)

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        shape = self.tensors[name].shape
        return self.region(name, (0,) * len(shape), shape)

    def region(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A rectangle of one tensor, contiguous: mapped where it is whole rows of one piece, else in its own memory."""
        region = torch.empty(shape, dtype=self.tensors[name].dtype)
        stored: TensorStorageMetadata = self._stored[name]
        for chunk in stored.chunks:
            start = tuple(chunk.offsets)
            sizes = zip(offsets, shape, start, chunk.sizes, strict=True)
            common = [(max(a, b), min(a + n, b + m)) for a, n, b, m in sizes]
            if all(first < last for first, last in common):
                here, there = (
                    tuple(
                        slice(first - origin, last - origin)
                        for (first, last), origin in zip(common, origins, strict=True)
                    )
                    for origins in (offsets, start)
                )
                part = self._piece(name, chunk)[there]
                if part.shape == region.shape and part.is_contiguous():
                    return part
                region[here] = part
        return region


def _mapped(path: Path, start: int, length: int) -> Tensor:
    """The tensor that torch.save wrote at ``start`` of a file, mapped: what is not read takes no memory, and all of it
    is given back with the tensor."""
    with path.open("rb") as file:
        view: Any = _create_file_view(file, start, length)
        described = torch.load(view, map_location="meta", weights_only=True)  # type, shape and strides
        view.seek(0)
        archive: Any = torch._C.PyTorchFileReader(view)
        elements = start + archive.get_record_offset("data/0")
        if described.numel() == 0:
            return torch.empty_like(described, device="cpu")
        before = elements % mmap.ALLOCATIONGRANULARITY
        size = before + described.untyped_storage().nbytes()
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=elements - before)
    storage = torch.frombuffer(mapped, dtype=described.dtype, offset=before)
    return storage.as_strided(described.shape, described.stride(), described.storage_offset())
