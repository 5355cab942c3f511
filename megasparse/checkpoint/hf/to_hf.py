"""A checkpoint of ours, saved in any layout -> a Hugging Face folder, a file at a time, without process groups.

Weights are written as the forward pass takes them: 2:4 weights as dense ones with zeros, or packed."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from torch import Tensor

from megasparse.checkpoint.hf import packed
from megasparse.checkpoint.hf.export import Export, open_export
from megasparse.checkpoint.hf.extras import find_tokenizer, write_card, write_extras
from megasparse.checkpoint.hf.folder import DTYPES, Stem
from megasparse.checkpoint.hf.output import File, opened
from megasparse.checkpoint.hf.prove import Proof, Run, check_memory, prove
from megasparse.checkpoint.hf.tensors import Piece
from megasparse.files import sha256_of_file, write_atomic
from megasparse.layout import Layout
from megasparse.ops.two_four import pack_24

BLOCK_BYTES = 2**23  # of a tensor that are read, checked and written at once
HEADER_ALIGNMENT = 8  # of safetensors
CODES = {dtype: code for code, dtype in DTYPES.items()} | {torch.uint8: "U8"}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Options:
    precision: str | None = None  # fp32, bf16 or fp16; None: that of training
    shard_bytes: int = 5 * 10**9  # of a file, if no tensor, or some experts together, are larger
    family: str | None = None  # a model_type; None: the first family that can say the model
    tokenizer: Path | None = None  # of a checkpoint that has none
    packed: bool = False  # 2:4 weights as values and places


def parse_size(text: str) -> int:
    """Bytes of ``500MB`` or ``5GB``; ValueError if it is neither."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", text)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"--shard-size {text}: write it like 500MB or 5GB")
    return int(float(match[1]) * UNITS[match[2]])


def to_hf(path: Path, final: Path, options: Options, run: Run | None, console: Console) -> Proof | None:
    """Convert the checkpoint ``path`` into the folder ``final``, and compare their logits by ``run`` (None: do not
    compare). A run that was stopped is gone on with. ValueError for everything that is not as it should be; then there
    is no ``final``."""
    export = open_export(path, options.precision, options.family)
    path = export.reader.path
    tokenizer = find_tokenizer(export, options.tokenizer)
    tensors = _planned(export, options.packed)
    if run is not None:
        check_memory(sum(math.prod(shape) for shape, _ in export.tensors.values()))
    identity = {"checkpoint": sha256_of_file(path / "manifest.json"), "family": export.family.model_type}
    identity |= {"dtype": str(export.dtype), "shard_bytes": options.shard_bytes, "packed": options.packed}
    stem = packed.STEM if options.packed else Stem()
    with opened(final, identity) as output:
        written = output.write(_files(export, tensors, options.shard_bytes, stem), console)
        write_extras(export, output.partial, tokenizer)
        if len(written) > 1:
            _write_index(output.partial / stem.index, written)
        proof = prove(path, output.partial, export.dtype, Layout(), run) if run is not None else None
        write_card(export, output.partial, proof)
        output.publish()
    return proof


@dataclass(frozen=True)
class Planned:
    """A tensor of theirs, or what a packed one is stored as."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """A rectangle of a tensor of ours that is read at once, and what is written of it, in this order."""

    name: str
    piece: Piece
    planned: tuple[Planned, ...]
    packed: bool


def _planned(export: Export, pack: bool) -> list[Source]:
    """Everything that is written. ValueError if it shall be packed, and nothing is 2:4."""
    sources = []
    for name, (_, pieces) in export.tensors.items():
        dtype, is_24 = export.dtype_of(name), pack and export.is_24(name)
        for piece in pieces:
            # What lies transposed with them has its fours along the other dimension.
            packs = is_24 and piece.keeps_rows
            if packs:
                planned = [
                    Planned(*stored) for part in piece.parts for stored in packed.stored(part.name, part.shape, dtype)
                ]
            else:
                planned = [Planned(part.name, dtype, part.shape) for part in piece.parts]
            sources.append(Source(name, piece, tuple(planned), packs))
    if pack and not any(source.packed for source in sources):
        raise ValueError(f"--packed: {export.reader.path} has no 2:4 weights that can be packed: leave it out")
    return sources


def _files(export: Export, sources: list[Source], shard_bytes: int, stem: Stem) -> list[File]:
    groups: list[list[Source]] = [[]]
    sizes = [0]
    for source in sources:
        size = sum(planned.bytes for planned in source.planned)
        if groups[-1] and sizes[-1] + size > shard_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(source)
        sizes[-1] += size
    return [
        File(stem.file(i, len(groups)), size, functools.partial(_write_file, export, group))
        for i, (size, group) in enumerate(zip(sizes, groups, strict=True))
    ]


def _write_file(export: Export, sources: list[Source], file: BinaryIO) -> dict[str, int]:
    """A safetensors file: length of the header, header, tensors one after the other. Returns the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    planned, end = [planned for source in sources for planned in source.planned], 0
    for tensor in planned:
        offsets = [end, end + tensor.bytes]
        header[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for source in sources:
        for tensor in _tensors(export, source):
            content: Any = tensor.view(-1).view(torch.uint8).numpy()
            file.write(memoryview(content))
    return {tensor.name: tensor.bytes for tensor in planned}


def _tensors(export: Export, source: Source) -> Iterator[Tensor]:
    """What a piece of ours holds of theirs, in order; where that is one tensor as it is, some rows at a time."""
    name, piece = source.name, source.piece
    if source.packed:
        whole = export.weight(name, piece.offsets, piece.shape)
        for part in piece.parts:
            yield from pack_24(part.take(whole))
        return
    if not piece.is_theirs:
        whole = export.weight(name, piece.offsets, piece.shape)
        yield from (part.take(whole) for part in piece.parts)
        return
    rows = max(1, BLOCK_BYTES // (4 * math.prod(piece.shape[1:])))
    for start in range(0, piece.shape[0], rows):
        offsets = (piece.offsets[0] + start, *piece.offsets[1:])
        yield export.weight(name, offsets, (min(rows, piece.shape[0] - start), *piece.shape[1:]))


def _write_index(path: Path, written: dict[str, dict[str, Any]]) -> None:
    weight_map = {name: file for file, record in written.items() for name in record["about"]}
    total = sum(size for record in written.values() for size in record["about"].values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomic(path, json.dumps(index, indent=2) + "\n")
