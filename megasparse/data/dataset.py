"""Token files -> samples by number. Sample n depends on the seed alone: not on the layout, nor on the budget.

megatron-core's GPTDataset shuffles for a known number of samples, so that a longer run would see another order.
Here each epoch of a set is a GPTDataset of its own: one pass over the documents, seeded by (seed, set, epoch).
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.datasets.utils import Split as CoreSplit
from numpy.typing import NDArray

from megasparse.data.manifest import Manifest, Split
from megasparse.data.tokenizer import Tokenizer

# GPTDataset warns, for every epoch, that indices kept in memory are not saved.
logging.getLogger("megatron.core.datasets.gpt_dataset").setLevel(logging.ERROR)

BLEND_BLOCK = 65_536  # samples after which the pattern of a blend repeats

_IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1


def open_tokens(folder: Path, name: str, manifest: Manifest, split: Split) -> IndexedDataset:
    """Open ``<folder>/<name>.bin`` and ``.idx``; ValueError naming the file if it is foreign or cut short.

    ``manifest`` and ``split`` are those of the folder, sizes already checked by read_manifest.
    """
    path = folder / f"{name}.idx"
    with path.open("rb") as file:
        header = file.read(_IDX_HEADER.size)
    magic, version, code, sequences, bounds = (
        _IDX_HEADER.unpack(header) if len(header) == _IDX_HEADER.size else (b"", 0, 0, 0, 0)
    )
    if (magic, version) != (b"MMIDIDX\x00\x00", 1):
        raise ValueError(f"{path} is not a megatron-core index: prepare the data set again")
    expected = _IDX_HEADER.size + sequences * (4 + 8) + bounds * 8  # lengths int32, offsets int64, bounds int64
    if expected != split.idx_bytes or sequences != split.documents or code != DType[manifest.dtype].value:
        raise ValueError(f"{path} is not the index its manifest describes: prepare the data set again")
    return IndexedDataset(str(folder / name))


class Epochs:
    """The samples of one set, numbered without end: epoch after epoch, each in an order of its own.

    An epoch is the set's documents shuffled, joined and cut into ``seq_length`` tokens (each token is predicted once;
    only the ragged end, less than a sample, is left out), the samples shuffled again. Every process builds the indices
    in memory: 12 bytes a sample, no file written, no process waits for another.
    """

    def __init__(self, tokens: IndexedDataset, seq_length: int, seed: tuple[int, int], tokenizer: Tokenizer) -> None:
        total = int(tokens.sequence_lengths.sum(dtype=np.int64))
        self.samples_per_epoch = (total - 1) // seq_length
        if self.samples_per_epoch < 1:
            raise ValueError(
                f"{tokens.path_prefix}.bin has {total} tokens, too few for one sample: "
                f"set data.seq_length below {total} (it is {seq_length})"
            )
        self._tokens, self._seq_length, self._seed = tokens, seq_length, seed
        self._tokenizer = _CoreTokenizer(tokenizer.vocab_size, tokenizer.eod)
        self._open: dict[int, GPTDataset] = {}  # the epochs of the last samples: two where a batch spans a boundary

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        """Sample ``number`` >= 0 as ``[seq_length + 1]`` token ids: the inputs, and one more as the last label."""
        epoch, index = divmod(number, self.samples_per_epoch)
        if epoch not in self._open:
            self._open = {e: dataset for e, dataset in self._open.items() if e == epoch - 1}
            self._open[epoch] = self._build(epoch)
        sample = self._open[epoch][index]
        return np.append(sample["tokens"].numpy(), sample["labels"][-1].numpy())

    def _build(self, epoch: int) -> GPTDataset:
        config = GPTDatasetConfig(
            random_seed=int(np.random.SeedSequence([*self._seed, epoch]).generate_state(1)[0]),
            sequence_length=self._seq_length,
            tokenizer=self._tokenizer,  # type: ignore[arg-type]
            path_to_cache="",  # indices in memory; None would write them beside the data
            reset_position_ids=False,  # masks and positions are the loader's
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        documents = np.arange(len(self._tokens), dtype=np.int32)
        dataset = GPTDataset(self._tokens, None, documents, None, CoreSplit.train, config)
        assert len(dataset) == self.samples_per_epoch
        return dataset


@dataclass
class _CoreTokenizer:
    """The little GPTDataset asks of a tokenizer. Without ``pad`` it treats no id as padding: none is zeroed."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "eod": self.eod}


class Blend:
    """Samples of several sets in fixed proportion, numbered without end.

    megatron-core's greedy blending (each sample from the set furthest below its share) gives the pattern of
    BLEND_BLOCK samples, repeated block after block: shares are exact to one part in 65,536, and the first n samples
    are the same however many follow.
    """

    def __init__(self, sets: list[Epochs], weights: list[float], names: list[str]) -> None:
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        self._sets = sets
        self._set_of = np.zeros(BLEND_BLOCK, dtype=np.int16)
        self._number_of = np.zeros(BLEND_BLOCK, dtype=np.int64)
        helpers.build_blending_indices(  # type: ignore[attr-defined]
            self._set_of, self._number_of, shares, len(shares), BLEND_BLOCK, False
        )
        self.counts = np.bincount(self._set_of, minlength=len(shares))  # samples of each set in a block
        for name, share in zip(names, shares, strict=True):
            if share * BLEND_BLOCK < 1:
                raise ValueError(
                    f"data.sets: {name} has {share:.1e} of the weight, less than 1 sample in {BLEND_BLOCK}: "
                    "raise its weight or leave it out"
                )

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        """Sample ``number`` >= 0 as ``[seq_length + 1]`` token ids."""
        which, within = self.locate(number)
        return self._sets[which][within]

    def locate(self, number: int) -> tuple[int, int]:
        """The set that sample ``number`` comes from, and its number there."""
        block, index = divmod(number, BLEND_BLOCK)
        which = int(self._set_of[index])
        return which, block * int(self.counts[which]) + int(self._number_of[index])
