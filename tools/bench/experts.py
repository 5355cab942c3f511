"""Forward and backward of our experts on CPU against DeepSpeed's, transformers' and Megatron's, as ratios of time.

    python tools/bench/experts.py --threads 1 --rounds 15

Two tables. "experts": rows already sorted, as DeepSpeed's GroupedExperts takes them. "layer": from the router's choice
to the weighted sum of a token's experts, as transformers' experts do it. In each round all contenders run in turn on
the same routing, drawn anew for the round, as in training; the median of the rounds' ratios counts, so that other load
on the machine weighs on all. Each has a process of its own: in one process they would use, and crowd out, each other's
kernels in oneDNN's cache. A ratio above 1 means that ours is faster. More than one thread needs an idle machine:
threads that wait for one another wait for whatever else runs there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from deepspeed.moe.ep_experts import GroupedExperts
from torch import Tensor
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from megasparse.ops import experts as ops

WARM_UP = 10  # rounds in which oneDNN compiles kernels for the shapes it has not seen
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TABLES = {
    "experts": ("ours", "deepspeed separate", "deepspeed fused", "megatron sequential"),
    "layer": ("ours", "transformers grouped_mm"),
}


@dataclass(frozen=True)
class Shape:
    hidden: int
    ffn: int
    experts: int
    top_k: int
    tokens: int


SHAPES = [
    Shape(256, 256, 16, 2, 2048),
    Shape(256, 512, 16, 2, 4096),
    Shape(256, 512, 16, 2, 8192),
    Shape(256, 256, 64, 8, 2048),
    Shape(512, 1024, 8, 2, 4096),
]


@dataclass(frozen=True)
class Routed:
    """One round's input: the same for every contender."""

    x: Tensor
    experts: Tensor
    weights: Tensor
    rows: Tensor
    order: Tensor
    counts: Tensor


def draw(shape: Shape, dtype: torch.dtype) -> Routed:
    popularity = torch.randn(shape.experts) * 0.5  # loads differ by about half their mean, as early in training
    weights, experts = (torch.randn(shape.tokens, shape.experts) + popularity).softmax(-1).topk(shape.top_k)
    x = torch.randn(shape.tokens, shape.hidden).to(dtype).requires_grad_()
    order, counts = ops.sort_by_expert(experts, shape.experts)
    rows = ops.gather(x, order, shape.top_k).detach().requires_grad_()
    return Routed(x, experts, weights.to(dtype).requires_grad_(), rows, order, counts)


class Contenders:
    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape = shape
        w1, w3 = (torch.randn(shape.experts, shape.ffn, shape.hidden) * 0.02 for _ in range(2))
        w2 = torch.randn(shape.experts, shape.hidden, shape.ffn) * 0.02
        self.w1, self.w2, self.w3 = (w.to(dtype).requires_grad_() for w in (w1, w2, w3))
        self.w13 = [torch.cat(pair).to(dtype).requires_grad_() for pair in zip(w1, w3, strict=True)]
        self.w2_each = [w.to(dtype).requires_grad_() for w in w2]
        self.deepspeed = {impl: self._deepspeed(impl).to(dtype) for impl in ("separate", "fused")}
        config = OlmoeConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = "grouped_mm"
        self.transformers = OlmoeExperts(config).to(dtype)
        weights = {"gate_up_proj": torch.stack(self.w13), "down_proj": self.w2}
        self.transformers.load_state_dict({name: weight.detach() for name, weight in weights.items()})

    def _deepspeed(self, impl: str) -> GroupedExperts:
        shape = self.shape
        module = GroupedExperts(
            shape.hidden, shape.ffn, shape.experts, disable_triton_grouped_mm=True, gate_up_impl=impl
        )
        module.load_state_dict({name: weight.detach() for name, weight in self._named_weights().items()})
        return module

    def _named_weights(self) -> dict[str, Tensor]:
        return {"w1": self.w1, "w2": self.w2, "w3": self.w3}

    def _ours(self, rows: Tensor, counts: Tensor) -> Tensor:
        return ops.grouped_swiglu(rows, counts, self.w1, self.w2, self.w3)

    def _megatron(self, rows: Tensor, counts: Tensor) -> Tensor:
        """megatron.core SequentialMLP: a loop over experts with gate and up in one weight, then a concatenation."""
        outputs = []
        for part, w13, w2 in zip(rows.split(counts.tolist()), self.w13, self.w2_each, strict=True):
            gate, up = F.linear(part, w13).chunk(2, -1)
            outputs.append(F.linear(F.silu(gate) * up, w2))
        return torch.cat(outputs)

    def zero_grad(self) -> None:
        for module in (*self.deepspeed.values(), self.transformers):
            module.zero_grad()
        for weight in (*self._named_weights().values(), *self.w13, *self.w2_each):
            weight.grad = None

    def experts(self) -> dict[str, Callable[[Routed], Tensor]]:
        return {
            "ours": lambda r: self._ours(r.rows, r.counts),
            "deepspeed separate": lambda r: self.deepspeed["separate"](r.rows, r.counts),
            "deepspeed fused": lambda r: self.deepspeed["fused"](r.rows, r.counts),
            "megatron sequential": lambda r: self._megatron(r.rows, r.counts),
        }

    def layer(self) -> dict[str, Callable[[Routed], Tensor]]:
        def ours(r: Routed) -> Tensor:
            order, counts = ops.sort_by_expert(r.experts, self.shape.experts)
            return ops.combine(self._ours(ops.gather(r.x, order, self.shape.top_k), counts), order, r.weights)

        return {"ours": ours, "transformers grouped_mm": lambda r: self.transformers(r.x, r.experts, r.weights)}


def serve(connection: Connection, table: str, name: str, shape: Shape, dtype: torch.dtype, threads: int) -> None:
    """Answer each seed with the seconds of a forward and backward on that round's input, and a part of the output."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    contenders = Contenders(shape, dtype)
    run = (contenders.experts() if table == "experts" else contenders.layer())[name]
    dy = torch.randn(shape.tokens * (shape.top_k if table == "experts" else 1), shape.hidden).to(dtype)
    for seed in iter(connection.recv, None):
        contenders.zero_grad()
        torch.manual_seed(seed)
        routed = draw(shape, dtype)
        start = time.perf_counter()
        y = run(routed)
        y.backward(dy)
        connection.send((time.perf_counter() - start, y[:64].detach().float().tolist()))


def compare(table: str, shape: Shape, dtype: torch.dtype, threads: int, rounds: int) -> None:
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    for name in TABLES[table]:
        connections[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, table, name, shape, dtype, threads), daemon=True).start()
    times: dict[str, list[float]] = {name: [] for name in connections}
    for turn in range(WARM_UP + rounds):
        outputs = {}
        for name, connection in connections.items():
            connection.send(turn)
            seconds, output = connection.recv()
            outputs[name] = torch.tensor(output)
            if turn >= WARM_UP:
                times[name].append(seconds)
        for name, y in outputs.items():
            error = (y - outputs["ours"]).abs().max() / y.abs().max()
            assert error < (1e-4 if dtype == torch.float32 else 3e-2), f"{name} differs from ours by {error:.1e}"
    for connection in connections.values():
        connection.send(None)
    ours = times["ours"]
    flops = 18 * shape.tokens * shape.top_k * shape.hidden * shape.ffn
    median = statistics.median(ours)
    print(f"  {'ours':26}{median * 1e3:9.1f} ms {flops / median / 1e9:7.0f} GFLOP/s")
    for name, values in times.items():
        if name != "ours":
            ratio = statistics.median(theirs / mine for theirs, mine in zip(values, ours, strict=True))
            print(f"  {name:26}{statistics.median(values) * 1e3:9.1f} ms {ratio:7.2f} x ours", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="which of SHAPES")
    arguments = parser.parse_args()
    for name in arguments.dtypes:
        for shape in (SHAPES[i] for i in arguments.shapes):
            for table in TABLES:
                print(f"{table}: {name} {shape}")
                compare(table, shape, DTYPES[name], arguments.threads, arguments.rounds)


if __name__ == "__main__":
    main()
