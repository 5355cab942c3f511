from __future__ import annotations

import random
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megasparse.data.dataset import BLEND_BLOCK, Blend, Epochs, open_tokens
from megasparse.data.manifest import read_manifest
from megasparse.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(small_set: Path) -> Tokenizer:
    return load_tokenizer(small_set)


def counting(folder: Path, lengths: list[int]) -> IndexedDataset:
    """Documents whose tokens are 0, 1, 2, ... through all of them: every token tells where it is from."""
    builder = IndexedDatasetBuilder(str(folder / "train.bin"), dtype=np.int32)
    start = 0
    for length in lengths:
        builder.add_document(torch.arange(start, start + length), [length])
        start += length
    builder.finalize(str(folder / "train.idx"))
    return IndexedDataset(str(folder / "train"))


LENGTHS = [1, 5, 17, 2, 100, 33, 8, 8, 64, 21, 1, 1, 50]


def test_an_epoch_predicts_every_token_once(tmp_path: Path, tokenizer: Tokenizer):
    seq, total = 8, sum(LENGTHS)
    epochs = Epochs(counting(tmp_path, LENGTHS), seq, (7, 0), tokenizer)
    per_epoch = epochs.samples_per_epoch
    assert per_epoch == (total - 1) // seq
    starts = np.cumsum([0, *LENGTHS])
    orders = []
    for epoch in range(4):
        samples = [epochs[n] for n in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        labels = np.concatenate([s[1:] for s in samples])
        assert len(set(labels.tolist())) == len(labels) == per_epoch * seq  # none twice
        for sample in samples:
            assert sample.shape == (seq + 1,)
            for before, after in pairwise(sample.tolist()):  # one on, or from an end to a start
                assert after == before + 1 or (before + 1 in starts and after in starts)
        orders.append(labels.tolist())
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_order_depends_on_seed_and_number_only(tmp_path: Path, tokenizer: Tokenizer):
    tokens = counting(tmp_path, LENGTHS)
    first = Epochs(tokens, 8, (7, 0), tokenizer)
    forward = [first[n].tolist() for n in range(150)]
    second = Epochs(tokens, 8, (7, 0), tokenizer)
    numbers = list(range(150))
    random.Random(0).shuffle(numbers)
    assert all(second[n].tolist() == forward[n] for n in numbers)
    for other in ((8, 0), (7, 1)):
        assert [Epochs(tokens, 8, other, tokenizer)[n].tolist() for n in range(38)] != forward[:38]


def test_nothing_is_written_and_no_rank_waits(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    tokens = counting(tmp_path, LENGTHS)
    before = sorted(tmp_path.rglob("*"))
    alone = Epochs(tokens, 8, (7, 0), tokenizer)[3].tolist()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 5)
    assert Epochs(tokens, 8, (7, 0), tokenizer)[3].tolist() == alone
    assert sorted(tmp_path.rglob("*")) == before


def test_no_id_is_taken_for_padding(tmp_path: Path, tokenizer: Tokenizer):
    builder = IndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=np.uint16)
    ids = torch.tensor([0, 1, 2, 3, tokenizer.eod, 65_535] * 20)
    builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "train.idx"))
    epochs = Epochs(IndexedDataset(str(tmp_path / "train")), 12, (0, 0), tokenizer)
    for n in range(epochs.samples_per_epoch):
        assert Counter(epochs[n][:12].tolist()) == Counter([0, 1, 2, 3, tokenizer.eod, 65_535] * 2)


def test_too_few_tokens_for_a_sample(tmp_path: Path, tokenizer: Tokenizer):
    tokens = counting(tmp_path, [8])
    assert Epochs(tokens, 7, (0, 0), tokenizer).samples_per_epoch == 1
    with pytest.raises(
        ValueError, match=r"train.bin has 8 tokens, too few for one sample: set data.seq_length below 8"
    ):
        Epochs(tokens, 8, (0, 0), tokenizer)


def test_blend_is_the_greedy_pattern_repeated():
    weights = [5.0, 3.0, 1.0, 1.0]
    blend = Blend([], weights, list("abcd"))
    shares, counts = np.array(weights) / 10, np.zeros(4, dtype=int)
    expected = []
    for n in range(2000):  # each sample from the set furthest below its share
        which = int(np.argmax(shares * max(n, 1) - counts))
        expected.append((which, int(counts[which])))
        counts[which] += 1
    assert [blend.locate(n) for n in range(2000)] == expected
    assert np.abs(blend.counts - shares * BLEND_BLOCK).max() <= 1
    seen = [0] * 4
    for n in range(3 * BLEND_BLOCK):  # each set's own samples come in order, none left out, across blocks
        which, number = blend.locate(n)
        assert number == seen[which]
        seen[which] += 1


def test_blend_of_a_negligible_share_is_refused():
    with pytest.raises(ValueError, match=r"data.sets: tiny has 1.0e-06 of the weight, less than 1 sample in 65536"):
        Blend([], [1.0, 1e-6], ["large", "tiny"])


def test_foreign_and_cut_files_are_refused_by_name(small_set: Path, tmp_path: Path):
    def changed(name: str, data: bytes) -> Path:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(small_set, folder)
        (folder / name).write_bytes(data)
        return folder

    def opens(folder: Path) -> None:
        manifest = read_manifest(folder)
        open_tokens(folder, "train", manifest, manifest.train)

    opens(small_set)
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx"):
        data = (small_set / name).read_bytes()
        with pytest.raises(ValueError, match=rf"{name} has {len(data) - 2} bytes, not the {len(data)} of its manifest"):
            opens(changed(name, data[:-2]))
        folder = changed(name, data)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=rf"{name} is missing"):
            opens(folder)
    index = (small_set / "train.idx").read_bytes()
    with pytest.raises(ValueError, match=r"train.idx is not a megatron-core index"):
        opens(changed("train.idx", b"PK\x03\x04".ljust(len(index))))
    with pytest.raises(ValueError, match=r"train.idx is not the index its manifest describes"):
        opens(changed("train.idx", index[:17] + b"\x04" + index[18:]))  # int32
    with pytest.raises(ValueError, match=r"manifest.json is not a manifest of this version"):
        opens(changed("manifest.json", b'{"format": 2}'))
    with pytest.raises(ValueError, match=r"is not a finished data set \(no manifest.json\)"):
        opens(tmp_path)
