"""What goes along with the weights of an exported folder: config, tokenizer, state, README.md."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from megasparse.checkpoint.hf.card import card
from megasparse.checkpoint.hf.export import MODEL, Export
from megasparse.checkpoint.hf.from_hf import BESIDE, RECIPE, STATE, THEIRS
from megasparse.checkpoint.hf.megasparse import MEGASPARSE, MODELING
from megasparse.checkpoint.hf.prove import Proof
from megasparse.config import dump_recipe
from megasparse.data.fast_tokenizer import save_fast_tokenizer
from megasparse.data.tokenizer import (
    HUGGINGFACE_FILE,
    SENTENCEPIECE_FILE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)
from megasparse.files import write_atomic

AnyTokenizer = SentencePieceTokenizer | HuggingFaceTokenizer
GENERATION = "generation_config.json"


def find_tokenizer(export: Export, given: Path | None) -> AnyTokenizer | None:
    """The checkpoint's, or the one that is ``given``; ValueError if that is another one. None if there is none."""
    path, expected = export.reader.path, export.reader.manifest.get("tokenizer")
    has_one = any((path / name).is_file() for name in (SENTENCEPIECE_FILE, HUGGINGFACE_FILE))
    if given is None and not has_one:
        return None
    tokenizer = load_tokenizer(given or path)
    if expected is not None and tokenizer.hash != expected:
        raise ValueError(f"--tokenizer {given}: it is not the tokenizer that {path} was trained with")
    if export.family is not MEGASPARSE and not (path / THEIRS / HUGGINGFACE_FILE).is_file():
        _check_tokenizer(export.family.model_type, tokenizer)
    return tokenizer


def _check_tokenizer(model_type: str, tokenizer: AnyTokenizer) -> None:
    """ValueError if transformers makes another one of it: beside some configs it takes a class of its own."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(model_type).save_pretrained(folder)
        try:
            save_fast_tokenizer(tokenizer, Path(folder))
        except ValueError as error:
            raise ValueError(f"{error}; the family megasparse takes any (--family megasparse)") from None


def write_extras(export: Export, folder: Path, tokenizer: AnyTokenizer | None) -> None:
    """Everything but weights and README.md."""
    beside = folder / BESIDE
    beside.mkdir(exist_ok=True)
    (beside / RECIPE).write_text(dump_recipe(export.recipe))
    state = {name.removeprefix(MODEL): export.reader.read(name) for name in export.beside}
    save_file(state, beside / STATE)
    theirs = export.reader.path / THEIRS
    for path in sorted(theirs.iterdir()) if theirs.is_dir() else []:
        shutil.copyfile(path, folder / path.name)
    if tokenizer is not None and not (folder / HUGGINGFACE_FILE).is_file():
        save_fast_tokenizer(tokenizer, folder, export.config.get("max_position_embeddings"))
    _write_config(export, folder)


def _write_config(export: Export, folder: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    special = _special_tokens(folder)
    fields = {**export.config, **special, "architectures": [export.family.architecture]}
    fields["dtype"] = str(export.dtype).removeprefix("torch.")
    if export.family is MEGASPARSE:
        from megasparse.checkpoint.hf.modeling_megasparse import MegasparseConfig

        shutil.copyfile(MODELING, folder / MODELING.name)
        config = MegasparseConfig(**fields)
    else:
        config = AutoConfig.for_model(export.family.model_type, **fields)
    config.save_pretrained(folder)
    if not (folder / GENERATION).is_file():
        GenerationConfig(**special).save_pretrained(folder)


def _special_tokens(folder: Path) -> dict[str, int | None]:
    """Ids of the tokens that begin and end a text, and that fill one up: those of the tokenizer as it was written."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if not (folder / HUGGINGFACE_FILE).is_file():
        return dict.fromkeys(names)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {name: getattr(tokenizer, name) for name in names}


def write_card(export: Export, folder: Path, proof: Proof | None) -> None:
    notes = [f"{proof}." if proof else "Logits were not compared."]
    if export.recipe.sparsity.weights is not None:
        notes.append("2:4 weights are written as the forward pass takes them, with their zeros.")
    if export.beside:
        notes.append(f"{len(export.beside)} tensors that transformers does not read are in {BESIDE}/{STATE}.")
    recipe = export.recipe.model_copy(update={"model": export.model})
    run = export.reader.path.resolve().parent.parent
    text = card(recipe, export.reader.manifest, export.family.model_type, export.family is MEGASPARSE, notes, run)
    write_atomic(folder / "README.md", text)
