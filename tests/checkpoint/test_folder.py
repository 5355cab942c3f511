"""The folder of checkpoints, with files that are only hashed: what is whole, what is latest, what is pruned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint.folder import (
    Damaged,
    latest,
    newest_before,
    prune,
    publish,
    read_manifest,
    verify,
    whole_before,
)
from megasparse.files import sha256_of_file


def write(folder: Path, step: int) -> Path:
    """A checkpoint of two files, published."""
    partial = folder / f"step_{step}.partial"
    partial.mkdir()
    for name in ("a", "b"):
        (partial / name).write_text(f"{name} of {step}")
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256_of_file(f)} for f in partial.iterdir()}
    checkpoints.write_manifest(partial, {"step": step, "files": files})
    publish(partial, folder / f"step_{step}")
    return folder / f"step_{step}"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_and_read(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    assert latest(tmp_path) == path
    assert names_in(tmp_path) == ["latest", "step_7"]
    manifest = read_manifest(path)
    assert manifest["step"] == 7
    verify(path, manifest)


def test_latest(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None
    assert latest(tmp_path) is None
    (tmp_path / "latest").write_text("step_7\n")
    with pytest.raises(ValueError, match=r"latest.*step_7"):
        latest(tmp_path)
    (tmp_path / "step_7").mkdir()
    assert latest(tmp_path) == tmp_path / "step_7"


def test_the_newest_before_a_step(tmp_path: Path) -> None:
    """By number, whatever ``latest`` names; what is being written or removed is none."""
    assert newest_before(tmp_path / "nowhere", 9) is None
    assert newest_before(tmp_path, 9) is None
    for step in (9, 10, 100, 2):
        write(tmp_path, step)
    (tmp_path / "step_11.partial").mkdir()
    (tmp_path / "step_8.removed").mkdir()
    for step, newest in ((1, None), (2, 2), (8, 2), (9, 9), (10, 10), (11, 10), (99, 10), (100, 100), (10**6, 100)):
        assert newest_before(tmp_path, step) == (newest and tmp_path / f"step_{newest}"), step


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    """Changed in any place it is refused, or says the same as before (white space)."""
    path = write(tmp_path, 7)
    file = path / "manifest.json"
    content, manifest = file.read_bytes(), read_manifest(path)
    refused = 0
    for i in range(len(content)):
        file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        try:
            assert read_manifest(path) == manifest
        except ValueError:
            refused += 1
    assert refused > 0.8 * len(content)


@pytest.mark.parametrize("content", [None, "", '{"format": 2, ', "[]", '"text"', '{"format": 2}'])
def test_a_manifest_that_says_nothing(tmp_path: Path, content: str | None) -> None:
    manifest = write(tmp_path, 1) / "manifest.json"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_text(content)
    with pytest.raises(Damaged, match=r"step_1 is not a whole checkpoint.*manifest\.json"):
        read_manifest(tmp_path / "step_1")


def test_a_manifest_of_another_format(tmp_path: Path) -> None:
    path = write(tmp_path, 1) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    with pytest.raises(ValueError, match="step_1 has format 1, this version of megasparse reads 2"):
        read_manifest(path.parent)


@pytest.mark.parametrize("content", [None, "a of", "a of 12", "b of 1"], ids=["gone", "short", "long", "other"])
def test_damage_is_named_and_the_one_before_offered(tmp_path: Path, content: str | None) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step)
    for step in (2, 10):
        path = tmp_path / f"step_{step}"
        (path / "a").unlink()
        if content is not None:
            (path / "a").write_text(content)
        with pytest.raises(Damaged, match=f"step_{step} is damaged: .*a.*"):
            verify(path, read_manifest(path))
    assert "--resume --checkpoint step_1" in whole_before(tmp_path / "step_10"), "step_2 is damaged as well"
    assert "no whole checkpoint" in whole_before(tmp_path / "step_1")


def test_only_the_asked_files_are_verified(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "a").write_text("A of 1")
    verify(path, read_manifest(path), ["b"])
    with pytest.raises(Damaged, match="SHA-256 of a "):
        verify(path, read_manifest(path), ["a"])


def test_keeps_the_newest(tmp_path: Path) -> None:
    """By number, not by name: step_10 is newer than step_9."""
    for step in (8, 9, 10, 11):
        write(tmp_path, step)
        prune(tmp_path, keep=2, keep_every=0, step=step)
    assert names_in(tmp_path) == ["latest", "step_10", "step_11"]


def test_keeps_every_mth_for_good(tmp_path: Path) -> None:
    for step in range(2, 25, 2):
        write(tmp_path, step)
        prune(tmp_path, keep=2, keep_every=8, step=step)
    assert names_in(tmp_path) == ["latest", "step_16", "step_22", "step_24", "step_8"]


def test_what_latest_names_is_never_pruned(tmp_path: Path) -> None:
    """A checkpoint of a higher step that the run never got to name (killed between rename and ``latest``)."""
    write(tmp_path, 12)
    write(tmp_path, 2)
    prune(tmp_path, keep=1, keep_every=0, step=2)
    assert latest(tmp_path) == tmp_path / "step_2"
    read_manifest(tmp_path / "step_2")
    assert names_in(tmp_path) == ["latest", "step_12", "step_2"]


def test_a_step_written_anew_replaces_the_old_one(tmp_path: Path) -> None:
    old = write(tmp_path, 12)
    (old / "a").write_text("old")
    checkpoints.set_latest(write(tmp_path, 2))
    assert (write(tmp_path, 12) / "a").read_text() == "a of 12"
    verify(old, read_manifest(old))


def test_what_latest_names_is_never_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    with pytest.raises(AssertionError):
        write(tmp_path, 2)
    verify(path, read_manifest(path))


def test_leftovers_go_and_strangers_stay(tmp_path: Path) -> None:
    write(tmp_path, 1)
    shutil.copytree(tmp_path / "step_1", tmp_path / "step_5.partial")
    shutil.copytree(tmp_path / "step_1", tmp_path / "step_0.removed")
    (tmp_path / "step_0_mine").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    prune(tmp_path, keep=1, keep_every=0, step=1)
    assert names_in(tmp_path) == ["latest", "notes.txt", "step_0_mine", "step_1"]
