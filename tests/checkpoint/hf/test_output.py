"""A folder is written a file at a time, and is there when all of it is."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

import pytest
import torch

from megasparse.checkpoint.hf import output as module
from megasparse.checkpoint.hf.output import CHUNK, JOURNAL, LOCK, ChunkedFile, File, hash_along, opened
from tests.checkpoint.hf.conversion import quiet
from tests.helpers import REPOSITORY, files_of_at_most

IDENTITY = {"source": "a", "list": (1, 2)}
Usage = namedtuple("Usage", "total used free")


def file(name: str, content: bytes = b"content", about: Any = None, fails: BaseException | None = None) -> File:
    def write(stream: BinaryIO) -> Any:
        stream.write(content)
        if fails is not None:
            raise fails
        return about

    return File(name, len(content), write)


def test_what_is_written_is_there_and_hashed_meanwhile(tmp_path: Path) -> None:
    """Of bytes and of views of memory that is used again; more at once than goes to the disk at once."""
    rng, whole, memory, ended, sizes = random.Random(0), bytearray(), bytearray(3 * CHUNK), Event(), []
    with ThreadPoolExecutor(1) as thread, ChunkedFile(tmp_path / "x", sizes.append) as stream:
        hashed = thread.submit(hash_along, tmp_path / "x", ended)
        try:
            for longest in (1, 10, 10_000, len(memory)) * 10:
                size = rng.randrange(longest)
                memory[:size] = rng.randbytes(size)
                assert stream.write(memoryview(memory)[:size]) == size
                whole += memory[:size]
                assert stream.write(b"xy") == 2
                whole += b"xy"
                assert stream.tell() == len(whole) == sum(sizes)
                assert (tmp_path / "x").read_bytes() == whole
            assert not hashed.done()
        finally:
            ended.set()
        assert hashed.result() == hashlib.sha256(whole).hexdigest()


def test_a_disk_that_takes_a_part(tmp_path: Path) -> None:
    """A system call may write less than it was given: the rest follows, or the disk is full."""
    with files_of_at_most(CHUNK + 5), ChunkedFile(tmp_path / "x", id) as stream, pytest.raises(OSError, match="large"):
        stream.write(b"x" * 2 * CHUNK)
    assert (tmp_path / "x").stat().st_size == CHUNK + 5


def written(final: Path, *files: File, identity: Any = IDENTITY) -> dict[str, dict[str, Any]]:
    """By a run that stops before it publishes."""
    with opened(final, identity) as output:
        return output.write(list(files), quiet())


def done(final: Path, identity: Any = IDENTITY) -> set[str]:
    """What another run finds."""
    with opened(final, identity) as output:
        return set(output.done)


def test_torch_has_its_threads_again(tmp_path: Path) -> None:
    before, within = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        written(tmp_path / "folder", File("a", 0, lambda _: within.append(torch.get_num_threads())))
        with pytest.raises(ValueError, match="not finite"):
            written(tmp_path / "folder", file("b", fails=ValueError("not finite")))
        assert (within, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


def test_nothing_is_there_before_it_is_published(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "folder"
    with opened(final, IDENTITY) as output:
        found = output.write([file("a", b"aa", about={"x": [1]}), file("b", b"b")], quiet())
        assert not final.exists()
        digest = hashlib.sha256(b"aa").hexdigest()
        assert found["a"] == {"bytes": 2, "sha256": digest, "about": {"x": [1]}}
        assert list(found) == ["a", "b"]
        output.publish()
    assert {path.name: path.read_bytes() for path in final.iterdir()} == {"a": b"aa", "b": b"b"}
    assert not output.partial.exists()
    with pytest.raises(ValueError, match=r"folder is there already: choose another folder or delete it"):
        written(final)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 90, 10))
    final = tmp_path / "folder"
    with pytest.raises(ValueError, match=r"no room for .*folder: 11 bytes are needed, 10 are free there"):
        written(final, file("a", b"x" * 6), file("b", b"x" * 5))
    assert not final.exists()
    assert done(final) == set()
    written(final, file("a", b"x" * 6))
    written(final, file("a", b"x" * 6), file("b", b"x" * 5))  # what is there needs none


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_disk_that_refuses(tmp_path: Path, code: int) -> None:
    """What was done before is kept; the next run goes on there."""
    final = tmp_path / "folder"
    fails = OSError(code, "the disk says so")
    with pytest.raises(ValueError, match=r"could not write .*folder\.partial: the disk says so; run the same command"):
        written(final, file("a", b"aa", 7), file("b", fails=fails), file("c"))
    assert not final.exists()
    with opened(final, IDENTITY) as again:
        assert set(again.done) == {"a"}
        before = (again.partial / "a").stat().st_mtime_ns
        unused = AssertionError("it is there")
        found = again.write([file("a", fails=unused), file("b", b"b"), file("c", b"c")], quiet())
        assert (again.partial / "a").stat().st_mtime_ns == before
        assert found["a"] == {"bytes": 2, "sha256": hashlib.sha256(b"aa").hexdigest(), "about": 7}
        again.publish()
    assert sorted(path.name for path in final.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("call", ["sync", "write_atomic"])
def test_a_disk_that_refuses_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "the/file")

    monkeypatch.setattr(module, call, refuse)
    with pytest.raises(ValueError, match=r"No space left on device \(the/file\)"):
        written(tmp_path / "folder", file("a"))
    monkeypatch.undo()
    assert done(tmp_path / "folder") == set()


def test_a_disk_that_refuses_what_goes_along(tmp_path: Path) -> None:
    """Between the files and their publishing, too."""
    with (
        pytest.raises(ValueError, match=r"could not write .*: No such file"),
        opened(tmp_path / "a", IDENTITY) as output,
    ):
        (output.partial / "missing" / "file").write_text("")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="could not write"):
        written(tmp_path / "file" / "folder", file("a"))


@pytest.mark.parametrize("change", [lambda journal: {**journal, "identity": {"source": "b"}}, lambda _: {}])
def test_what_another_run_left_is_thrown_away(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    final, partial = tmp_path / "folder", tmp_path / "folder.partial"
    written(final, file("a", b"aa"))
    (partial / "within").mkdir()
    (partial / "within" / "b").write_text("")
    changed = change(json.loads((partial / JOURNAL).read_text()))
    (partial / JOURNAL).write_text(json.dumps(changed)) if changed else (partial / JOURNAL).unlink()
    assert done(final) == set()
    assert [path.name for path in partial.iterdir()] == [LOCK]


def test_what_is_not_of_a_conversion_is_kept(tmp_path: Path) -> None:
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial" / "thesis").write_text("years")
    with pytest.raises(ValueError, match=r"folder\.partial is there, and not of a conversion: choose another folder"):
        written(tmp_path / "folder", file("a"))
    assert (tmp_path / "folder.partial" / "thesis").read_text() == "years"


def test_one_at_a_time(tmp_path: Path) -> None:
    """The second is told, whatever it would write, and takes nothing from the first; one that was killed is no one."""
    final = tmp_path / "folder"
    script = f"""
import sys, time
from pathlib import Path
from megasparse.checkpoint.hf.output import opened
with opened(Path({str(final)!r}), {{}}):
    print("open", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=REPOSITORY) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"open\n"
            for identity in ({}, IDENTITY):
                with pytest.raises(ValueError, match=r"another conversion is writing .*folder\.partial: wait for it"):
                    written(final, file("a"), identity=identity)
        finally:
            other.kill()
    written(final, file("a"))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, "the disk says so")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert set(written(tmp_path / "folder", file("a"))) == {"a"}
    code = errno.EIO
    with pytest.raises(ValueError, match=r"could not write .*: the disk says so"):
        written(tmp_path / "folder", file("a"))


def test_the_same_identity_in_json(tmp_path: Path) -> None:
    """Tuples and lists are one there."""
    written(tmp_path / "folder", file("a", b"aa"))
    assert done(tmp_path / "folder", {"source": "a", "list": [1, 2]}) == {"a"}
