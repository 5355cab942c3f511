"""What ``prepare`` records about a data set, and the checks made before one is read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megasparse.data.tokenizer import Tokenizer, load_tokenizer

MANIFEST_FILE = "manifest.json"


class Record(BaseModel):
    """A part of the manifest: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Split(Record):
    """Training or held-out documents, as ``<name>.bin`` and ``<name>.idx``."""

    documents: int
    tokens: int  # with one end-of-document token per document
    utf8_bytes: int  # of the texts, without separators
    lossy_documents: int  # decode(encode(text)) != text
    lossy_utf8_bytes: int  # size of those documents
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


class HeldOut(Split):
    """Held-out documents, and what general compressors make of their concatenation."""

    gzip9_bytes: int  # gzip -9
    xz_bytes: int  # xz, preset 6 (its default)


class Settings(Record):
    """What decides the content of a data set: equal settings give equal files."""

    corpus_hash: str
    tokenizer: str  # "sentencepiece", or the hash of the tokenizer given
    vocab_size: int | None  # asked of SentencePiece; None: the tokenizer was given
    validation_fraction: float


class Manifest(Record):
    """The content of ``manifest.json``, written last: a folder without it is not a data set."""

    format: Literal[1] = 1
    settings: Settings
    sources: list[str]
    text_key: str
    skipped: dict[str, int]  # reason -> documents left out
    ignored_files: int  # of a kind that is not read
    tokenizer_hash: str
    vocab_size: int
    eod: int
    dtype: Literal["uint16", "int32"]
    train: Split
    validation: HeldOut | None  # None: validation_fraction was 0
    versions: dict[str, str]


def read_manifest(folder: Path) -> Manifest:
    """Read and check a data set's manifest and file sizes.

    Raises ValueError naming the file if it is missing, foreign, or not of the size recorded.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a finished data set (no {MANIFEST_FILE}): run megasparse prepare") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path} is not a manifest of this version ({field}: {first['msg']}): prepare again") from None
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        if split is not None:
            _check_size(folder / f"{name}.bin", split.bin_bytes)
            _check_size(folder / f"{name}.idx", split.idx_bytes)
    return manifest


def read_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The data set's own tokenizer; ValueError if it is not the one that made the tokens."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.hash != manifest.tokenizer_hash:
        raise ValueError(f"the tokenizer in {folder} is not the one that made its tokens: prepare the data set again")
    return tokenizer


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy the whole folder or prepare it again")
    if (size := path.stat().st_size) != expected:
        raise ValueError(f"{path} has {size} bytes, not the {expected} of its manifest: copy or prepare it again")
