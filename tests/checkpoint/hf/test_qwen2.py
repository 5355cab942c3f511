from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.hf.conversion import DENSE, check, convert, theirs


def test_there_and_back(tmp_path: Path) -> None:
    check(tmp_path, "qwen2", DENSE)


def test_windows_are_refused(tmp_path: Path) -> None:
    folder = theirs(tmp_path / "theirs", "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ValueError, match="sliding_attention"):
        convert(folder, tmp_path / "ours")
