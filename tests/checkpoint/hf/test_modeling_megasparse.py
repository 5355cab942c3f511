"""The exported model file against the recipe's model: the same weights give the same logits and the same text."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.nn import ModuleList
from transformers import AutoModelForCausalLM, dynamic_module_utils

from megasparse import topology
from megasparse.checkpoint.hf import modeling_megasparse
from megasparse.checkpoint.hf.megasparse import AUTO_MAP, MEGASPARSE
from megasparse.checkpoint.hf.modeling_megasparse import MegasparseConfig, MegasparseForCausalLM
from megasparse.config import Model, Recipe, SparseAttention
from megasparse.generate import generate
from megasparse.model import build_model
from tests import small
from tests.helpers import relative_error

SEQ = 64
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
LONG_YARN = {"scaling": "yarn", **YARN, "original_max_position_embeddings": 64}
GPT2 = {"position_embedding": "learned", "normalization": "LayerNorm", "bias": "all", "tie_embeddings": True}
OLMO2 = {"norm_placement": "post", "qk_norm": "full"}
SIGMOID = {"top_k": 3, "score_function": "sigmoid", "num_groups": 4, "top_k_groups": 2, "score_scale": 2.5}
DENSE: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {  # changes of model and moe
    "llama": ({"head_dim": 12, "rope": {"percent": 0.5}}, None),
    "linear": ({"rope": {"scaling": "linear", "factor": 3.0}}, None),
    "llama3": ({"rope": {"theta": 500.0, "scaling": "llama3", **LLAMA3}, "bias": "qkv", "tie_embeddings": True}, None),
    "yarn": ({"rope": {"scaling": "yarn", **YARN}, "qk_norm": "head"}, None),
    "yarn-factor": ({"head_dim": 16, "rope": {"theta": 100.0, "attention_factor": 1.3, **LONG_YARN}}, None),
    "gpt2": ({**GPT2, "activation": "gelu_tanh", "num_query_groups": None, "ffn_hidden_size": None}, None),
    "gelu": ({**GPT2, "activation": "gelu", "max_position_embeddings": 80}, None),
    "olmo2": (OLMO2, None),
    "olmoe": ({"qk_norm": "full"}, {"normalize_scores": False}),
    "flex-olmo": (OLMO2, {"layers": 2}),
    "deepseek": (
        {"num_layers": 3},
        {**SIGMOID, "layers": [0, 1, 1], "shared_expert_ffn_hidden_size": 40, "bias_update_rate": 0.001},
    ),
}
POOLED = {"selector": "pooled", "block_size": 4, "blocks": 4, "local_blocks": 1}
NSA = {
    **{"selector": "nsa", "block_size": 8, "blocks": 3, "local_blocks": 1},
    **{"compression_size": 8, "compression_stride": 4, "window_blocks": 2},
}
SPARSE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # sparse_attention, and changes of model
    "local": ({"selector": "local", "block_size": 8, "local_blocks": 2}, {}),
    "local-queries": ({"selector": "local", "block_size": 8, "query_block_size": 16, "sink_blocks": 0}, {}),
    "strided": ({"selector": "strided", "block_size": 4, "stride": 3, "local_blocks": 1}, {}),
    "strided-queries": ({"selector": "strided", "block_size": 8, "query_block_size": 4, "stride": 4}, {}),
    "pooled": (POOLED, {}),
    "pooled-mass": ({**POOLED, "blocks": 8, "mass": 0.4}, {"num_query_groups": 1}),
    "pooled-queries": ({**POOLED, "query_block_size": 4, "dense_start": 0.3, "ramp": 0.7}, {}),
    "pooled-long-queries": ({**POOLED, "query_block_size": 12, "blocks": 6, "mass": 0.7}, {"layers": [0, 1]}),
    "gate": ({**POOLED, "selector": "gate", "gate_dim": 16, "sink_blocks": 2}, {"qk_norm": "head"}),
    "gate-mass": ({**POOLED, "selector": "gate", "gate_dim": 8, "blocks": 8, "mass": 0.5}, {"num_query_groups": 4}),
    "clusters": ({**POOLED, "selector": "clusters", "clusters": 5}, {}),
    "clusters-queries": ({**POOLED, "selector": "clusters", "clusters": 3, "query_block_size": 4}, OLMO2),
    "nsa": (NSA, {}),
    "nsa-norm": ({**NSA, "mass": 0.8, "blocks": 4, "layers": [0, 1]}, OLMO2),
    "nsa-wide": ({**NSA, "compression_size": 16, "block_size": 4, "window_blocks": 3}, {"qk_norm": "head"}),
    "nsa-dense-end": ({**NSA, "dense_end": 0.1}, {}),
}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies the file to that a folder carries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.syspath_prepend(dynamic_module_utils.HF_MODULES_CACHE)
        yield


def ours(
    model: dict[str, Any], moe: dict[str, Any] | None, place: topology.Topology, **training: Any
) -> tuple[Recipe, ModuleList]:
    """As at the end of a run, with weights that matter: norms, biases, gates and all."""
    recipe = small.recipe({"init_std": 0.15, **model}, moe, training, data={"seq_length": SEQ})
    chunks, state = build_model(recipe, place, small.VOCAB)
    state.begin(recipe.training.steps - 1, recipe.training.steps, 1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in chunks[0].state_dict().items():
            if tensor is not None and (tensor.dim() == 1 or name.endswith(".output")):
                tensor += 0.15 * torch.randn(tensor.shape, generator=generator)
    return recipe, chunks.eval()


def theirs(recipe: Recipe, gpt: torch.nn.Module) -> MegasparseForCausalLM:
    config = MegasparseConfig(
        **{**recipe.model.model_dump(mode="json"), "vocab_size": small.VOCAB, **positions(recipe)}
    )
    model = MegasparseForCausalLM(config)
    tensors = exported(gpt.state_dict(), recipe.model)
    if recipe.model.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model.eval()


def positions(recipe: Recipe) -> dict[str, Any]:
    return {"max_position_embeddings": recipe.model.max_position_embeddings or recipe.data.seq_length}


def exported(state: dict[str, Tensor], recipe: Model) -> dict[str, Tensor]:
    """The exported checkpoint's tensors of our model's."""
    tensors = {}
    for name, (_, pieces) in MEGASPARSE.tensors(recipe, small.VOCAB, SEQ).items():
        for piece in pieces:
            place = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.shape, strict=True))
            tensors |= {part.name: part.take(state[name][place]) for part in piece.parts}
    return tensors


def sparse_model(name: str) -> dict[str, Any]:
    sparse, model = SPARSE[name]
    layers = {"layers": model["layers"]} if "layers" in model else {}
    return {**{k: v for k, v in model.items() if k != "layers"}, "sparse_attention": {**sparse, **layers}}


@torch.no_grad()
def logits_of(gpt: torch.nn.Module, ids: Tensor) -> Tensor:
    return gpt(ids, torch.arange(ids.shape[1]).expand(len(ids), -1), None)


def tokens(seq: int) -> Tensor:
    return torch.randint(0, small.VOCAB, (3, seq), generator=torch.Generator().manual_seed(seq))


def saved(model: MegasparseForCausalLM, folder: Path) -> Path:
    """As the exporter writes it: the file beside the weights, and auto_map in config.json."""
    model.save_pretrained(folder)
    shutil.copy(modeling_megasparse.__file__, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}))
    return folder


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.mark.parametrize("name", DENSE)
def test_logits_of_dense_attention_are_ours(single: topology.Topology, name: str) -> None:
    recipe, chunks = ours(*DENSE[name], single)
    model, ids = theirs(recipe, chunks[0]), tokens(50)
    with torch.no_grad():
        assert relative_error(model(ids).logits, logits_of(chunks[0], ids)) < 1e-5


@pytest.mark.parametrize("name", SPARSE)
def test_logits_of_sparse_attention_are_ours(single: topology.Topology, name: str) -> None:
    recipe, chunks = ours(sparse_model(name), None, single)
    model = theirs(recipe, chunks[0])
    for seq in (5, 21, 50, 64):  # shorter than a block, ragged, whole
        ids = tokens(seq)
        expected = logits_of(chunks[0], ids)
        with torch.no_grad():
            error = relative_error(model(ids).logits, expected)
        assert error < 1e-5, f"{seq} tokens: {error:.1e}"
    if name != "nsa-dense-end":
        model.config.sparse_attention["dense_end"] = 0.1  # the layers have the same dict
        with torch.no_grad():
            assert relative_error(model(ids).logits, expected) > 0.01, "blocks do not matter"


def test_every_selector_has_a_case() -> None:
    selectors = get_args(SparseAttention.model_fields["selector"].annotation)
    assert {sparse["selector"] for sparse, _ in SPARSE.values()} == set(selectors)


@pytest.mark.parametrize("name", ["yarn", "gpt2", "deepseek", "pooled-queries", "gate", "clusters-queries", "nsa-norm"])
def test_a_folder_gives_the_same_model_and_text(single: topology.Topology, tmp_path: Path, name: str) -> None:
    """Loaded by AutoModelForCausalLM: logits to the bit, and what generate writes is what ours does."""
    recipe, chunks = ours(*(DENSE[name] if name in DENSE else (sparse_model(name), None)), single)
    model, ids = theirs(recipe, chunks[0]), tokens(50)
    again = loaded(saved(model, tmp_path))
    assert type(again).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    prompt = ids[0, :45].tolist()
    expected = generate(chunks, recipe, single, prompt, 12)
    text = again.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert text[0, 45:].tolist() == expected
    assert len(set(expected)) > 2
    cached = again.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, use_cache=True)
    assert cached[0, 45:].tolist() == expected[:3], "there is no cache to use"


def test_bfloat16_keeps_the_selection_bias_in_float32(single: topology.Topology, tmp_path: Path) -> None:
    recipe, chunks = ours(*DENSE["deepseek"], single)
    model, ids = theirs(recipe, chunks[0]), tokens(50)
    half = loaded(saved(model, tmp_path), dtype=torch.bfloat16)
    router, original = half.model.layers[1].mlp.gate, model.model.layers[1].mlp.gate
    assert router.weight.dtype == torch.bfloat16
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, original.e_score_correction_bias)
    with torch.no_grad():
        assert half(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["pooled-mass", "gate", "clusters", "nsa-norm"])
def test_bfloat16_rounds_as_ours_does(single: topology.Topology, name: str) -> None:
    """Else near-ties between blocks fall the other way."""
    recipe, chunks = ours(sparse_model(name), None, single, precision="bf16")
    model, ids = theirs(recipe, chunks[0]).to(torch.bfloat16), tokens(50)
    expected = logits_of(chunks[0], ids).float()
    with torch.no_grad():
        difference = model(ids).logits.float() - expected
    assert difference.abs().mean() < 1e-3 * expected.abs().mean()


def test_tied_embeddings_are_one_tensor(single: topology.Topology, tmp_path: Path) -> None:
    recipe, chunks = ours(*DENSE["llama3"], single)
    model = loaded(saved(theirs(recipe, chunks[0]), tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_labels_give_the_cross_entropy_of_next_tokens(single: topology.Topology) -> None:
    recipe, chunks = ours({}, None, single)
    model, ids = theirs(recipe, chunks[0]), tokens(21)
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten())
    assert relative_error(output.loss, expected) < 1e-6


def test_padding_may_follow_a_text_but_not_lead_it(single: topology.Topology) -> None:
    recipe, chunks = ours(sparse_model("pooled-queries"), {}, single)
    model, ids = theirs(recipe, chunks[0]), tokens(50)
    mask = torch.ones_like(ids)
    mask[1, 21:] = 0
    with torch.no_grad():
        padded, alone = model(ids, attention_mask=mask).logits, model(ids[1:2, :21]).logits
    assert relative_error(padded[1:2, :21], alone) < 1e-5
    for prompt in (mask.flip(1), mask):  # what is generated would follow the padding
        with pytest.raises(ValueError, match="must not be padded on the left"):
            model.generate(ids, attention_mask=prompt, max_new_tokens=2)


def test_the_learned_table_ends(single: topology.Topology) -> None:
    recipe, chunks = ours(*DENSE["gpt2"], single)
    with pytest.raises(ValueError, match="65 tokens are more than max_position_embeddings=64"):
        theirs(recipe, chunks[0])(tokens(65))


def test_fields_left_open_mean_what_the_recipe_says() -> None:
    recipe = small.recipe({"num_query_groups": None, "ffn_hidden_size": None}).model
    config = MegasparseConfig(**recipe.model_dump(exclude_unset=True), vocab_size=small.VOCAB)
    assert (config.head_dim, config.num_query_groups) == (recipe.head_size, recipe.kv_heads)
    assert (config.intermediate_size, config.num_hidden_layers) == (recipe.ffn_size, recipe.num_layers)
    assert config.rope == recipe.rope.model_dump()
    for name in set(MegasparseConfig.__annotations__) & set(Model.model_fields) - {"rope"}:
        if not Model.model_fields[name].is_required() and name != "vocab_size":
            assert getattr(MegasparseConfig, name) == Model.model_fields[name].default, name


def test_what_a_folder_lacks_is_initialised() -> None:
    """As transformers does it: nothing is left as memory had it."""
    for name in ("gate", "clusters", "nsa"):
        recipe = small.recipe(sparse_model(name), {"bias_update_rate": 0.1}).model
        model = MegasparseForCausalLM(MegasparseConfig(**{**recipe.model_dump(), "vocab_size": small.VOCAB}))
        for key, weight in model.named_parameters():
            if weight.dim() > 1:
                assert weight.std().item() == pytest.approx(0.02, rel=0.3), key


def test_the_file_needs_torch_and_transformers_alone() -> None:
    imports = dynamic_module_utils.get_imports(modeling_megasparse.__file__)
    assert set(imports) - set(sys.stdlib_module_names) == {"torch", "transformers"}
