"""Run a function on several gloo ranks; compare tensors."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent


class RankError(AssertionError):
    """A rank raised, died or did not end in time; the message has its traceback."""


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``fn(*args)`` on ``world_size`` new processes and return what each returned, by rank.

    ``fn`` and what it takes and returns must be picklable: a function at the top of a module. RANK, LOCAL_RANK,
    WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT are set as a launcher would, with one thread a rank; ``fn``
    joins the process group itself (``topology.initialize``). The first rank that fails ends all of them and raises
    RankError with its traceback; after ``timeout`` seconds the stacks of those still running.
    """
    context = _fork_server()
    port = _free_port()
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                stacks = Path(folder) / f"rank{rank}.txt"
                process = context.Process(
                    target=_rank_main, args=(pickle.dumps((fn, args)), rank, world_size, port, stacks, theirs)
                )
                process.start()
                theirs.close()
                ranks.append(_Rank(rank, process, ours, stacks))
            return _collect(ranks, timeout)
        finally:
            for rank_process in ranks:
                rank_process.end()


class _Rank:
    def __init__(self, rank: int, process: Any, pipe: Connection, stacks: Path) -> None:
        self.rank, self.process, self.pipe, self.stacks = rank, process, pipe, stacks

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _collect(ranks: list[_Rank], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    waiting = {rank.pipe: rank for rank in ranks}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"not done after {timeout:.0f} s\n" + "\n".join(_stack(r) for r in waiting.values()))
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[index]  # wait returns what it was given
            try:
                succeeded, value = pickle.loads(rank.pipe.recv_bytes())
            except EOFError:
                rank.process.join()
                raise RankError(f"rank {rank.rank} died with exit code {rank.process.exitcode}") from None
            if not succeeded:
                raise RankError(f"rank {rank.rank} of {len(ranks)} failed\n{value}")
            results[rank.rank] = value
    return [results[rank.rank] for rank in ranks]


def _stack(rank: _Rank) -> str:
    """Where a rank that hangs is."""
    if rank.process.is_alive():
        os.kill(rank.process.pid, signal.SIGUSR1)
        time.sleep(0.5)
    text = rank.stacks.read_text() if rank.stacks.exists() else "(not started)"
    return f"rank {rank.rank} is here:\n{text}"


def _rank_main(job: bytes, rank: int, world_size: int, port: int, stacks: Path, pipe: Connection) -> None:
    size, number = str(world_size), str(rank)
    os.environ.update(RANK=number, LOCAL_RANK=number, WORLD_SIZE=size, LOCAL_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    torch.manual_seed(1234)
    with stacks.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file)
        try:
            fn, args = pickle.loads(job)
            outcome = pickle.dumps((True, fn(*args)))
        except BaseException:  # noqa: BLE001  # handed to the parent, which raises it
            outcome = pickle.dumps((False, traceback.format_exc()))
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send_bytes(outcome)
        pipe.poll(None)  # until the parent ends it: other ranks may still need this one's connections


def _fork_server() -> Any:
    """A context whose processes are forked from one that has already imported what the tests need."""
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


def _free_port() -> int:
    """Below the ports that the system hands out, so that no other process is given it before the ranks listen."""
    while True:
        port = random.randint(20_000, 29_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|, in float64; 0 if both are all zeros."""
    a, b = a.detach().double(), b.detach().double()
    largest = b.abs().max().item() if b.numel() else 0.0
    difference = (a - b).abs().max().item() if b.numel() else 0.0
    return difference / largest if largest else (0.0 if difference == 0 else float("inf"))


def assert_close(a: Any, b: Any, rtol: float, name: str = "") -> None:
    """Assert max|a - b| / max|b| <= rtol for two tensors, numbers, or lists or dicts of them, each by itself; the
    message names the worst one and its figure. ``b`` is the reference. Not-a-number is never close."""
    worst, place = 0.0, name
    for path, left, right in _pairs(a, b, name):
        assert left.shape == right.shape, f"{path}: shape {tuple(left.shape)} is not {tuple(right.shape)}"
        error = relative_error(left, right)
        if not error <= worst:
            worst, place = error, path
    assert worst <= rtol, f"{place or 'tensors'}: relative error {worst:.2e} is more than {rtol:.0e}"


def _pairs(a: Any, b: Any, name: str) -> list[tuple[str, Tensor, Tensor]]:
    if isinstance(b, dict):
        assert a.keys() == b.keys(), f"{name}: keys differ: {sorted(a.keys() ^ b.keys())}"
        return [pair for key in b for pair in _pairs(a[key], b[key], f"{name}.{key}" if name else str(key))]
    if isinstance(b, list | tuple):
        assert len(a) == len(b), f"{name}: {len(a)} entries, not {len(b)}"
        return [pair for i, (x, y) in enumerate(zip(a, b, strict=True)) for pair in _pairs(x, y, f"{name}[{i}]")]
    return [(name, _tensor(a), _tensor(b))]


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
