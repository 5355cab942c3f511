"""A trained model to ask: a megasparse checkpoint in any layout, or a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megasparse import platform, topology
from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint.weights import inference_source, load_model
from megasparse.data.tokenizer import FILES as TOKENIZER_FILES
from megasparse.data.tokenizer import Tokenizer, load_tokenizer
from megasparse.generate import all_logits, generate
from megasparse.launch import launch
from megasparse.layout import Layout, check_layout

MANIFEST = "manifest.json"  # a checkpoint has one
LONGEST_DEFAULT_WINDOW = 2048  # tokens; of Hugging Face models, which may say they take a million


class Model(Protocol):
    """What the verbs know of a model. Making one is quick and finds the user's errors; ``load`` is the long work.

    In a job of several processes each of them calls every method alike, and gets the same."""

    path: Path
    window: int  # tokens it sees at a time, by default
    longest: int | None  # tokens it has positions for; None: any number
    prefix: int  # the token that a document's first one comes after

    def load(self) -> None: ...

    def encode(self, text: str) -> list[int]:
        """Without special tokens."""
        ...

    def decode(self, ids: list[int]) -> str: ...

    def logits(self, tokens: Tensor) -> Tensor:
        """int64 [batch, seq] -> float32 [batch, seq, vocab]: of the token after each."""
        ...


def open_model(
    path: Path,
    tokenizer: Path | None = None,
    layout: Layout | None = None,
    precision: str | None = None,
    trust_remote_code: bool = False,
) -> CheckpointModel | HuggingFaceModel:
    """The model at ``path``: a checkpoint step_N, the latest one of a run folder, or a Hugging Face folder.

    ``tokenizer``: where its tokenizer is, if not there. ``layout``: of a checkpoint; None: one process, or data
    parallelism. ``precision``: in place of its own. ValueError if there is no model, or not one that can be used so."""
    if not path.is_dir():
        raise ValueError(f"no folder at {path}: give a checkpoint step_N, a run folder or a Hugging Face folder")
    if precision is not None and precision not in platform.DTYPES:
        raise ValueError(f"--precision {precision}: give one of {', '.join(platform.DTYPES)}")
    if (path / "checkpoints").is_dir():
        latest = checkpoints.latest(path / "checkpoints")
        if latest is None:
            raise ValueError(f"no checkpoint in {path / 'checkpoints'}: train until one is saved")
        path = latest
    if (path / MANIFEST).is_file():
        return CheckpointModel(path, tokenizer, layout or Layout(), precision)
    if (path / "config.json").is_file():
        if layout is not None or launch().world_size > 1:
            raise ValueError(
                f"{path} is a Hugging Face folder, which runs in one process: start megasparse without deepspeed and "
                "--layout"
            )
        return HuggingFaceModel(path, tokenizer, precision, trust_remote_code)
    raise ValueError(
        f"{path} is neither a checkpoint (it has no {MANIFEST}), nor a run folder (no checkpoints), "
        "nor a Hugging Face folder (no config.json)"
    )


class CheckpointModel:
    """A megasparse checkpoint, as it was when it was saved: with its masks, and in its state of schedules."""

    def __init__(self, path: Path, tokenizer: Path | None, layout: Layout, precision: str | None) -> None:
        self.path = path
        self._source, vocabulary = inference_source(path, layout.parallel(), precision)
        self.recipe, self._vocab_size = self._source.recipe, vocabulary.size
        self.layout = check_layout(self.recipe, launch().world_size)
        self.tokenizer = _tokenizer(path, tokenizer, vocabulary.tokenizer, self.recipe.data.sets[0].path)
        if self.tokenizer.vocab_size > self._vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model of {path} {self._vocab_size}: give "
                "the one it was trained with as --tokenizer"
            )
        model, self.window = self.recipe.model, self.recipe.data.seq_length
        learned = model.position_embedding == "learned"
        self.longest = (model.max_position_embeddings or self.window) if learned else None
        self.prefix = self.tokenizer.eod

    def load(self) -> None:
        """Join the process group in the layout and read the weights."""
        self.topology = topology.initialize(self.layout, self.recipe.training.seed)
        self.chunks = load_model(self._source, self.topology, self._vocab_size)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def logits(self, tokens: Tensor) -> Tensor:
        return all_logits(self.chunks, self.recipe, self.topology, tokens)

    def generate(
        self,
        prompt: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        until: Callable[[list[int]], bool] | None = None,
    ) -> list[int]:
        return generate(
            self.chunks,
            self.recipe,
            self.topology,
            prompt,
            max_new_tokens,
            temperature,
            seed,
            stop=self.tokenizer.eod,
            top_p=top_p,
            until=until,
        )


def _tokenizer(path: Path, given: Path | None, wanted: str | None, data_set: Path) -> Tokenizer:
    """The tokenizer with the hash ``wanted`` (None: the checkpoint does not say): the one given, the checkpoint's own,
    or that of its first data set."""
    if given is not None:
        tokenizer = load_tokenizer(given)
        if wanted not in (None, tokenizer.hash):
            raise ValueError(f"--tokenizer {given} is not the one {path} was trained with: its hash is another")
        return tokenizer
    if _holds_tokenizer(path):
        return load_tokenizer(path)
    if wanted is not None and _holds_tokenizer(data_set):
        tokenizer = load_tokenizer(data_set)
        if tokenizer.hash == wanted:
            return tokenizer
    raise ValueError(
        f"no tokenizer in {path}, and not the one it was trained with in {data_set}: give its file or folder as "
        "--tokenizer"
    )


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


class HuggingFaceModel:
    """What transformers' AutoModelForCausalLM and AutoTokenizer load, in one process."""

    def __init__(self, path: Path, tokenizer: Path | None, precision: str | None, trust_remote_code: bool) -> None:
        from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

        self.path, self._trust = path, trust_remote_code
        self._dtype = platform.DTYPES[precision] if precision else "auto"
        described = json.loads((path / "config.json").read_text())
        own_code = "auto_map" in described and described.get("model_type") not in CONFIG_MAPPING
        if own_code and not trust_remote_code:
            raise ValueError(f"{path} brings its own code: read it, then pass --trust-remote-code")
        if not [*path.glob("*.safetensors"), *path.glob("*.bin")]:
            raise ValueError(f"{path} has a config.json but no weights: *.safetensors is missing")
        holder = tokenizer or path
        if not holder.is_dir() or not _holds_tokenizer(holder):
            raise ValueError(
                f"no tokenizer in {holder}: give a folder with {' or '.join(TOKENIZER_FILES)}, --tokenizer"
            )
        text = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(holder, trust_remote_code=trust_remote_code)
        if len(self.tokenizer) > text.vocab_size:
            raise ValueError(
                f"the tokenizer in {holder} has {len(self.tokenizer)} tokens, the model of {path} {text.vocab_size}: "
                "give the one it was trained with as --tokenizer"
            )
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise ValueError(f"the tokenizer in {holder} has neither a bos nor an eos token: name one in its config")
        self.prefix: int = eos if bos is None else bos
        self.longest = text.max_position_embeddings if hasattr(text, "max_position_embeddings") else None
        self.window = min(self.longest or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)

    def load(self) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.path, dtype=self._dtype, trust_remote_code=self._trust)
        self.model = model.to(platform.device()).eval()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens.to(self.model.device)).logits.float()

    @torch.no_grad()
    def generate(
        self,
        prompt: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        until: Callable[[list[int]], bool] | None = None,
    ) -> list[int]:
        assert until is None  # lm-eval's own class generates for Hugging Face models
        torch.manual_seed(seed)
        ids = torch.tensor([prompt], device=self.model.device)
        stops = self.model.generation_config.eos_token_id  # one, several or none
        stops = {self.tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
        whole = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            eos_token_id=sorted(stops) or None,
            pad_token_id=self.prefix,
            **sampling,
        )
        new = whole[0, len(prompt) :].tolist()
        return new[:-1] if new and new[-1] in stops else new


def is_main() -> bool:
    """Is this the process that prints and writes?"""
    return launch().rank == 0
