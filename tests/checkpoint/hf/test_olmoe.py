from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.hf.conversion import EXPERTS, check


@pytest.mark.parametrize("normed", [False, True])
def test_there_and_back(tmp_path: Path, normed: bool) -> None:
    sizes = {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": normed}
    check(tmp_path, "olmoe", EXPERTS if normed else (), **sizes)
