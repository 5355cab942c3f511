from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import models, pre_tokenizers

from megasparse.data import prepare as module
from megasparse.data import shards
from megasparse.data.corpus import Corpus
from megasparse.data.manifest import Manifest
from megasparse.data.prepare import PrepareConfig, prepare
from megasparse.data.tokenizer import load_tokenizer

from .conftest import MakeSet, sentences, write_texts


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """About twenty shards for sixty short documents."""
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 500)


def configure(tmp_path: Path, output: str = "set", **changes: object) -> PrepareConfig:
    """60 short texts, 20% held out."""
    source = tmp_path / "texts"
    if not source.exists():
        write_texts(source, sentences(seed=1))
    return PrepareConfig.model_validate(
        {"output": tmp_path / output, "sources": [source], "vocab_size": 330, "validation_fraction": 0.2, "workers": 1}
        | changes
    )


def content(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_every_document_is_there_with_its_end(tmp_path: Path, small_chunks: None):
    config = configure(tmp_path)
    manifest = prepare(config)
    tokenizer = load_tokenizer(config.output)
    corpus = list(Corpus(config.sources, validation_fraction=0.2))
    assert manifest.validation is not None
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        texts = [d.text for d in corpus if d.validation == (name == "validation")]
        tokens = IndexedDataset(str(config.output / name))
        documents = [tokens[i].tolist() for i in range(len(tokens))]
        assert [tokenizer.decode(ids[:-1]) for ids in documents] == texts
        assert all(ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1] for ids in documents)
        assert tokens.document_indices.tolist() == list(range(len(texts) + 1))
        assert split.documents == len(texts) > 5
        assert split.tokens == sum(map(len, documents))
        assert split.utf8_bytes == sum(len(text.encode()) for text in texts)
        assert split.lossy_documents == split.lossy_utf8_bytes == 0
        for kind, size, digest in (
            ("bin", split.bin_bytes, split.bin_sha256),
            ("idx", split.idx_bytes, split.idx_sha256),
        ):
            data = (config.output / f"{name}.{kind}").read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)
    assert manifest.tokenizer_hash == tokenizer.hash
    assert (manifest.vocab_size, manifest.eod, manifest.dtype) == (330, tokenizer.eod, "uint16")
    assert manifest == Manifest.model_validate_json((config.output / "manifest.json").read_bytes())
    assert sorted(p.name for p in config.output.iterdir()) == sorted(
        ["manifest.json", "tokenizer.model", "train.bin", "train.idx", "validation.bin", "validation.idx"]
    )


def test_any_number_of_processes_gives_the_same(tmp_path: Path, small_chunks: None):
    for workers in (1, 2):
        prepare(configure(tmp_path, output=f"set{workers}", workers=workers))
    assert content(tmp_path / "set1") == content(tmp_path / "set2")


def test_killed_and_run_again_is_never_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 100_000)
    write_texts(tmp_path / "texts", sentences(seed=1, documents=500, longest=3000))
    config = configure(tmp_path, output="killed", workers=2)
    program = (
        "from megasparse.data import prepare, shards\n"
        "shards.CHUNK_CHARACTERS = 100_000\n"
        f"config = prepare.PrepareConfig.model_validate_json({config.model_dump_json()!r})\n"
        "if __name__ == '__main__': prepare.prepare(config)\n"
    )
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py")], env=environment)
    written = config.output / ".work" / "shards"
    deadline = time.monotonic() + 60
    while len(list(written.glob("*.npz"))) < 3:
        assert process.poll() is None, "prepare ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (config.output / "manifest.json").exists()
    time.sleep(0.5)  # its processes end with it
    kept = set(written.glob("*.npz"))

    built: set[Path] = set()
    write = shards._write_shard
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", lambda path, *rest: (built.add(path), write(path, *rest)))
        prepare(configure(tmp_path, output="killed"))
    assert len(kept) >= 3
    assert built
    assert not built & kept
    prepare(configure(tmp_path, output="whole"))
    assert content(config.output) == content(tmp_path / "whole")


def test_stopped_at_any_rename_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 2000)
    whole = prepare(configure(tmp_path, output="whole"))
    rename = os.replace
    limit, finished = 0, False
    while not finished:
        limit += 1
        calls = 0

        def stop(source: Path, target: Path, limit: int = limit) -> None:
            nonlocal calls
            calls += 1
            if calls == limit:
                raise KeyboardInterrupt
            rename(source, target)

        config = configure(tmp_path, output=f"stopped{limit}")
        monkeypatch.setattr(os, "replace", stop)
        try:
            prepare(config)
            finished = True
        except KeyboardInterrupt:
            assert not (config.output / "manifest.json").exists()
        finally:
            monkeypatch.setattr(os, "replace", rename)
        assert prepare(config) == whole
        assert content(config.output) == content(tmp_path / "whole")
    assert 10 < limit < 100


def test_second_call_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = configure(tmp_path)
    first = prepare(config)
    times = {path: path.stat().st_mtime_ns for path in config.output.iterdir()}
    capsys.readouterr()
    assert prepare(config) == first
    assert "nothing to do" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in config.output.iterdir()}


def test_other_settings_are_refused_unless_overwrite(tmp_path: Path, make_set: MakeSet):
    config = configure(tmp_path)
    prepare(config)
    with pytest.raises(ValueError, match=r"set with vocab_size=330, not 340: name another folder or set overwrite"):
        prepare(configure(tmp_path, vocab_size=340))
    with pytest.raises(ValueError, match=r"validation_fraction=0.2, not 0.3"):
        prepare(configure(tmp_path, validation_fraction=0.3))
    with pytest.raises(ValueError, match=r"tokenizer=sentencepiece, not [0-9a-f]{64}"):
        prepare(configure(tmp_path, tokenizer=str(make_set(seed=2) / "tokenizer.model")))
    assert prepare(configure(tmp_path, vocab_size=340, overwrite=True)).vocab_size == 340
    assert prepare(configure(tmp_path, vocab_size=340)).vocab_size == 340
    prepare(configure(tmp_path, output="new", vocab_size=340))
    assert content(config.output) == content(tmp_path / "new")

    (tmp_path / "texts" / "more.txt").write_text("one more")
    with pytest.raises(ValueError, match=r"corpus_hash=.*, not .*: name another folder"):
        prepare(configure(tmp_path, vocab_size=340))


def test_other_content_of_the_folder_is_refused(tmp_path: Path):
    config = configure(tmp_path)
    config.output.mkdir()
    (config.output / "thesis.doc").write_text("do not touch")
    with pytest.raises(ValueError, match=r"holds other files: name another folder"):
        prepare(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output .*file is a file: name a folder"):
        prepare(configure(tmp_path, output="file"))


def test_damaged_set_is_not_taken_for_finished(tmp_path: Path):
    config = configure(tmp_path)
    prepare(config)
    (config.output / "train.bin").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"train.bin has 3 bytes, not .* \(set overwrite"):
        prepare(config)
    prepare(configure(tmp_path, overwrite=True))
    prepare(configure(tmp_path, output="new"))
    assert content(config.output) == content(tmp_path / "new")


def test_interrupted_run_with_other_settings_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "_merge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(configure(tmp_path, vocab_size=350))
    assert (tmp_path / "set" / ".work" / "shards").is_dir()
    assert prepare(configure(tmp_path)).vocab_size == 330
    prepare(configure(tmp_path, output="new"))
    assert content(tmp_path / "set") == content(tmp_path / "new")


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_is_reported_and_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = (shards, "_write_shard") if workers == 1 else (shards, "_finish")
    monkeypatch.setattr(*target, full)
    with pytest.raises(ValueError, match=r"the disk of output .*set is full: free space and run again"):
        prepare(configure(tmp_path, workers=workers))
    monkeypatch.undo()
    assert not (tmp_path / "set" / "manifest.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    prepare(configure(tmp_path))
    prepare(configure(tmp_path, output="new"))
    assert content(tmp_path / "set") == content(tmp_path / "new")


def test_lossy_documents_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = configure(tmp_path)
    lossy = ["block \u2581 here", "\u2581"]
    write_texts(tmp_path / "texts" / "lossy", lossy)
    manifest = prepare(config)
    assert manifest.validation is not None
    assert manifest.train.lossy_documents + manifest.validation.lossy_documents == 2
    assert manifest.train.lossy_utf8_bytes + manifest.validation.lossy_utf8_bytes == len("".join(lossy).encode())
    assert "does not give back exactly" in capsys.readouterr().out


def test_splits_that_would_be_empty(tmp_path: Path):
    (tmp_path / "one.txt").write_text("only one document")
    with pytest.raises(ValueError, match=r"no document fell to validation: .*change validation_fraction"):
        prepare(configure(tmp_path, sources=[tmp_path / "one.txt"], vocab_size=275))
    manifest = prepare(configure(tmp_path, sources=[tmp_path / "one.txt"], vocab_size=275, validation_fraction=0))
    assert manifest.validation is None
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"no document to use \(skipped: \{'empty': 1\}\)"):
        prepare(configure(tmp_path, sources=[tmp_path / "empty.txt"]))


def test_given_tokenizer_with_more_ids_than_fit_16_bits(tmp_path: Path):
    words = {f"w{i}": i for i in range(70_000)} | {"<end>": 70_000}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_texts(tmp_path / "texts", [f"w{i} w69999 w65536" for i in range(20)])
    config = configure(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), eod_token="<end>", workers=2)
    manifest = prepare(config)
    assert (manifest.vocab_size, manifest.eod, manifest.dtype) == (70_001, 70_000, "int32")
    tokens = IndexedDataset(str(config.output / "train"))
    assert all(tokens[i].tolist()[1:] == [69_999, 65_536, 70_000] for i in range(len(tokens)))
    assert load_tokenizer(config.output).hash == manifest.tokenizer_hash
    with pytest.raises(ValueError, match=r"eod_token='<end>' is for a given tokenizer.json"):
        prepare(configure(tmp_path, output="other", eod_token="<end>"))
