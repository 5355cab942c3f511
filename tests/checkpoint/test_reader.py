"""A checkpoint is read with no process group, a piece at a time."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse.checkpoint import reader as module
from megasparse.checkpoint.folder import write_manifest
from megasparse.checkpoint.reader import Reader, read_elements
from megasparse.checkpoint.save import Saver
from megasparse.checkpoint.writer import write_block, write_metadata
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
from megasparse.checkpoint import reader as module
from megasparse.checkpoint.reader import Reader, read_elements
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


# Rectangles -----------------------------------------------------------------------------------------------------------


def written(folder: Path, whole: torch.Tensor, blocks: list[tuple[tuple[int, ...], torch.Tensor]]) -> Reader:
    with (folder / "file").open("wb") as file:
        table = [write_block(file, "x", offsets, block) for offsets, block in blocks]
    write_metadata(folder, {"x": (tuple(whole.shape), whole.dtype)}, {"file": table})
    write_manifest(folder, {"files": {}})
    return Reader(folder)


def cuts(rng: random.Random, size: int) -> list[tuple[int, int]]:
    """0 .. size in up to four parts."""
    edges = [0, *sorted(rng.sample(range(1, size), min(size - 1, rng.randrange(4)))), size]
    return list(itertools.pairwise(edges))


@pytest.mark.parametrize("seed", range(4))
def test_any_rectangle_of_any_pieces(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randrange(2, 9) for _ in range(seed + 1))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    places: list[tuple[tuple[int, int], ...]] = [()]
    for size in shape:
        places = [(*place, part) for place in places for part in cuts(rng, size)]
    rng.shuffle(places)
    blocks = [(tuple(a for a, _ in place), whole[tuple(slice(*part) for part in place)].clone()) for place in places]
    reader = written(tmp_path, whole, blocks)
    assert torch.equal(reader.read("x"), whole)
    for _ in range(50):
        offsets = tuple(rng.randrange(size) for size in shape)
        sizes = tuple(rng.randrange(size - start + 1) for size, start in zip(shape, offsets, strict=True))
        region = reader.region("x", offsets, sizes)
        here = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
        assert torch.equal(region, whole[here])
        assert region.is_contiguous()


@pytest.mark.parametrize(
    "stored",
    [lambda x: x.t(), lambda x: x[1:, 2:], lambda x: x[1:], lambda x: x[:, 1], lambda x: x[1, 1], lambda x: x[:0]],
    ids=["transposed", "rectangle", "rows", "column", "element", "nothing"],
)
def test_views_of_a_larger_storage(tmp_path: Path, stored: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """As torch.save has them, which checkpoints of other versions may."""
    whole = stored(torch.randn(4, 6))
    with (tmp_path / "file").open("wb") as stream:
        stream.write(b"xyz")
        torch.save(whole, stream)
        table = [["x", [0] * whole.dim(), list(whole.shape), 3, stream.tell() - 3]]
    write_metadata(tmp_path, {"x": (tuple(whole.shape), whole.dtype)}, {"file": table})
    write_manifest(tmp_path, {"files": {}})
    reader = Reader(tmp_path)
    assert torch.equal(reader.read("x"), whole)
    ((_, piece),) = reader.pieces("x")
    assert torch.equal(piece, whole)
    if whole.dim() == 2 and len(whole):
        assert torch.equal(reader.region("x", (1, 0), (2, 3)), whole[1:3, :3])


@pytest.mark.parametrize(
    ("offsets", "sizes"),
    [((0, 0, 0), (4, 5, 6)), ((1, 0, 0), (2, 5, 6)), ((3, 2, 0), (1, 3, 6)), ((2, 1, 1), (1, 1, 4))],
)
def test_no_more_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    """Of rows of one expert of a piece that has several, as a conversion takes them, those rows alone."""
    whole, elements = torch.arange(4 * 5 * 6).view(4, 5, 6), []
    reader = written(tmp_path, whole, [((0, 0, 0), whole)])

    def counted(path: Path, start: int, shape: tuple[int, ...], *others: Any) -> torch.Tensor:
        elements.append(torch.Size(shape).numel())
        return read_elements(path, start, shape, *others)

    monkeypatch.setattr(module, "read_elements", counted)
    here = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
    assert torch.equal(reader.region("x", offsets, sizes), whole[here])
    assert elements == [torch.Size(sizes).numel()]


def memory(field: str) -> int:
    """Bytes of this process."""
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def test_a_rectangle_takes_no_memory_for_the_rest(tmp_path: Path) -> None:
    """Neither while it is read (the peak is begun anew before) nor after."""
    piece = torch.zeros(2_000, 25_000)  # 200 MB
    piece[1000] = torch.arange(25_000)
    reader = written(tmp_path, piece, [((0, 0), piece)])
    del piece
    reader.region("x", (0, 0), (1, 1))  # what is imported at first
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    region = reader.region("x", (1000, 100), (2, 300))
    assert torch.equal(region, torch.stack([torch.arange(100.0, 400.0), torch.zeros(300)]))
    assert memory("VmHWM") - before < 20e6
    rows = reader.region("x", (1000, 0), (2, 25_000))
    assert torch.equal(rows, torch.stack([torch.arange(25_000.0), torch.zeros(25_000)]))
    assert memory("VmHWM") - before < 20e6
    whole = reader.read("x")
    assert whole.sum() == sum(range(25_000))
    assert memory("VmHWM") - before > 190e6, "the measure sees nothing"
    assert memory("RssFile") + memory("RssAnon") - before < whole.nbytes + 20e6, "more than the tensor is kept"
    del whole
    assert memory("RssFile") + memory("RssAnon") - before < 20e6, "it is kept"
