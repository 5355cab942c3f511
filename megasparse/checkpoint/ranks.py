"""Steps that every rank takes part in, and that succeed or fail on all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")
R = TypeVar("R")


def together(group: dist.ProcessGroup | None, part: Callable[[], T], whole: Callable[[list[T]], R]) -> R:
    """``part`` on every rank, then ``whole`` of what they returned on rank 0; its result on every rank.

    An OSError or ValueError of any rank, and any error that torch's checkpoints report, is raised on every rank as the
    same ValueError. ``group``: None for the world."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own = _attempt(part)
    gathered: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(own, gathered, group=group, group_dst=0)
    outcome: list[Any] = [None]
    if gathered is not None:
        failures = {failure for _, failures in gathered for failure in failures}
        outcome = [(None, failures) if failures else _attempt(lambda: whole([result for result, _ in gathered]))]
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    result, failures = outcome[0]
    if failures:
        raise ValueError("; ".join(sorted(failures)))
    return result


def _attempt(call: Callable[[], Any]) -> tuple[Any, set[str]]:
    """(result, what failed)."""
    try:
        return call(), set()
    except CheckpointException as error:
        return None, {f"rank {rank}: {_first_line(cause)}" for rank, (cause, _) in error.failures.items()}
    except (OSError, ValueError) as error:
        return None, {_first_line(error)}


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
