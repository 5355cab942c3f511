from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megasparse.data.corpus import Corpus, is_validation

TEXTS = ["first\n\ttext ", "zweiter Text: Öl", "三", "  four\r\n"]


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(texts))


def write(path: Path, texts: list[str]) -> Path:
    """Texts as JSON lines, plain or compressed, or as parquet, by the suffix."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(jsonl(texts)))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(jsonl(texts)))
    else:
        path.write_bytes(jsonl(texts))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_line_or_row_is_a_document(tmp_path: Path, name: str):
    documents = list(Corpus([write(tmp_path / name, TEXTS)]))
    assert [d.text for d in documents] == TEXTS
    assert [d.name for d in documents] == [f"{name}#{i}" for i in range(1, 5)]


def test_folder_is_read_in_name_order(tmp_path: Path):
    (tmp_path / "b" / ".hidden").mkdir(parents=True)
    (tmp_path / "b" / ".hidden" / "x.txt").write_text("not read")
    (tmp_path / "b" / "z.md").write_bytes(b"\xef\xbb\xbfmark\r\n")
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    write(tmp_path / "c.jsonl", ["line"])
    corpus = Corpus([tmp_path])
    assert [(d.name, d.text) for d in corpus] == [
        ("a.py", "x = 1\n"),
        ("b/z.md", "\ufeffmark\r\n"),
        ("c.jsonl#1", "line"),
    ]
    assert corpus.ignored_files == 1


def test_unusable_documents_are_counted(tmp_path: Path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("Öl".encode("latin-1"))
    (tmp_path / "nothing.txt").write_bytes(b"")
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\\ud800"}\n\n{"text": "\xff"}\n{"text": null}\n{"text": "fine"}\n')
    corpus = Corpus([tmp_path])
    scan = corpus.scan()
    assert scan.skipped == {"not UTF-8": 3, "empty": 2}
    assert scan.documents == len(list(corpus)) == 2
    assert [d.name for d in corpus] == ["good.txt", "x.jsonl#5"]


def test_scan_counts_and_compressed_sizes(tmp_path: Path):
    write(tmp_path / "a.jsonl", [f"text number {i}, held out or not ö" for i in range(200)])
    corpus = Corpus([tmp_path], validation_fraction=0.3)
    scan = corpus.scan()
    held_out = b"".join(d.text.encode() for d in corpus if d.validation)
    assert len(held_out) > 1000
    assert scan.validation_gzip9_bytes == len(gzip.compress(held_out, 9))
    assert scan.validation_xz_bytes == len(lzma.compress(held_out))  # Python's default, as xz's, is preset 6
    assert scan.utf8_bytes == sum(len(d.text.encode()) for d in corpus)
    assert scan.characters == sum(len(d.text) for d in corpus)


def test_hash_depends_on_names_and_texts(tmp_path: Path):
    def corpus_hash(name: str, text: str) -> str:
        folder = tmp_path / f"{name}-{text}"
        folder.mkdir()
        (folder / name).write_text(text)
        (folder / "other.txt").write_text("other")
        return Corpus([folder]).scan().hash

    hashes = [corpus_hash("a.txt", "x"), corpus_hash("a.txt", "y"), corpus_hash("b.txt", "x")]
    assert len(set(hashes)) == 3
    assert Corpus([tmp_path / "a.txt-x"]).scan().hash == hashes[0]


def test_split_is_stable_and_near_its_fraction():
    names = [f"folder/file{i}.py" for i in range(20_000)]
    held_out = [name for name in names if is_validation(name, 0.05)]
    assert 0.045 < len(held_out) / len(names) < 0.055
    assert held_out[:3] == ["folder/file6.py", "folder/file20.py", "folder/file62.py"]  # for ever
    assert all(is_validation(name, 0.2) for name in held_out)
    assert not any(is_validation(name, 0) for name in names)


def test_standard_library():
    corpus = Corpus(None)
    documents = list(corpus)
    names = [d.name for d in documents]
    assert len(set(names)) == len(names)
    assert {"argparse.py", "asyncio/events.py", "pydoc_data/topics#assert"} <= set(names)
    assert "pydoc_data/topics.py" not in names  # its texts are documents already
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    scan = corpus.scan()
    assert scan == Corpus(None).scan()
    assert 8e6 < scan.utf8_bytes < 20e6
    assert 0.02 < sum(len(d.text) for d in documents if d.validation) / scan.characters < 0.10


def damaged(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-20])
    return path


def test_wrong_sources_are_refused_by_name(tmp_path: Path):
    def refuses(source: Path, *words: str, text_key: str = "text") -> None:
        with pytest.raises(ValueError, match=source.name) as error:
            list(Corpus([source], text_key))
        message = str(error.value)
        assert "\n" not in message
        assert all(word in message for word in words), message

    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "missing", "does not exist")
    refuses(tmp_path / "empty", "no readable file")
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    refuses(tmp_path / "a.pdf", "no known kind", ".jsonl")
    many = [f"{i * i} documents" for i in range(5000)]
    refuses(damaged(write(tmp_path / "cut.jsonl.gz", many)), "damaged")
    refuses(damaged(write(tmp_path / "cut.jsonl.zst", many)), "damaged")
    refuses(damaged(write(tmp_path / "cut.parquet", many)), "damaged")
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": \n')
    refuses(tmp_path / "bad.jsonl", "line 2", "not JSON")
    (tmp_path / "list.jsonl").write_bytes(b"[1]\n")
    refuses(tmp_path / "list.jsonl", "line 1", "'text'")
    (tmp_path / "number.jsonl").write_bytes(b'{"text": 5}\n')
    refuses(tmp_path / "number.jsonl", "line 1", "int, not text")
    refuses(write(tmp_path / "key.jsonl", TEXTS), "no 'content'", "['id', 'text']", text_key="content")
    refuses(write(tmp_path / "key.parquet", TEXTS), "no column 'content'", "['text']", text_key="content")
