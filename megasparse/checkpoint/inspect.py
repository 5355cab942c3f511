"""What ``megasparse inspect`` prints of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megasparse.checkpoint.reader import Reader
from megasparse.files import write_atomic

HASH_DIGITS = 12  # of those shown; the JSON file has them all


def inspect(path: Path, hashes: bool = False, output: Path | None = None) -> None:
    """Print the checkpoint at ``path`` and write it to ``output`` as JSON. ``hashes``: ValueError if a file does not
    have its own. Reads no tensor."""
    reader = Reader(path)
    if hashes:
        reader.verify()
    manifest = reader.manifest
    console = Console(highlight=False)
    console.print(
        f"{manifest['recipe']['name']}, step {manifest['step']:,} ({manifest['samples']:,} samples), saved by "
        f"{manifest['world_size']} x {manifest['layout']}, {manifest['recipe']['training']['precision']}",
        markup=False,
    )
    files, tensors = _files(reader, hashes), _tensors(reader)
    for table in (files, tensors):
        console.print(table)
    if output is not None:
        write_atomic(output, json.dumps(description(reader), indent=1))


def description(reader: Reader) -> dict[str, Any]:
    """The manifest, and every tensor's shape, type and number of pieces."""
    tensors = {
        name: {"shape": list(info.shape), "dtype": str(info.dtype).removeprefix("torch."), "pieces": info.pieces}
        for name, info in reader.tensors.items()
    }
    return {**reader.manifest, "tensors": tensors}


def _files(reader: Reader, verified: bool) -> Table:
    table = Table("file", "bytes", "SHA-256, verified" if verified else "SHA-256, not verified")
    for name, file in sorted(reader.manifest["files"].items()):
        table.add_row(name, f"{file['bytes']:,}", file["sha256"][:HASH_DIGITS])
    total = sum(file["bytes"] for file in reader.manifest["files"].values())
    table.add_row("in all", f"{total:,}", "")
    return table


def _tensors(reader: Reader) -> Table:
    table = Table()
    for column in ("tensor", "shape", "type", "pieces"):
        table.add_column(column, overflow="fold")  # names in full
    for name, tensor in description(reader)["tensors"].items():
        shape = " x ".join(map(str, tensor["shape"]))
        table.add_row(name, shape, tensor["dtype"], str(tensor["pieces"]))
    return table
