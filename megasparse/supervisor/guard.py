"""The supervisor of one rank: starts it, passes signals on, notices its end or its silence, and tells the hub."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from typing import Any

from megasparse.launch import Launch
from megasparse.supervisor.hub import JOIN_SECONDS, LOST_SECONDS, Hub
from megasparse.supervisor.messages import BEAT_SECONDS, LIMIT, Failure, encode, failure, read, signal_name
from megasparse.supervisor.worker import RESUME, VARIABLE

STOP = (signal.SIGTERM, signal.SIGUSR1)
PASSED_ON = (*STOP, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # of Linux's prctl
STACK_SECONDS = 1.0  # that a rank has to write its stacks


def guard(place: Launch, command: list[str]) -> int:
    """Run ``command`` as this rank and return the exit status to end with, the same on every rank.

    0 or RESUME if all ended so; else what the hub found: 2 for what the user can mend, 128 and the signal's number of a
    rank that was killed, else 1. torchrun, which starts again what ends with anything but 0, gets 0 in place of RESUME.
    The run's folder has the status, whatever the launcher makes of it."""
    try:
        status = asyncio.run(_Guard(place, command).run())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0 if status == RESUME and place.launcher == "torchrun" else status


class _Guard:
    def __init__(self, place: Launch, command: list[str]) -> None:
        self.place, self.command, self.host = place, command, socket.gethostname()
        self.status: int | None = None  # to exit with
        self.over = asyncio.Event()
        self.said: dict[str, Any] | None = None  # the error that the rank reported
        self.step: int | None = None
        self.watch_seconds, self.beat_at = 0.0, time.monotonic()
        self.hung = False
        self.hub_heard = time.monotonic()
        self.tasks: set[asyncio.Task[None]] = set()
        self.broken: BaseException | None = None
        self.outbox: asyncio.Queue[bytes] = asyncio.Queue()

    async def run(self) -> int:
        hub = Hub(self.place, self.host) if self.place.rank == 0 else None
        if hub is not None:
            await hub.start(self._spawn)
        self.address = ("127.0.0.1", hub.port) if hub else (self.place.master_addr, self.place.master_port + 1)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, lambda: None)  # the terminal's, which the rank gets itself
        with tempfile.TemporaryFile() as stacks:
            ours, theirs = socket.socketpair()
            self.stacks = stacks
            self.child = await asyncio.create_subprocess_exec(
                *self.command,
                pass_fds=(theirs.fileno(), stacks.fileno()),
                env={**os.environ, VARIABLE: f"{theirs.fileno()},{stacks.fileno()}"},
                preexec_fn=_end_with_parent(),
            )
            for number in PASSED_ON:
                loop.add_signal_handler(number, self._pass_on, number)
            theirs.close()
            self.line, self.answer = await asyncio.open_connection(sock=ours, limit=LIMIT)
            for part in (self._listen, self._link, self._watch, self._wait):
                self._spawn(part())
            await self.over.wait()
            self._kill()
            if hub is not None:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(hub.ended.wait(), LOST_SECONDS)
        for task in self.tasks:
            task.cancel()
        if self.broken is not None:
            raise self.broken
        assert self.status is not None
        return self.status

    def _spawn(self, part: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run it beside; if it raises, which is our mistake, all is over."""
        task = asyncio.create_task(part)
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.broken = error
            self.over.set()

    def _pass_on(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(number)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.kill()

    def _end(self, status: int) -> None:
        if self.status is None:
            self.status = status
        self.over.set()

    # The rank --------------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        """To what the rank says."""
        while (message := await read(self.line)) is not None:
            self.beat_at = time.monotonic()
            match message["say"]:
                case "beat":
                    self.step = message["step"] if message["step"] is not None else self.step
                case "watch":
                    self.watch_seconds = 60 * message["minutes"]
                case "run_dir":
                    self.outbox.put_nowait(encode("run_dir", path=message["path"]))
                case "refused" | "raised":
                    self.said = message
                    status = 2 if message["say"] == "refused" else 1
                    self._failed(message["say"], message["message"], message["traceback"], status)

    async def _wait(self) -> None:
        """For the rank's end."""
        code = await self.child.wait()
        if self.said is not None or self.hung:
            return  # the hub knows
        if code in (0, RESUME):
            self.outbox.put_nowait(encode("done", status=code))
        elif -code in STOP:  # later the rank notes them, and saves
            self._failed("refused", f"{signal_name(-code)} before the first step: nothing is lost", status=RESUME)
        elif code == -signal.SIGINT or code == 128 + signal.SIGINT:
            self._failed("refused", "interrupted", status=128 + 2)
        elif code < 0:
            memory = ", as the kernel does when memory runs out (see dmesg)" if code == -signal.SIGKILL else ""
            self._failed("killed", f"was killed by {signal_name(-code)}{memory}", status=128 - code)
        else:
            self._failed("exited", f"ended with exit status {code}", status=code)

    async def _watch(self) -> None:
        """Is there progress?"""
        while True:
            await asyncio.sleep(min(BEAT_SECONDS, max(self.watch_seconds / 10, 0.1)))
            self.outbox.put_nowait(encode("beat", step=self.step))
            silent = time.monotonic() - self.beat_at
            if self.watch_seconds and silent > self.watch_seconds and not self.hung and self.child.returncode is None:
                self.hung = True
                await self._say_where()
                self._failed("hang", f"made no progress for {silent / 60:.1f} minutes")

    async def _say_where(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(signal.SIGQUIT)
        await asyncio.sleep(STACK_SECONDS)
        text = os.pread(self.stacks.fileno(), LIMIT // 4, 0).decode(errors="replace")
        self.outbox.put_nowait(encode("stacks", text=text))

    def _failed(self, kind: str, message: str, traceback: str = "", status: int = 1) -> None:
        found = Failure(kind, self.place.rank, self.host, message, traceback, status, self.step, time.time())
        self.outbox.put_nowait(failure(found))

    # The hub ---------------------------------------------------------------------------------------------------------

    async def _link(self) -> None:
        """The connection to the hub, from its first try to its end."""
        reader, writer = await self._connect()
        if writer is None:
            return
        writer.write(encode("hello", rank=self.place.rank, host=self.host, world_size=self.place.world_size))
        beside = [self._spawn(self._send(writer)), self._spawn(self._watch_hub())]
        while (message := await read(reader)) is not None:
            self.hub_heard = time.monotonic()
            match message["say"]:
                case "heard":
                    self.answer.write(b"\n")
                case "stranger":
                    print(f"error: {_at(self.address)} is another job's: set another MASTER_PORT", file=sys.stderr)
                    self._end(2)
                case "stacks":
                    self.hung = True  # what comes after is no news
                    self._spawn(self._say_where())
                case "end":
                    self._end(message["status"])
                    break
        for task in beside:
            task.cancel()
        if self.status is None:
            self._lost("is gone: its supervisor was killed, or its host fell")

    async def _connect(self) -> tuple[Any, Any]:
        deadline = time.monotonic() + JOIN_SECONDS
        while True:
            try:
                return await asyncio.wait_for(asyncio.open_connection(*self.address, limit=LIMIT), 10)
            except (OSError, asyncio.TimeoutError) as error:
                if time.monotonic() > deadline:
                    self._lost(f"was not reached within {JOIN_SECONDS:.0f} s ({error or 'no answer'})")
                    return None, None
                await asyncio.sleep(0.2)

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(await self.outbox.get())
            with contextlib.suppress(OSError):  # the reader will see it, too
                await writer.drain()

    async def _watch_hub(self) -> None:
        while time.monotonic() - self.hub_heard < LOST_SECONDS:
            await asyncio.sleep(BEAT_SECONDS / 2)
        self._lost(f"was not heard from for {LOST_SECONDS:.0f} s: its host, or the network between, is down")

    def _lost(self, what: str) -> None:
        """No hub to print it."""
        if self.said is not None:
            print(f"{self.said['traceback']}{self.said['message']}", file=sys.stderr, flush=True)
        print(
            f"error: rank 0 ({_at(self.address)}) {what}; rank {self.place.rank} on {self.host} ends",
            file=sys.stderr,
            flush=True,
        )
        self._end(1)


def _at(address: tuple[str, int]) -> str:
    return f"MASTER_ADDR={address[0]}, supervisor's port {address[1]}"


def _end_with_parent() -> Callable[[], None]:
    """For the child: be killed when the supervisor is."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return ask
