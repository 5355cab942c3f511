"""A folder is written a file at a time, and is there when all of it is."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import shutil
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

import pytest
import torch

from megasparse.checkpoint.hf import output as module
from megasparse.checkpoint.hf.output import CHUNK, JOURNAL, ChunkedFile, File, Output, hash_along
from tests.checkpoint.hf.conversion import quiet
from tests.helpers import files_of_at_most

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
    rng, whole, memory, ended = random.Random(0), bytearray(), bytearray(3 * CHUNK), Event()
    with ThreadPoolExecutor(1) as thread, ChunkedFile(tmp_path / "x") as stream:
        hashed = thread.submit(hash_along, tmp_path / "x", ended)
        try:
            for longest in (1, 10, 10_000, len(memory)) * 10:
                size = rng.randrange(longest)
                memory[:size] = rng.randbytes(size)
                assert stream.write(memoryview(memory)[:size]) == size
                whole += memory[:size]
                assert stream.write(b"xy") == 2
                whole += b"xy"
                assert stream.tell() == len(whole)
                assert (tmp_path / "x").read_bytes() == whole
            assert not hashed.done()
        finally:
            ended.set()
        assert hashed.result() == hashlib.sha256(whole).hexdigest()


def test_a_disk_that_takes_a_part(tmp_path: Path) -> None:
    """A system call may write less than it was given: the rest follows, or the disk is full."""
    with files_of_at_most(CHUNK + 5), ChunkedFile(tmp_path / "x") as stream, pytest.raises(OSError, match="too large"):
        stream.write(b"x" * 2 * CHUNK)
    assert (tmp_path / "x").stat().st_size == CHUNK + 5


def test_torch_has_its_threads_again(tmp_path: Path) -> None:
    before, within = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        Output(tmp_path / "folder", IDENTITY).write(
            [File("a", 0, lambda _: within.append(torch.get_num_threads()))], quiet()
        )
        with pytest.raises(ValueError, match="not finite"):
            Output(tmp_path / "folder", {}).write([file("a", fails=ValueError("not finite"))], quiet())
        assert (within, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


def test_nothing_is_there_before_it_is_published(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "folder"
    output = Output(final, IDENTITY)
    assert not final.parent.exists(), "nothing is made before there is something to write"
    written = output.write([file("a", b"aa", about={"x": [1]}), file("b", b"b")], quiet())
    assert not final.exists()
    digest = hashlib.sha256(b"aa").hexdigest()
    assert written["a"] == {"bytes": 2, "sha256": digest, "about": {"x": [1]}}
    assert list(written) == ["a", "b"]
    output.publish()
    assert {path.name: path.read_bytes() for path in final.iterdir()} == {"a": b"aa", "b": b"b"}
    assert not output.partial.exists()
    with pytest.raises(ValueError, match=r"folder is there already: choose another folder or delete it"):
        Output(final, IDENTITY)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 90, 10))
    output = Output(tmp_path / "folder", IDENTITY)
    with pytest.raises(ValueError, match=r"no room for .*folder: 11 bytes are needed, 10 are free there"):
        output.write([file("a", b"x" * 6), file("b", b"x" * 5)], quiet())
    assert not output.final.exists()
    assert list(output.partial.iterdir()) == []
    output.write([file("a", b"x" * 6)], quiet())
    output.write([file("a", b"x" * 6), file("b", b"x" * 5)], quiet())  # what is there needs none


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_disk_that_refuses(tmp_path: Path, code: int) -> None:
    """What was done before is kept; the next run goes on there."""
    final = tmp_path / "folder"
    fails = OSError(code, "the disk says so")
    with pytest.raises(ValueError, match=r"could not write .*folder\.partial: the disk says so; run the same command"):
        Output(final, IDENTITY).write([file("a", b"aa", 7), file("b", fails=fails), file("c")], quiet())
    assert not final.exists()
    again = Output(final, IDENTITY)
    assert set(again.done) == {"a"}
    before = (again.partial / "a").stat().st_mtime_ns
    unused = AssertionError("it is there")
    written = again.write([file("a", fails=unused), file("b", b"b"), file("c", b"c")], quiet())
    assert (again.partial / "a").stat().st_mtime_ns == before
    assert written["a"] == {"bytes": 2, "sha256": hashlib.sha256(b"aa").hexdigest(), "about": 7}
    again.publish()
    assert sorted(path.name for path in final.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("call", ["sync", "write_atomic"])
def test_a_disk_that_refuses_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, call, refuse)
    with pytest.raises(ValueError, match="No space left on device"):
        Output(tmp_path / "folder", IDENTITY).write([file("a")], quiet())
    monkeypatch.undo()
    assert Output(tmp_path / "folder", IDENTITY).done == {}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="could not write"):
        Output(tmp_path / "file" / "folder", IDENTITY).write([file("a")], quiet())


@pytest.mark.parametrize("change", [lambda journal: {**journal, "identity": {"source": "b"}}, lambda _: {}])
def test_what_another_run_left_is_thrown_away(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    first = Output(tmp_path / "folder", IDENTITY)
    first.write([file("a", b"aa")], quiet())
    journal = first.partial / JOURNAL
    changed = change(json.loads(journal.read_text()))
    journal.write_text(json.dumps(changed)) if changed else journal.unlink()
    second = Output(tmp_path / "folder", IDENTITY)
    assert second.done == {}
    assert not second.partial.exists()


def test_the_same_identity_in_json(tmp_path: Path) -> None:
    """Tuples and lists are one there."""
    Output(tmp_path / "folder", IDENTITY).write([file("a", b"aa")], quiet())
    assert set(Output(tmp_path / "folder", {"source": "a", "list": [1, 2]}).done) == {"a"}
