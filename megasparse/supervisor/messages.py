"""What a rank, its supervisor and the hub say to each other: JSON objects, one a line."""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import asdict, dataclass
from typing import Any

BEAT_SECONDS = 2.0  # between two signs of life
LIMIT = 1 << 24  # bytes of a line: stacks are long


@dataclass(frozen=True)
class Failure:
    """How a rank ended that should not have."""

    kind: str
    """"refused": a ValueError that the user can mend; "raised": another exception; "killed"; "exited" with a status and
    no word; "hang"; "lost": not heard from."""
    rank: int
    host: str
    message: str
    traceback: str = ""
    status: int = 1  # to exit with
    step: int | None = None  # the last that was done
    at: float = 0.0  # when the hub heard of it

    def line(self) -> str:
        """``rank 3 on n2: ...``; what the user can mend is the same on every rank and names none."""
        return self.message if self.kind == "refused" else f"rank {self.rank} on {self.host} {self.message}"


def encode(say: str, /, **content: Any) -> bytes:
    return json.dumps({"say": say, **content}).encode() + b"\n"


def failure(failed: Failure) -> bytes:
    return encode("failed", **asdict(failed))


async def read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message; None when the other side is gone, or does not talk as we do."""
    try:
        line = await reader.readline()
        message = json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
