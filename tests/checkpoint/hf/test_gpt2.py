from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.hf.conversion import DENSE, check, convert, export, read, theirs

SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": True}


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_there_and_back(tmp_path: Path, activation: str) -> None:
    layouts = DENSE if activation == "gelu_new" else ()
    check(tmp_path, "gpt2", layouts, **SIZES, activation_function=activation, n_inner=40)


def test_the_first_checkpoints_names(tmp_path: Path) -> None:
    """Those of 2019 have no ``transformer.`` before their names, and save the causal mask."""
    folder = theirs(tmp_path / "theirs", "gpt2", **SIZES)
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(folder / "model.safetensors").items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    back = read(tmp_path / "back")
    assert {f"transformer.{name}" for name in tensors if not name.endswith(".attn.bias")} == back.keys()
    assert torch.equal(back["transformer.h.1.attn.c_attn.weight"], tensors["h.1.attn.c_attn.weight"])
