"""What each selector costs in quality: validation loss on a corpus at equal tokens, and the share of blocks seen.

    python tools/bench/quality.py data/stdlib [--variants dense nsa] [--steps 450] [--jobs 2]

One recipe, one seed, the same batches; only model.sparse_attention differs. About a quarter of the causal key blocks
are seen, as counted in training, all branches of NSA included. Each variant is a process of its own, --jobs at a time;
its run stays in --runs and is not repeated.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from training_runs import metrics_of

SEQ, BATCH, BLOCK = 1024, 4, 16
BUDGET = {"block_size": BLOCK, "local_blocks": 2, "sink_blocks": 1, "blocks": 8, "dense_start": 0.1}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "local": {"selector": "local", "block_size": BLOCK, "local_blocks": 7, "sink_blocks": 1, "dense_start": 0.1},
    "strided": {**{"selector": "strided", "block_size": BLOCK, "stride": 7}, **{"local_blocks": 3, "dense_start": 0.1}},
    "pooled": {"selector": "pooled", **BUDGET},
    "gate": {"selector": "gate", **BUDGET, "gate_dim": 32},
    "nsa": {"selector": "nsa", **BUDGET, "blocks": 4, "local_blocks": 1, "window_blocks": 2},
}


def recipe(data: Path, sparse: dict[str, Any] | None, steps: int) -> dict[str, Any]:
    """Six layers, 16 experts top-2: the model of examples/pretrain.yaml on sequences four times as long."""
    return {
        "name": "quality",
        "data": {"sets": [{"path": str(data)}], "seq_length": SEQ},
        "model": {
            **{"num_layers": 6, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2},
            **{"qk_norm": "head", "tie_embeddings": True, "init_std": 0.06, "sparse_attention": sparse},
            "moe": {"num_experts": 16, "top_k": 2, "ffn_hidden_size": 256, "bias_update_rate": 0.005},
        },
        "optimizer": {"lr": 2e-3},
        "schedule": {
            **{"type": "wsd", "warmup_tokens": 50 * SEQ * BATCH, "min_lr_ratio": 0.0},
            "decay_tokens": steps * SEQ * BATCH // 3,
        },
        "training": {
            **{"steps": steps, "global_batch_size": BATCH, "micro_batch_size": BATCH // 2, "precision": "bf16"},
            **{"eval_interval": steps, "eval_tokens": 400_000, "save_interval": steps},
        },
        "parallel": {"zero_stage": 1},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the CPUs")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    options = parser.parse_args()
    threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)

    def run(name: str) -> list[dict[str, Any]]:
        raw = recipe(options.data.resolve(), VARIANTS[name], options.steps)
        steps = metrics_of(options.runs / name, raw, threads)
        print(f"{name}: {steps[-1]['validation_loss']:.4f} nats/token", file=sys.stderr)
        return steps

    with ThreadPoolExecutor(options.jobs) as pool:
        runs = dict(zip(options.variants, pool.map(run, options.variants), strict=True))
    table = Table("selector", "validation loss, nats/token", "to dense", "blocks seen", "dense attention in them")
    for name, steps in runs.items():
        loss, last = steps[-1]["validation_loss"], steps[-1]
        to_dense = f"{loss / runs['dense'][-1]['validation_loss'] - 1:+.2%}" if "dense" in runs else ""
        table.add_row(
            *(name, f"{loss:.4f}", to_dense),
            *(f"{last.get(key, 1.0):.3f}" for key in ("block_density", "attention_recall")),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
