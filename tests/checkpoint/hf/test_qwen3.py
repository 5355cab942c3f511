from __future__ import annotations

from pathlib import Path

from tests.checkpoint.hf.conversion import DENSE, check


def test_there_and_back(tmp_path: Path) -> None:
    """Norms of heads wider than hidden / heads."""
    check(tmp_path, "qwen3", DENSE, head_dim=16)
