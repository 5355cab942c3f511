from __future__ import annotations

from pathlib import Path

from tests.checkpoint.hf.conversion import DENSE, check


def test_there_and_back(tmp_path: Path) -> None:
    check(tmp_path, "olmo2", DENSE)
