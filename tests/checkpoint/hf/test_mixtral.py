from __future__ import annotations

from pathlib import Path

from tests.checkpoint.hf.conversion import EXPERTS, check


def test_there_and_back(tmp_path: Path) -> None:
    check(tmp_path, "mixtral", EXPERTS, num_local_experts=8, num_experts_per_tok=2, head_dim=8)
