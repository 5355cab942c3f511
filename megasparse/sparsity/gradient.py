"""The weight's gradient from a 2:4 estimate of the output's (MVUE, arXiv 2203.10991; 2by4, arXiv 2404.01847)."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megasparse.config import WeightSparsity
from megasparse.ops.two_four import mvue_24

if TYPE_CHECKING:
    from megasparse.layers.step import StepState

MASK64 = 2**64 - 1


@dataclass(frozen=True)
class GradientEstimate:
    """Of one layer: at most two of every four consecutive tokens of a sequence count, for each output feature.

    A draw depends on the run's seed, the step, the layer, the sequence, the place of the four tokens in it and the
    feature's number in the whole layer: it is the same in every layout and where a layer is recomputed.
    """

    method: Literal["exact", "approx"]
    state: StepState
    key: int  # of the layer
    slabs: list[tuple[int, int, int]]  # features of this process: first here, how many, first in the whole layer

    @staticmethod
    def of(
        name: str, weight: Any, sparsity: WeightSparsity, state: StepState, tp_group: Any
    ) -> GradientEstimate | None:
        """For a layer whose output features are split over ``tp_group``, None: not split; None without an estimate."""
        if sparsity.mvue == "none":
            return None
        ranks, rank = (1, 0) if tp_group is None else (dist.get_world_size(tp_group), dist.get_rank(tp_group))
        parts = weight.partition_stride if tp_group is not None else 1
        size = len(weight) // parts
        slabs = [(i * size, size, (i * ranks + rank) * size) for i in range(parts)]
        key = int.from_bytes(hashlib.sha256(f"{state.seed}:{name}".encode()).digest()[:8], "big")
        return GradientEstimate(sparsity.mvue, state, key, slabs)

    def of_these_tokens(self) -> Callable[[Tensor], Tensor]:
        """What backward, which other tokens may come before, calls with the gradient of these tokens' outputs."""
        state = self.state
        assert state.token_index is not None
        step = _mixed(self.key ^ state.step)
        seeds = [
            _mixed(step ^ number // state.seq_length) for number in state.token_index[:, 0].tolist()
        ]  # device waits

        def estimate(dy: Tensor) -> Tensor:
            """[seq, batch, features] -> the same."""
            found = torch.empty_like(dy)
            for (tokens, first_four), (row, seed), (first, size, whole) in itertools.product(
                self._runs(), enumerate(seeds), self.slabs
            ):
                part = tokens, row, slice(first, first + size)
                found[part] = mvue_24(dy[part], 0, self.method, seed=seed, start=(first_four, whole))
            return found

        return estimate

    def _runs(self) -> list[tuple[slice, int]]:
        """Tokens of this process that follow each other in a sequence, and which four of the sequence they begin with:
        all of them, or the two parts of a context-parallel rank (data.loader.zigzag)."""
        rank, ranks, seq = self.state.context_rank, self.state.context_parallel, self.state.seq_length
        if ranks == 1:
            return [(slice(0, seq), 0)]
        size = seq // (2 * ranks)
        return [
            (slice(i * size, (i + 1) * size), part * size // 4) for i, part in enumerate((rank, 2 * ranks - 1 - rank))
        ]


def _mixed(x: int) -> int:
    """The finalizer of splitmix64 (Steele et al. 2014): neighbours become unlike."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK64
    return x ^ x >> 31
