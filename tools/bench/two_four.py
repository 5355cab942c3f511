"""2:4 weights on CPU: the search for masks against the 90-pattern product, and what each method adds to a step.

    python tools/bench/two_four.py                       # masks of 4096 x 4096, and the steps of two models
    python tools/bench/two_four.py --size 2048 --steps 0 # masks alone

The peer is 2by4's search (arXiv 2404.01847): |w| by blocks, [blocks, 16], times the 90 patterns, [16, 90], argmax. All
contenders take their turns in one process, so that other load weighs on all; medians count. A step's overhead is that
of the steps without new masks, and of one with, in the proportion of the refresh interval.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megasparse import platform, topology
from megasparse.config import Recipe, parse_recipe
from megasparse.data.loader import Batch, make_batch
from megasparse.engine import Engine
from megasparse.model import build_model
from megasparse.ops.two_four import mvue_24, naive, prune_24, soft_threshold_24, transposable_mask

INTERVAL = 40  # steps between masks
VOCAB = 4096
STEPS = 10_000  # of the run, of which the first few are taken
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "STE": {"method": "ste", "refresh_interval": INTERVAL},
    "SR-STE": {"method": "sr_ste", "mask": "row", "decay": 1e-4},
    "transposable SR-STE": {"method": "sr_ste", "decay": 1e-4},
    "S-STE": {"method": "s_ste"},
    "S-STE + MVUE": {"method": "s_ste", "mvue": "exact"},
    "ASP": {"method": "asp", "dense_start": 1e-6},
    "AST": {"method": "ast", "decay": 1e-4, "score": "wanda", "refresh_interval": INTERVAL},
    "AST + SLoRB": {"method": "ast", "decay": 1e-4, "score": "wanda", "boost": 16, "refresh_interval": INTERVAL},
    "MdGf": {"method": "mdgf", "ramp": 0.5, "refresh_interval": INTERVAL},
}
MODELS: dict[str, dict[str, Any]] = {
    "dense, GPT-2-like": {"ffn_hidden_size": 1536, "bias": "all", "activation": "gelu_tanh"},
    "MoE, 16 experts top-2": {"moe": {"num_experts": 16, "top_k": 2, "ffn_hidden_size": 384}},
}


def ninety_patterns(w: Tensor) -> Tensor:
    """2by4's search for the best transposable mask, bool [rows, columns]."""
    rows, columns = w.shape
    patterns = naive.transposable_patterns().flatten(1)
    blocks = w.abs().view(rows // 4, 4, columns // 4, 4).transpose(1, 2).reshape(-1, 16)
    best = (blocks @ patterns.t().to(w.dtype)).argmax(1)
    return patterns[best].view(rows // 4, columns // 4, 4, 4).transpose(1, 2).reshape(rows, columns)


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "90 patterns": ninety_patterns,
    "transposable_mask exact": transposable_mask,
    "transposable_mask greedy": lambda w: transposable_mask(w, "greedy"),
    "prune_24": prune_24,
    "soft_threshold_24": soft_threshold_24,
    "mvue_24 exact": lambda w: mvue_24(w, 0, seed=1),
    "mvue_24 approx": lambda w: mvue_24(w, 0, "approx", seed=1),
}


def masks(size: int, repeats: int, console: Console) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(size, size).to(dtype)
        kept = [(w.abs() * mask).double().sum() for mask in (transposable_mask(w), ninety_patterns(w))]
        assert kept[0] >= kept[1] * (1 - 1e-6), "the search is exact"
        seconds = in_turn({name: partial(call, w) for name, call in OPERATIONS.items()}, repeats)
        table = Table(title=f"{size} x {size}, {dtype}, {torch.get_num_threads()} threads")
        for column in ("operation", "ms", "as fast as 90 patterns"):
            table.add_column(column, justify="left" if column == "operation" else "right")
        for name, values in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(seconds["90 patterns"], values, strict=True))
            table.add_row(name, f"{1e3 * statistics.median(values):.1f}", f"{ratio:.1f}x")
        console.print(table)


def recipe_of(model: dict[str, Any], weights: dict[str, Any] | None) -> Recipe:
    shape = {"num_layers": 4, "hidden_size": 384, "num_attention_heads": 6, "vocab_size": VOCAB, "tie_embeddings": True}
    return parse_recipe(
        {
            "name": "two_four",
            "data": {"sets": [{"path": "unused"}], "seq_length": 256},
            "model": {**shape, **model},
            "training": {"steps": STEPS, "global_batch_size": 16, "micro_batch_size": 8, "precision": "bf16"},
            "sparsity": {"weights": weights},
        }
    )


def batches_of(recipe: Recipe, step: int) -> list[Batch]:
    random, training, seq = np.random.default_rng(step), recipe.training, recipe.data.seq_length
    made = []
    for number in range(0, training.global_batch_size, training.micro_batch_size):
        ids = random.integers(0, VOCAB, (training.micro_batch_size, seq + 1))
        scored = np.ones((training.micro_batch_size, seq), dtype=bool)
        made.append(make_batch(ids[:, :-1], ids[:, 1:], scored, number, VOCAB - 1, recipe.data))
    return made


def steps(name: str, repeats: int, place: topology.Topology, console: Console) -> None:
    engines = {}
    for method, weights in METHODS.items():
        recipe = recipe_of(MODELS[name], weights)
        engines[method] = Engine(recipe, place, *build_model(recipe, place, VOCAB))
    seconds: dict[str, list[float]] = {method: [] for method in engines}  # of steps without new masks
    renewed: dict[str, list[float]] = {method: [] for method in engines}  # and with
    recipe = engines["dense"].recipe
    numbers = [
        step for turn in range(repeats) for step in (INTERVAL * turn, *range(INTERVAL * turn + 1, INTERVAL * turn + 4))
    ]
    for turn, step in enumerate(numbers):
        batches = batches_of(recipe, step)
        for method, engine in engines.items():
            start = time.perf_counter()
            engine.train_step(batches, step, 1e-4)
            if turn:
                (seconds if step % INTERVAL else renewed)[method].append(time.perf_counter() - start)
    table = Table(title=f"A step: {name}, {recipe.tokens_per_step} tokens, new masks every {INTERVAL} steps")
    for column in ("method", "ms", "with new masks, ms", "over dense"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in engines:
        plain, new = (statistics.median(values[method]) for values in (seconds, renewed))
        ratios = [
            statistics.median(a / b for a, b in zip(values[method], values["dense"], strict=True))
            for values in (seconds, renewed)
        ]
        ratio = ((INTERVAL - 1) * ratios[0] + ratios[1]) / INTERVAL
        table.add_row(method, f"{1e3 * plain:.0f}", f"{1e3 * new:.0f}", f"{100 * (ratio - 1):+.1f} %")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--steps", type=int, default=6, help="times that masks are made anew, with three steps after each"
    )
    arguments = parser.parse_args()
    console = Console(width=100)
    torch.manual_seed(0)
    platform.activate()
    masks(arguments.size, arguments.repeats, console)
    if arguments.steps:
        place = topology.initialize()
        for name in MODELS:
            steps(name, arguments.steps, place, console)


if __name__ == "__main__":
    main()
