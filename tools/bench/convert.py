"""Conversions from and to Hugging Face folders beside a plain copy of the same files, and their peak memory.

    python tools/bench/convert.py

A synthetic checkpoint in bf16, of dense layers or of experts; each contender in a process of its own, in turns, on the
same disk, with the source in the page cache. Ours are without the comparison of logits.

- copy: every file copied and flushed to disk, as ours are
- from-hf: read, checked for values that are not finite, put together, hashed, written, flushed
- to-hf: the same the other way, from what from-hf wrote

The rate is bytes of the source's weights per second, the second time in a process. The memory is its largest resident
set, imports included, beside twice the largest tensor and 300 MB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

MODELS: dict[str, dict[str, Any]] = {
    "dense": {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 14},
        **{"intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 64_000},
    },
    "experts": {
        **{"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "hidden_size": 1024, "num_hidden_layers": 8},
        **{"intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 50_304},
        **{"num_experts": 64, "num_experts_per_tok": 8},
    },
}
SHARD_BYTES = 2**29
ALLOWED = 300e6  # bytes beside twice the largest tensor


def make(folder: Path, name: str) -> None:
    """The folder, with random weights: shards written by the export's own writer would prove nothing of it, so by
    safetensors."""
    from safetensors.torch import save_file

    from megasparse.checkpoint.hf.families import family_of
    from megasparse.checkpoint.hf.folder import Stem

    config = {**MODELS[name], "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family = family_of(config["model_type"], config)
    from transformers import AutoConfig

    from megasparse.checkpoint.hf.family import by_names

    model = family.model(by_names(AutoConfig.from_pretrained(folder), family.fields))
    parts = [
        part
        for _, pieces in family.tensors(model, config["vocab_size"], 4096).values()
        for piece in pieces
        for part in piece.parts
    ]
    shards: list[list[Any]] = [[]]
    size = 0
    for part in parts:
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += 2 * torch.Size(part.shape).numel()
    stem, weight_map = Stem(), {}
    for number, shard in enumerate(shards):
        file = stem.file(number, len(shards))
        tensors = {part.name: torch.randn(part.shape, dtype=torch.bfloat16) for part in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / stem.index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Contenders -----------------------------------------------------------------------------------------------------------


def seconds(target: Path, work: Callable[[], Any]) -> float:
    """Of the work that writes the target, the second time: what is imported is there then, and so is the memory of the
    page cache, which the host of a virtual machine may have to give anew."""
    taken = []
    for _ in range(2):
        shutil.rmtree(target, ignore_errors=True)
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return taken[-1]


def copy(source: Path, ours: Path, target: Path) -> float:
    from megasparse.files import sync

    def work() -> None:
        target.mkdir()
        for path in source.iterdir():
            shutil.copyfile(path, target / path.name)
            sync(target / path.name)

    return seconds(target, work)


def from_hf(source: Path, ours: Path, target: Path) -> float:
    from megasparse.checkpoint.hf.from_hf import from_hf as run
    from megasparse.layout import Layout

    return seconds(target, lambda: run(source, target, Layout(), frozenset(), None, Console(quiet=True)))


def to_hf(source: Path, ours: Path, target: Path) -> float:
    from megasparse.checkpoint.hf.to_hf import Options
    from megasparse.checkpoint.hf.to_hf import to_hf as run

    return seconds(target, lambda: run(ours, target, Options(shard_bytes=SHARD_BYTES), None, Console(quiet=True)))


def measure(contender: Callable[[Path, Path, Path], float], *paths: Path) -> tuple[float, int]:
    """Seconds, and the peak resident set of its process in bytes."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, contender, paths))
    process.start()
    try:
        return receiver.recv()
    finally:
        process.join()


def _measured(sender: Any, contender: Callable[[Path, Path, Path], float], paths: tuple[Path, Path, Path]) -> None:
    seconds = contender(*paths)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # getrusage's begins as the parent's
    assert peak
    sender.send((seconds, 1024 * int(peak[1])))


def bench(name: str, rounds: int, folder: Path, console: Console) -> None:
    source, ours, target = folder / "source", folder / "ours", folder / "target"
    make(source, name)
    files = list(source.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    measure(from_hf, source, ours, ours)
    largest = largest_tensor(source)
    taken: dict[str, list[tuple[float, int]]] = {}
    contenders = {"copy": copy, "from-hf": from_hf, "to-hf": to_hf}
    for _ in range(rounds):
        for title, contender in contenders.items():
            taken.setdefault(title, []).append(measure(contender, source, ours, target))
    limit = 2 * largest + ALLOWED
    table = Table(
        title=f"{name}: {size / 1e9:.2f} GB in bf16, the largest tensor {largest / 1e6:.0f} MB; medians of {rounds}",
        title_justify="left",
    )
    for column in ("", "seconds", "MB/s", "of copy", "peak memory, MB", f"of {limit / 1e6:.0f} MB"):
        table.add_column(column, justify="right" if column else "left")
    # Each round's own copy is what its conversions are compared with.
    for title, results in taken.items():
        median = statistics.median(s for s, _ in results)
        ratio = statistics.median(c / s for (s, _), (c, _) in zip(results, taken["copy"], strict=True))
        peak = max(memory for _, memory in results)
        shown = ("", "") if title == "copy" else (f"{peak / 1e6:.0f}", f"{peak / limit:.0%}")
        table.add_row(title, f"{median:.2f}", f"{size / median / 1e6:.0f}", f"{ratio:.0%}", *shown)
    console.print(table)


def largest_tensor(source: Path) -> int:
    """Bytes."""
    from megasparse.checkpoint.hf.folder import Folder

    return max(torch.Size(t.shape).numel() * t.dtype.itemsize for t in Folder(source).tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="On the disk to measure. Default: the system's temporary one.")
    arguments = parser.parse_args()
    for name in MODELS:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            bench(name, arguments.rounds, Path(folder), Console())


if __name__ == "__main__":
    main()
