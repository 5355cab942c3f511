"""Worker processes on this machine: run a function on several ranks, layout after layout, in the same processes.

Importing torch, DeepSpeed and megatron-core costs seconds of CPU a process. The ranks are forked from a server that has
imported them, and stay alive between calls: each call makes a process group of its own and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch

from megasparse import topology


class RankError(AssertionError):
    """A rank raised, died or did not end in time; the message has its traceback or where it hangs."""


class Workers:
    """A pool of ranks. Use as a context manager, or call ``close``."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End every rank. The pool can be used again: it starts new ones."""
        for rank in self._ranks:
            rank.end()
        self._ranks.clear()

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call ``fn(*args)`` on ``world_size`` processes and return what each returned, by rank.

        ``fn`` and what it takes and returns must be picklable: a function at the top of a module. RANK, LOCAL_RANK,
        WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT are set as a launcher would, with one thread a rank; ``fn``
        joins the process group itself (``topology.initialize``), and is taken out of it when all ranks are done.
        The first rank that fails ends all of them and raises RankError with its traceback; after ``timeout`` seconds
        the stacks of those still running.
        """
        try:
            while len(self._ranks) < world_size:
                self._ranks.append(_Rank.start(len(self._ranks), Path(self._folder.name)))
            ranks, size = self._ranks[:world_size], str(world_size)
            environment = {"WORLD_SIZE": size, "LOCAL_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            environment["MASTER_PORT"] = str(_free_port())
            results = _call(ranks, fn, args, environment, timeout)
            _call(ranks, _leave, (), {}, timeout)  # only now: until all are done, others may need their connections
            return results
        except BaseException:
            self.close()
            raise


class _Rank:
    """The parent's side of one worker."""

    def __init__(self, number: int, process: Any, pipe: Connection, stacks: Path) -> None:
        self.number, self.process, self.pipe, self.stacks = number, process, pipe, stacks

    @staticmethod
    def start(number: int, folder: Path) -> _Rank:
        context = _fork_server()
        ours, theirs = context.Pipe()
        stacks = folder / f"rank{number}.txt"
        process = context.Process(target=_serve, args=(number, stacks, theirs), daemon=True)
        process.start()
        theirs.close()
        return _Rank(number, process, ours, stacks)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def where(self) -> str:
        """The stack of a rank that hangs."""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGQUIT)
            time.sleep(0.5)
        text = self.stacks.read_text() if self.stacks.exists() else "(not started)"
        return f"rank {self.number} is here:\n{text}"


def _call(ranks: list[_Rank], fn: Any, args: Any, environment: dict[str, str], timeout: float) -> list[Any]:
    job = pickle.dumps((fn, args, environment))
    for rank in ranks:
        with contextlib.suppress(OSError):  # it died, as will be said below
            rank.pipe.send_bytes(job)
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    waiting: dict[Any, _Rank] = {rank.pipe: rank for rank in ranks}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"not done after {timeout:.0f} s\n" + "\n".join(r.where() for r in waiting.values()))
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                succeeded, value = pickle.loads(rank.pipe.recv_bytes())
            except (EOFError, OSError):
                raise RankError(_death(rank)) from None
            if not succeeded:
                dead = next(iter(wait([other.process.sentinel for other in ranks], 0.1)), None)  # was that why?
                cause = "".join(_death(other) + "; " for other in ranks if other.process.sentinel == dead)
                raise RankError(f"{cause}rank {rank.number} of {len(ranks)} failed\n{value}")
            results[rank.number] = value
    return [results[rank.number] for rank in ranks]


def _death(rank: _Rank) -> str:
    rank.process.join()
    return f"rank {rank.number} died with exit code {rank.process.exitcode}"


# In the worker --------------------------------------------------------------------------------------------------------


def _serve(number: int, stacks: Path, pipe: Connection) -> None:
    """A worker's life: job after job, until the parent ends it or is gone."""
    jobs: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read, args=(pipe, jobs), daemon=True).start()
    torch.set_num_threads(1)
    with stacks.open("w") as file:
        faulthandler.register(signal.SIGQUIT, file)
        while True:
            pipe.send_bytes(_outcome(number, jobs.get()))


def _read(pipe: Connection, jobs: SimpleQueue[bytes]) -> None:
    """Wait for jobs beside the work: when the parent is gone the process ends, whatever it is doing."""
    while True:
        try:
            jobs.put(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)


def _outcome(number: int, job: bytes) -> bytes:
    """(True, what the job returned) or (False, its traceback), pickled."""
    try:
        fn, args, environment = pickle.loads(job)
        if gc.get_freeze_count() == 0:  # what is imported is no garbage: _leave would look through it for longer than
            gc.freeze()  # most jobs take. Once only: what a job leaves is garbage
        os.environ.update(environment, RANK=str(number), LOCAL_RANK=str(number))
        torch.manual_seed(1234)
        return pickle.dumps((True, fn(*args)))
    except BaseException:  # noqa: BLE001  # handed to the parent, which raises it
        return pickle.dumps((False, traceback.format_exc()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _leave() -> None:
    """Forget the job: its process group and everything that hangs on it."""
    topology.leave()
    torch.set_grad_enabled(True)
    gc.collect()


# Starting them --------------------------------------------------------------------------------------------------------


def _fork_server() -> Any:
    """A context whose processes are forked from one that has already imported what they need, and sees no GPU.

    Nothing imported there may start a thread or run a parallel torch operation, which would not survive the fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "megatron.core.models.gpt", "megasparse.engine", "megasparse.verify"])
    before = dict(os.environ)
    os.environ.update(
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        DS_ACCELERATOR="cpu",
        PYTHONWARNINGS="ignore",
        DS_LOG_LEVEL="error",
        MEGASPARSE_SUPERVISOR="none",  # the parent is
    )
    try:
        forkserver.ensure_running()  # it keeps this environment
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _free_port() -> int:
    """Below the ports that the system hands out, so that no other process is given it before the ranks listen."""
    while True:
        port = random.randint(20_000, 29_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
