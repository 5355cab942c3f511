"""Files are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasparse.files import write_atomic, written_aside


def test_replaces_the_file_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    write_atomic(path, "né".encode())
    assert path.read_text(encoding="utf-8") == "né"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path: Path) -> None:
    with written_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError("killed")


def test_a_failure_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    with pytest.raises(RuntimeError, match="killed"):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_not_there_before_the_end(tmp_path: Path):
    path = tmp_path / "a.txt"
    with written_aside(path) as aside:
        aside.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
