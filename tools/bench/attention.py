"""Block-sparse attention on CPU against torch's scaled_dot_product_attention, forward and backward, as ratios of time.

    python tools/bench/attention.py --threads 2 --seq 16384 32768
    python tools/bench/attention.py --memory

Batch 1, 8 query and 2 K/V heads of 64. Lists are drawn at random among the blocks that causality allows, the own one
always in them. Both take turns in every round on the same tensors; the median of the rounds' ratios counts. "density"
is the share of the causal pairs of blocks that are listed; 1 / density is the most that skipping can give.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megasparse.ops.block_sparse import BlockMask, block_sparse_attention

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRANULARITIES = {"query blocks of 128": (128, 128), "single queries": (64, 1)}  # block_size, query_block_size


def tensors(seq: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the output's gradient."""
    q, k, v = (torch.randn(1, seq, heads, HEAD_DIM).to(dtype).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v, torch.randn(1, seq, HEADS, HEAD_DIM).to(dtype)


def random_mask(seq: int, density: float, block: int, query_block: int) -> BlockMask:
    """As many blocks a query as give the density, but no more than there are; the own one among them."""
    blocks = seq // block
    own = torch.arange(seq // query_block) * query_block // block
    per_query = _per_query(own + 1, density)
    index = torch.empty(1, KV_HEADS, len(own), per_query, dtype=torch.long)
    for start in range(0, len(own), 1024):  # not all of [queries, blocks] at once
        part = own[start : start + 1024]
        score = torch.rand(1, KV_HEADS, len(part), blocks).masked_fill(torch.arange(blocks) > part.unsqueeze(1), -1.0)
        score.scatter_(-1, part.view(1, 1, -1, 1).expand(1, KV_HEADS, -1, 1), 2.0)
        index[:, :, start : start + 1024] = score.topk(per_query).indices
    return BlockMask.from_index(index, index <= own.view(1, 1, -1, 1), blocks, block, query_block)


def _per_query(available: Tensor, density: float) -> int:
    """The fewest blocks a query for which the sum of min(blocks, available) is at least ``density`` of all pairs."""
    n = 1
    while int(available.clamp(max=n).sum()) < density * int(available.sum()):
        n += 1
    return n


def seconds(run: Callable[[], Tensor], gradient: Tensor) -> float:
    start = time.perf_counter()
    run().backward(gradient)
    return time.perf_counter() - start


def compare(seq: int, dtype: str, density: float, granularity: str, rounds: int) -> list[str]:
    q, k, v, gradient = tensors(seq, DTYPES[dtype])
    mask = random_mask(seq, density, *GRANULARITIES[granularity])
    q_, k_, v_ = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v))

    def ours() -> Tensor:
        output = block_sparse_attention(q, k, v, mask)
        assert isinstance(output, Tensor)
        return output

    def torchs() -> Tensor:
        return F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=True)

    if density == 1.0:  # the same result
        difference = (ours() - torchs().transpose(1, 2)).abs().max().item()
        assert difference < (1e-5 if dtype == "fp32" else 2e-2), f"outputs differ by {difference}"
    else:
        ours()  # compiles
    turned = gradient.transpose(1, 2).contiguous()
    times = [(seconds(ours, gradient), seconds(torchs, turned)) for _ in range(rounds)]
    ratio = statistics.median(b / a for a, b in times)
    actual = mask.density(causal=True)
    return [str(seq), dtype, granularity, f"{actual:.3f}", f"{1 / actual:.1f}", f"{ratio:.2f}"]


def peak(seq: int, blocks: int, granularity: str) -> int:
    """MiB that forward and backward in bf16 add to a process's memory at its height."""
    block, query_block = GRANULARITIES[granularity]
    torch.set_num_threads(2)
    q, k, v, gradient = tensors(256, torch.bfloat16)
    block_sparse_attention(q, k, v, random_mask(256, 1.0, block, query_block)).backward(gradient)  # type: ignore[union-attr]
    q, k, v, gradient = tensors(seq, torch.bfloat16)
    own = torch.arange(seq // query_block).view(1, 1, -1, 1).expand(1, KV_HEADS, -1, 1) * query_block // block
    index = own - torch.arange(blocks)
    mask = BlockMask.from_index(index, index >= 0, seq // block, block, query_block)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    block_sparse_attention(q, k, v, mask).backward(gradient)  # type: ignore[union-attr]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seq", type=int, nargs="+", default=[16384])
    parser.add_argument("--density", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="peak memory at 16 blocks a query instead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.memory:
        table = Table("seq", *[f"{name}, MiB" for name in GRANULARITIES])
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for seq in (8192, 16384, 32768, 65536):
                table.add_row(str(seq), *[str(pool.apply(peak, (seq, 16, name))) for name in GRANULARITIES])
    else:
        table = Table("seq", "type", "lists of", "density", "1 / density", "torch / ours")
        for seq in arguments.seq:
            for density in arguments.density:
                for granularity in GRANULARITIES:
                    if density == 1.0 and GRANULARITIES[granularity][1] == 1:
                        continue  # a list of all blocks for each query
                    for dtype in DTYPES:
                        table.add_row(*compare(seq, dtype, density, granularity, arguments.rounds))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
