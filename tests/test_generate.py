"""Generation: greedy and sampled, by one process and by many, which must agree (test_engine: greedy = transformers)."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn import ModuleList

from megasparse import generate as module
from megasparse import topology
from megasparse.config import Recipe, parse_recipe
from megasparse.generate import all_logits, generate, key_value_caches, likeliest, next_token_logits
from megasparse.layers import linear
from megasparse.model import build_model
from megasparse.sparsity.weight import sparse_weights
from tests import small
from tests.helpers import assert_close, run_distributed

PROMPT = [5, 6, 8, 9]


def sharp_model(recipe: Recipe, place: topology.Topology) -> ModuleList:
    """Weights so large that the next token depends on the ones before it."""
    chunks, _ = build_model(recipe, place, small.VOCAB)
    for parameter in chunks.parameters():
        if parameter.dim() > 1:
            parameter.data *= 8
    return chunks


@pytest.fixture
def model(single: topology.Topology) -> tuple[ModuleList, Recipe, topology.Topology]:
    recipe = small.recipe(moe={})
    return sharp_model(recipe, single), recipe, single


def test_greedy_takes_the_best_of_the_whole_context(model: tuple) -> None:
    gpt, recipe, place = model
    new = generate(gpt, recipe, place, PROMPT, 15)
    assert len(new) == 15
    tokens = PROMPT + new
    assert len(set(new)) > 3
    with torch.no_grad():
        logits = gpt[0](torch.tensor([tokens]), torch.arange(len(tokens)).unsqueeze(0), None)[0]
    assert logits.argmax(-1)[len(PROMPT) - 1 : -1].tolist() == new


def test_logits_are_the_models(model: tuple) -> None:
    gpt, recipe, place = model
    logits = next_token_logits(gpt.eval(), recipe, place, PROMPT)
    assert logits.shape == (small.VOCAB,)
    assert logits.dtype == torch.float32
    with torch.no_grad():
        expected = gpt[0](torch.tensor([PROMPT]), torch.arange(4).unsqueeze(0), None)[0, -1]
    assert_close(logits, expected, 1e-6)


def test_logits_of_all_positions_are_the_models(model: tuple) -> None:
    gpt, recipe, place = model
    tokens = torch.randint(0, small.VOCAB, (3, 7))
    logits = all_logits(gpt.eval(), recipe, place, tokens)
    assert logits.shape == (3, 7, small.VOCAB)
    with torch.no_grad():
        assert_close(logits, gpt[0](tokens, torch.arange(7).expand(3, 7), None), 1e-6)
    for row, ids in zip(logits, tokens.tolist(), strict=True):
        assert_close(row[-1], next_token_logits(gpt, recipe, place, ids), 1e-6)


def test_a_seed_is_a_text(model: tuple) -> None:
    gpt, recipe, place = model
    texts = [generate(gpt, recipe, place, PROMPT, 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    torch.rand(5)  # the global generator has no part in it
    texts.append(generate(gpt, recipe, place, PROMPT, 20, temperature=1.0, seed=1))
    assert texts[0] == texts[1] == texts[3]
    assert texts[0] != texts[2]


def test_generation_leaves_the_generators_of_training_alone(model: tuple) -> None:
    gpt, recipe, place = model
    before = torch.get_rng_state()
    generate(gpt, recipe, place, PROMPT, 3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(model: tuple, temperature: float) -> None:
    """First tokens over many seeds come as often as softmax(logits / temperature) says."""
    gpt, recipe, place = model
    logits = next_token_logits(gpt.eval(), recipe, place, PROMPT)
    expected = (logits.double() / temperature).softmax(-1)
    draws = 3000
    with mock.patch.object(module, "next_token_logits", return_value=logits):
        first = [generate(gpt, recipe, place, PROMPT, 1, temperature, seed)[0] for seed in range(draws)]
    counts = torch.bincount(torch.tensor(first), minlength=small.VOCAB).double()
    spread = (draws * expected * (1 - expected)).sqrt()
    assert ((counts - draws * expected).abs() <= 5 * spread + 3).all()


def test_a_low_temperature_is_greedy(model: tuple) -> None:
    gpt, recipe, place = model
    cold = generate(gpt, recipe, place, PROMPT, 10, temperature=1e-4, seed=3)
    assert cold == generate(gpt, recipe, place, PROMPT, 10)


def test_the_likeliest_tokens(model: tuple) -> None:
    """The fewest that have top_p together: as many as needed, the last of them included."""
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    for top_p, kept in ((0.39, [1]), (0.41, [1, 3]), (0.75, [1, 2, 3]), (0.95, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert likeliest(probabilities, top_p).nonzero().flatten().tolist() == kept
    gpt, recipe, place = model
    greedy = generate(gpt, recipe, place, PROMPT, 10)
    assert generate(gpt, recipe, place, PROMPT, 10, temperature=2.0, top_p=1e-6) == greedy
    assert generate(gpt, recipe, place, PROMPT, 10, temperature=2.0) != greedy


def test_stops_when_told_that_it_is_enough(model: tuple) -> None:
    gpt, recipe, place = model
    whole = generate(gpt, recipe, place, PROMPT, 15)
    assert generate(gpt, recipe, place, PROMPT, 15, until=lambda new: new[-2:] == whole[3:5]) == whole[:5]


def test_stops_before_the_stop_token(model: tuple) -> None:
    gpt, recipe, place = model
    whole = generate(gpt, recipe, place, PROMPT, 15)
    stop = whole[4]
    assert generate(gpt, recipe, place, PROMPT, 15, stop=stop) == whole[: whole.index(stop)]
    assert generate(gpt, recipe, place, [*PROMPT, stop], 15, stop=-1) == generate(
        gpt, recipe, place, [*PROMPT, stop], 15
    ), "a stop token in the prompt does not count"
    assert generate(gpt, recipe, place, PROMPT, 0) == []


@pytest.mark.parametrize("model_options", [{}, {"position_embedding": "learned"}], ids=["rope", "learned"])
def test_a_long_prompt_is_read_from_its_end(single: topology.Topology, model_options: dict[str, Any]) -> None:
    """Only the last seq_length tokens are seen, also when it is the new ones that make it long."""
    recipe = small.recipe(model_options, {})
    gpt = sharp_model(recipe, single)
    long = torch.randint(0, small.VOCAB, (small.SEQ + 10,)).tolist()
    assert generate(gpt, recipe, single, long, 5) == generate(gpt, recipe, single, long[-small.SEQ :], 5)
    new = generate(gpt, recipe, single, PROMPT, small.SEQ + 5)
    tokens = PROMPT + new
    assert new[-1] == generate(gpt, recipe, single, tokens[-small.SEQ - 1 : -1], 1)[0]


POOLED = {"selector": "pooled", "block_size": 4, "blocks": 4}
NSA = {"compression_size": 4, "compression_stride": 2, "window_blocks": 2}
ATTENTION: dict[str, dict[str, Any]] = {
    "dense": {},
    "yarn": {"rope": {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "learned": {"position_embedding": "learned"},
    "local": {"sparse_attention": {"selector": "local", "block_size": 4, "local_blocks": 2, "query_block_size": 3}},
    "strided": {"sparse_attention": {"selector": "strided", "block_size": 2, "stride": 5}},
    "pooled": {"sparse_attention": {**POOLED, "layers": [1, 0]}},
    "query blocks": {"sparse_attention": {**POOLED, "query_block_size": 4}},
    "larger query blocks": {"sparse_attention": {**POOLED, "blocks": 5, "query_block_size": 6}},
    "gate": {"sparse_attention": {**POOLED, "selector": "gate", "gate_dim": 8}},
    "nsa": {"sparse_attention": {**POOLED, "selector": "nsa", **NSA}},
    "clusters": {"sparse_attention": {**POOLED, "selector": "clusters", "clusters": 3}},
}


@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_a_cache_changes_nothing(single: topology.Topology, name: str) -> None:
    """Logits of each token, by itself or a few at a time after a prompt, are those of a forward pass over all."""
    recipe = small.recipe(ATTENTION[name], {})
    gpt = sharp_model(recipe, single).eval()
    tokens = torch.randint(0, small.VOCAB, (small.SEQ,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = {n: next_token_logits(gpt, recipe, single, tokens[:n]) for n in range(1, small.SEQ + 1)}
    fed: list[int] = []
    gpt[0].register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].shape[1]))
    for prompt, step in ((3, 1), (9, 1), (8, 1), (2, 5)):
        with key_value_caches(gpt, single) as position:
            for length in range(prompt, small.SEQ + 1, step):
                logits = next_token_logits(gpt, recipe, single, tokens[:length], position.start)
                assert_close(logits, whole[length], 1e-5)
                assert fed[-1] == length - position.start
                position.start = length
    assert_close(next_token_logits(gpt, recipe, single, tokens), whole[small.SEQ], 1e-7)  # no cache is left behind


@pytest.mark.parametrize("name", ATTENTION)
def test_text_goes_on_past_the_sequence_length(single: topology.Topology, name: str) -> None:
    """Every token is the best after the last seq_length ones, while there is a cache and when they no longer fit."""
    recipe = small.recipe(ATTENTION[name], {})
    gpt = sharp_model(recipe, single)
    tokens = PROMPT + generate(gpt, recipe, single, PROMPT, small.SEQ + 5)
    for end in range(len(PROMPT), len(tokens)):
        with torch.no_grad():
            logits = next_token_logits(gpt, recipe, single, tokens[:end][-small.SEQ :])
        assert tokens[end] == int(logits.argmax())


def test_an_error_leaves_no_cache_behind(model: tuple) -> None:
    gpt, recipe, place = model
    exact = next_token_logits(gpt.eval(), recipe, place, PROMPT)
    with (
        mock.patch.object(module, "_of_first_rank", side_effect=[1, KeyboardInterrupt]),
        pytest.raises(KeyboardInterrupt),
    ):
        generate(gpt, recipe, place, PROMPT, 5)
    assert torch.equal(next_token_logits(gpt, recipe, place, PROMPT), exact)


def texts(raw: dict[str, Any]) -> list[list[int]]:
    recipe = parse_recipe(raw)
    place = small.start(recipe)
    gpt = sharp_model(recipe, place)
    long = [(7 * i) % small.VOCAB for i in range(small.SEQ + 3)]
    stop = generate(gpt, recipe, place, PROMPT, 5)[-1]
    return [
        generate(gpt, recipe, place, PROMPT, 5),
        generate(gpt, recipe, place, PROMPT[:3], 8, temperature=1.0, seed=5),
        generate(gpt, recipe, place, PROMPT, 12, stop=stop),
        generate(gpt, recipe, place, long, 3),
    ]


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {"ep": 2}),
        (2, {"pp": 2}),
        (2, {"tp": 2}),
        (2, {"tp": 2, "ep": 2, "sequence_parallel": True}),
        (2, {"pp": 2, "vp": 2}),
        (2, {"cp": 2}),
        (4, {"tp": 2, "cp": 2, "sequence_parallel": True}),
        (4, {"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True}),
    ],
    ids=lambda value: "".join(map(str, value)) if isinstance(value, dict) else str(value),
)
def test_every_layout_writes_the_same(world_size: int, parallel: dict[str, Any]) -> None:
    """On every rank; the vocabulary of 96 and prompts of 3 and 4 tokens are divisible by tp and not."""
    options = {"tie_embeddings": True, "num_layers": 4}
    raw = small.recipe(options, {"capacity_factor": 0.5}, {"micro_batch_size": 1}).model_dump(mode="json")
    whole = run_distributed(texts, 1, raw)[0]
    assert run_distributed(texts, world_size, {**raw, "parallel": parallel}) == [whole] * world_size
    assert len(whole[2]) < 12


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("nsa", {"tp": 2, "sequence_parallel": True}),
        ("gate", {"pp": 2}),
        ("larger query blocks", {"pp": 2, "vp": 2}),
    ],
)
def test_block_sparse_attention_writes_the_same(name: str, parallel: dict[str, Any]) -> None:
    raw = small.recipe({**ATTENTION[name], "num_layers": 4}, {}, {"micro_batch_size": 1}).model_dump(mode="json")
    whole = run_distributed(texts, 1, raw)
    assert run_distributed(texts, 2, {**raw, "parallel": parallel}) == whole * 2


def texts_of_ranks_that_differ(stop: int | None) -> list[list[int]]:
    """Each rank computes other logits, as rounding may make it: without a common choice they part, or hang."""
    recipe = small.recipe(moe={}, parallel={"ep": 2})
    place = small.start(recipe)
    gpt = sharp_model(recipe, place)
    exact = module.next_token_logits

    def differing(*arguments: Any) -> torch.Tensor:
        logits = exact(*arguments)
        return logits.roll(dist.get_rank())

    with mock.patch.object(module, "next_token_logits", differing):
        return [generate(gpt, recipe, place, PROMPT, 6, t, stop=stop) for t in (0.0, 1.0)]


def test_ranks_that_round_differently_stay_together() -> None:
    free = run_distributed(texts_of_ranks_that_differ, 2, None)
    assert free[0] == free[1]
    stop = free[0][0][2]
    stopped = run_distributed(texts_of_ranks_that_differ, 2, stop)
    assert stopped[0] == stopped[1]
    assert stopped[0][0] == free[0][0][: free[0][0].index(stop)]


def test_fp8_2_4_products_where_they_run(monkeypatch: pytest.MonkeyPatch, single: topology.Topology) -> None:
    """With a stand-in of torchao's kernel that does not round, the text is the masked products'; every 2:4 linear layer
    goes there, and afterwards none. Without a Hopper GPU it is refused."""
    recipe = small.recipe({"bias": "qkv"}, sparsity={"weights": {"method": "s_ste", "targets": ["qkv", "fc2"]}})
    gpt = sharp_model(recipe, single)
    for sparse in sparse_weights(gpt):
        sparse.begin_step(0, 4)
        sparse.end_step()
    expected = generate(gpt, recipe, single, PROMPT, 6)
    with pytest.raises(ValueError, match="torchao's FP8 2:4 kernels need a CUDA GPU of sm_90"):
        generate(gpt, recipe, single, PROMPT, 6, fp8_sparse=True)
    products = []

    def fp8_linear_24(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert ((weight.unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all()
        products.append(weight.shape)
        return x @ weight.t()

    monkeypatch.setattr(linear, "prepare_fp8", lambda weight: weight)
    monkeypatch.setattr(linear, "fp8_linear_24", fp8_linear_24)
    assert generate(gpt, recipe, single, PROMPT, 6, fp8_sparse=True) == expected
    assert len(products) == 6 * 4
    assert generate(gpt, recipe, single, PROMPT, 6) == expected
    assert len(products) == 6 * 4
