"""Does learned block-sparse attention learn? Associative recall far beyond a local window, at the same density.

    python tools/bench/recall.py --seeds 1 2 3 --json recall.json

The task is multi-query associative recall (MQAR; Zoology, arXiv 2312.04927). A sequence binds keys to values drawn
anew, a key's token right before its value's, and at its end asks for the keys' values in random order, one query a
position. An answer takes two steps: a layer has to see what comes before a value, a later one to find the value by it.
Pairs lie outside the first block, and farther from every query than layers x window of ``local``, so that no window
reaches or relays them.

Each variant is a recipe that differs in ``model.sparse_attention`` alone. Sequences are short at first: on long ones
even dense attention does not find the two steps in minutes on one core. Batches and learning rates are the same, but
nsa has a curriculum of its own, and all but nsa begin with dense attention. Accuracy is that of the largest logit on
sequences of full length not trained on, with the attention of the last step.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megasparse import topology
from megasparse.config import Recipe, parse_recipe
from megasparse.data.loader import Batch
from megasparse.engine import Engine
from megasparse.model import build_model
from megasparse.schedule import learning_rate
from megasparse.topology import Topology

# The task: tokens are a filler, keys and values. Places are those of a sequence of full length.
SEQ, KEYS, VALUES = 1152, 16, 8
FIRST, LAST, QUERIES = 16, 720, 960  # pairs lie in FIRST .. LAST, queries from QUERIES on
VOCAB = 1 + KEYS + VALUES


@dataclass(frozen=True)
class Curriculum:
    """Sequences are short at first."""

    lengths: tuple[tuple[int, float], ...]  # tokens of a sequence, until this share of the steps
    tokens_per_pair: int  # a pair for so many of them, up to KEYS
    queries: int  # where queries begin in the short ones, as a place of a full one


CURRICULUM = Curriculum(((36, 0.2), (144, 0.35), (SEQ, 1.0)), 9, LAST)
# A compressed key of 16 tokens tells few pairs apart: they are as sparse in the short sequences as it can learn from.
OWN_CURRICULUM = {"nsa": Curriculum(((72, 0.25), (144, 0.32), (288, 0.4), (SEQ, 1.0)), 18, QUERIES)}

BLOCK, BLOCKS = 16, 5  # a query sees 5 of up to 72 blocks of 16 keys: 13 % of the causal ones
LAYERS = 2
PHASES = {"dense_start": 0.45}
BUDGET = {"blocks": BLOCKS, "block_size": BLOCK, "local_blocks": 2, "sink_blocks": 0, "ramp": 0.2, **PHASES}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "local": {"selector": "local", "block_size": BLOCK, "local_blocks": BLOCKS, "sink_blocks": 0, **PHASES},
    "pooled": {"selector": "pooled", **BUDGET},
    "gate": {"selector": "gate", "gate_dim": 64, "gate_loss_coefficient": 1.0, **BUDGET},
    # Compressed keys learn while they are needed, so it begins sparse. 2 + 1 blocks and a 16th of the keys: 14 %.
    "nsa": {
        **{"selector": "nsa", "block_size": BLOCK, "blocks": 2, "local_blocks": 1, "sink_blocks": 0},
        **{"window_blocks": 1, "compression_size": 16},
    },
}
EVALUATED = 128  # sequences


def recipe(variant: str, seed: int, steps: int, batch: int) -> Recipe:
    return parse_recipe(
        {
            "name": f"recall-{variant}",
            "data": {"sets": [{"path": "unused"}], "seq_length": SEQ},
            "model": {
                "num_layers": LAYERS,
                "hidden_size": 128,
                "num_attention_heads": 2,
                "num_query_groups": 1,
                "head_dim": 64,
                "ffn_hidden_size": 128,
                "vocab_size": VOCAB,
                "bias": "qkv",
                "qk_norm": "head",  # without it dense attention did not learn the task
                "init_std": 0.04,
                "sparse_attention": VARIANTS[variant],
            },
            "training": {"steps": steps, "global_batch_size": batch, "micro_batch_size": batch, "seed": seed},
            "optimizer": {"lr": 2.5e-3, "weight_decay": 0.0},
            "schedule": {"warmup_tokens": steps // 20 * batch * SEQ, "min_lr_ratio": 0.02},
            "parallel": {"zero_stage": 0},
        }
    )


def draw(generator: torch.Generator, size: int, seq: int, curriculum: Curriculum = CURRICULUM) -> Batch:
    """``size`` sequences of ``seq`` tokens: filler, in it each pair somewhere in a part of its own, filler, queries.
    Answers alone count."""
    first, last = FIRST * seq // SEQ, LAST * seq // SEQ
    queries = QUERIES if seq == SEQ else curriculum.queries * seq // SEQ
    pairs = min(KEYS, seq // curriculum.tokens_per_pair)
    keys = torch.rand(size, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(VALUES, (size, pairs), generator=generator)
    room = (last - first) // pairs
    places = first + torch.arange(pairs) * room + torch.randint(room - 1, (size, pairs), generator=generator)
    asked = torch.randint(pairs, (size, seq - queries), generator=generator)
    tokens = torch.zeros(size, seq, dtype=torch.long)
    labels, scored = tokens.clone(), torch.zeros(size, seq)
    tokens.scatter_(1, places, 1 + keys)
    tokens.scatter_(1, places + 1, 1 + KEYS + values)
    tokens[:, queries:] = 1 + keys.gather(1, asked)
    labels[:, queries:] = 1 + KEYS + values.gather(1, asked)
    scored[:, queries:] = 1.0
    positions = torch.arange(seq).expand(size, seq).contiguous()
    index = torch.arange(size * seq).view(size, seq)
    return Batch(tokens, labels, scored, positions, document_ids=None, token_index=index)


def sequences(seed: int, batch: int, steps: int, curriculum: Curriculum = CURRICULUM) -> Iterator[Batch]:
    """A batch for each of ``steps``, all of batch x SEQ tokens."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        seq = next(seq for seq, share in curriculum.lengths if step < share * steps)
        yield draw(generator, batch * SEQ // seq, seq, curriculum)


def run(variant: str, seed: int, steps: int, batch: int, place: Topology, log: Console) -> dict[str, Any]:
    """Train and test one model."""
    plan = recipe(variant, seed, steps, batch)
    engine = Engine(plan, place, *build_model(plan, place, VOCAB))
    started, density, losses = time.perf_counter(), 1.0, []
    curriculum = OWN_CURRICULUM.get(variant, CURRICULUM)
    for step, sample in enumerate(sequences(seed, batch, steps, curriculum)):
        tokens = (step + 1) * plan.tokens_per_step
        rate = learning_rate(tokens, plan.optimizer, plan.schedule, plan.total_tokens)
        result = engine.train_step([sample], step, rate)
        density = 1.0 if not result.attention else result.attention["block_density"]
        losses.append(result.loss)
        if (step + 1) % 50 == 0:
            loss = statistics.mean(losses[-50:])
            log.print(f"{variant} seed {seed} step {step + 1}: {loss=:.3f} {density=:.3f}")
    return {
        "variant": variant,
        "seed": seed,
        "accuracy": accuracy(engine, seed + 2**31, batch),
        "density": density,  # of the last step
        "seconds": time.perf_counter() - started,
        "tokens": plan.total_tokens,
        "losses": losses,
    }


@torch.no_grad()
def accuracy(engine: Engine, seed: int, size: int) -> float:
    """The share of answers whose logit is the largest of the vocabulary, on EVALUATED sequences of full length."""
    engine.chunks.eval()
    generator, right, asked = torch.Generator().manual_seed(seed), 0.0, 0.0
    for _ in range(EVALUATED // size):
        batch = draw(generator, size, SEQ)
        best = engine.chunks[0](batch.tokens, batch.position_ids, None).argmax(-1)
        right += ((best == batch.labels) * batch.loss_mask).sum().item()
        asked += batch.loss_mask.sum().item()
    return right / asked


def summary(runs: list[dict[str, Any]]) -> dict[str, list[str]]:
    """A row of cells for each variant."""
    rows = {}
    for variant in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == variant]
        accuracies = [100 * run["accuracy"] for run in mine]
        rows[variant] = [
            f"{statistics.mean(run['density'] for run in mine):.3f}",
            f"{statistics.mean(accuracies):.1f}",
            ", ".join(f"{value:.1f}" for value in accuracies),
            f"{statistics.mean(run['seconds'] for run in mine):.0f}",
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console, place, runs = Console(width=110), topology.initialize(), []
    for seed in arguments.seeds:
        for variant in arguments.variants:
            runs.append(run(variant, seed, arguments.steps, arguments.batch, place, console))
            console.print(f"{variant} seed {seed}: accuracy {runs[-1]['accuracy']:.3f}")
            if arguments.json is not None:
                task = {"seq": SEQ, "keys": KEYS, "values": VALUES, "steps": arguments.steps, "batch": arguments.batch}
                arguments.json.write_text(json.dumps({"task": task, "runs": runs}, indent=2) + "\n")
    columns = ["attention", "block density", "accuracy, %", "by seed", "seconds"]
    title = f"{KEYS} pairs in {SEQ} tokens, {arguments.steps} steps of {arguments.batch}; chance {100 / VALUES:.1f} %"
    table = Table(*columns, title=title)
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for variant, cells in summary(runs).items():
        table.add_row(variant, *cells)
        print(f"| {variant} | {' | '.join(cells)} |")
    console.print(table)


if __name__ == "__main__":
    main()
