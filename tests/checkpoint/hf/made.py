"""Checkpoints of random numbers: no model, no training, no process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasparse.checkpoint.folder import write_manifest
from megasparse.checkpoint.reader import Reader
from megasparse.checkpoint.writer import write_block, write_metadata
from megasparse.config import Recipe, parse_recipe
from megasparse.files import sha256_of_file
from megasparse.ops.two_four import prune_24
from megasparse.parameters import parameters, router_buffers
from tests.checkpoint.hf.trained import STEPS, VOCAB


def state_of(name: str) -> str:
    """Where a checkpoint has the sparsity of a weight."""
    layer, last = name.rsplit(".", 1)
    return f"model.{layer}.sparsity." + ("" if last == "weight" else f"{last}.")


def tensors_of(recipe: Recipe, vocab_size: int = VOCAB) -> dict[str, Tensor]:
    """Weights, routers, and the state of sparse weights, with 2:4 masks."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 0.15 * torch.randn(shape, generator=generator)

    model = recipe.model
    shapes = {**parameters(model, vocab_size, recipe.data.seq_length), **router_buffers(model)}
    made = {f"model.{name}": random(*shape) for name, shape in shapes.items()}
    sparsity = recipe.sparsity.weights
    for name in recipe.sparse_weights:
        assert sparsity is not None
        weight, state = made[f"model.{name}"], state_of(name)
        made[f"{state}mask"] = prune_24(weight)[1]
        if sparsity.method == "s_ste":
            made[f"{state}scale"] = 1 + random(*(weight.shape[:-2] or (1,))).abs()
        if sparsity.boost:
            made[f"{state}boost"] = random(*weight.shape[:-1], weight.shape[-1] // sparsity.boost)
    return made


def write(folder: Path, recipe: Recipe, tensors: dict[str, Tensor], step: int = STEPS, **manifest: Any) -> Path:
    """The checkpoint, each tensor in two pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "__0_0.distcp"
    blocks = []
    with file.open("wb") as stream:
        for name, tensor in tensors.items():
            half = tensor.shape[0] // 2
            for start, block in ((0, tensor[:half]), (half, tensor[half:])):
                if len(block):
                    blocks.append(write_block(stream, name, (start, *[0] * (tensor.dim() - 1)), block.clone()))
    write_metadata(folder, {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}, {file.name: blocks})
    described = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != "manifest.json"
    }
    settings = {"step": step, "samples": step * 8, "layout": "dp1", "world_size": 1, "data_fingerprint": "", "data": []}
    settings |= {"adam_steps": step, "loss_scaler": None, "tokenizer": None, "recipe": recipe.model_dump(mode="json")}
    write_manifest(folder, {**settings, **manifest, "files": described})
    return folder


def make(folder: Path, recipe: Recipe, step: int = STEPS, **manifest: Any) -> Path:
    return write(folder, recipe, tensors_of(recipe), step, **manifest)


def rewritten(checkpoint: Path, folder: Path, tensors: dict[str, Tensor | None]) -> Path:
    """A copy with these tensors in place of its own; None: without it."""
    reader = Reader(checkpoint)
    changed = {name: reader.read(name) for name in reader.tensors} | tensors
    folder.mkdir()
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    recipe = parse_recipe(reader.manifest["recipe"], source=str(checkpoint))
    manifest = {name: value for name, value in reader.manifest.items() if name not in ("files", "recipe", "step")}
    return write(folder, recipe, kept, reader.manifest["step"], **manifest)
