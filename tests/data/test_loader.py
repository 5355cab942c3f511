from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from torch import Tensor

from megasparse.config import Data
from megasparse.data.loader import Batch, TrainingData, ValidationWindows, make_batch
from megasparse.data.manifest import read_manifest
from megasparse.data.tokenizer import load_tokenizer

from .conftest import MakeSet

SEQ = 16


@pytest.fixture(scope="module")
def second_set(make_set: MakeSet, small_set: Path) -> Path:
    """Other texts, the same tokenizer."""
    return make_set(seed=2, tokenizer=small_set, documents=30)


def recipe(*sets: Path, weights: tuple[float, ...] = (1.0, 1.0), **changes: object) -> Data:
    named = [{"path": path, "weight": weight} for path, weight in zip(sets, weights, strict=False)]
    return Data.model_validate({"sets": named, "seq_length": SEQ} | changes)


def rows(batches: list[Batch], field: str) -> Tensor:
    return torch.cat([getattr(batch, field) for batch in batches])


def test_a_step_is_the_same_samples_under_every_layout(small_set: Path, second_set: Path):
    data = TrainingData(recipe(small_set, second_set, weights=(3, 1)), seed=5)
    one = data.step(40, 24, 3, dp_rank=0, dp_size=1)
    assert len(one) == 8
    for dp_size in (2, 4, 8):
        split = [b for rank in range(dp_size) for b in data.step(40, 24, 3, rank, dp_size)]
        assert len(split) == 8
        for a, b in zip(one, split, strict=True):
            assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("tokens", "labels", "token_index"))
    for micro_batch_size in (1, 6, 24):
        again = data.step(40, 24, micro_batch_size, 0, 1)
        assert torch.equal(rows(again, "tokens"), rows(one, "tokens"))
    assert torch.equal(rows(one, "token_index"), 40 * SEQ + torch.arange(24 * SEQ).view(24, SEQ))
    assert torch.equal(rows(one, "tokens")[:, 1:], rows(one, "labels")[:, :-1])


def test_order_does_not_depend_on_how_it_is_consumed(small_set: Path, second_set: Path):
    configuration = recipe(small_set, second_set, weights=(2, 5))
    data = TrainingData(configuration, seed=5)
    long = rows(data.step(0, 600, 1, 0, 1), "tokens")  # several epochs of both sets
    for size in (1, 4, 60):
        fresh = TrainingData(configuration, seed=5)
        steps = [rows(fresh.step(n, size, 1, 0, 1), "tokens") for n in range(0, 600, size)]
        assert torch.equal(torch.cat(steps), long)
    resumed = TrainingData(configuration, seed=5)
    assert torch.equal(rows(resumed.step(540, 60, 4, 0, 1), "tokens"), long[540:])
    assert not torch.equal(rows(TrainingData(configuration, seed=6).step(0, 600, 1, 0, 1), "tokens"), long)


def test_blend_keeps_its_proportion(small_set: Path, second_set: Path):
    alone = TrainingData(recipe(small_set), seed=5)
    mine = {tuple(row) for row in rows(alone.step(0, 400, 1, 0, 1), "tokens").tolist()}
    mixed = rows(TrainingData(recipe(small_set, second_set, weights=(3, 1)), seed=5).step(0, 400, 1, 0, 1), "tokens")
    assert sum(tuple(row) in mine for row in mixed.tolist()) == 300


def test_what_is_recorded_of_each_set(small_set: Path, second_set: Path):
    first, second = TrainingData(recipe(small_set, second_set, weights=(3, 1)), seed=5).sets
    split = read_manifest(small_set).train
    assert first == {
        **{"path": str(small_set), "weight": 3.0, "documents": split.documents, "tokens": split.tokens},
        **{"utf8_bytes": split.utf8_bytes, "bin_sha256": split.bin_sha256},
        "tokenizer": load_tokenizer(small_set).hash,
    }
    assert (second["path"], second["weight"], second["tokenizer"]) == (str(second_set), 1.0, first["tokenizer"])


def reference(tokens: list[int], eod: int) -> tuple[list[int], list[int]]:
    """Document and position of each token, one by one."""
    document, position, documents, positions = 0, 0, [], []
    for token in tokens:
        documents.append(document)
        positions.append(position)
        position += 1
        if token == eod:
            document, position = document + 1, 0
    return documents, positions


def test_document_masks(small_set: Path):
    data = TrainingData(recipe(small_set, document_mask=True, reset_position_ids=True), seed=1)
    eod = data.tokenizer.eod
    ends = 0
    for batch in data.step(0, 40, 8, 0, 1):
        assert batch.document_ids is not None
        for row in range(8):
            tokens, labels = batch.tokens[row].tolist(), batch.labels[row].tolist()
            documents, positions = reference(tokens, eod)
            assert batch.document_ids[row].tolist() == documents
            assert batch.position_ids[row].tolist() == positions
            after, _ = reference([*tokens, labels[-1]], eod)  # a label is scored in its own document only
            same = [float(a == b) for a, b in pairwise(after)]
            assert batch.loss_mask[row].tolist() == same
            ends += sum(m for m, label in zip(same, labels, strict=True) if label == eod)
            _, mask, ids = _get_ltor_masks_and_position_ids(batch.tokens[row], eod, True, False, True, False)
            assert torch.equal(mask, batch.loss_mask[row])
            assert torch.equal(ids, batch.position_ids[row])
    assert ends > 5  # the end of a document is itself predicted


def test_without_document_mask_everything_is_scored(small_set: Path):
    for batch in TrainingData(recipe(small_set), seed=1).step(0, 8, 4, 0, 1):
        assert batch.document_ids is None
        assert bool((batch.loss_mask == 1).all())
        assert torch.equal(batch.position_ids, torch.arange(SEQ).expand(4, SEQ))
        assert batch.loss_mask.dtype == torch.float32
        assert {t.dtype for t in (batch.tokens, batch.labels, batch.position_ids, batch.token_index)} == {torch.int64}


def test_fingerprint_tells_what_the_order_depends_on(small_set: Path, second_set: Path, tmp_path: Path):
    def fingerprint(*sets: Path, seed: int = 1, **changes: object) -> str:
        return TrainingData(recipe(*sets, **changes), seed).fingerprint  # type: ignore[arg-type]

    first = fingerprint(small_set, second_set)
    assert first == fingerprint(small_set, second_set, weights=(2, 2), document_mask=True)
    shutil.copytree(small_set, tmp_path / "moved")
    assert first == fingerprint(tmp_path / "moved", second_set)
    others = [
        fingerprint(second_set, small_set),
        fingerprint(small_set),
        fingerprint(small_set, second_set, weights=(2, 1)),
        fingerprint(small_set, second_set, seq_length=SEQ + 1),
        fingerprint(small_set, second_set, seed=2),
    ]
    assert len({first, *others}) == 6


def test_wrong_tokenizers_are_refused(small_set: Path, make_set: MakeSet, tmp_path: Path):
    foreign = make_set(seed=9)
    with pytest.raises(ValueError, match=r"data.sets: .* were made by different tokenizers: prepare"):
        TrainingData(recipe(small_set, foreign), seed=1)
    shutil.copytree(small_set, tmp_path / "set")
    shutil.copy(foreign / "tokenizer.model", tmp_path / "set")
    for opener in (lambda d: TrainingData(d, seed=1), ValidationWindows):
        with pytest.raises(ValueError, match=r"the tokenizer in .*set is not the one that made its tokens"):
            opener(recipe(tmp_path / "set"))


def held_out(*sets: Path) -> list[int]:
    return [int(i) for path in sets for i in np.fromfile(path / "validation.bin", dtype=np.uint16)]


@pytest.mark.parametrize("stride", [None, 1, 5, SEQ])
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 3, SEQ, 77])
def test_every_held_out_token_is_scored_once(
    small_set: Path, second_set: Path, stride: int | None, document_mask: bool, max_tokens: int | None
):
    windows = ValidationWindows(recipe(small_set, second_set, document_mask=document_mask), stride)
    expected = held_out(small_set, second_set)
    assert windows.tokens == len(expected) > 300
    stream = [windows.tokenizer.eod, *expected][: None if max_tokens is None else max_tokens + 1]
    step = stride or SEQ
    for dp_size, size in ((1, 4), (3, 2)):
        ranks = [list(windows.batches(size, rank, dp_size, max_tokens)) for rank in range(dp_size)]
        assert len({len(batches) for batches in ranks}) == 1  # collectives match
        in_order = [ranks[j % dp_size][j // dp_size] for j in range(dp_size * len(ranks[0]))]
        scored = []
        for number, (tokens, labels, mask) in enumerate(
            zip(*(rows(in_order, f).tolist() for f in ("tokens", "labels", "loss_mask")), strict=True)
        ):
            for i in range(SEQ):
                if mask[i]:
                    place = number * step + i  # of the label in the held-out tokens
                    scored.append(place)
                    assert labels[i] == stream[place + 1]
                    assert tokens[: i + 1] == stream[place - i : place + 1]  # the context
                    assert i + 1 >= min(place + 1, SEQ - step + 1)  # and enough of it
        assert scored == list(range(len(stream) - 1))


def test_micro_batches_of_windows_do_not_depend_on_the_layout(small_set: Path):
    windows = ValidationWindows(recipe(small_set, document_mask=True), stride=4)
    one = list(windows.batches(2, 0, 1))
    two = [list(windows.batches(2, rank, 2)) for rank in range(2)]
    for j, batch in enumerate(one):
        other = two[j % 2][j // 2]
        for field in ("tokens", "labels", "loss_mask", "position_ids", "document_ids", "token_index"):
            assert torch.equal(getattr(batch, field), getattr(other, field))


def test_bytes_of_the_scored_text(small_set: Path, second_set: Path):
    windows = ValidationWindows(recipe(small_set, second_set))
    tokenizer = load_tokenizer(small_set)
    ids = held_out(small_set, second_set)
    text = "".join(tokenizer.decode([i for i in ids if i != tokenizer.eod]))
    assert windows.utf8_bytes() == len(text.encode())
    assert windows.utf8_bytes(10**9) == windows.utf8_bytes(windows.tokens) == len(text.encode())
    for limit in (1, 2, 40, windows.tokens - 1):  # a limit may cut a character in two
        part = tokenizer.decode([i for i in ids[:limit] if i != tokenizer.eod])
        assert abs(windows.utf8_bytes(limit) - len(part.encode())) <= 9
    assert windows.gzip9_bytes > windows.xz_bytes * 0.5 > 0


def test_wrong_windows_are_refused(small_set: Path, tmp_path: Path):
    for stride in (0, SEQ + 1):
        with pytest.raises(ValueError, match=rf"stride={stride} is not in 1 .. data.seq_length=16"):
            ValidationWindows(recipe(small_set), stride)


def test_rows_are_separate():
    tokens = np.array([[5, 2, 6, 2], [7, 8, 2, 9]])
    batch = make_batch(
        tokens,
        tokens,
        tokens > 0,
        3,
        2,
        Data.model_validate(
            {"sets": [{"path": "x"}], "seq_length": 4, "document_mask": True, "reset_position_ids": True}
        ),
    )
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
    assert batch.token_index.tolist() == [[12, 13, 14, 15], [16, 17, 18, 19]]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_context_parts_hold_every_position_once_and_cost_the_same(small_set: Path, size: int):
    """Causal attention at position p costs p + 1: each rank has as many positions and as much of that as any other."""
    whole = TrainingData(recipe(small_set, document_mask=True), seed=5).step(0, 2, 2, dp_rank=0, dp_size=1)[0]
    parts = [whole.context_part(rank, size) for rank in range(size)]
    assert len({len(part.position_ids[0]) for part in parts}) == 1
    assert len({part.position_ids[0].sum().item() for part in parts}) == 1
    for field in ("tokens", "labels", "loss_mask", "position_ids", "token_index"):
        found = torch.empty_like(getattr(whole, field))
        for part in parts:
            found[:, part.position_ids[0]] = getattr(part, field)
        assert torch.equal(found, getattr(whole, field)), field
    assert all(torch.equal(part.document_ids, whole.document_ids) for part in parts), "keys of other parts are seen"
