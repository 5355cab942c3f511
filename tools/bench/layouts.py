"""What each layout sends in a training step: messages and bytes, beside the least that the layout must send.

    python tools/bench/layouts.py tp2 tp2+sp pp2 cp2 ep2 dp2 tp2pp2ep2

One optimizer step of the same small model in every layout, on CPU processes of this machine; every collective of every
rank is counted. Bytes are those a ring sends, summed over ranks: all-reduce 2 (n - 1) / n of the tensor a rank,
all-gather and reduce-scatter (n - 1) / n of the whole tensor, all-to-all what is for the others, send all of it. The
least is the same account of the tensors that the layout has to move (``least_bytes``), each once. It leaves out losses,
norms and counts of tokens, which are a message each but few bytes.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megasparse import topology
from megasparse.config import Recipe, parse_recipe
from megasparse.data.loader import Batch
from megasparse.layout import Layout, check_layout
from megasparse.processes import Workers

DEFAULT = "tp2 tp2+sp pp2 pp2vp2 cp2 ep2 dp2+zero0 dp2 dp2+zero2 ep2dp4 tp2ep2 tp2ep4 cp2ep2 tp2pp2ep2 tp2pp2ep2+sp"
VOCAB, BYTES = 512, 4  # of a float32


def recipe_of(layout: Layout) -> Recipe:
    """Two dense and two MoE layers, 4 micro-batches of 128 tokens in a global batch of 8 sequences."""
    return parse_recipe(
        {
            "name": "layouts",
            "data": {"sets": [{"path": "unused"}], "seq_length": 64},
            "model": {
                "num_layers": 4,
                "hidden_size": 128,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 256,
                "vocab_size": VOCAB,
                "moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 128, "layers": 2},
            },
            "training": {"steps": 1, "global_batch_size": 16, "micro_batch_size": 2},
            "parallel": layout.parallel(),
        }
    )


class Counter(TorchDispatchMode):
    """Messages this rank sends, and their bytes, while it is the active mode."""

    def __init__(self) -> None:
        super().__init__()
        self.messages, self.bytes = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sent = sent_bytes(func._schema.name.removeprefix("c10d::"), args)
            self.messages += sent > 0
            self.bytes += sent
        return func(*args, **(kwargs or {}))


def sent_bytes(name: str, args: Any) -> float:
    """Bytes this rank sends in one call of torch's collective, by a ring."""
    if name in ("recv_", "barrier", "monitored_barrier_"):
        return 0.0
    boxed = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
    group = dist.ProcessGroup.unbox(boxed)
    n = group.size()
    if n == 1:
        return 0.0
    match name:
        case "allreduce_" | "allreduce_coalesced_":
            return 2 * (n - 1) / n * size(args[0])
        case "_allgather_base_":  # output, input
            return (n - 1) * size(args[1])
        case "allgather_" | "allgather_into_tensor_coalesced_":  # outputs, inputs
            return (n - 1) * size(args[1])
        case "_reduce_scatter_base_" | "reduce_scatter_" | "reduce_":
            return (n - 1) / n * size(args[1] if name != "reduce_" else args[0])
        case "broadcast_":
            return (n - 1) / n * size(args[0])
        case "alltoall_base_":  # output, input, group, output splits, input splits
            splits = args[4] or [args[1].shape[0] // n] * n
            rows = max(args[1].shape[0], 1)
            return size(args[1]) * (1 - splits[group.rank()] / rows)
        case "send":
            return size(args[0])
    raise AssertionError(f"{name} is not counted yet")


def size(tensors: Any) -> float:
    """Bytes of a tensor or of lists of them."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(size(t) for t in tensors)


def measure(raw: dict[str, Any]) -> tuple[int, float]:
    """(messages, bytes) this rank sends in the second of two steps."""
    from megasparse.engine import Engine
    from megasparse.layers import attention
    from megasparse.model import build_model

    recipe = parse_recipe(raw)
    place = topology.initialize(check_layout(recipe, int(os.environ["WORLD_SIZE"])))
    engine = Engine(recipe, place, *build_model(recipe, place, VOCAB))
    engine.train_step(list(batches(recipe, 0, place)), 0, 1e-3)
    counter = Counter()
    # torch's lower-right mask does not go through a dispatch mode: the same mask, written out.
    plain = mock.patch.object(attention, "causal_lower_right", lambda q, k: torch.ones(q, k).tril(k - q).bool())
    with plain, counter:
        engine.train_step(list(batches(recipe, 1, place)), 1, 1e-3)
    return counter.messages, counter.bytes


def batches(recipe: Recipe, step: int, place: topology.Topology) -> Iterator[Batch]:
    """This rank's micro-batches of random tokens."""
    rows, seq = recipe.training.micro_batch_size, recipe.data.seq_length
    count = recipe.training.global_batch_size // (rows * place.dp)
    for j in range(place.dp_rank * count, (place.dp_rank + 1) * count):
        number = step * recipe.training.global_batch_size + j * rows + torch.arange(rows)[:, None]
        ids = torch.randint(0, VOCAB, (rows, seq), generator=torch.Generator().manual_seed(int(number[0])))
        position = torch.arange(seq).expand(rows, seq).contiguous()
        yield Batch(ids, ids.roll(-1, 1), torch.ones(rows, seq), position, None, number * seq + position)


def least_bytes(recipe: Recipe, layout: Layout) -> float:
    """The least that all ranks together must send in a step, in rings of (n - 1) / n, float32.

    tensor: for each layer's attention and dense MLP an all-reduce of the activations in forward and one in backward
    (with sequence parallelism a gather and a scatter, as many bytes), for the embedding one, for the output layer one
    (its gradient); for a mixture of experts, whose tokens are split, a gather in each direction (none with sequence
    parallelism). pipeline: activations and their gradients across each border of stages. context: keys and values
    gathered, their gradients scattered. expert: the routed copies' rows out and back, in both directions. data and
    context: gradients scattered over the replicas, weights gathered. A tied embedding is not in this model.
    """
    model, moe = recipe.model, recipe.model.moe
    assert moe is not None
    tp, pp, cp, dp, ep = layout.tp, layout.pp, layout.cp, layout.dp, layout.ep
    micro_batches = recipe.training.global_batch_size // recipe.training.micro_batch_size
    tokens = recipe.training.micro_batch_size * recipe.data.seq_length
    activations = tokens * model.hidden_size * BYTES  # of a micro-batch, over all context ranks
    flags = model.moe_layers
    dense = flags.count(False)

    def ring(n: int) -> int:  # what a whole ring sends to gather or to scatter one tensor, over the tensor
        return n - 1

    blocks = len(flags) + dense  # attention and dense MLP
    if (
        layout.sequence_parallel
    ):  # two gathers and two scatters a block; the embedding's scatter and gather, the output's
        tensor = ring(tp) * activations * (4 * blocks + 4)
    else:  # two all-reduces a block, one of the embedding, one of the output layer; two gathers a mixture of experts
        tensor = ring(tp) * activations * (4 * blocks + 4 + 2 * flags.count(True))
    borders = pp * layout.vp - 1
    pipeline = borders * 2 * activations * (1 if layout.sequence_parallel else tp)
    context = 2 * ring(cp) * len(flags) * 2 * tokens * model.kv_heads * model.head_size * BYTES
    expert = flags.count(True) * 4 * (ep - 1) / ep * activations * moe.top_k
    per_micro_batch = tensor + pipeline + context + expert

    attention = model.hidden_size * model.head_size * (2 * model.num_attention_heads + 2 * model.kv_heads)
    mlp = 3 * model.hidden_size * model.ffn_size
    split = len(flags) * attention + dense * mlp + 2 * VOCAB * model.hidden_size  # over tensor parallelism
    whole = (2 * len(flags) + 1) * model.hidden_size + flags.count(True) * moe.num_experts * model.hidden_size
    experts = flags.count(True) * moe.num_experts * 3 * model.hidden_size * moe.ffn_hidden_size
    copies = tp * cp * dp // ep
    weights = 2 * BYTES * (ring(dp * cp) * (split + whole * tp) + ring(copies) * experts)
    return micro_batches * per_micro_batch + weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", default=DEFAULT.split())
    table = Table("layout", "ranks", "messages a rank", "bytes a rank", "least", "sent / least")
    with Workers() as workers:
        for text in parser.parse_args().layouts:
            layout = Layout.parse(text)
            recipe = recipe_of(layout)
            check_layout(recipe, layout.world_size)
            ranks = workers.run(measure, layout.world_size, recipe.model_dump(mode="json"))
            messages = sum(count for count, _ in ranks) / len(ranks)
            sent = sum(count for _, count in ranks) / len(ranks)
            least = least_bytes(recipe, layout) / len(ranks)
            ratio = f"{sent / least:.2f}" if least else "-"
            table.add_row(
                str(layout), str(len(ranks)), f"{messages:.0f}", f"{math.ceil(sent):,}", f"{math.ceil(least):,}", ratio
            )
    Console().print(table)


if __name__ == "__main__":
    main()
