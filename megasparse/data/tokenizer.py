"""Text to token ids and back: a SentencePiece model or a Hugging Face ``tokenizer.json``, behind one small interface.

A tokenizer lives in a folder: ``tokenizer.model``, or ``tokenizer.json`` with a ``tokenizer_config.json`` that names
the end-of-document token as ``eos_token``.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "tokenizer.json"
HUGGINGFACE_CONFIG = "tokenizer_config.json"
FILES = (SENTENCEPIECE_FILE, HUGGINGFACE_FILE, HUGGINGFACE_CONFIG)


class Tokenizer(Protocol):
    """What the rest of the system knows of a tokenizer."""

    vocab_size: int  # ids are below this
    eod: int  # id that ends a document; text never encodes to it
    hash: str  # SHA-256 of what defines the ids

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without the end-of-document id."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; ``decode(encode(text)) == text`` unless the tokenizer normalises ``text``."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files that ``load_tokenizer(folder)`` reads back equal."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model. Lossless if trained by ``train_sentencepiece``, but for U+2581, given back as a space."""

    def __init__(self, model: bytes, source: str) -> None:
        self.model = model  # the file
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError(f"{source} is not a SentencePiece model: give a .model or tokenizer.json file") from None
        self.vocab_size = self._processor.vocab_size()
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise ValueError(f"{source} has no eos piece to end documents: train it with eos_id >= 0")
        self.hash = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def save(self, folder: Path) -> None:
        (folder / SENTENCEPIECE_FILE).write_bytes(self.model)


class HuggingFaceTokenizer:
    """A ``tokenizer.json``. Special tokens that occur in a text are encoded as ordinary text."""

    def __init__(self, model: bytes, eod_token: str, source: str) -> None:
        self.model, self.eod_token = model, eod_token  # the file, and what its config names
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(model)
        except Exception as error:  # noqa: BLE001 (the library raises nothing narrower)
            raise ValueError(f"{source} is not a tokenizer.json: {error}") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if eod_token not in vocabulary:
            raise ValueError(f"eod_token={eod_token!r} is not in {source}: name one of its special tokens")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod = vocabulary[eod_token]
        self.hash = hashlib.sha256(model + b"\0" + eod_token.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        (folder / HUGGINGFACE_FILE).write_bytes(self.model)
        (folder / HUGGINGFACE_CONFIG).write_text(json.dumps({"eos_token": self.eod_token}) + "\n")


def load_tokenizer(path: Path, eod_token: str | None = None) -> SentencePieceTokenizer | HuggingFaceTokenizer:
    """Read a tokenizer from its folder, a ``.model`` or a ``tokenizer.json``.

    ``eod_token`` names the end-of-document token of a ``tokenizer.json``; None: the ``eos_token`` of the
    ``tokenizer_config.json`` beside it. Raises ValueError if the file is missing, foreign or has no such token.
    """
    if path.is_dir():
        found = [path / name for name in (SENTENCEPIECE_FILE, HUGGINGFACE_FILE) if (path / name).is_file()]
        if not found:
            raise ValueError(f"no {SENTENCEPIECE_FILE} or {HUGGINGFACE_FILE} in {path}")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}: give 'sentencepiece', a .model or a tokenizer.json")
    if path.suffix != ".json":
        if eod_token is not None:
            raise ValueError(f"eod_token={eod_token!r} is for a tokenizer.json; {path} ends documents with its eos")
        return SentencePieceTokenizer(path.read_bytes(), source=str(path))
    eod_token = eod_token or _eos_token(path.with_name(HUGGINGFACE_CONFIG))
    if eod_token is None:
        raise ValueError(f"{path} does not say which token ends a document: set eod_token, such as '<|endoftext|>'")
    return HuggingFaceTokenizer(path.read_bytes(), eod_token, source=str(path))


def _eos_token(config: Path) -> str | None:
    if not config.is_file():
        return None
    token = json.loads(config.read_text()).get("eos_token")
    return token["content"] if isinstance(token, dict) else token


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train byte-fallback BPE that gives back every text exactly: newlines, tabs and runs of spaces included.

    Each text is one training sentence, so that line ends can join pieces (``:\\n``): one sentence per line would leave
    every newline a token of its own. Deterministic. Raises ValueError if the texts cannot fill ``vocab_size``.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,  # characters outside the vocabulary become their UTF-8 bytes
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            split_by_unicode_script=False,  # pieces such as "self." and "):\n": 10% fewer tokens on Python code
            max_sentence_length=2**30,  # bytes; longer texts would be dropped in silence
            num_threads=1,  # recorded in the model, so part of its hash
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size={vocab_size} does not suit this corpus: {_reason(error)}") from None
    return SentencePieceTokenizer(model.getvalue(), source="trained model")


def _reason(error: RuntimeError) -> str:
    """SentencePiece's advice, without its source location: ``... Please set it to a value <= 1234.``"""
    return " ".join(str(error).rpartition("]")[2].split()) or "choose another size"
