"""What is wrong with a folder is said by name, before there is a checkpoint; a conversion that is stopped goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint.hf import from_hf as converting
from megasparse.checkpoint.hf import tensors as entries
from megasparse.checkpoint.hf import to_hf
from megasparse.checkpoint.hf.from_hf import open_source
from megasparse.checkpoint.hf.output import JOURNAL, LOCK
from megasparse.checkpoint.reader import Reader
from megasparse.layout import Layout
from tests.checkpoint.hf.conversion import convert, export, read, theirs
from tests.helpers import files_of_at_most

Tensors = dict[str, Tensor]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of tensor but biases."""
    return theirs(tmp_path_factory.mktemp("models") / "qwen3", "qwen3_moe", head_dim=16, **EXPERTS)


@pytest.fixture
def changed(source: Path, tmp_path: Path) -> Callable[..., Path]:
    def change(tensors: Callable[[Tensors], Any] = lambda tensors: None, **config: Any) -> Path:
        """A copy of the source with other tensors, and other fields of the config."""
        shutil.copytree(source, tmp_path / "theirs")
        file = tmp_path / "theirs" / "model.safetensors"
        loaded = load_file(file)
        tensors(loaded)
        save_file({name: x.contiguous() for name, x in loaded.items()}, file, metadata={"format": "pt"})
        path = tmp_path / "theirs" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return tmp_path / "theirs"

    return change


def refused(folder: Path, match: str) -> None:
    final = folder.with_name("ours")
    with pytest.raises(ValueError, match=match):
        convert(folder, final, run=None)
    assert not final.exists()


NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
NAMES += ["model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.self_attn.q_norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_missing_or_renamed(changed: Callable[..., Path], name: str) -> None:
    folder = changed(lambda tensors: tensors.update({name + "s": tensors.pop(name)}))
    refused(folder, rf"has no {name} \[.*which a qwen3_moe must have")


@pytest.mark.parametrize("name", [name for name in NAMES if "norm" not in name])
def test_a_tensor_that_is_transposed(changed: Callable[..., Path], name: str) -> None:
    folder = changed(lambda tensors: tensors.update({name: tensors[name].t()}))
    refused(folder, rf"model\.safetensors: {name} is \[(\d+), (\d+)\], its config.json makes it \[\2, \1\]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_not_finite(changed: Callable[..., Path], name: str, value: float) -> None:
    folder = changed(lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    refused(folder, rf"model\.safetensors: {name} has values that are not finite")


def test_a_tensor_too_many(changed: Callable[..., Path]) -> None:
    folder = changed(lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2, 3)}))
    refused(folder, r"model\.layers\.2\.mlp\.up_proj\.weight \[2, 3\] is no tensor of a qwen3_moe .*--ignore")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"attention_bias": True}, "attention_bias=True, which no recipe can say"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
        ({"logit_softcap": 30.0}, "logit_softcap=30.0, which this version does not know .*--ignore logit_softcap"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\): dequantize"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "kv_lora_rank=512, multi-head latent attention"),
        ({"model_type": "gemma3_text"}, "model_type='gemma3_text': only gpt2, llama, "),
        ({"num_hidden_layers": 3}, r"has no model\.layers\.2\.input_layernorm\.weight"),
        ({"num_experts_per_tok": 9}, "moe.*top_k=9 is more than num_experts=4"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not model.embed_tokens.weight"),
    ],
)
def test_a_model_that_no_recipe_can_say(changed: Callable[..., Path], config: dict[str, Any], match: str) -> None:
    refused(changed(**config), match)


def test_what_is_ignored_is_the_users_word(changed: Callable[..., Path], tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.mtp.weight"] = torch.ones(2)

    folder = changed(add, logit_softcap=30.0)
    convert(folder, tmp_path / "ours", run=None, ignored=["logit_softcap", "model.mtp."])


def test_a_tied_head_may_be_there_twice(changed: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
        tie_word_embeddings=True,
    )
    convert(folder, tmp_path / "ours", run=None)
    assert "model.output_layer.weight" not in Reader(tmp_path / "ours").tensors


@pytest.mark.parametrize("change", [lambda head: head[-1, -1:].add_(1), lambda head: head.resize_(3, 5)])
def test_a_tied_head_that_is_another(
    changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Any]
) -> None:
    """Compared some rows at a time, to the last one."""

    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        change(tensors["lm_head.weight"])

    monkeypatch.setattr(converting, "BLOCK_BYTES", 700)
    refused(
        changed(add, tie_word_embeddings=True), "its lm_head.weight is not model.embed_tokens.weight: set it to false"
    )


def test_damaged_and_foreign_folders(changed: Callable[..., Path], tmp_path: Path) -> None:
    refused(tmp_path, "is no Hugging Face model: it has no config.json")
    folder = changed()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, r"model\.safetensors is damaged \(.*download it again")
    file.rename(folder / "pytorch_model.bin")
    refused(folder, r"has neither model\.safetensors nor .*: load pytorch_model\.bin with transformers")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is not JSON")


def test_shards_that_lack_one_or_a_tensor(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "theirs"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size="30KB")
    convert(folder, tmp_path / "whole", run=None)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    tensors = load_file(folder / file)
    del tensors[name]
    save_file(tensors, folder / file, metadata={"format": "pt"})
    refused(folder, f"{file} has no {name}, which model.safetensors.index.json says it has")
    (folder / file).unlink()
    refused(folder, f"{file} is missing: model.safetensors.index.json names it")


def test_logits_that_differ_leave_no_checkpoint(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that takes keys for values would pass every check of names and shapes."""
    read = converting._finite

    def swapped(source: converting.Source, name: str, *rows: Any) -> Tensor:
        return read(source, name.replace(".k_proj", ".v_proj"), *rows)

    monkeypatch.setattr(converting, "_finite", swapped)
    with pytest.raises(ValueError, match="are not the same model: logits of 128 random tokens"):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class Killed(BaseException):
    pass


def test_a_conversion_that_was_killed_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(converting, "FILE_BYTES", 20_000)
    final, partial = tmp_path / "ours", tmp_path / "ours.partial"
    read, count = converting._finite, 0

    def killed_at(last: int) -> Callable[..., Tensor]:
        def read_some(*args: Any) -> Tensor:
            nonlocal count
            count += 1
            if count == last:
                raise Killed
            return read(*args)

        return read_some

    monkeypatch.setattr(converting, "_finite", killed_at(30))
    with pytest.raises(Killed):
        convert(source, final, run=None)
    assert not final.exists()
    with pytest.raises(checkpoints.Damaged):
        checkpoints.read_manifest(partial)
    whole = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.distcp")}
    assert len(whole) > 2
    monkeypatch.setattr(converting, "_finite", read)
    convert(source, final, run=None)
    assert whole.items() <= {path.name: path.stat().st_mtime_ns for path in final.glob("*.distcp")}.items()
    assert not partial.exists()
    convert(source, tmp_path / "again", run=None)
    killed, again = Reader(final), Reader(tmp_path / "again")
    killed.verify()
    assert killed.tensors == again.tensors
    assert all(torch.equal(killed.read(name), again.read(name)) for name in again.tensors)
    with pytest.raises(ValueError, match="is there already"):
        convert(source, final, run=None)


def test_another_source_is_begun_anew(source: Path, changed: Callable[..., Path], tmp_path: Path) -> None:
    final, partial = tmp_path / "ours", tmp_path / "ours.partial"
    partial.mkdir()
    (partial / LOCK).touch()
    (partial / JOURNAL).write_text(json.dumps({"identity": {"source": "another"}, "files": {"__0_0.distcp": {}}}))
    (partial / "__0_0.distcp").write_bytes(b"of another model")
    convert(source, final, run=None)
    Reader(final).verify()


def test_types_are_kept(tmp_path: Path) -> None:
    folder = theirs(tmp_path / "theirs", "llama", dtype=torch.bfloat16)
    convert(folder, tmp_path / "ours")
    reader = Reader(tmp_path / "ours")
    assert {info.dtype for info in reader.tensors.values()} == {torch.bfloat16}
    assert reader.manifest["recipe"]["training"]["precision"] == "bf16"
    assert open_source(folder, frozenset(), Layout()).recipe.training.precision == "bf16"


@pytest.mark.parametrize("size", [0, 100, 3000, 60_000])
def test_a_full_disk(source: Path, tmp_path: Path, size: int) -> None:
    """Wherever it is full the error is the disk's, and both ways go on afterwards."""
    with files_of_at_most(size), pytest.raises(ValueError, match=r"could not write .*ours\.partial: File too large"):
        convert(source, tmp_path / "ours", run=None)
    assert not (tmp_path / "ours").exists()
    convert(source, tmp_path / "ours", run=None)
    with files_of_at_most(size), pytest.raises(ValueError, match=r"could not write .*back\.partial: File too large"):
        export(tmp_path / "ours", tmp_path / "back", run=None)
    assert not (tmp_path / "back").exists()
    export(tmp_path / "ours", tmp_path / "back", run=None)


def test_large_tensors_go_some_rows_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, experts too: the same as at once."""
    convert(source, tmp_path / "at once", run=None)
    monkeypatch.setattr(entries, "TOGETHER", 1)
    monkeypatch.setattr(converting, "BLOCK_BYTES", 700)
    monkeypatch.setattr(to_hf, "BLOCK_BYTES", 700)
    convert(source, tmp_path / "ours", run=None)
    whole, rows = Reader(tmp_path / "at once"), Reader(tmp_path / "ours")
    for name, info in whole.tensors.items():
        assert torch.equal(whole.read(name), rows.read(name)), name
        assert rows.tensors[name].elements == info.elements, name
    assert rows.tensors["model.decoder.layers.1.mlp.experts.w1"].pieces > 4  # of as many experts
    export(tmp_path / "ours", tmp_path / "back", run=None)
    before, after = read(source), read(tmp_path / "back")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
