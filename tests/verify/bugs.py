"""Mistakes of layouts, planted in the production code for one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist

from megasparse import engine
from megasparse.engine import Engine
from megasparse.fragments import Fragment, Fragments
from megasparse.layers import fp8, selectors
from megasparse.layers.router import Router
from megasparse.placement import is_expert


@contextlib.contextmanager
def experts_over_the_wrong_group() -> Iterator[None]:
    """DeepSpeed's ZeRO-1 without contiguous gradients averages expert gradients over the dense group."""
    config = engine.deepspeed_config

    def wrong(*args: Any) -> dict[str, Any]:
        made = config(*args)
        made["zero_optimization"]["contiguous_gradients"] = False
        return made

    with mock.patch.object(engine, "deepspeed_config", wrong):
        yield


@contextlib.contextmanager
def aux_loss_scaled_by_tensor_parallelism() -> Iterator[None]:
    loss = Router._loss

    def wrong(self: Router, *args: Any) -> Any:
        right = loss(self, *args)
        return None if right is None else right * dist.get_world_size(self.group)

    with mock.patch.object(Router, "_loss", wrong):
        yield


@contextlib.contextmanager
def strides_by_the_head_of_the_rank() -> Iterator[None]:
    """Tensor-parallel ranks shift the strided pattern by their own heads' numbers."""
    strided = selectors.strided

    def wrong(grid: Any, q: Any, k: Any, stride: int, first_head: int, all_heads: int) -> Any:
        return strided(grid, q, k, stride, 0, all_heads)

    with mock.patch.object(selectors, "strided", wrong):
        yield


@contextlib.contextmanager
def norm_without_experts_of_later_ranks() -> Iterator[None]:
    """Experts are not marked tensor-parallel: the norm counts them on rank 0 of the tensor-parallel group only."""
    iterate, norm = Fragments.__iter__, Fragments.gradient_norm

    def wrong(self: Fragments) -> float:
        def counted(self: Fragments) -> Iterator[Fragment]:
            return (f for f in iterate(self) if self.topology.tp_rank == 0 or not is_expert(f.weight.tensor))

        with mock.patch.object(Fragments, "__iter__", counted):
            return norm(self)

    with mock.patch.object(Fragments, "gradient_norm", wrong):
        yield


@contextlib.contextmanager
def tied_weight_not_summed() -> Iterator[None]:
    finalize = Engine._finalize_gradients

    def wrong(self: Engine, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(engine.parallel_state, "is_rank_in_embedding_group", return_value=False):
            finalize(self, *args, **kwargs)

    with mock.patch.object(Engine, "_finalize_gradients", wrong):
        yield


@contextlib.contextmanager
def micro_batches_counted_twice() -> Iterator[None]:
    run = Engine._forward_backward

    def wrong(self: Engine, batches: list[Any], scale: float, **kwargs: Any) -> Any:
        return run(self, batches, scale / len(batches), **kwargs)

    with mock.patch.object(Engine, "_forward_backward", wrong):
        yield


@contextlib.contextmanager
def fp8_scales_of_each_rank() -> Iterator[None]:
    """By what it has seen itself."""
    alone = SimpleNamespace(**{**vars(dist), "all_reduce": lambda *_, **__: None})
    with mock.patch.object(fp8, "dist", alone):
        yield


def planted(bug: Callable[[], Any], fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)`` with the bug in the code."""
    with bug():
        return fn(*args)
