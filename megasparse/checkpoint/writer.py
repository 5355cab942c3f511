"""Writing tensors of a checkpoint in one process, a block at a time: what reader.py reads, and any layout loads."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils.serialization import config as serialization

from megasparse.files import sync

METADATA = ".metadata"
Shape = tuple[int, ...]


@contextmanager
def disk_errors() -> Iterator[None]:
    """Around torch.save: OSError as the disk said it, which torch's zip format covers with an error about positions."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def write_block(file: BinaryIO, name: str, offsets: Shape, block: Tensor) -> list[Any]:
    """Write a rectangle of the tensor ``name``; returns what ``write_metadata`` has to know.
    torch.save makes no checksums of it: the manifest has better ones."""
    start = file.tell()
    with disk_errors(), serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        torch.save(_alone(block), file)
    return [name, list(offsets), list(block.shape), start, file.tell() - start]


def _alone(block: Tensor) -> Tensor:
    """The same memory as a storage of its own: torch.save writes all of a storage, whatever part of it a view is."""
    if block.untyped_storage().nbytes() == block.nbytes or block.nbytes == 0:
        return block.contiguous()
    content: Any = block.reshape(-1).view(torch.uint8).numpy()
    return torch.frombuffer(content, dtype=block.dtype).view(block.shape)


def write_metadata(
    folder: Path, tensors: Mapping[str, tuple[Shape, torch.dtype]], blocks: Mapping[str, list[list[Any]]]
) -> None:
    """The table of tensors, of which each file of ``blocks`` has those that write_block returned."""
    metadata: Any = Metadata(state_dict_metadata={}, storage_data={})
    for name, (shape, dtype) in tensors.items():
        metadata.state_dict_metadata[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), [])
    for file, written in blocks.items():
        for name, offsets, sizes, start, length in written:
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            metadata.state_dict_metadata[name].chunks.append(chunk)
            metadata.storage_data[MetadataIndex(name, chunk.offsets)] = _StorageInfo(file, start, length)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    sync(folder / METADATA)
