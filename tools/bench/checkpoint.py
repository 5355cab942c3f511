"""Saving and loading the whole training state: ours beside megatron-core's and DeepSpeed's own, on two CPU processes.

    python tools/bench/checkpoint.py

The same model, ZeRO-1 partitions and experts split over two processes, and the same disk; contenders take turns.

- ours: every rank writes the ranges of its optimizer to one file, flushed to disk and hashed; loading verifies hashes
- ours, bare: without the flush and the hashes, to see what they cost
- ours, beside the run: what the training step waits for with training.async_save
- megatron-core: dist_checkpointing wants rectangles of whole tensors, so that weights and moments are first gathered
  from the ZeRO partitions, and set back after loading
- DeepSpeed: save_checkpoint and load_checkpoint: tied to the layout, not flushed, no hashes
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import math
import multiprocessing
import queue
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megasparse import topology
from megasparse.checkpoint import save as saving
from megasparse.checkpoint.load import load
from megasparse.checkpoint.save import Saver
from megasparse.checkpoint.state import finish_loading, numbers
from megasparse.config import Recipe, parse_recipe
from megasparse.data.loader import Batch
from megasparse.engine import Engine
from megasparse.layout import check_layout
from megasparse.model import build_model
from megasparse.placement import local_weights
from megasparse.processes import Workers

PROCESSES, VOCAB, SEQ = 2, 4096, 64
PARTS = ("fp32", "exp_avg", "exp_avg_sq")
OURS, BARE, BESIDE, MEGATRON, DEEPSPEED = "ours", "ours, bare", "ours, beside the run", "megatron-core", "DeepSpeed"


def recipe_of(asynchronous: bool) -> Recipe:
    return parse_recipe(
        {
            "name": "checkpoint",
            "data": {"sets": [{"path": "unused"}], "seq_length": SEQ},
            "model": {
                "num_layers": 6,
                "hidden_size": 384,
                "num_attention_heads": 6,
                "vocab_size": VOCAB,
                "moe": {"num_experts": 8, "ffn_hidden_size": 384},
            },
            "training": {
                "steps": 10,
                "global_batch_size": 2,
                "micro_batch_size": 1,
                "keep_checkpoints": 1,
                "async_save": asynchronous,
            },
            "parallel": {"ep": 2},
        }
    )


def batches() -> list[Batch]:
    ids = torch.randint(0, VOCAB, (1, SEQ + 1))
    positions = torch.arange(SEQ)[None]
    return [Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, SEQ), positions, None, positions)]


@dataclass
class Contender:
    save: Callable[[int], Any]
    load: Callable[[int], Any] | None
    finish: Callable[[], None] = lambda: None  # not timed


def measure(rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds to save and load, and bytes on disk, of each contender; the same on both ranks."""
    recipe = recipe_of(asynchronous=False)
    place = topology.initialize(check_layout(recipe, PROCESSES))
    engine = Engine(recipe, place, *build_model(recipe, place, VOCAB))
    engine.train_step(batches(), 0, 1e-3)
    contenders = contenders_of(engine, folder)
    seconds: dict[tuple[str, str], list[float]] = {}
    for step in range(1, rounds + 2):  # the first round warms up
        for name, contender in contenders.items():
            for kind, act in (("save", contender.save), ("load", contender.load)):
                if act is not None:
                    seconds.setdefault((name, kind), []).append(timed(act, step))
                contender.finish()
    results: dict[str, dict[str, float]] = {name: {"bytes": size_of(folder / name)} for name in contenders}
    for (name, kind), values in seconds.items():
        results[name][kind] = statistics.median(values[1:])
    results[OURS]["parameters"] = sum(math.prod(weight.shape) for weight in local_weights(engine.chunks, place))
    return results


def timed(act: Callable[[int], Any], step: int) -> float:
    dist.barrier()
    started = time.perf_counter()
    act(step)
    dist.barrier()
    return time.perf_counter() - started


def size_of(folder: Path) -> int:
    """Of the one checkpoint left in ``folder``."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def contenders_of(engine: Engine, folder: Path) -> dict[str, Contender]:
    ours, bare, beside = (Saver(engine, folder / name, "") for name in (OURS, BARE, BESIDE))

    def save_bare(step: int) -> None:
        unflushed = functools.partial(saving._Writer, sync_files=False)
        unhashed = mock.patch.object(saving, "_describe", lambda file: {"bytes": file.stat().st_size, "sha256": ""})
        with mock.patch.object(saving, "_Writer", unflushed), unhashed:
            bare.save(step)

    def save_beside(step: int) -> None:
        engine.recipe = recipe_of(asynchronous=True)
        beside.save(step)
        engine.recipe = recipe_of(asynchronous=False)

    def save_deepspeed(step: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            engine.deepspeed.save_checkpoint(str(alone(folder / DEEPSPEED)), tag=f"step_{step}")

    def load_deepspeed(step: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            engine.deepspeed.load_checkpoint(str(folder / DEEPSPEED), tag=f"step_{step}")

    return {
        OURS: Contender(ours.save, lambda step: load(engine, folder / OURS / f"step_{step}")),
        BARE: Contender(save_bare, None),
        BESIDE: Contender(save_beside, None, beside.wait),
        MEGATRON: Contender(
            lambda step: save_megatron(engine, alone(folder / MEGATRON)),
            lambda step: load_megatron(engine, folder / MEGATRON),
        ),
        DEEPSPEED: Contender(save_deepspeed, load_deepspeed),
    }


def alone(folder: Path) -> Path:
    """An empty folder."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    return folder


# megatron-core --------------------------------------------------------------------------------------------------------


def sharded_state(engine: Engine) -> dict[str, Any]:
    """Every local weight and its moments, gathered from the ZeRO partitions, as megatron-core's ShardedTensors."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from megatron.core.dist_checkpointing import ShardedTensor

    place, state = engine.topology, {}
    engine.optimizer._hp_optimizer_states_linked = False  # it links the moments of its first group only
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    for weight in local_weights(engine.chunks, place):
        expert = weight.shape != tuple(weight.tensor.shape)
        offsets, replica = ([(0, place.ep_rank, place.ep)], 0) if expert else ([], place.rank)
        for part in PARTS:
            full: Any = (
                safe_get_full_fp32_param(weight.tensor)
                if part == "fp32"
                else safe_get_full_optimizer_state(weight.tensor, part)
            )
            key = f"{part}.{weight.name}"
            state[key] = ShardedTensor.from_rank_offsets(
                key, full.view_as(weight.tensor).contiguous(), *offsets, replica_id=replica
            )
    return state


def save_megatron(engine: Engine, folder: Path) -> None:
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem
    from megatron.core import dist_checkpointing

    filesystem._results_queue = queue.Queue()  # else a process with a manager
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it forks its writers
    dist_checkpointing.save(sharded_state(engine), str(folder))


def load_megatron(engine: Engine, folder: Path) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
    from megatron.core import dist_checkpointing

    loaded: Any = dist_checkpointing.load(sharded_state(engine), str(folder))
    for weight in local_weights(engine.chunks, engine.topology):
        for part in PARTS:
            value = loaded[f"{part}.{weight.name}"]
            if part == "fp32":
                safe_set_full_fp32_param(weight.tensor, value)
            else:
                safe_set_full_optimizer_state(weight.tensor, value, part)
    finish_loading(engine, numbers(engine))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Workers() as workers:
        results = workers.run(measure, PROCESSES, arguments.rounds, Path(folder), timeout=540)[0]
    ours = results[OURS]
    table = Table(
        "contender", "save, s", "save / ours", "load, s", "load / ours", "bytes / parameter", title="Training state"
    )
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['save']:.3f}",
            f"{result['save'] / ours['save']:.2f}",
            f"{result['load']:.3f}" if "load" in result else "",
            f"{result['load'] / ours['load']:.2f}" if "load" in result else "",
            f"{result['bytes'] / ours['parameters']:.2f}" if result["bytes"] else "",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
