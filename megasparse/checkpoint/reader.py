"""Reading a checkpoint in one process: no process group, no model, and never more in memory than one piece."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

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
        """(offsets in the whole, rectangle) of one tensor, a piece at a time."""
        stored: TensorStorageMetadata = self._stored[name]
        for chunk in stored.chunks:
            place = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            with (self.path / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                content = file.read(place.length)
            yield tuple(chunk.offsets), torch.load(io.BytesIO(content), weights_only=True)

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        whole = torch.empty(self.tensors[name].shape, dtype=self.tensors[name].dtype)
        for offsets, piece in self.pieces(name):
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))] = piece
        return whole
