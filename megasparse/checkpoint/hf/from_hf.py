"""A Hugging Face folder -> a checkpoint of ours: weights without a training state, for ``training.initial_checkpoint``.

Nothing is written before every tensor on either side has its counterpart of the right shape; then a file at a time."""

from __future__ import annotations

import functools
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint.hf.families import family_of
from megasparse.checkpoint.hf.family import Family
from megasparse.checkpoint.hf.folder import Folder
from megasparse.checkpoint.hf.megasparse import MEGASPARSE
from megasparse.checkpoint.hf.output import File, Output, opened
from megasparse.checkpoint.hf.prove import Proof, Run, check_memory, prove
from megasparse.checkpoint.hf.tensors import Piece, Shape
from megasparse.checkpoint.writer import METADATA, write_block, write_metadata
from megasparse.config import Recipe, load_recipe, parse_recipe
from megasparse.data.tokenizer import FILES as TOKENIZER_FILES
from megasparse.data.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE, load_tokenizer
from megasparse.files import sha256_of_file
from megasparse.layout import Layout, check_layout
from megasparse.parameters import FP8_SCALES

FILE_BYTES = 2**28  # of tensors in a file of the checkpoint, if none alone is larger
BLOCK_BYTES = 2**23  # of a tensor that are read, checked and written at once
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SEQ_LENGTH = 2048  # of the recipe, if the model has as many positions
THEIRS = "huggingface"  # folder for what goes along unread
BESIDE, STATE, RECIPE = "megasparse", "state.safetensors", "recipe.yaml"  # what to_hf writes of ours
ALONG = re.compile(
    r"(tokenizer|vocab|special_tokens_map|added_tokens|chat_template|generation_config).*\.(json|jinja)|merges\.txt"
)


@dataclass(frozen=True)
class Source:
    """A folder of theirs that can be converted."""

    folder: Folder
    family: Family
    recipe: Recipe
    tensors: dict[str, tuple[Shape, list[Piece]]]  # of ours
    names: dict[str, str]  # of theirs as the family has them -> as the folder does
    state: dict[str, Tensor]  # of ours, what a folder that we wrote has of it beside

    def dtype(self, pieces: list[Piece]) -> torch.dtype:
        """Of a tensor of ours: the widest of its parts; float32 where it has none."""
        dtypes = [self.folder.tensors[self.names[part.name]].dtype for piece in pieces for part in piece.parts]
        return max(dtypes, key=lambda dtype: dtype.itemsize) if dtypes else torch.float32


def open_source(path: Path, ignored: frozenset[str], layout: Layout) -> Source:
    """Read config.json and the headers of the safetensors at ``path``. ValueError, naming the field or the tensor, if
    the model cannot be said, or if a tensor is missing, left over or of another shape. ``ignored``: fields of the
    config whose value does not matter, and beginnings of names of tensors to leave out. ``layout``: of the recipe."""
    folder = Folder(path)
    raw = folder.raw_config()
    family = family_of(raw["model_type"], raw)
    model = family.model(raw if family is MEGASPARSE else folder.config(family.fields), ignored)
    assert model.vocab_size is not None
    positions = model.max_position_embeddings or SEQ_LENGTH
    tensors = family.tensors(model, model.vocab_size, positions)
    names = _names(folder, family, tensors, ignored, model.tie_embeddings)
    state, fp8 = _beside(path)
    recipe = parse_recipe(
        {
            "name": re.sub(r"[^A-Za-z0-9._-]", "-", path.resolve().name),
            "data": {"sets": [{"path": "data"}], "seq_length": min(positions, SEQ_LENGTH)},
            "model": model.model_dump(mode="json"),
            "training": {
                **{"steps": 1, "global_batch_size": layout.world_size, "micro_batch_size": 1},
                **{"precision": _precision(folder), "fp8": fp8},
            },
            "parallel": layout.parallel(),
        },
        source=str(path),
    )
    check_layout(recipe, layout.world_size)
    tensors |= {name: (tuple(scales.shape), []) for name, scales in state.items() if FP8_SCALES in name}
    return Source(folder, family, recipe, tensors, names, state)


def _beside(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Of a folder that we wrote: the state that it has beside the weights, and the recipe's FP8."""
    beside = path / BESIDE
    if not (beside / STATE).is_file():
        return {}, None
    recipe = load_recipe(beside / RECIPE)
    fp8 = recipe.training.fp8
    state = {name: tensor for name, tensor in load_file(beside / STATE).items() if fp8 or FP8_SCALES not in name}
    return state, None if fp8 is None else fp8.model_dump(mode="json")


def _precision(folder: Folder) -> str:
    """That of most elements."""
    elements: dict[str, int] = {}
    for stored in folder.tensors.values():
        name = PRECISIONS.get(stored.dtype, "fp32")
        elements[name] = elements.get(name, 0) + torch.Size(stored.shape).numel()
    return max(elements, key=lambda name: elements[name])


def _names(
    folder: Folder,
    family: Family,
    tensors: dict[str, tuple[Shape, list[Piece]]],
    ignored: frozenset[str],
    tied: bool,
) -> dict[str, str]:
    """Every tensor of theirs that the family has, as the folder names it."""
    expected = {part.name: part.shape for _, pieces in tensors.values() for piece in pieces for part in piece.parts}
    bare = family.root and not any(name.startswith(family.root) for name in folder.tensors)
    names = {name: name.removeprefix(family.root) if bare else name for name in expected}
    for name, shape in expected.items():
        stored = folder.tensors.get(names[name])
        if stored is None:
            raise ValueError(f"{folder.path} has no {names[name]} {list(shape)}, which a {family.model_type} must have")
        if stored.shape != shape:
            raise ValueError(
                f"{folder.path / stored.file}: {names[name]} is {list(stored.shape)}, its config.json makes it "
                f"{list(shape)}"
            )
    used = set(names.values())
    for name, stored in folder.tensors.items():
        if name in used or family.is_unsaved(name) or name.startswith(tuple(ignored)):
            continue
        if tied and name == "lm_head.weight":
            _check_tied(folder, names[family.top["embedding.word_embeddings.weight"].name])  # type: ignore[attr-defined]
            continue
        raise ValueError(
            f"{folder.path / stored.file}: {name} {list(stored.shape)} is no tensor of a {family.model_type} of its "
            f"config.json: pass --ignore {name} to leave it out"
        )
    return names


def _check_tied(folder: Folder, embedding: str) -> None:
    head, other = (folder.tensors[name] for name in ("lm_head.weight", embedding))
    rows = max(1, BLOCK_BYTES // (head.dtype.itemsize * math.prod(head.shape[1:])))
    if (head.shape, head.dtype) != (other.shape, other.dtype) or not all(
        torch.equal(folder.read("lm_head.weight", start, start + rows), folder.read(embedding, start, start + rows))
        for start in range(0, head.shape[0], rows)
    ):
        raise ValueError(
            f"{folder.path} has tie_word_embeddings=true, but its lm_head.weight is not {embedding}: set it to false"
        )


# Writing --------------------------------------------------------------------------------------------------------------


def write(source: Source, output: Output, console: Console) -> None:
    """The checkpoint, into ``output.partial``: whole, but not published. ValueError naming a tensor that has a value
    that is not finite."""
    written = output.write(_files(source), console)
    tensors = {f"model.{name}": (shape, source.dtype(pieces)) for name, (shape, pieces) in source.tensors.items()}
    write_metadata(output.partial, tensors, {name: file["about"] for name, file in written.items()})
    files = {name: {"bytes": file["bytes"], "sha256": file["sha256"]} for name, file in written.items()}
    tokenizer, copied = _copy_along(source.folder.path, output.partial)
    for name in (METADATA, *copied):
        path = output.partial / name
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    if tokenizer is None:
        console.print(f"{source.folder.path} has no tokenizer: evaluate and to-hf need --tokenizer", highlight=False)
    manifest = {
        **{"step": 0, "samples": 0, "layout": "dp1", "world_size": 1, "data_fingerprint": "", "data": []},
        **{"adam_steps": 0, "loss_scaler": None, "tokenizer": tokenizer},
        "recipe": source.recipe.model_dump(mode="json"),
        "converted_from": {"path": str(source.folder.path.resolve()), "model_type": source.family.model_type},
    }
    checkpoints.write_manifest(output.partial, {**manifest, "files": files})


def _files(source: Source) -> list[File]:
    """Tensors of ours in files of FILE_BYTES."""
    groups: list[list[str]] = [[]]
    sizes = [0]
    for name, (shape, pieces) in source.tensors.items():
        size = math.prod(shape) * source.dtype(pieces).itemsize
        if groups[-1] and sizes[-1] + size > FILE_BYTES:
            groups.append([])
            sizes.append(0)
        groups[-1].append(name)
        sizes[-1] += size

    def write_group(names: list[str], file: BinaryIO) -> list[list[Any]]:
        return [block for name in names for block in _write_tensor(source, name, file)]

    return [
        File(f"__0_{number}.distcp", size, functools.partial(write_group, names))
        for number, (names, size) in enumerate(zip(groups, sizes, strict=True))
    ]


def _write_tensor(source: Source, name: str, file: BinaryIO) -> Iterator[list[Any]]:
    """Blocks of rows, each read, checked and written before the next."""
    shape, pieces = source.tensors[name]
    if not pieces:  # where no router has chosen yet: even loads, no biases
        start = torch.full(shape, 1 / shape[0] if name.endswith(".load") else 0.0)
        yield write_block(file, f"model.{name}", (0,) * len(shape), source.state.get(name, start))
    for piece in pieces:
        for offsets, block in _blocks(source, piece, source.dtype(pieces)):
            yield write_block(file, f"model.{name}", offsets, block)


def _blocks(source: Source, piece: Piece, dtype: torch.dtype) -> Iterator[tuple[Shape, Tensor]]:
    """(offsets in the tensor of ours, rectangle) of a piece: rows at a time where it is one tensor of theirs."""
    if not piece.is_theirs:
        whole = source.folder.memory.empty(piece.shape, dtype)
        for part in piece.parts:
            part.copy(_finite(source, part.name), whole)
        yield piece.offsets, whole
        return
    (part,) = piece.parts
    before = piece.shape[: len(piece.shape) - len(part.shape)]  # of an expert 1
    rows = max(1, BLOCK_BYTES // max(1, dtype.itemsize * math.prod(part.shape[1:])))
    for start in range(0, part.shape[0], rows):
        theirs = _finite(source, part.name, start, start + rows)
        row = len(before)
        offsets = (*piece.offsets[:row], piece.offsets[row] + start, *piece.offsets[row + 1 :])
        yield offsets, theirs.to(dtype).reshape(*before, *theirs.shape)


def _finite(source: Source, name: str, start: int = 0, stop: int | None = None) -> Tensor:
    tensor = source.folder.read(source.names[name], start, stop)
    smallest, largest = torch.aminmax(tensor)  # not a number, if one is
    if not (torch.isfinite(smallest) and torch.isfinite(largest)):
        file = source.folder.path / source.folder.tensors[source.names[name]].file
        raise ValueError(f"{file}: {source.names[name]} has values that are not finite: download it again")
    return tensor


def _copy_along(source: Path, folder: Path) -> tuple[str | None, list[str]]:
    """The tokenizer as data sets have it, and every file of theirs besides the weights; the tokenizer's hash, and what
    was written."""
    theirs = folder / THEIRS
    theirs.mkdir(exist_ok=True)
    copied = [path for path in sorted(source.iterdir()) if path.is_file() and ALONG.fullmatch(path.name)]
    for path in copied:
        shutil.copyfile(path, theirs / path.name)
    names = [f"{THEIRS}/{path.name}" for path in copied]
    found = [source / name for name in (HUGGINGFACE_FILE, SENTENCEPIECE_FILE) if (source / name).is_file()]
    if not found:
        return None, names
    tokenizer = load_tokenizer(found[0])
    tokenizer.save(folder)
    return tokenizer.hash, names + [name for name in TOKENIZER_FILES if (folder / name).is_file()]


# The command ----------------------------------------------------------------------------------------------------------


def from_hf(
    path: Path, final: Path, layout: Layout, ignored: frozenset[str], run: Run | None, console: Console
) -> Proof | None:
    """Convert the folder ``path`` into the checkpoint ``final``, and compare their logits, ours in ``layout`` by
    ``run`` (None: do not compare). A run that was stopped is gone on with. ValueError for everything that is not as
    it should be; then there is no ``final``."""
    source = open_source(path, ignored, layout)
    if run is not None:
        check_memory(sum(math.prod(shape) for shape, _ in source.tensors.values()))
    identity = {
        "source": source.folder.identity(),
        "ignored": sorted(ignored),
        "recipe": source.recipe.model_dump_json(),
    }
    with opened(final, identity) as output:
        write(source, output, console)
        proof = prove(output.partial, path, torch.float32, layout, run) if run is not None else None
        output.publish()
    return proof
