"""A tokenizer as a folder for transformers' ``AutoTokenizer``: ``tokenizer.json`` and ``tokenizer_config.json``.

A ``tokenizer.json`` stays as it is; tokens that its post-processor adds are left out with ``add_special_tokens=False``,
as they are in training. A SentencePiece model becomes one that gives the same ids for a text and the same text for ids;
``save_fast_tokenizer`` compares the two before it returns. Unlike what transformers' SpmConverter makes, a text is one
word, since pieces may span spaces, line ends and scripts; ``</s>`` in a text is text; unknown characters and a text's
first space are decoded as SentencePiece does it.

What stays different, since tokenizers cannot express it:

- ``decode`` writes control pieces (``</s>``), as everywhere in transformers; ``skip_special_tokens=True`` does not.
- A run of byte pieces that is not UTF-8 as a whole, as when a generated text ends within a character, is one U+FFFD a
  byte; SentencePiece decodes the characters that are whole.
- BPE: where one piece can be made in two places that overlap, from other parts, SentencePiece makes the left one and
  tokenizers the one whose first part is the longer. No text is known for which this changes the ids.
- Unigram: which of two ways with the same sum of scores is taken is chance (``--------``); sums are float32 there and
  float64 here. NFKC composes a letter with several marks as Unicode says, SentencePiece by its own table.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from megasparse.data.tokenizer import (
    HUGGINGFACE_CONFIG,
    HUGGINGFACE_FILE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
)

Piece = ModelProto.SentencePiece
SPACE = "\u2581"  # what SentencePiece writes for a space

# Texts that are most likely to be encoded or decoded otherwise.
HARD_TEXTS = [
    *("", " ", "  ", "\n", "\n\n\n  \n", "\t\tx\t", " one", "  two", "trailing ", "a  b   c", "a" + " " * 50 + "b"),
    *("\r\nwindows\r\n", "\ufeffmark", "\0nul\0", "\x01\x7f\x85\u2028\u2029", "\u00a0\u2003\u3000\u200b wide"),
    *("</s>", "<s>", "<unk>", "a</s>b<s> <unk><pad>", "<0x41><0x0A>", "<|endoftext|>[INST]", "<s", "</", "< s>"),
    *("\u2581", "\u2581x", "x\u2581\u2581 y", " \u2581", "\u2581</s>"),
    *("naïve e\u0301 é", "ﬁ ① \u212b ½ ㎏", "\u2460\u0308 ½\ufe0f", "😀🇩🇪", "👩\u200d👩\u200d👧", "稀疏混合 专家"),
    *("한국어 \u1112\u1161\u11ab", "हिन्दी", "عَرَبِي", "\ufffd\uffff\U0010ffff", "\ud7ff\ue000"),
    *("don't 1,234.5 == x_y->z", "def f(x):\n    if x:\n        return {'a': [1, 2]}\n\n\nclass C:\n\tpass\n"),
    *("".join(map(chr, range(0x20, 0x250))), "x" * 1000, "-" * 77 + "=" * 78, "the quick brown fox " * 100),
]


def fast_tokenizer(
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer, max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """``tokenizer`` for transformers, not compared with it. ``max_length``: tokens that the model takes.

    ValueError if it is a SentencePiece model of another type than BPE or unigram."""
    content, config = _files(tokenizer, max_length)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_buffer(content), **config)


def save_fast_tokenizer(
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer, folder: Path, max_length: int | None = None
) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``; read them back with AutoTokenizer, which
    a ``config.json`` there has a say in, so write it first; and ``compare``.

    ValueError as ``fast_tokenizer`` and ``compare``."""
    content, config = _files(tokenizer, max_length)
    (folder / HUGGINGFACE_FILE).write_bytes(content)
    (folder / HUGGINGFACE_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    fast = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if isinstance(tokenizer, SentencePieceTokenizer) and type(fast) is not PreTrainedTokenizerFast:
        raise ValueError(
            f"transformers makes a {type(fast).__name__} of every tokenizer beside a config.json of this model_type: "
            "a SentencePiece model needs another one"
        )
    compare(tokenizer, fast)


def compare(tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer, fast: Any) -> None:
    """ValueError, naming the first text or ids, if ``fast`` encodes one of HARD_TEXTS, the text of a piece, or
    random chains of pieces, otherwise than ``tokenizer``; or so decodes what these are encoded to, or a piece."""
    pieces = {i: tokenizer.decode([i]) for i in range(tokenizer.vocab_size)}
    sequences = [[i] for i, text in pieces.items() if text]  # a control piece has none
    texts = [*HARD_TEXTS, *pieces.values(), *_overlapping(list(pieces.values()))]
    scores = _unigram_scores(tokenizer)
    for text, found in zip(texts, fast(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True):
        expected = tokenizer.encode(text)
        if found != expected and not (scores and _same_score(scores, found, expected)):
            raise ValueError(f"the exported tokenizer encodes {text!r} to {found}, its source to {expected}")
        sequences.append(found)
    for ids, found in zip(sequences, fast.batch_decode(sequences), strict=True):
        if found != (expected := tokenizer.decode(ids)):
            raise ValueError(f"the exported tokenizer decodes {ids} to {found!r}, its source to {expected!r}")


def _overlapping(pieces: list[str]) -> list[str]:
    """Random chains of ten pieces, where half of the pieces share their first character with the one before: merges
    that compete for it show their order."""
    rng = random.Random(0)
    by_first: dict[str, list[str]] = defaultdict(list)
    for piece in pieces:
        by_first[piece[:1]].append(piece)
    chains = [rng.choice(pieces) for _ in range(4000)]
    for _ in range(9):
        for i, chain in enumerate(chains):
            shared = by_first.get(chain[-1:], []) if rng.random() < 0.5 else []
            chains[i] += rng.choice(shared)[1:] if shared else rng.choice(pieces)
    return chains


def _unigram_scores(tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer) -> list[float] | None:
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = ModelProto.FromString(tokenizer.model)
        if proto.trainer_spec.model_type == TrainerSpec.UNIGRAM:
            return [piece.score for piece in proto.pieces]
    return None


def _same_score(scores: list[float], a: list[int], b: list[int]) -> bool:
    """To the precision of float32, in which SentencePiece adds."""
    return math.isclose(sum(scores[i] for i in a), sum(scores[i] for i in b), rel_tol=1e-6)


def _files(
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer, max_length: int | None
) -> tuple[bytes, dict[str, Any]]:
    """The content of ``tokenizer.json``, and ``tokenizer_config.json``."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # those that occur in a text are text
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.model, {**config, "eos_token": tokenizer.eod_token}
    proto = ModelProto.FromString(tokenizer.model)
    # No bos_token: in training a document follows an end-of-document token.
    named = {"eos_token": tokenizer.eod, "unk_token": proto.trainer_spec.unk_id, "pad_token": proto.trainer_spec.pad_id}
    tokens = {name: proto.pieces[i].piece for name, i in named.items() if i >= 0}
    return _converted(proto).to_str(pretty=True).encode(), {**config, **tokens}


# From SentencePiece ---------------------------------------------------------------------------------------------------


def _converted(proto: ModelProto) -> tokenizers.Tokenizer:
    kind = proto.trainer_spec.model_type
    if kind not in (TrainerSpec.BPE, TrainerSpec.UNIGRAM):
        name = TrainerSpec.ModelType.Name(kind).lower()
        raise ValueError(f"there is no fast tokenizer for a SentencePiece model of type {name}: give BPE or unigram")
    converted = _bpe(proto) if kind == TrainerSpec.BPE else _unigram(proto)
    converted.normalizer = normalizers.Sequence(list(_normalizers(proto)))
    converted.decoder = decoders.Sequence(list(_decoders(proto)))
    special = [piece.piece for piece in proto.pieces if piece.type in (Piece.UNKNOWN, Piece.CONTROL)]
    converted.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    if kind == TrainerSpec.BPE:
        converted.add_tokens([AddedToken(piece, normalized=True) for piece in _user_defined(proto)])
    return converted


def _user_defined(proto: ModelProto) -> list[str]:
    return [piece.piece for piece in proto.pieces if piece.type == Piece.USER_DEFINED]


def _bpe(proto: ModelProto) -> tokenizers.Tokenizer:
    """Two parts are merged in the order of the score of the piece they make (bpe_model.cc). User-defined pieces are
    found first, in the normalised text, and never merged."""
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    merges = generate_merges(vocabulary, scores, {piece.piece for piece in proto.pieces if piece.type != Piece.NORMAL})
    trainer = proto.trainer_spec
    return tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=trainer.byte_fallback)
    )


def _unigram(proto: ModelProto) -> tokenizers.Tokenizer:
    """tokenizers would find control and byte pieces in a text: they get a score that the characters they are spelt
    with always beat. Unknown characters would lose to it: runs of them are words of their own, and so are user-defined
    pieces that have some."""
    trainer = proto.trainer_spec
    lowest = min(piece.score for piece in proto.pieces if piece.type == Piece.NORMAL)
    vocabulary: list[tuple[str, float]] = []
    known: set[str] = set()
    for piece in proto.pieces:
        score = 100 * min(lowest, -1.0)
        if piece.type == Piece.NORMAL:
            score = piece.score
        elif piece.type == Piece.USER_DEFINED:
            score = 0.1 * (len(piece.piece.encode()) - 1)  # measured in SentencePiece 0.2.3; -0.1 in releases before
        vocabulary.append((piece.piece, score))
        if piece.type in (Piece.NORMAL, Piece.USER_DEFINED) and len(piece.piece) == 1:
            known.add(piece.piece)
    converted = tokenizers.Tokenizer(models.Unigram(vocabulary, trainer.unk_id, trainer.byte_fallback))
    odd = sorted((piece for piece in _user_defined(proto) if not known.issuperset(piece)), key=len, reverse=True)
    before = "".join(f"{re.escape(piece)}|" for piece in odd)
    characters = "".join(f"\\x{{{ord(character):x}}}" for character in sorted(known))
    words = Regex(f"{before}(?:(?!{before}[{characters}])[\\s\\S])+")
    converted.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    return converted


def _normalizers(proto: ModelProto) -> Iterator[normalizers.Normalizer]:
    """Normalizer::Normalize of normalizer.cc, step by step."""
    spec = proto.normalizer_spec
    if spec.add_dummy_prefix and not spec.remove_extra_whitespaces:
        yield normalizers.Prepend(" ")  # not to an empty text
    if spec.precompiled_charsmap:
        normalize = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()).normalize
        if normalize("e\u0301").endswith("é"):
            yield normalizers.NFC()  # the map's sequences, of which Precompiled finds only those below 6 bytes
        # Precompiled looks up whole graphemes and drops what follows a match: a control character parts them. One that
        # the map drops anyway, or else one that is no character.
        apart = "\U000e0fff" if normalize("\x01") else "\x01"
        yield normalizers.Replace(Regex(r"(?<=[\s\S])(?=[\s\S])"), apart)
        yield normalizers.Precompiled(spec.precompiled_charsmap)
        yield normalizers.Replace(apart, "")
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    yield normalizers.Replace(" ", SPACE)
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(rf"{SPACE}+\z"), "")
        if spec.add_dummy_prefix:
            yield normalizers.Prepend(SPACE)


def _decoders(proto: ModelProto) -> Iterator[decoders.Decoder]:
    """SentencePieceProcessor::Decode of sentencepiece_processor.cc."""
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    yield decoders.Replace(Regex(rf"\A{re.escape(trainer.unk_piece)}\z"), trainer.unk_surface)
    to_spaces = decoders.Replace(SPACE, " ")
    if not (spec.add_dummy_prefix or spec.remove_extra_whitespaces):
        yield from (to_spaces, decoders.ByteFallback(), decoders.Fuse())
        return
    first = rf"\A{SPACE}+" if spec.remove_extra_whitespaces else rf"\A{SPACE}"
    yield from (decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(Regex(first), ""), to_spaces)
