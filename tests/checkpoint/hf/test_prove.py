"""Logits are compared where there is room for it, and a small difference is found."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megasparse import topology
from megasparse.checkpoint.hf.prove import DIVERGENCE, ERROR, Proof, check_memory, prove
from megasparse.checkpoint.reader import Reader
from megasparse.layout import Layout
from tests.checkpoint.hf.conversion import convert, theirs
from tests.checkpoint.hf.made import rewritten

Memory = namedtuple("Memory", "available")
WEIGHTS = [
    "embedding.word_embeddings.weight",
    "decoder.layers.0.self_attention.linear_qkv.weight",
    "decoder.layers.1.self_attention.linear_proj.weight",
    "decoder.layers.1.self_attention.k_layernorm.weight",
    "decoder.layers.0.mlp.linear_fc1.weight",
    "decoder.layers.1.mlp.linear_fc2.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
]


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> None:
    """Its environment is as a launcher sets it."""
    topology.initialize()
    topology.shutdown()


def here(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float) -> list[Any]:
    """In this process."""
    assert world_size == 1
    assert timeout > 0
    try:
        return [fn(*args)]
    finally:
        topology.shutdown()


def proved(checkpoint: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Proof:
    return prove(checkpoint, folder, dtype, Layout(), here)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return theirs(tmp_path_factory.mktemp("prove") / "theirs", "qwen3", head_dim=16)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    convert(folder, folder.with_name("ours"), run=None)
    return folder.with_name("ours")


def test_the_same_model(checkpoint: Path, folder: Path) -> None:
    proof = proved(checkpoint, folder)
    assert proof.error <= ERROR <= 1e-5
    assert proof.divergence <= DIVERGENCE <= 1e-10
    assert (proof.tokens, proof.layout) == (128, str(Layout()))
    assert str(proof).startswith("logits of 128 random tokens, ours in ")


@pytest.mark.parametrize("name", WEIGHTS)
def test_one_weight_that_is_changed_by_a_hundredth(checkpoint: Path, folder: Path, tmp_path: Path, name: str) -> None:
    weight = Reader(checkpoint).read(f"model.{name}")
    if name.startswith("embedding"):
        weight *= 1.01  # which of its rows are tokens of the comparison is chance
    else:
        weight.view(-1)[weight.abs().argmax()] *= 1.01
    changed = rewritten(checkpoint, tmp_path / "changed", {f"model.{name}": weight})
    with pytest.raises(ValueError, match=r"theirs and .*changed are not the same model: logits of 128 random tokens"):
        proved(changed, folder)


def test_weights_are_rounded_before_they_are_compared(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    half = copied(folder, tmp_path / "half", lambda tensors: {name: x.bfloat16() for name, x in tensors.items()})
    assert proved(checkpoint, half, torch.bfloat16).error <= ERROR
    with pytest.raises(ValueError, match="are not the same model"):
        proved(checkpoint, half)


def copied(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(change(load_file(folder / "model.safetensors")), to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_what_transformers_does_not_find_is_named(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """It would fill it with random numbers."""

    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("layers.1.self_attn.q_norm", "layers.1.q_norm"): x for name, x in tensors.items()}

    reason = r"missing: transformers finds missing_keys model\.layers\.1\.self_attn\.q_norm\.weight"
    with pytest.raises(ValueError, match=reason):
        proved(checkpoint, copied(folder, tmp_path / "missing", renamed))


def test_room_for_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(10 * 2**30))
    check_memory(10 * 2**30 // 8)
    with pytest.raises(ValueError, match=r"in float32: 24 GiB, 10 GiB of memory are free: pass --no-verify"):
        check_memory(3 * 2**30)
