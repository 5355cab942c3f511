"""Trained checkpoints, of any layout and with every kind of sparsity, as Hugging Face folders. Each export compares its
logits with those of our model in float32: to 1e-5, and KL to 1e-10 (prove.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megasparse.checkpoint.hf import tensors as entries
from megasparse.checkpoint.hf.export import open_export
from megasparse.checkpoint.hf.to_hf import parse_size
from tests.checkpoint.hf.conversion import convert, export, read
from tests.checkpoint.hf.trained import VOCAB, recipe_of, train
from tests.helpers import assert_close

GLM = {"score_function": "sigmoid", "bias_update_rate": 0.01, "shared_expert_ffn_hidden_size": 96, "num_groups": 4}
GLM |= {"top_k_groups": 2, "layers": [0, 1, 1, 1]}


def written(tmp_path: Path, checkpoint: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path / "theirs"
    export(checkpoint, folder, **options)
    return folder, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("layout", ["tp2pp2ep2", "ep2dp2", "tp2+sp"])
def test_checkpoints_of_any_layout(tmp_path: Path, layout: str) -> None:
    """Rows that pad the vocabulary, tied embeddings, experts on several ranks, ZeRO's parts, stages: one model."""
    recipe = recipe_of({"num_layers": 4, "tie_embeddings": True, "qk_norm": "head"}, {"layers": [0, 1, 0, 1]})
    _, config = written(tmp_path, train(recipe, tmp_path, layout))
    assert config["model_type"] == "qwen3_moe"
    assert config["vocab_size"] == VOCAB


def test_selection_biases_are_float32(tmp_path: Path) -> None:
    recipe = recipe_of({"num_layers": 4, "bias": "qkv"}, GLM, training={"precision": "bf16"})
    folder, config = written(tmp_path, train(recipe, tmp_path, "ep2"))
    assert config["model_type"] == "glm4_moe"
    tensors = read(folder)
    bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert bias.any()
    assert {x.dtype for name, x in tensors.items() if "bias" not in name} == {torch.bfloat16}


SPARSITY: dict[str, dict[str, Any]] = {
    "sr_ste": {"method": "sr_ste", "decay": 0.01},
    "s_ste": {"method": "s_ste"},
    "ast, boost": {"method": "ast", "decay": 0.01, "score": "wanda", "boost": 8},
    "mdgf, half faded": {"method": "mdgf", "ramp": 0.9},
    "dense end": {"method": "ste", "dense_end": 0.3},
}


@pytest.mark.parametrize("case", SPARSITY)
def test_sparse_weights_are_written_as_they_are_multiplied(tmp_path: Path, case: str) -> None:
    weights = {"targets": [r"\."], "refresh_interval": 1, **SPARSITY[case]}
    steps = 2 if "faded" in case else 4
    recipe = recipe_of({"bias": "qkv"}, None, sparsity={"weights": weights}, training={"precision": "bf16"})
    checkpoint = train(recipe, tmp_path, "single" if "boost" in case else "tp2", steps)
    folder, config = written(tmp_path, checkpoint)
    assert config["model_type"] == "qwen2"
    for name, tensor in read(folder).items():
        if "proj.weight" in name:
            zeros = (tensor.unflatten(1, (-1, 4)) == 0).sum(-1)
            assert bool((zeros >= 2).all()) == (case in ("sr_ste", "s_ste")), name


def test_sparse_experts(tmp_path: Path) -> None:
    """With S-STE's scale of each expert, and masks over expert parallelism."""
    weights = {"method": "s_ste", "targets": [r"\.experts\."]}
    recipe = recipe_of({}, {}, sparsity={"weights": weights})
    folder, _ = written(tmp_path, train(recipe, tmp_path, "ep2"))
    for name, tensor in read(folder).items():
        if ".experts." in name:
            assert ((tensor.unflatten(1, (-1, 4)) == 0).sum(-1) >= 2).all(), name


def test_fp8_scales_are_kept_beside(tmp_path: Path) -> None:
    """And are back, with the recipe's FP8, when the folder is converted again."""
    fp8 = {"precision": "bf16", "fp8": {"recipe": "delayed", "amax_history_len": 8}}
    checkpoint = train(recipe_of({}, {}, training=fp8), tmp_path, "ep2")
    folder, _ = written(tmp_path, checkpoint)
    convert(folder, tmp_path / "ours")
    before, after = (open_export(path, None, None).reader for path in (checkpoint, tmp_path / "ours"))
    scales = [name for name in before.tensors if ".fp8_scales." in name]
    assert len(scales) == 2 * 2 * (2 + 3)  # layers x (scale, history) x (linear layers, matrices of experts)
    for name in scales:
        assert torch.equal(before.read(name), after.read(name)), name
    assert after.manifest["recipe"]["training"]["fp8"] == before.manifest["recipe"]["training"]["fp8"]


SELECTORS: dict[str, dict[str, Any]] = {
    "gate": {"selector": "gate", "block_size": 4, "blocks": 4, "local_blocks": 1, "gate_dim": 16, "layers": [1, 0]},
    "pooled, ramp": {"selector": "pooled", "block_size": 4, "blocks": 3, "local_blocks": 1, "ramp": 0.9},
    "nsa": {
        **{"selector": "nsa", "block_size": 8, "blocks": 3, "local_blocks": 1, "dense_end": 0.3},
        **{"compression_size": 8, "compression_stride": 4, "window_blocks": 1},
    },
}


@pytest.mark.parametrize("case", SELECTORS)
def test_block_sparse_attention_goes_along_as_a_file(tmp_path: Path, case: str) -> None:
    """And what it generates, loaded as anyone would, is more than nothing; there and back to the bit."""
    recipe = recipe_of({"sparse_attention": SELECTORS[case], "qk_norm": "head"}, {})
    checkpoint = train(recipe, tmp_path, "tp2", steps=2)
    folder, config = written(tmp_path, checkpoint)
    assert config["model_type"] == "megasparse"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False).shape == (1, 12)
    convert(folder, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    before, after = read(folder), read(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_attention_that_ended_dense_needs_no_file(tmp_path: Path) -> None:
    sparse = {"selector": "gate", "block_size": 4, "blocks": 4, "local_blocks": 1, "gate_dim": 8, "dense_end": 0.3}
    folder, config = written(tmp_path, train(recipe_of({"sparse_attention": sparse}), tmp_path))
    assert config["model_type"] == "llama"
    beside = load_file(folder / "megasparse" / "state.safetensors")
    assert {name.rsplit(".", 1)[1] for name in beside} == {"query", "key"}


def test_what_no_family_can_say_is_refused_by_field(tmp_path: Path) -> None:
    checkpoint = train(recipe_of({"qk_norm": "head"}, {}), tmp_path)
    for family, reason in (
        ("llama", "model.qk_norm='head': a llama has 'none'"),
        ("mixtral", "model.qk_norm='head'"),
        ("qwen3", "model.moe"),
        ("gpt3", "model_type='gpt3'.*only gpt2, llama, "),
    ):
        with pytest.raises(ValueError, match=reason):
            export(checkpoint, tmp_path / "theirs", family=family)
    assert not (tmp_path / "theirs").exists()


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "TOGETHER", 1)
    checkpoint = train(recipe_of({}, {}), tmp_path)
    export(checkpoint, tmp_path / "one")
    export(checkpoint, tmp_path / "many", shard_bytes=20_000, run=None)
    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert_close(many, one, 0.0)
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 3
    assert max(file.stat().st_size for file in files) < 30_000  # header included
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")


@pytest.mark.parametrize("text", ["5", "0GB", "GB", "5 GB", "-1MB"])
def test_sizes(text: str) -> None:
    assert parse_size("500MB") == 500_000_000
    assert parse_size("1.5GB") == 1_500_000_000
    with pytest.raises(ValueError, match="--shard-size"):
        parse_size(text)
