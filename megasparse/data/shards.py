"""Documents -> shards of token ids, by any number of processes: the tokenise stage of ``prepare``.

A shard is one chunk of consecutive documents. Chunks depend on the documents alone and each shard is a file that is
whole or absent, so that a stage cut short goes on where it stopped and gives the same shards.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megasparse.data.corpus import Document
from megasparse.data.tokenizer import Tokenizer, load_tokenizer
from megasparse.files import written_aside

CHUNK_CHARACTERS = 1 << 20  # per shard: large enough that passing it to a process costs little

SPLITS = ("train", "validation")


class Part(NamedTuple):
    """The documents of one split in one shard."""

    ids: NDArray[np.integer]  # [tokens]: the documents' ids joined, an end-of-document id after each
    lengths: NDArray[np.int64]  # [documents]: tokens of each
    counts: NDArray[np.int64]  # [3]: UTF-8 bytes, lossy documents, UTF-8 bytes of lossy documents


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:08d}.npz"


def read_shard(path: Path, split: str) -> Part:
    """The part of a shard that belongs to ``split``."""
    with np.load(path) as arrays:
        return Part(*(arrays[f"{split}_{field}"] for field in Part._fields))


def tokenise(
    documents: Iterable[Document], tokenizer_folder: Path, folder: Path, dtype: str, workers: int
) -> Iterator[int]:
    """Write the shards of ``documents`` into ``folder``, those already there excepted.

    Yields, shard by shard in order, the characters tokenised. ``dtype`` is numpy's name for the ids' type.
    """
    if workers == 1:
        tokenizer = load_tokenizer(tokenizer_folder)
        for path, chunk in _chunks(documents, folder):
            if not path.exists():
                _write_shard(path, chunk, tokenizer, dtype)
            yield _characters(chunk)
        return
    # spawn: the caller may hold threads, which a forked process would not survive
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        pending: deque[tuple[int, Future[None]]] = deque()
        try:
            for path, chunk in _chunks(documents, folder):
                if path.exists():
                    yield _characters(chunk)
                    continue
                pending.append((_characters(chunk), pool.submit(_work, path, chunk, tokenizer_folder, dtype)))
                if len(pending) > 2 * workers:  # read ahead only as far as keeps every process busy
                    yield _finish(*pending.popleft())
            while pending:
                yield _finish(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _finish(characters: int, shard: Future[None]) -> int:
    shard.result()  # raises what its process raised
    return characters


def _work(path: Path, documents: list[Document], tokenizer_folder: Path, dtype: str) -> None:
    """What a process of the pool runs."""
    _write_shard(path, documents, _cached_tokenizer(tokenizer_folder), dtype)


@lru_cache(maxsize=1)
def _cached_tokenizer(folder: Path) -> Tokenizer:
    """Read once per process of the pool, not once per shard."""
    return load_tokenizer(folder)


def _write_shard(path: Path, documents: list[Document], tokenizer: Tokenizer, dtype: str) -> None:
    arrays = {}
    for split in SPLITS:
        texts = [d.text for d in documents if d.validation == (split == "validation")]
        part = _encode(texts, tokenizer, dtype)
        arrays |= {f"{split}_{field}": array for field, array in part._asdict().items()}
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, **arrays)


def _encode(texts: list[str], tokenizer: Tokenizer, dtype: str) -> Part:
    """Encode each text and check that decoding gives it back."""
    ids, lengths = [], []
    utf8_bytes = lossy = lossy_bytes = 0
    for text in texts:
        encoded = tokenizer.encode(text)
        size = len(text.encode())
        utf8_bytes += size
        if tokenizer.decode(encoded) != text:
            lossy += 1
            lossy_bytes += size
        encoded.append(tokenizer.eod)
        ids.append(np.array(encoded, dtype=dtype))
        lengths.append(len(encoded))
    joined = np.concatenate(ids) if ids else np.zeros(0, dtype=dtype)
    return Part(joined, np.array(lengths, dtype=np.int64), np.array([utf8_bytes, lossy, lossy_bytes], dtype=np.int64))


def _chunks(documents: Iterable[Document], folder: Path) -> Iterator[tuple[Path, list[Document]]]:
    """Consecutive documents, with the shard they become."""
    chunk: list[Document] = []
    index = characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS:
            yield shard_path(folder, index), chunk
            chunk, index, characters = [], index + 1, 0
    if chunk:
        yield shard_path(folder, index), chunk


def _characters(documents: list[Document]) -> int:
    return sum(len(d.text) for d in documents)


def _end_with_parent() -> None:
    """End this process when the one that started it dies, even of SIGKILL: nobody would read its work."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
