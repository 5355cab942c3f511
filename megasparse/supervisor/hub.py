"""The hub: what rank 0's supervisor does for all. It hears of every rank, finds what came first, and ends the job."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megasparse.launch import Launch
from megasparse.supervisor.events import append_event
from megasparse.supervisor.messages import BEAT_SECONDS, LIMIT, Failure, encode, read

JOIN_SECONDS = 300.0  # until every rank's supervisor has been heard from
LOST_SECONDS = 30.0  # without a sign of life
GATHER_SECONDS = 1.5  # after the first failure: what caused it may be heard of a moment later
# How gloo, NCCL and torch's store say that another rank is no longer there.
DISCONNECTED = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|ncclRemoteError|ncclSystemError|recvValue failed"
)
GONE = "is gone: its supervisor was killed, or its host fell"
STACKS_SECONDS = 5.0  # of a hang: until every rank has said where it is


Spawn = Callable[[Coroutine[Any, Any, None]], Any]


@dataclass
class Member:
    """A rank, as the hub knows it."""

    rank: int
    host: str
    writer: asyncio.StreamWriter
    heard: float
    status: int | None = None  # it has ended by itself
    step: int | None = None


@dataclass
class Hub:
    """Of ``place.world_size`` ranks. ``end`` is set when the job is over; every supervisor has then been told."""

    place: Launch
    host: str
    members: dict[int, Member] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    stacks: dict[int, str] = field(default_factory=dict)
    run_dir: Path | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0

    async def start(self, spawn: Spawn) -> None:
        """Listen, ``spawn`` running what goes on beside. ValueError if the port is taken."""
        self.started, self._spawn = time.monotonic(), spawn
        wanted = self.place.master_port + 1 if self.place.master_port else 0
        interface = "127.0.0.1" if self.place.world_size == self.place.local_world_size else None
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # 1024 by default: no more ranks than that
        try:
            self.server = await asyncio.start_server(self._serve, interface, wanted, limit=LIMIT, backlog=4096)
        except OSError as error:
            raise ValueError(
                f"rank 0's supervisor cannot listen on port {wanted} of {self.host}, the one after MASTER_PORT="
                f"{self.place.master_port}: {error.strerror}: set another MASTER_PORT"
            ) from None
        self.port = self.server.sockets[0].getsockname()[1]
        spawn(self._watch())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One supervisor's connection."""
        with contextlib.suppress(asyncio.CancelledError):  # at the end of all; asyncio would print it
            await self._listen(reader, writer)

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await read(reader)
        if first is None or not self._is_ours(first):
            writer.write(encode("stranger"))
            writer.close()
            return
        member = Member(first["rank"], first["host"], writer, time.monotonic())
        self.members[member.rank] = member
        while (message := await read(reader)) is not None:
            member.heard = time.monotonic()
            self._hear(member, message)
        if member.status is None and not self._failed(member.rank):
            self._fail(Failure("lost", member.rank, member.host, GONE, step=member.step))

    def _is_ours(self, first: dict[str, Any]) -> bool:
        """Neither a port scanner nor a rank of another job that was given the same port."""
        here = first.get("say") == "hello" and first.get("world_size") == self.place.world_size
        return here and first.get("rank") not in self.members

    def _hear(self, member: Member, message: dict[str, Any]) -> None:
        match message.pop("say"):
            case "beat":
                member.step = message["step"]
            case "run_dir":
                self.run_dir = Path(message["path"])
                (self.run_dir / "status").unlink(missing_ok=True)
                (self.run_dir / "pid").write_text(f"{os.getpid()} {self.host}\n")  # for signals
            case "stacks":
                self.stacks[member.rank] = message["text"]
            case "failed":
                self._fail(Failure(**message))
                member.writer.write(encode("heard"))
            case "done":
                member.status = message["status"]
                self._end_if_all_done()

    def _end_if_all_done(self) -> None:
        members = self.members.values()
        if len(members) == self.place.world_size and all(member.status is not None for member in members):
            self._say_end(max(member.status or 0 for member in members))
            self.ended.set()

    def _say_end(self, status: int) -> None:
        """To all, and in the run's folder for who started a launcher: it may end with a status of its own."""
        if self.run_dir is not None:
            with self._noting(self.run_dir):
                (self.run_dir / "pid").unlink(missing_ok=True)
                (self.run_dir / "status").write_text(f"{status}\n")
        self._tell_all(encode("end", status=status))

    def _tell_all(self, message: bytes) -> None:
        for member in self.members.values():
            member.writer.write(message)

    async def _watch(self) -> None:
        """Are all of them there, and are they all alive?"""
        while not self.ended.is_set():
            await asyncio.sleep(BEAT_SECONDS / 2)
            now = time.monotonic()
            self._tell_all(encode("beat"))
            missing = sorted(set(range(self.place.world_size)) - self.members.keys())
            if missing and now - self.started > JOIN_SECONDS:
                self._fail(
                    Failure(
                        "lost",
                        missing[0],
                        "an unknown host",
                        f"did not start within {JOIN_SECONDS:.0f} s, of "
                        f"{self.place.world_size} these did not: {_some(missing)}",
                    )
                )
            silent = [m for m in self.members.values() if m.status is None and now - m.heard > LOST_SECONDS]
            for member in silent:
                if not self._failed(member.rank):
                    self._fail(
                        Failure(
                            "lost",
                            member.rank,
                            member.host,
                            f"was not heard from for {LOST_SECONDS:.0f} s: "
                            f"its host, or the network between it and {self.host}, is down",
                        )
                    )

    # Failures ------------------------------------------------------------------------------------------------------

    def _failed(self, rank: int) -> bool:
        return any(failure.rank == rank for failure in self.failures)

    def _fail(self, failure: Failure) -> None:
        first = not self.failures
        self.failures.append(failure)
        if first:
            self._spawn(self._end_job())

    async def _end_job(self) -> None:
        await asyncio.sleep(GATHER_SECONDS)
        cause = root_cause(self.failures)
        print(f"\n{self._report(cause)}", file=sys.stderr, flush=True)
        if cause.kind == "hang":
            self._tell_all(encode("stacks"))
            deadline = time.monotonic() + STACKS_SECONDS
            while len(self.stacks) < len(self.members) and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
            print(self._where(), file=sys.stderr, flush=True)
        self._record(cause)
        self._say_end(cause.status)
        await asyncio.sleep(0.2)  # let it be sent
        self.ended.set()

    def _report(self, cause: Failure) -> str:
        others = [failure for failure in self.failures if failure is not cause and failure.rank != cause.rank]
        lines = [cause.traceback.rstrip()] if cause.traceback else []
        lines.append(f"error: {cause.line()}")
        if cause.step is not None and cause.kind != "refused":
            lines[-1] += f" (step {cause.step} was done)"
        if others and cause.kind != "refused":
            lines.append(f"after it, rank{'s' * (len(others) > 1)} {_some(sorted({f.rank for f in others}))} failed")
        return "\n".join(lines)

    def _where(self) -> str:
        """Of a hang: which ranks are in which place; every stack is in the run's folder."""
        places: dict[str, list[int]] = defaultdict(list)
        for rank, text in sorted(self.stacks.items()):
            places[innermost(text)].append(rank)
        lines = [f"  rank{'s' * (len(ranks) > 1)} {_some(ranks)}: {place}" for place, ranks in places.items()]
        if self.run_dir is not None:
            folder = self.run_dir / "stacks"
            folder.mkdir(parents=True, exist_ok=True)
            for rank, text in self.stacks.items():
                (folder / f"rank_{rank}.txt").write_text(text)
            lines.append(f"  every thread's stack: {folder}")
        return "\n".join(["where they are:", *lines])

    def _record(self, cause: Failure) -> None:
        if self.run_dir is not None and cause.kind != "refused":
            with self._noting(self.run_dir):
                append_event(self.run_dir, cause.kind, cause.line(), cause.step, cause.rank, cause.host)

    @contextlib.contextmanager
    def _noting(self, run_dir: Path) -> Iterator[None]:
        """The job ends where nothing can be written any more, too."""
        try:
            yield
        except OSError as error:
            print(f"could not note it in {run_dir}: {error.strerror}", file=sys.stderr, flush=True)


def root_cause(failures: list[Failure]) -> Failure:
    """What the others follow from. A rank that raises is heard of before its end can be felt by others, but one that is
    killed or just exits may be heard of a moment later: a kill goes first, a lost connection after all else."""
    order = {"killed": 0, "lost": 3, "hang": 4}

    def place(failure: Failure) -> int:
        return 2 if DISCONNECTED.search(failure.message) else order.get(failure.kind, 1)

    return min(failures, key=place)


def innermost(stack: str) -> str:
    """Where the main thread of a faulthandler dump is: the innermost frame outside libraries, and the innermost."""
    main = stack.rpartition("(most recent call first):")[2]  # the thread that ran the handler comes last
    frames = re.findall(r'File "(.*?)", line (\d+) in (\S+)', main)
    if not frames:
        return "no Python stack"
    own = next((frame for frame in frames if "site-packages" not in frame[0]), frames[0])
    shown = dict.fromkeys([own, frames[0]])
    return ", in ".join(f"{function} ({Path(file).name}:{line})" for file, line, function in shown)


def _some(ranks: list[int], most: int = 16) -> str:
    """``0-3, 7``, cut short."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    texts = ["-".join(map(str, run)) for run in runs]
    return ", ".join(texts[:most]) + (", ..." if len(texts) > most else "")
