"""DeepSpeed's two profilers: the operations of a forward pass, and the messages that go through DeepSpeed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn as nn

from megasparse.config import Recipe


@contextlib.contextmanager
def flops_of_forward(recipe: Recipe, chunks: nn.ModuleList, step: int, rank: int) -> Iterator[None]:
    """Within it, where ``step`` (from 0) is the first process's to be profiled, forward passes are counted and timed;
    then what was found is printed, or written to flops_profiler.output_file."""
    wanted = recipe.parallel.deepspeed.flops_profiler
    if not wanted.enabled or rank != 0 or step + 1 != wanted.profile_step:
        yield
        return
    from deepspeed.profiling.flops_profiler.profiler import FlopsProfiler

    profiler = FlopsProfiler(chunks)
    profiler.start_profile()
    try:
        yield
        profiler.stop_profile()
        profiler.print_model_profile(
            profile_step=wanted.profile_step,
            module_depth=wanted.module_depth,
            top_modules=wanted.top_modules,
            detailed=wanted.detailed,
            output_file=None if wanted.output_file is None else str(wanted.output_file),
        )
    finally:
        profiler.end_profile()


def log_messages(recipe: Recipe) -> None:
    """Let DeepSpeed log its messages from now on, or no more: it keeps this for the process, whatever its engine."""
    from deepspeed import comm

    wanted = recipe.parallel.deepspeed.comms_logger
    comm.configure(
        enabled=wanted.enabled,
        prof_all=wanted.prof_all,
        prof_ops=wanted.prof_ops,
        debug=wanted.debug,
        verbose=False,  # as INFO of its logger, which is not shown
    )


def print_messages(recipe: Recipe) -> None:
    """What comms_logger saw: number, sizes and times of messages by kind. Every process
    calls it, the first one prints."""
    if recipe.parallel.deepspeed.comms_logger.enabled:
        from deepspeed import comm

        comm.log_summary()
