"""A checkpoint is read with no process group, a piece at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megasparse.checkpoint.reader import Reader
from megasparse.checkpoint.save import Saver
from megasparse.layout import Layout
from tests import small
from tests.checkpoint.runs import FINGERPRINT, engine_of, recipe_of, run
from tests.helpers import REPOSITORY, run_distributed

LAYOUT = "tp2pp2ep2"


def save(layout: str, folder: Path) -> dict[str, torch.Tensor]:
    """Step 1 of a run; returns rank 0's plain norm weights, which every layout holds whole."""
    recipe = recipe_of(layout)
    engine = engine_of(recipe, small.start(recipe))
    run(engine, 0, 1)
    Saver(engine, folder, FINGERPRINT).save(1)
    return {name: p.detach() for name, p in engine.chunks[0].named_parameters() if name.endswith("layernorm.weight")}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    norms = run_distributed(save, Layout.parse(LAYOUT).world_size, LAYOUT, folder)[0]
    torch.save(norms, folder / "norms.pt")
    return folder / "step_1"


def test_tensors(path: Path) -> None:
    reader = Reader(path)
    embedding = reader.tensors["model.embedding.word_embeddings.weight"]
    assert embedding.shape == (small.VOCAB - 1, 32)
    assert embedding.dtype == torch.float32
    assert embedding.pieces >= 2
    assert all(info.elements == torch.Size(info.shape).numel() for info in reader.tensors.values())
    assert reader.tensors["model.decoder.layers.3.mlp.experts.w2"].shape[0] == 8
    kinds = {name.split(".")[0] for name in reader.tensors}
    assert kinds == {"model", "optimizer", "random"}


def test_pieces_tile_the_whole(path: Path) -> None:
    reader = Reader(path)
    for name, info in reader.tensors.items():
        seen = torch.zeros(info.shape, dtype=torch.int64)
        for offsets, piece in reader.pieces(name):
            seen[tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))] += 1
            assert piece.untyped_storage().nbytes() == piece.nbytes, "no more is stored than the piece"
        assert (seen == 1).all(), name


def test_values(path: Path) -> None:
    reader, norms = Reader(path), torch.load(path.parent / "norms.pt")
    assert len(norms) >= 2
    for name, weight in norms.items():
        assert torch.equal(reader.read(f"model.{name}"), weight)


def test_without_a_process_group_and_bounded(path: Path) -> None:
    """In a fresh process; what it allocates at once is the largest piece, not the largest tensor."""
    script = f"""
import torch
from pathlib import Path
from megasparse.checkpoint.reader import Reader
reader = Reader(Path({str(path)!r}))
reader.verify()
largest = max(piece.nbytes for name in reader.tensors for _, piece in reader.pieces(name))
assert not torch.distributed.is_initialized()
import sys
print(largest, "deepspeed" in sys.modules, "megatron" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0, done.stderr
    largest, *imported = done.stdout.split()
    tensors = Reader(path).tensors.values()
    assert 0 < int(largest) <= max(4 * torch.Size(t.shape).numel() for t in tensors) // 2
    assert imported == ["False", "False"], "reading needs neither"
