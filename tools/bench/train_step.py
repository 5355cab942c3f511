"""Tokens per second of one process: ours against transformers' OLMoE and megatron-core's own layers.

    python tools/bench/train_step.py --model 16x2 --dtype fp32 --profile profile.txt

The same model, weights, batches, threads, AdamW and clipping for all (peers.py says what each does). Each contender
has a process of its own, or they would crowd out each other's kernels in oneDNN's cache. They take their steps in
turn, so that other load on the machine weighs on all; medians over the steps count, and the ratio is the median of the
steps' ratios to the fastest peer. Before any timing counts, the losses and gradient norms of the first steps must
agree.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peers
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megasparse.config import Recipe

WARM_UP = 4  # steps in which oneDNN compiles kernels for the shapes it has not seen
ATTENTION = {"num_attention_heads": 8, "num_query_groups": 2}
MODELS: dict[str, dict[str, Any]] = {
    "16x2": {
        "num_layers": 6,
        "hidden_size": 256,
        "vocab_size": 4096,
        "moe": {"num_experts": 16, "top_k": 2, "ffn_hidden_size": 256},
        **ATTENTION,
    },
    "64x8": {
        "num_layers": 4,
        "hidden_size": 256,
        "vocab_size": 4096,
        "moe": {"num_experts": 64, "top_k": 8, "ffn_hidden_size": 128},
        **ATTENTION,
    },
}
# Largest relative difference from ours of the first step's loss and gradient norm.
TOLERANCE = {"fp32": (1e-6, 1e-5), "bf16": (1e-3, 1e-2)}


def contender(name: str, recipe: Recipe, weights: dict[str, Tensor]) -> Any:
    match name:
        case "ours":
            return peers.Ours(recipe)
        case "transformers":
            return peers.Transformers(recipe, weights)
        case _:
            return peers.Megatron(recipe, weights, dispatcher=name.removeprefix("megatron "))


def serve(connection: Connection, name: str, recipe: Recipe, weights: dict[str, Tensor], threads: int) -> None:
    """Answer each step's number with (seconds, loss, gradient norm, peak memory in MiB), a path with a profile."""
    torch.set_num_threads(threads)
    trained = contender(name, recipe, weights)
    for number in iter(connection.recv, None):
        if isinstance(number, Path):
            connection.send(number.write_text(profile(trained, recipe)))
            continue
        batch = peers.draw_batch(recipe, number)
        start = time.perf_counter()
        loss, norm = trained.step(batch, number)
        seconds = time.perf_counter() - start
        connection.send((seconds, loss, norm, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def profile(trained: Any, recipe: Recipe) -> str:
    """One step by torch's profiler, operators by their own time."""
    batch = peers.draw_batch(recipe, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        trained.step(batch, 0)
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=50, max_name_column_width=60)


def measure(recipe: Recipe, names: list[str], threads: int, steps: int, to: Path | None) -> dict[str, dict[str, float]]:
    """Run the contenders in turn: seconds (median), ratio to ours, first and last loss, MiB, by name."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:  # joins a process group of its own, as the contenders do
        weights = pool.apply(peers.our_weights, (recipe,))
    connections: dict[str, Connection] = {}
    for name in names:
        connections[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, name, recipe, weights, threads), daemon=True).start()
    answers: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in names}
    for number in range(WARM_UP + steps):
        for name, connection in connections.items():
            connection.send(number)
            answers[name].append(connection.recv())
        if number == 0:
            check({name: values[0] for name, values in answers.items()}, recipe)
    if to is not None:
        connections["ours"].send(to)
        connections["ours"].recv()
    for connection in connections.values():
        connection.send(None)
    seconds = {name: [answer[0] for answer in values[WARM_UP:]] for name, values in answers.items()}
    return {
        name: {
            "tokens_per_second": recipe.tokens_per_step / statistics.median(seconds[name]),
            "step_ms": 1e3 * statistics.median(seconds[name]),
            "ours_is_faster_by": statistics.median(
                theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)
            ),
            "first_loss": values[0][1],
            "first_grad_norm": values[0][2],
            "last_loss": values[-1][1],
            "peak_mib": values[-1][3],
        }
        for name, values in answers.items()
    }


def check(first: dict[str, tuple[float, float, float, float]], recipe: Recipe) -> None:
    """The contenders compute the same function and its gradient, or their speeds cannot be compared."""
    _, loss, norm, _ = first["ours"]
    loss_tolerance, norm_tolerance = TOLERANCE[recipe.training.precision]
    for name, (_, their_loss, their_norm, _) in first.items():
        loss_error, norm_error = abs(their_loss / loss - 1), abs(their_norm / norm - 1)
        if loss_error > loss_tolerance or norm_error > norm_tolerance:
            raise SystemExit(f"{name} does other work: loss {their_loss} not {loss}, norm {their_norm} not {norm}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="16x2", help="experts x top-k")
    parser.add_argument("--dtype", choices=TOLERANCE, default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--peers", nargs="+", default=["transformers", "megatron alltoall"])
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--profile", type=Path, help="write torch's profile of one step of ours there")
    arguments = parser.parse_args()
    recipe = peers.recipe(MODELS[arguments.model], arguments.seq, arguments.batch, arguments.dtype)
    names = ["ours", *arguments.peers]
    results = measure(recipe, names, arguments.threads, arguments.steps, arguments.profile)
    title = (
        f"{arguments.model} {arguments.dtype}, {arguments.threads} threads, {arguments.batch} x {arguments.seq} tokens"
    )
    table = Table("", "tok/s", "ms/step", "ours/it", "1st loss", "1st norm", "last loss", "MiB", title=title)
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['tokens_per_second']:.0f}",
            f"{row['step_ms']:.0f}",
            "" if name == "ours" else f"{row['ours_is_faster_by']:.2f}",
            f"{row['first_loss']:.5f}",
            f"{row['first_grad_norm']:.4f}",
            f"{row['last_loss']:.4f}",
            f"{row['peak_mib']:.0f}",
        )
    Console(width=110).print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"run": title, "contenders": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
