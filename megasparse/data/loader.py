"""Samples -> micro-batches of a step, and the held-out tokens as windows scored exactly once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megasparse import config
from megasparse.data.dataset import Blend, Epochs, open_tokens
from megasparse.data.manifest import HeldOut, Manifest, read_manifest, read_tokenizer
from megasparse.data.tokenizer import Tokenizer


@dataclass
class Batch:
    """One micro-batch."""

    tokens: Tensor  # [batch, seq] int64
    labels: Tensor  # [batch, seq] int64: the next token
    loss_mask: Tensor  # [batch, seq] float32: 1 where the label is scored
    position_ids: Tensor  # [batch, seq] int64
    document_ids: Tensor | None  # [batch, seq] int64, counted from 0 in each row; only with data.document_mask
    token_index: Tensor  # [batch, seq] int64: sample number * seq + position, unique in a run

    def to(self, device: torch.device) -> Batch:
        """The same micro-batch on ``device``."""
        tensors: dict[str, Any] = {
            name: value if value is None else value.to(device) for name, value in vars(self).items()
        }
        return Batch(**tensors)

    def context_part(self, rank: int, size: int) -> Batch:
        """What context-parallel rank ``rank`` of ``size`` works on: of 2 * size equal parts of the sequence the one of
        its number and the one as far from the end, so that causal attention costs each rank the same (Llama 3).

        Keys and values are gathered, so the document ids stay whole."""
        if size == 1:
            return self
        parts = {name: None if t is None else zigzag(t, rank, size) for name, t in vars(self).items()}
        return Batch(**{**parts, "document_ids": self.document_ids})  # type: ignore[arg-type]


def zigzag(x: Tensor, rank: int, size: int) -> Tensor:
    """Of ``x`` [batch, seq, ...]: the parts ``rank`` and ``2 * size - 1 - rank`` of 2 * size along the sequence."""
    parts = x.chunk(2 * size, 1)
    return torch.cat([parts[rank], parts[2 * size - 1 - rank]], 1)


class TrainingData:
    """The training tokens of a recipe, by samples consumed.

    Which samples form a step, and which of them a micro-batch, depends on the seed and the samples consumed alone;
    the layout only says which rank reads which micro-batch. Raises ValueError if a set is missing, damaged or made by
    another tokenizer than the first.
    """

    def __init__(self, data: config.Data, seed: int) -> None:
        manifests, self.tokenizer = _open_sets(data)
        self.vocab_size = self.tokenizer.vocab_size
        self._data = data
        sets = [
            Epochs(open_tokens(s.path, "train", m, m.train), data.seq_length, (seed, i), self.tokenizer)
            for i, (s, m) in enumerate(zip(data.sets, manifests, strict=True))
        ]
        self._samples = Blend(sets, [s.weight for s in data.sets], [str(s.path) for s in data.sets])
        self.sets = [_describe(s, m) for s, m in zip(data.sets, manifests, strict=True)]  # for the record
        total = sum(s.weight for s in data.sets)
        order = {
            "sets": [[m.train.bin_sha256, s.weight / total] for s, m in zip(data.sets, manifests, strict=True)],
            "tokenizer": self.tokenizer.hash,
            "seq_length": data.seq_length,
            "seed": seed,
        }
        self.fingerprint = hashlib.sha256(json.dumps(order).encode()).hexdigest()  # of all that the order depends on

    def step(
        self, consumed: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> list[Batch]:
        """This rank's micro-batches of the optimizer step that follows ``consumed`` samples.

        Micro-batch j of the step is samples ``consumed + j * micro_batch_size`` and on, under every layout; of the
        step's M * dp_size micro-batches, rank r gets ``r * M .. (r + 1) * M``.
        """
        count, rest = divmod(global_batch_size, micro_batch_size * dp_size)
        assert rest == 0, "checked by Recipe.data_parallel_size"
        first = consumed + dp_rank * count * micro_batch_size
        return [
            self._micro_batch(range(n, n + micro_batch_size))
            for n in range(first, first + count * micro_batch_size, micro_batch_size)
        ]

    def _micro_batch(self, numbers: range) -> Batch:
        ids = np.stack([self._samples[n] for n in numbers])  # [batch, seq + 1]
        tokens, labels = ids[:, :-1], ids[:, 1:]
        scored = tokens != self.tokenizer.eod if self._data.document_mask else np.ones_like(tokens, dtype=bool)
        return make_batch(tokens, labels, scored, numbers.start, self.tokenizer.eod, self._data)


class ValidationWindows:
    """The held-out tokens of a recipe's sets, in order, each scored exactly once.

    The stream is every held-out document with its end-of-document token, the sets one after another; the context of
    its first token is an end-of-document token. It is cut into windows of seq_length; with ``stride`` < seq_length
    they overlap, and each but the first scores its last ``stride`` tokens, so that these have at least
    seq_length - stride tokens of context. No token is left out: with data.document_mask the first token of a
    document, which training never scores, is charged too.
    """

    def __init__(self, data: config.Data, stride: int | None = None) -> None:
        self.stride = data.seq_length if stride is None else stride
        if not 1 <= self.stride <= data.seq_length:
            raise ValueError(f"stride={stride} is not in 1 .. data.seq_length={data.seq_length}")
        manifests, self.tokenizer = _open_sets(data)
        self._data = data
        self._held_out: list[HeldOut] = []
        streams = []
        for s, manifest in zip(data.sets, manifests, strict=True):
            if manifest.validation is None:
                raise ValueError(f"{s.path} holds nothing out: prepare it with validation_fraction above 0")
            self._held_out.append(manifest.validation)
            open_tokens(s.path, "validation", manifest, manifest.validation)  # checks the index
            streams.append(np.memmap(s.path / "validation.bin", dtype=manifest.dtype, mode="r"))
        self._stream: NDArray[np.integer] = streams[0] if len(streams) == 1 else np.concatenate(streams)

    @property
    def tokens(self) -> int:
        """Held-out tokens, end-of-document tokens included."""
        return len(self._stream)

    @property
    def gzip9_bytes(self) -> int:
        """Size of the held-out texts after gzip -9 (several sets: each compressed alone)."""
        return sum(split.gzip9_bytes for split in self._held_out)

    @property
    def xz_bytes(self) -> int:
        """Size of the held-out texts after xz (several sets: each compressed alone)."""
        return sum(split.xz_bytes for split in self._held_out)

    def utf8_bytes(self, max_tokens: int | None = None) -> int:
        """UTF-8 bytes of the held-out texts, or of their first ``max_tokens`` tokens (decoded; exact to a character).

        Bits per byte = nats / ln 2 / utf8_bytes, the nats of end-of-document tokens included.
        """
        if max_tokens is None or max_tokens >= self.tokens:
            return sum(split.utf8_bytes for split in self._held_out)
        ids = np.asarray(self._stream[:max_tokens], dtype=np.int64)
        documents = np.split(ids, np.flatnonzero(ids == self.tokenizer.eod) + 1)
        texts = (self.tokenizer.decode(d[d != self.tokenizer.eod].tolist()) for d in documents)
        return sum(len(text.encode()) for text in texts)

    def batches(
        self, micro_batch_size: int, dp_rank: int, dp_size: int, max_tokens: int | None = None
    ) -> Iterator[Batch]:
        """This rank's micro-batches over the first ``max_tokens`` held-out tokens (None: all).

        Micro-batch j holds the same windows under every layout and goes to rank j % dp_size. All ranks get equally
        many: what is missing is filled with windows whose loss_mask is 0.
        """
        seq, eod = self._data.seq_length, self.tokenizer.eod
        end = self.tokens if max_tokens is None else min(max_tokens, self.tokens)
        windows = 1 + math.ceil(max(0, end - seq) / self.stride)
        rounds = math.ceil(windows / (micro_batch_size * dp_size))
        for j in range(dp_rank, rounds * dp_size, dp_size):
            numbers = range(j * micro_batch_size, (j + 1) * micro_batch_size)
            rows = [self._window(n, end) for n in numbers]
            ids = np.stack([row for row, _ in rows])
            scored = np.stack([mask for _, mask in rows])
            yield make_batch(ids[:, :-1], ids[:, 1:], scored, numbers.start, eod, self._data)

    def _window(self, number: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Window ``number``: its ids ``[seq + 1]``, filled up with eod, and which labels it scores ``[seq]``."""
        seq = self._data.seq_length
        start = number * self.stride
        ids = np.full(seq + 1, self.tokenizer.eod, dtype=np.int64)
        context = max(start - 1, 0)
        known = self._stream[context : min(start + seq, end)]
        offset = 1 if start == 0 else 0  # the stream's first token follows an end-of-document token
        ids[offset : offset + len(known)] = known
        position = start + np.arange(seq)  # of the label in the stream
        first_scored = 0 if number == 0 else start + seq - self.stride
        return ids, (position >= first_scored) & (position < end)


def make_batch(
    tokens: NDArray[np.int64],
    labels: NDArray[np.int64],
    scored: NDArray[np.bool_],
    first_number: int,
    eod: int,
    data: config.Data,
) -> Batch:
    """Tensors of ``[batch, seq]`` ids; rows are samples ``first_number`` and on.

    A document ends with its end-of-document token: the token after it starts the next document.
    """
    batch, seq = tokens.shape
    starts = np.zeros((batch, seq), dtype=np.int64)  # 1 on the first token of a document, but for the row's first
    starts[:, 1:] = tokens[:, :-1] == eod
    position = np.broadcast_to(np.arange(seq), (batch, seq))
    reset = position - np.maximum.accumulate(position * starts, axis=1)
    number = first_number + np.arange(batch)[:, None]
    return Batch(
        tokens=torch.from_numpy(tokens.copy()),
        labels=torch.from_numpy(labels.copy()),
        loss_mask=torch.from_numpy(scored.astype(np.float32)),
        position_ids=torch.from_numpy((reset if data.reset_position_ids else position).copy()),
        document_ids=torch.from_numpy(np.cumsum(starts, axis=1)) if data.document_mask else None,
        token_index=torch.from_numpy(number * seq + position),
    )


def _describe(data_set: config.DataSet, manifest: Manifest) -> dict[str, Any]:
    """A set of a recipe, and its training documents."""
    train = manifest.train
    return {
        "path": str(data_set.path.resolve()),
        "weight": data_set.weight,
        "documents": train.documents,
        "tokens": train.tokens,
        "utf8_bytes": train.utf8_bytes,
        "bin_sha256": train.bin_sha256,
        "tokenizer": manifest.tokenizer_hash,
    }


def _open_sets(data: config.Data) -> tuple[list[Manifest], Tokenizer]:
    """The sets' manifests and the tokenizer they share."""
    manifests = [read_manifest(s.path) for s in data.sets]
    for s, manifest in zip(data.sets, manifests, strict=True):
        if manifest.tokenizer_hash != manifests[0].tokenizer_hash:
            raise ValueError(
                f"data.sets: {s.path} and {data.sets[0].path} were made by different tokenizers: "
                f"prepare one with the tokenizer of the other"
            )
    tokenizers = [read_tokenizer(s.path, manifest) for s, manifest in zip(data.sets, manifests, strict=True)]
    return manifests, tokenizers[0]
