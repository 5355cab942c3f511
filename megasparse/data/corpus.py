"""Where documents come from: the standard library of the running Python, or folders and files of text.

Documents are read in a fixed order, have stable names, and each belongs to training or validation by a hash of its
name: adding files never moves a document from one to the other.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

TEXT_SUFFIXES = (".txt", ".py", ".md")  # one document per file
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")  # one document per line
PARQUET_SUFFIXES = (".parquet",)  # one document per row
SUFFIXES = TEXT_SUFFIXES + JSONL_SUFFIXES + PARQUET_SUFFIXES

# Of the standard library: tests, other people's packages and files generated when this interpreter was built.
_STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_STDLIB_GENERATED = ("_sysconfigdata", "config-")
_TOPICS = "pydoc_data/topics"  # read as texts, not as the Python file that quotes them


class Document(NamedTuple):
    """One text and where it goes."""

    name: str  # path relative to its source; lines and rows add #number, counted from 1
    text: str
    validation: bool


class Scan(NamedTuple):
    """What one pass over a corpus found."""

    hash: str  # SHA-256 over (name, SHA-256 of text) in reading order
    documents: int
    characters: int
    utf8_bytes: int
    skipped: dict[str, int]  # reason -> documents left out
    validation_gzip9_bytes: int  # size of the concatenated held-out texts after gzip -9
    validation_xz_bytes: int  # and after xz (preset 6, its default)


class _Raw(NamedTuple):
    """A document as found; ``problem`` says why it is skipped."""

    name: str
    text: str
    problem: str | None = None


class Corpus:
    """The documents of ``sources`` (None: the standard library), re-read at each iteration.

    ``text_key`` is the field of JSON lines and parquet rows that holds the text. Raises ValueError if a source is
    missing or holds nothing readable, and while reading if a file is damaged or lacks the field.
    """

    def __init__(self, sources: list[Path] | None, text_key: str = "text", validation_fraction: float = 0.05) -> None:
        self.text_key = text_key
        self.validation_fraction = validation_fraction
        self.ignored_files = 0  # in folders: of a kind that is not read
        self._stdlib = sources is None
        self._files: list[tuple[str, Path]] = []  # (name, path) in reading order
        for source in [Path(sysconfig.get_path("stdlib"))] if sources is None else sources:
            self._files += self._find(source)

    def __iter__(self) -> Iterator[Document]:
        for raw in self._read():
            if raw.problem is None:
                yield Document(raw.name, raw.text, is_validation(raw.name, self.validation_fraction))

    def scan(self) -> Scan:
        """Read everything once: hash, counts and the compressed sizes of the held-out texts."""
        digest = hashlib.sha256()
        gzip, xz = zlib.compressobj(9, wbits=31), lzma.LZMACompressor(preset=6)
        gzip_bytes = xz_bytes = documents = characters = utf8_bytes = 0
        skipped: Counter[str] = Counter()
        for name, text, problem in self._read():
            if problem is not None:
                skipped[problem] += 1
                continue
            data = text.encode()
            digest.update(json.dumps([name, hashlib.sha256(data).hexdigest()]).encode())
            documents += 1
            characters += len(text)
            utf8_bytes += len(data)
            if is_validation(name, self.validation_fraction):
                gzip_bytes += len(gzip.compress(data))
                xz_bytes += len(xz.compress(data))
        gzip_bytes += len(gzip.flush())
        xz_bytes += len(xz.flush())
        return Scan(digest.hexdigest(), documents, characters, utf8_bytes, dict(skipped), gzip_bytes, xz_bytes)

    def _find(self, source: Path) -> list[tuple[str, Path]]:
        """The readable files of a source, in name order."""
        if source.is_file():
            if not source.name.endswith(SUFFIXES):
                raise ValueError(f"source {source} is of no known kind: give {' '.join(SUFFIXES)} or a folder of them")
            return [(source.name, source)]
        if not source.is_dir():
            raise ValueError(f"source {source} does not exist: give a folder or a file of {' '.join(SUFFIXES)}")
        found = []
        for folder, folders, names in os.walk(source):
            folders[:] = [f for f in folders if not f.startswith(".") and not (self._stdlib and _excluded(f))]
            for name in names:
                path = Path(folder, name)
                relative = path.relative_to(source).as_posix()
                if self._stdlib and (_excluded(name) or not name.endswith(".py") or relative == f"{_TOPICS}.py"):
                    continue
                if name.endswith(SUFFIXES):
                    found.append((relative, path))
                else:
                    self.ignored_files += 1
        if not found:
            raise ValueError(f"source {source} holds no readable file: {' '.join(SUFFIXES)} are read")
        return sorted(found)

    def _read(self) -> Iterator[_Raw]:
        """Every document in order, those to skip included."""
        for name, path in self._files:
            if name.endswith(JSONL_SUFFIXES):
                yield from _read_jsonl(name, path, self.text_key)
            elif name.endswith(PARQUET_SUFFIXES):
                yield from _read_parquet(name, path, self.text_key)
            else:
                yield _decode(name, path.read_bytes())
        if self._stdlib:
            from pydoc_data.topics import topics

            for topic in sorted(topics):
                yield _checked(f"{_TOPICS}#{topic}", topics[topic])


def is_validation(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out: a hash puts ``fraction`` of all names there."""
    return stable_fraction(name) < fraction


def stable_fraction(name: str) -> float:
    """A number in [0, 1) that is the same for a name on every machine, spread evenly over names."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _excluded(name: str) -> bool:
    return name in _STDLIB_EXCLUDED or name.startswith(_STDLIB_GENERATED)


def _decode(name: str, data: bytes) -> _Raw:
    """UTF-8 bytes as a document, line ends and byte-order mark kept."""
    try:
        return _checked(name, data.decode())
    except UnicodeDecodeError:
        return _Raw(name, "", "not UTF-8")


def _checked(name: str, text: str) -> _Raw:
    try:
        text.encode()  # JSON can hold lone surrogates, which are no text
    except UnicodeEncodeError:
        return _Raw(name, "", "not UTF-8")
    return _Raw(name, text, None if text else "empty")


def _read_jsonl(name: str, path: Path, text_key: str) -> Iterator[_Raw]:
    """One document per line of a plain or compressed file (pyarrow detects which by the suffix)."""
    try:
        with io.BufferedReader(pyarrow.input_stream(str(path))) as lines:  # type: ignore[arg-type]
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    yield _read_line(f"{name}#{number}", f"{path}, line {number}", line, text_key)
    except OSError as error:
        raise ValueError(f"{path} cannot be read to its end ({error}): replace the damaged file") from None


def _read_line(name: str, where: str, line: bytes, text_key: str) -> _Raw:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return _Raw(name, "", "not UTF-8")
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg}): repair the line or remove it") from None
    if not isinstance(record, dict) or text_key not in record:
        keys = f"keys {sorted(record)}" if isinstance(record, dict) else "no keys"
        raise ValueError(f"{where} has no {text_key!r} but {keys}: set text_key to the key that holds the text")
    return _text(name, where, record[text_key], text_key)


def _text(name: str, where: str, value: Any, text_key: str) -> _Raw:
    if not isinstance(value, (str, type(None))):
        raise ValueError(f"{where}: {text_key!r} is {type(value).__name__}, not text: set text_key to a text field")
    return _checked(name, value or "")


def _read_parquet(name: str, path: Path, text_key: str) -> Iterator[_Raw]:
    """One document per row."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if text_key not in file.schema_arrow.names:
            raise ValueError(
                f"{path} has no column {text_key!r} but {file.schema_arrow.names}: "
                "set text_key to the column that holds the text"
            )
        batches = file.iter_batches(batch_size=1024, columns=[text_key])
        values = (value for batch in batches for value in batch.column(0))
        for number, value in enumerate(values, start=1):
            try:
                text = value.as_py()
            except UnicodeDecodeError:
                yield _Raw(f"{name}#{number}", "", "not UTF-8")
            else:
                yield _text(f"{name}#{number}", f"{path}, row {number}", text, text_key)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}): replace the damaged file") from None
