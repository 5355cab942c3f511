"""Messages survive the way, and what is none is the end of the connection."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from megasparse.supervisor.messages import Failure, encode, failure, read, signal_name


async def received(*parts: bytes) -> list[object]:
    reader = asyncio.StreamReader()
    for part in parts:
        reader.feed_data(part)
    reader.feed_eof()
    found: list[object] = []
    while not found or found[-1] is not None:
        found.append(await read(reader))
    return found[:-1]


def test_there_and_back() -> None:
    failed = Failure("raised", 3, "n2", "raised KeyError: 'ö\n'", "Traceback\n  ...\n", 1, 7, 1.5)
    beat, back = asyncio.run(received(encode("beat", step=None), failure(failed)))
    assert beat == {"say": "beat", "step": None}
    assert back == {"say": "failed", **asdict(failed)}


def test_what_is_cut_short_or_none_of_ours_ends_it() -> None:
    assert asyncio.run(received(encode("beat", step=1), b'{"say": "be')) == [{"say": "beat", "step": 1}]
    assert asyncio.run(received(b"GET / HTTP/1.1\n")) == []


def test_what_failed_is_named() -> None:
    assert Failure("killed", 3, "n2", "was killed by SIGKILL").line() == "rank 3 on n2 was killed by SIGKILL"
    assert Failure("refused", 3, "n2", "model.x: unknown key").line() == "model.x: unknown key"
    assert [signal_name(9), signal_name(64), signal_name(40)] == ["SIGKILL", "SIGRTMAX", "signal 40"]
