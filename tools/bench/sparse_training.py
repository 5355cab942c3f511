"""What 2:4 weights cost in quality: validation loss at equal tokens of each method, over seeds; and flip rates.

    python tools/bench/sparse_training.py data/stdlib [--models gpt2 moe] [--variants dense S-STE] [--seeds 1 2 3]

A model of each kind, the same batches for all variants of a seed; masks are made every 10 steps. The
last rows go on from the dense run's end with new tokens, half as many again: dense itself, and AST, whose teacher is
that end, or the end of what dense becomes of it. Each run is a
process of its own, --jobs at a time; it stays in --runs and is not repeated, so the table can be made bit by bit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from training_runs import metrics_of

SEQ, BATCH, MASKS = 256, 8, 10
DECAY = {"gpt2": 3e-4, "moe": 1e-4}  # of SR-STE: flip rates 0.76 and 0.66 of dense, by tools/find_decay.py
AST_DECAY = 1e-4
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        **{"num_attention_heads": 4, "normalization": "LayerNorm", "activation": "gelu_tanh", "bias": "all"},
        **{"position_embedding": "learned", "ffn_hidden_size": 512},
    },
    "moe": {
        **{"num_attention_heads": 4, "num_query_groups": 2, "qk_norm": "head"},
        "moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 192, "bias_update_rate": 0.005},
    },
}
EVERY = {"targets": ["."], "refresh_interval": MASKS}
TRANSPOSABLE = {"method": "sr_ste", **EVERY}
AST = {"method": "ast", "decay": AST_DECAY, "ramp": 0.25, "score": "wanda", **EVERY}
TEACHER = {"temperature": 2.0, "weight": 0.67}  # AST's
FP8 = {"recipe": "current"}  # per tensor, as S-STE's simulation
FROM_SCRATCH: dict[str, dict[str, Any]] = {
    "dense": {"weights": {"method": "dense", "mask": "transposable", **EVERY}},
    "dense + FP8": {"weights": {"method": "dense", **EVERY}, "fp8": FP8},
    "STE": {"weights": {"method": "ste", **EVERY}},
    "SR-STE": {"weights": {"method": "sr_ste", "mask": "row", **EVERY}},
    "transposable SR-STE": {"weights": TRANSPOSABLE},
    "transposable SR-STE, dense tail": {"weights": {**TRANSPOSABLE, "dense_end": 0.17}},
    "S-STE": {"weights": {"method": "s_ste", **EVERY}},
    "S-STE + MVUE": {"weights": {"method": "s_ste", "mvue": "exact", **EVERY}},
    "S-STE + FP8": {"weights": {"method": "s_ste", **EVERY}, "fp8": FP8},
}
FROM_DENSE: dict[str, dict[str, Any]] = {
    "dense, more tokens": {"weights": {"method": "dense", "mask": "transposable", **EVERY}},
    "AST": {"weights": AST},
    "AST + SLoRB": {"weights": {**AST, "boost": 16}},
    "AST + KD": {"weights": AST, "teacher": TEACHER},
    "AST + SLoRB + KD": {"weights": {**AST, "boost": 16}, "teacher": TEACHER},
}
LONGER_TEACHER: dict[str, dict[str, Any]] = {
    "AST + KD of the longer run": {"weights": AST, "teacher": TEACHER},
    "AST + SLoRB + KD of the longer run": {"weights": {**AST, "boost": 16}, "teacher": TEACHER},
}
VARIANTS = FROM_SCRATCH | FROM_DENSE | LONGER_TEACHER


def recipe(data: Path, model: str, variant: str, seed: int, steps: int, rate: float, runs: Path) -> dict[str, Any]:
    """Four layers of 128; ``runs``: where the model's runs of this seed are, which the last variants go on from."""
    parts = VARIANTS[variant]
    weights = dict(parts["weights"])
    if weights["method"] == "sr_ste":
        weights["decay"] = DECAY[model]
    training: dict[str, Any] = {"fp8": parts["fp8"]} if "fp8" in parts else {}
    if variant not in FROM_SCRATCH:
        dense = runs / folder("dense") / f"checkpoints/step_{steps}"
        steps, rate = steps // 2, rate / 2
        longer = runs / folder("dense, more tokens") / f"checkpoints/step_{steps}"
        training["initial_checkpoint"] = str(dense)
        seed += 1000  # other batches than the dense run's
        if "teacher" in parts:
            training["teacher"] = {
                "checkpoint": str(longer if variant in LONGER_TEACHER else dense),
                **parts["teacher"],
            }
    shape = {"num_layers": 4, "hidden_size": 128, "tie_embeddings": True, "init_std": 0.06}
    return {
        "name": "sparse_training",
        "data": {"sets": [{"path": str(data)}], "seq_length": SEQ},
        "model": {**shape, **MODELS[model]},
        "sparsity": {"weights": weights},
        "optimizer": {"lr": rate},
        "schedule": {"type": "cosine", "warmup_tokens": steps // 20 * SEQ * BATCH, "min_lr_ratio": 0.05},
        "training": {
            **{"steps": steps, "global_batch_size": BATCH, "micro_batch_size": BATCH, "precision": "bf16"},
            **{"eval_stride": SEQ, "seed": seed, **training},
        },
        "logging": {"log_interval": 50, "wandb": "disabled", "tensorboard": False},
    }


def folder(variant: str) -> str:
    return variant.replace(" ", "_")


Runs = dict[str, list[list[dict[str, Any]]]]  # by variant, of each seed, of each step


def show(model: str, runs: Runs) -> Table:
    table = Table("method", "validation loss, nats/token", "spread", "to dense", "flips at the end", title=model)
    for name, seeds in runs.items():
        losses = [steps[-1]["validation_loss"] for steps in seeds]
        other = "dense" if name in FROM_SCRATCH else "dense, more tokens"
        pairs = zip(losses, (steps[-1]["validation_loss"] for steps in runs.get(other, [])), strict=False)
        differences = [ours / dense - 1 for ours, dense in pairs]
        flips = [[record["flip_rate"] for record in steps if "flip_rate" in record] for steps in seeds]
        table.add_row(
            *(name, f"{statistics.mean(losses):.4f}"),
            f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "",
            f"{statistics.mean(differences):+.2%}" if differences else "",
            f"{statistics.mean(rates[-1] for rates in flips):.2%}" if all(flips) else "",
        )
    return table


def plot(model: str, runs: Runs, path: Path) -> None:
    """Flip rates of the first seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, seeds in runs.items():
        points = [(record["step"], record["flip_rate"]) for record in seeds[0] if "flip_rate" in record]
        if points and name in FROM_SCRATCH:
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2, color="black" if name == "dense" else None)
    axis.set(xlabel="step", ylabel=f"masks flipped in {MASKS} steps", title=model, yscale="log")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3, help="the largest learning rate; half of it after dense")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the CPUs")
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse_training"))
    options = parser.parse_args()
    threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)

    suffix = "" if options.lr == parser.get_default("lr") else f"-{options.lr:g}"

    def run(model: str, variant: str, seed: int) -> list[dict[str, Any]]:
        runs = (options.runs / f"{model}-{options.steps}{suffix}" / str(seed)).resolve()
        raw = recipe(options.data.resolve(), model, variant, seed, options.steps, options.lr, runs)
        steps = metrics_of(runs / folder(variant), raw, threads)
        print(f"{model}, {variant}, seed {seed}: {steps[-1]['validation_loss']:.4f} nats/token", file=sys.stderr)
        return steps

    names = [name for name in VARIANTS if name in options.variants]
    found: dict[str, Runs] = {model: {} for model in options.models}
    with ThreadPoolExecutor(options.jobs) as pool:
        for group in (FROM_SCRATCH, FROM_DENSE, LONGER_TEACHER):  # each needs the checkpoints of those before
            futures = {
                (model, name, seed): pool.submit(run, model, name, seed)
                for seed in options.seeds
                for model in options.models
                for name in names
                if name in group
            }
            for (model, name, _), future in futures.items():
                found[model].setdefault(name, []).append(future.result())
    for model, runs in found.items():
        Console(width=110).print(show(model, runs))
        plot(model, runs, options.runs / f"{model}-{options.steps}{suffix}" / "flips.png")


if __name__ == "__main__":
    main()
