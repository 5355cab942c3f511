"""Folders whose 2:4 weights are packed: two values of each four and their places (ops.two_four.pack_24), about 9/16 of
their size in bf16. No other loader reads them, so their files have a name of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasparse.checkpoint.hf.folder import Folder, Stem
from megasparse.ops.two_four import unpack_24

STEM = Stem("packed")
VALUES, PLACES = ".values_24", ".places_24"  # after the name of the weight


def stored(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, type and shape of what ``pack_24`` makes of a weight [rows, columns]."""
    *rows, columns = shape
    yield name + VALUES, dtype, (*rows, columns // 2)
    yield name + PLACES, torch.uint8, (*rows, -(-columns // 8))


def unpacked(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight of a packed folder, one at a time, 2:4 ones with their zeros."""
    folder = Folder(path, STEM)
    for name in folder.tensors:
        if name.endswith(VALUES):
            weight = name.removesuffix(VALUES)
            yield weight, unpack_24(folder.read(name), folder.read(weight + PLACES))
        elif not name.endswith(PLACES):
            yield name, folder.read(name).clone()


def load_packed(path: Path, **options: Any) -> Any:
    """The transformers model of a packed folder; ``options`` are from_pretrained's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    with torch.device("meta"):  # for its class: the automatic one wants a folder that it can load
        model: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=True))
    return model.from_pretrained(None, config=config, state_dict=dict(unpacked(path)), **options)
