"""The tokenise stage: shards against a plain loop over the documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megasparse.data import shards
from megasparse.data.corpus import Document
from megasparse.data.manifest import read_manifest, read_tokenizer

TEXTS = ["alpha\n", "", "beta gamma\n\tdelta", "x = '\u2581'\n", "é" * 50, "last"]


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch) -> list[Document]:
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 12)  # several shards
    return [Document(name=str(i), text=text, validation=i % 3 == 2) for i, text in enumerate(TEXTS)]


def test_shards_hold_every_document_in_order(small_set: Path, documents: list[Document], tmp_path: Path):
    done = list(shards.tokenise(documents, small_set, tmp_path, "uint16", workers=1))
    assert sum(done) == sum(len(text) for text in TEXTS)
    assert len(done) > 1
    tokenizer = read_tokenizer(small_set, read_manifest(small_set))
    for split in shards.SPLITS:
        parts = [shards.read_shard(shards.shard_path(tmp_path, i), split) for i in range(len(done))]
        chosen = [d.text for d in documents if d.validation == (split == "validation")]
        expected = [[*tokenizer.encode(text), tokenizer.eod] for text in chosen]
        assert np.concatenate([p.ids for p in parts]).tolist() == [i for ids in expected for i in ids]
        assert np.concatenate([p.lengths for p in parts]).tolist() == [len(ids) for ids in expected]
        lossy = [text for text in chosen if tokenizer.decode(tokenizer.encode(text)) != text]
        sizes = [len(text.encode()) for text in chosen], [len(text.encode()) for text in lossy]
        assert sum(p.counts for p in parts).tolist() == [sum(sizes[0]), len(lossy), sum(sizes[1])]


def test_shards_already_there_are_kept(small_set: Path, documents: list[Document], tmp_path: Path):
    first = shards.tokenise(documents, small_set, tmp_path, "uint16", workers=1)
    next(first)  # stopped after one shard
    kept = shards.shard_path(tmp_path, 0)
    before = kept.stat().st_mtime_ns
    list(shards.tokenise(documents, small_set, tmp_path, "uint16", workers=1))
    assert kept.stat().st_mtime_ns == before
    assert not list(tmp_path.glob("*.tmp"))
