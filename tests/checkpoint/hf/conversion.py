"""What every family is held to: logits as transformers', in every layout, and every tensor back to the bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megasparse.checkpoint.hf.from_hf import from_hf
from megasparse.checkpoint.hf.prove import Proof, prove
from megasparse.checkpoint.hf.to_hf import Options, to_hf
from megasparse.layout import Layout
from tests.helpers import run_distributed
from tests.oracle import perturb

VOCAB = 95  # odd: tensor parallelism pads it
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,  # weights that matter: at 0.02 attention and routing are all but uniform
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2_HAS = ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
DENSE = ("tp2", "pp2", "tp2pp2dp2")
EXPERTS = ("tp2", "pp2", "ep2", "tp2pp2ep2")


def quiet() -> Console:
    return Console(file=io.StringIO())


def theirs(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny model of transformers with random weights, saved by it."""
    sizes = {name: size for name, size in SIZES.items() if model_type != "gpt2" or name in GPT2_HAS}
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    torch.manual_seed(0)
    model = perturb(AutoModelForCausalLM.from_config(config))
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.copy_(0.2 * torch.randn(buffer.shape))
    model.to(dtype).save_pretrained(folder)
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def convert(folder: Path, final: Path, layout: str = "single", **options: Any) -> Proof | None:
    """from_hf, with the comparison of logits."""
    run = options.pop("run", run_distributed)
    return from_hf(folder, final, Layout.parse(layout), frozenset(options.pop("ignored", ())), run, quiet(), **options)


def export(checkpoint: Path, final: Path, **options: Any) -> Proof | None:
    """to_hf, with the comparison of logits."""
    run = options.pop("run", run_distributed)
    return to_hf(checkpoint, final, Options(**options), run, quiet())


def check(tmp_path: Path, model_type: str, layouts: tuple[str, ...], **changes: Any) -> None:
    """A model of theirs with ``changes`` to SIZES, there and back. ``prove`` holds logits to 1e-5 and KL to 1e-10."""
    folder, checkpoint, back = theirs(tmp_path / "theirs", model_type, **changes), tmp_path / "ours", tmp_path / "back"
    proofs = [convert(folder, checkpoint)]
    proofs += [prove(checkpoint, folder, torch.float32, Layout.parse(text), run_distributed) for text in layouts]
    assert [proof.layout for proof in proofs if proof] == ["single", *(str(Layout.parse(text)) for text in layouts)]
    export(checkpoint, back, family=model_type)
    before, after = read(folder), read(back)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert before[next(iter(before))].dtype == after[next(iter(before))].dtype
    old, new = (AutoConfig.from_pretrained(path).to_dict() for path in (folder, back))
    changed = {name: (old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)}
    for name in (
        "_name_or_path",
        "initializer_range",
        "router_aux_loss_coef",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
    ):
        changed.pop(name, None)  # training's
    assert changed == {}, changed
