"""What the hub makes of what it hears, and of what it does not hear."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from megasparse.launch import Launch
from megasparse.supervisor import hub
from megasparse.supervisor.hub import Hub, innermost, root_cause
from megasparse.supervisor.messages import Failure, encode, failure, read


def failed(kind: str, rank: int, message: str = "") -> Failure:
    return Failure(kind, rank, f"n{rank}", message)


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        ([failed("raised", 2), failed("raised", 0)], 2),
        ([failed("raised", 2), failed("killed", 5)], 5),
        ([failed("raised", 2, "raised RuntimeError: Connection reset by peer"), failed("refused", 4)], 4),
        ([failed("raised", 2, "raised DistBackendError: ncclRemoteError"), failed("exited", 1)], 1),
        ([failed("lost", 3), failed("raised", 2, "raised RuntimeError: Connection closed by peer")], 2),
        ([failed("hang", 3), failed("lost", 1)], 1),
        ([failed("lost", 3)], 3),
    ],
)
def test_the_root_cause(failures: list[Failure], rank: int) -> None:
    assert root_cause(failures).rank == rank


def test_where_a_rank_is() -> None:
    """The main thread's innermost frame that is not a library's, and the innermost of all."""
    dump = """Thread 0x01 (most recent call first):
  File "/x/threading.py", line 5 in wait

Current thread 0x02 (most recent call first):
  File "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 2900 in all_reduce
  File "/home/megasparse/engine.py", line 30 in train_step
  File "/home/megasparse/train.py", line 3 in train
"""
    assert innermost(dump) == "train_step (engine.py:30), in all_reduce (distributed_c10d.py:2900)"
    assert innermost('Current thread 0x02 (most recent call first):\n  File "/a/b.py", line 1 in c\n') == "c (b.py:1)"
    assert innermost("") == "no Python stack"


@pytest.mark.parametrize(("ranks", "text"), [([3], "3"), ([0, 1, 2, 7], "0-2, 7"), ([0, 2, 3], "0, 2-3")])
def test_ranks_are_listed_short(ranks: list[int], text: str) -> None:
    assert hub._some(ranks) == text


def test_many_ranks_are_cut_short() -> None:
    assert hub._some(list(range(0, 100, 2)), most=3) == "0, 2, 4, ..."


async def until_over(world: int, hello: list[int]) -> Failure:
    """What the hub finds when ``hello`` ranks of ``world`` say so once, and nothing else."""
    tasks: set[Any] = set()

    def spawn(part: Coroutine[Any, Any, None]) -> None:
        tasks.add(asyncio.create_task(part))

    center = Hub(Launch("srun", 0, world, 0, world, "127.0.0.1", 0), "n1")
    await center.start(spawn)
    for rank in hello:
        _, writer = await asyncio.open_connection("127.0.0.1", center.port)
        writer.write(encode("hello", rank=rank, host=f"n{rank}", world_size=world))
        tasks.add(writer)
    await asyncio.wait_for(center.ended.wait(), 20)
    center.server.close()
    return root_cause(center.failures)


def test_a_host_that_is_not_heard_from(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hub, "LOST_SECONDS", 1.0)
    monkeypatch.setattr(hub, "GATHER_SECONDS", 0.1)
    cause = asyncio.run(until_over(2, [0, 1]))
    assert (cause.kind, cause.rank, cause.host) == ("lost", 0, "n0")
    assert "error: rank 0 on n0 was not heard from for 1 s: its host, or the network between it and n1" in (
        capsys.readouterr().err
    )


def test_ranks_that_never_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hub, "JOIN_SECONDS", 1.0)
    monkeypatch.setattr(hub, "GATHER_SECONDS", 0.1)
    cause = asyncio.run(until_over(6, [0, 1, 4]))
    assert (cause.kind, cause.rank) == ("lost", 2)
    assert "did not start within 1 s, of 6 these did not: 2-3, 5" in capsys.readouterr().err


async def of_many(world: int) -> tuple[float, set[int]]:
    """Seconds from a failure of one of ``world`` ranks until all have been told to end, and with which status."""
    tasks: set[Any] = set()
    center = Hub(Launch("srun", 0, world, 0, world, "127.0.0.1", 0), "n1")
    await center.start(lambda part: tasks.add(asyncio.create_task(part)))
    members = []
    for rank in range(world):
        reader, writer = await asyncio.open_connection("127.0.0.1", center.port)
        writer.write(encode("hello", rank=rank, host=f"n{rank // 8}", world_size=world))
        members.append((reader, writer))
    while len(center.members) < world:
        await asyncio.sleep(0.01)
    started = time.monotonic()
    members[7][1].write(failure(Failure("killed", 7, "n0", "was killed by SIGKILL", status=137)))

    async def told(reader: asyncio.StreamReader) -> int:
        while (message := await read(reader)) is not None:
            if message["say"] == "end":
                return message["status"]
        raise AssertionError("it was not told")

    statuses = await asyncio.gather(*(told(reader) for reader, _ in members))
    seconds = time.monotonic() - started
    for _, writer in members:
        writer.close()
    center.server.close()
    return seconds, set(statuses)


def test_a_thousand_ranks_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """More connections than a process may have files by default."""
    seconds, statuses = asyncio.run(of_many(1200))
    assert statuses == {137}
    assert seconds < hub.GATHER_SECONDS + 5
    assert "error: rank 7 on n0 was killed by SIGKILL" in capsys.readouterr().err


async def with_strangers(lines: list[bytes]) -> tuple[list[bytes], list[Failure], set[int]]:
    """A job of two ranks of which one has joined, and others that send ``lines`` to its port: the answers."""
    tasks: set[Any] = set()
    center = Hub(Launch("srun", 0, 2, 0, 2, "127.0.0.1", 0), "n1")
    await center.start(lambda part: tasks.add(asyncio.create_task(part)))
    _, ours = await asyncio.open_connection("127.0.0.1", center.port)
    ours.write(encode("hello", rank=1, host="n2", world_size=2))
    while not center.members:
        await asyncio.sleep(0.01)
    answers = []
    for line in lines:
        reader, writer = await asyncio.open_connection("127.0.0.1", center.port)
        writer.write(line)
        writer.write_eof()
        answers.append(await asyncio.wait_for(reader.read(), 10))
        writer.close()
    await asyncio.sleep(0.1)
    found = answers, list(center.failures), set(center.members)
    ours.close()
    center.server.close()
    return found


def test_strangers_do_no_harm() -> None:
    """A scanner of ports; ranks of another job that was given the same MASTER_PORT."""
    scanner = [b"", b"GET / HTTP/1.1\r\n\r\n", b"7\n", b"{}\n", bytes(range(256)), b'{"say": "hello"}\n']
    others = [encode("hello", rank=1, host="n9", world_size=2), encode("hello", rank=0, host="n9", world_size=4)]
    lines = [*scanner, *others, failure(Failure("killed", 1, "n9", "was killed")), encode("run_dir", path="/")]
    answers, failures, members = asyncio.run(with_strangers(lines))
    assert answers == [encode("stranger")] * len(lines)
    assert not failures
    assert members == {1}


async def status_when_told(folder: Path) -> str:
    """What the run's folder says when the first supervisor hears that the job has ended, to be resumed."""
    tasks: set[Any] = set()
    center = Hub(Launch("srun", 0, 1, 0, 1, "127.0.0.1", 0), "n1")
    await center.start(lambda part: tasks.add(asyncio.create_task(part)))
    reader, writer = await asyncio.open_connection("127.0.0.1", center.port)
    writer.write(encode("hello", rank=0, host="n1", world_size=1) + encode("run_dir", path=str(folder)))
    writer.write(encode("done", status=75))
    while (await asyncio.wait_for(read(reader), 10) or {"say": "end"})["say"] != "end":
        pass
    status = (folder / "status").read_text()
    writer.close()
    center.server.close()
    return status


def test_the_status_is_there_before_any_supervisor_ends(tmp_path: Path) -> None:
    """srun may kill the others, rank 0's among them, as soon as one has."""
    assert asyncio.run(status_when_told(tmp_path)) == "75\n"
