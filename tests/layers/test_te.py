"""The door, and the contract with Transformer Engine, read from sources: neither TE nor a GPU is needed.

What our door and megatron-core's extension use of TE 2.20.2 is looked up in the sources of its wheel.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core.utils
import pytest
import torch
import torch.nn as nn
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megasparse import topology
from megasparse.config import Fp8, WeightSparsity
from megasparse.layers import te
from megasparse.layers.linear import ColumnParallelLinear, Product, RowParallelLinear
from megasparse.layers.moe import MoELayer
from megasparse.layers.step import StepState
from megasparse.model import Linears, transformer_config
from tests import small
from tests.helpers import REPOSITORY, assert_close
from tests.layers.te_sources import VERSION, Offer, Use, Uses, te_gate
from tests.layers.te_stand_ins import pad, unpad

MEGATRON = Path(next(iter(importlib.util.find_spec("megatron.core").submodule_search_locations)))  # type: ignore
DOOR = REPOSITORY / "megasparse/layers/te.py"

# What megatron-core 0.16.1 uses that this version does not have, and why that does no harm.
KNOWN = {
    # A pydantic dataclass ignores them. So fp8_wgrad=False, "dW in higher precision", does nothing: never set it.
    "transformer_engine.common.recipe.DelayedScaling.__init__: "
    "no argument device, override_linear_precision, params_dtype",
    # Imports whose ImportError megatron-core catches: it splits by torch.split and has no te_general_gemm.
    "transformer_engine.pytorch.attention._SplitAlongDim: there is no such name",
    "transformer_engine.pytorch.attention._SplitAlongDim.apply: there is no such name",
    "transformer_engine.pytorch.module.base.get_workspace: there is no such name",
    "transformer_engine.pytorch.cpp_extensions.general_gemm: no argument workspace",
}


def uses(path: Path) -> list[Use]:
    return Uses(path.read_text(), "transformer_engine", te_gate(VERSION)).found


def test_the_door_uses_what_there_is(offer: Offer) -> None:
    found = uses(DOOR)
    assert [problem for use in found if (problem := offer.problem(use))] == []
    assert {use.name.split(".")[-1] for use in found if use.keywords == {"return_reason"}} == {
        "is_fp8_available",
        "is_fp8_block_scaling_available",
    }


def test_megatron_uses_what_there_is(offer: Offer) -> None:
    files = [MEGATRON / "extensions/transformer_engine.py", MEGATRON / "fp8_utils.py"]
    found = [use for file in files for use in uses(file)]
    assert {problem for use in found if (problem := offer.problem(use))} == KNOWN


def test_what_megatron_uses_is_found() -> None:
    """A reader that finds nothing would find nothing wrong."""
    extension = {use.name: use for use in uses(MEGATRON / "extensions/transformer_engine.py") if use.keywords}
    fp8 = {use.name: use for use in uses(MEGATRON / "fp8_utils.py") if use.keywords}
    pytorch, recipe = "transformer_engine.pytorch", "transformer_engine.common.recipe"
    linear = extension[f"{pytorch}.Linear.__init__"].keywords
    assert linear is not None
    assert linear >= {"in_features", "params_dtype", "device", "ub_overlap_ag", "rng_tracker_name", "ub_name"}
    assert "ub_split_ag" not in linear  # of TE before 1.5
    for name in ("LayerNormLinear.__init__", "GroupedLinear.__init__", "DotProductAttention.forward", "RMSNorm"):
        assert f"{pytorch}.{name}" in extension
    assert "interval" not in (extension[f"{recipe}.DelayedScaling.__init__"].keywords or ())  # of TE before 1.8
    assert fp8[f"{pytorch}.fp8_autocast"].keywords == {"enabled", "fp8_recipe", "fp8_group"}
    assert {f"{recipe}.{name}" for name in ("Float8CurrentScaling", "Float8BlockScaling")} <= fp8.keys()


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("te.pytorch.Linear(in_features=1, out_features=2, bias=True)", None),
        ("te.pytorch.Linear(in_features=1, outfeatures=2)", "pytorch.Linear: no argument outfeatures"),
        ("te.pytorch.Linaer(1)", "pytorch.Linaer: there is no such name"),
        ("class A(te.pytorch.Linear):\n def f(self):\n  super().forward(1, is_first=True)", "no argument is_first"),
        ("class A(te.pytorch.Linear):\n def f(self):\n  super().backward_wd()", "Linear.backward_wd: there is no such"),
        ("def f():\n k = {'eps': 1}\n k['epz'] = 2\n te.pytorch.Linear(8, **k)", "no argument eps, epz"),
        ("te.common.recipe.DelayedScaling(margin=1, amax_history_len=4)", None),
        ("te.common.recipe.DelayedScaling(amax_history=4)", "no argument amax_history"),
        ("te.common.recipe.Format.HYBRID", None),
        ("te.common.recipe.Format.E3M4", "Format.E3M4: there is no such name"),
        ("te.common.recipe.Float8BlockScalling", "there is no such name"),
        ("from transformer_engine.pytorch.fp8 import fp8_autocast\nfp8_autocast(recipe=1)", "no argument recipe"),
        ("from transformer_engine.pytorch.fp9 import x", "fp9.x: there is no such name"),
        ("te.pytorch.is_fp8_available(True, True)", "2 positional arguments"),
        ("if is_te_min_version('2.0'):\n te.pytorch.Linear\nelse:\n te.pytorch.Old", None),
        ("if get_te_version() < PkgVersion('1.3') or not HAVE_TE:\n te.pytorch.Old", None),
        ("if is_te_min_version('99.0'):\n te.pytorch.New", None),
        ("if something():\n te.pytorch.New", "pytorch.New: there is no such name"),
    ],
)
def test_the_reader_can_fail(offer: Offer, source: str, problem: str | None) -> None:
    found = Uses(f"import transformer_engine as te\n{source}", "transformer_engine", te_gate(VERSION)).found
    problems = [p for use in found if (p := offer.problem(use))]
    assert problems == [] if problem is None else any(re.search(re.escape(problem), p) for p in problems)


def test_the_slots_are_megatrons() -> None:
    """Each name that the door takes from megatron-core's extension is a class there."""
    root = MEGATRON.parent.parent
    megatron = Offer(lambda path: (root / path).read_text() if (root / path).is_file() else None)
    found = Uses(DOOR.read_text(), "megatron").found
    extension = [use for use in found if use.name.startswith("megatron.core.extensions.")]
    assert len(extension) == len(dataclasses.fields(te.Layers))
    assert [problem for use in found if (problem := megatron.problem(use))] == []


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te.platform, "has_cuda", lambda: False)
    assert te.missing() == te.missing("block") == "there is no CUDA device"
    with pytest.raises(ValueError, match="there is no CUDA device"):
        te.layers()
    monkeypatch.setattr(te.platform, "has_cuda", lambda: True)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    with pytest.raises(ValueError, match=r"cannot be imported .*pip install"):
        te.layers()


class FakeTE:
    """What the door asks of Transformer Engine: a Hopper GPU with a CUDA too old for block scaling."""

    @staticmethod
    def is_fp8_available(return_reason: bool) -> tuple[bool, str]:
        return True, ""

    @staticmethod
    def is_fp8_block_scaling_available(return_reason: bool) -> tuple[bool, str]:
        return False, "needs CUDA >= 12.9"


def test_it_asks_transformer_engine_for_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te.platform, "has_cuda", lambda: True)
    monkeypatch.setitem(sys.modules, "transformer_engine", type(sys)("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", FakeTE)
    assert te.missing() is te.missing("delayed") is te.missing("current") is None
    assert te.missing("block") == "FP8 with block scaling: needs CUDA >= 12.9"


def config(**fields) -> TransformerConfig:
    return TransformerConfig(num_layers=4, hidden_size=8, num_attention_heads=1, **fields)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            dict(recipe="delayed", margin=1, amax_history_len=16, amax_compute_algo="most_recent"),
            dict(fp8="hybrid", fp8_recipe="delayed", fp8_margin=1, fp8_amax_history_len=16)
            | dict(fp8_amax_compute_algo="most_recent", first_last_layers_bf16=False),
        ),
        (dict(recipe="delayed"), dict(fp8_amax_history_len=1024, fp8_amax_compute_algo="max", fp8_margin=0)),
        (dict(recipe="current"), dict(fp8="hybrid", fp8_recipe="tensorwise", first_last_layers_bf16=False)),
        (
            dict(recipe="block", gradients="e4m3", bf16_layers=(0, 2)),
            dict(fp8="e4m3", fp8_recipe="blockwise", first_last_layers_bf16=True)
            | dict(num_layers_at_start_in_bf16=0, num_layers_at_end_in_bf16=2),
        ),
    ],
)
def test_fields_are_megatrons(arguments: dict, expected: dict) -> None:
    result = config(**te.fp8_fields(**arguments))
    assert {name: getattr(result, name) for name in expected} == expected


def test_fields_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="recipe='mxfp8'"):
        te.fp8_fields("mxfp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bf16_layers=\(1, 1\)"):
        te.fp8_fields("delayed", bf16_layers=(1, 1))
    with pytest.raises(ValueError, match="first / last layer"):  # megatron-core's own word
        config(fp8="hybrid", fp8_recipe="delayed", first_last_layers_bf16=True)


def two_four(**weights: Any) -> dict[str, Any]:
    return {"weights": {"method": "s_ste", "targets": ["qkv"], **weights}}


@pytest.mark.parametrize(
    ("fp8", "sections", "message"),
    [
        ({"recipe": "current"}, {}, None),
        ({"recipe": "current", "experts": False}, {"moe": {}}, None),
        ({"recipe": "current", "num_layers_at_start_in_bf16": 1}, {"moe": {"layers": [1, 0]}}, None),
        ({"recipe": "block"}, {}, "block on a GPU: FP8 with block scaling: needs CUDA >= 12.9; set emulate=true"),
        (
            {"recipe": "current", "rounding": "smooth"},
            {},
            "rounding=smooth is not Transformer Engine's; set emulate=true",
        ),
        ({"recipe": "current"}, {"sparsity": two_four()}, None),
        (
            {"recipe": "current"},
            {"sparsity": two_four(mvue="exact")},
            "sparsity.weights.mvue asks for; set emulate=true",
        ),
        (
            {"recipe": "current"},
            {"sparsity": two_four(method="ste", score="wanda")},
            "score=wanda measures; set emulate",
        ),
        ({"recipe": "current"}, {"sparsity": two_four(products="semi_structured")}, "has no FP8; unset one of them"),
        ({"recipe": "current"}, {"moe": {"ffn_hidden_size": 16}}, None),
        ({"recipe": "current"}, {"moe": {"ffn_hidden_size": 24}}, "24 of model.moe.ffn_hidden_size, no multiple of 16"),
    ],
)
def test_what_transformer_engine_cannot_do_is_said(
    monkeypatch: pytest.MonkeyPatch, fp8: dict, sections: dict, message: str | None
) -> None:
    """On a Hopper GPU; nothing is emulated there unless the recipe says so."""
    recipe = small.recipe(training={"fp8": fp8}, **sections)
    assert not te.trains(recipe)
    monkeypatch.setattr(te.platform, "has_cuda", lambda: True)
    monkeypatch.setitem(sys.modules, "transformer_engine", type(sys)("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", FakeTE)
    monkeypatch.setattr(sys.modules["transformer_engine"], "__version__", VERSION, raising=False)
    monkeypatch.setattr(megatron.core.utils, "_te_version", None)
    assert te.trains(recipe)
    if message is None:
        place: Any = SimpleNamespace(tp=1, pp=1, cp=1, vp=1, sequence_parallel=False)
        made = transformer_config(recipe, place)
        assert (made.fp8, made.fp8_recipe, made.first_last_layers_bf16) == ("hybrid", "tensorwise", False)
    else:
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            te.checked_fields(recipe, 1, 1)
        assert "\n" not in str(error.value)
    assert not te.trains(
        small.recipe(training={"fp8": {**fp8, "emulate": True}}, **({"moe": {}} if "experts" in fp8 else {}))
    )
    assert not te.trains(small.recipe())


def test_the_spec_has_transformer_engines_layers_where_the_recipe_has_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small.recipe(
        training={"fp8": {"recipe": "current", "num_layers_at_start_in_bf16": 1}}, moe={"layers": [0, 1]}
    )
    monkeypatch.setattr(te, "trains", lambda _: True)
    monkeypatch.setattr(te, "layers", lambda: te.Layers("c", "n", "r"))  # type: ignore[arg-type]
    place: Any = SimpleNamespace(tp_cp_group=None, tp_group=None)
    first, second = (Linears(recipe, index, StepState(), place) for index in (0, 1))
    assert (second.column("self_attention.linear_qkv"), second.row("self_attention.linear_proj")) == ("n", "r")
    assert [second.has_norm(f"mlp.{name}") for name in ("linear_fc1", "shared_experts.linear_fc1")] == [False, False]
    assert not first.has_norm("self_attention.linear_qkv")
    assert first.column("self_attention.linear_qkv").module is ColumnParallelLinear
    assert first.row("mlp.linear_fc2").module is RowParallelLinear


def test_norms_before_linear_layers_are_a_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not where the norm comes after, and not where NSA projects what is normed as well."""
    monkeypatch.setattr(te, "trains", lambda _: True)
    place: Any = SimpleNamespace(tp_cp_group=None, tp_group=None)
    nsa = {"selector": "nsa", "block_size": 16, "blocks": 4, "layers": [0, 1]}
    fp8 = {"recipe": "current"}

    def norms(index: int, model: dict[str, Any]) -> list[bool]:
        linears = Linears(small.recipe(model, training={"fp8": fp8}), index, StepState(), place)
        return [linears.has_norm(name) for name in ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")]

    assert norms(0, {}) == norms(0, {"sparse_attention": nsa}) == [True, True, False]
    assert norms(1, {"sparse_attention": nsa}) == [False, True, False]
    assert norms(0, {"norm_placement": "post"}) == [False, False, False]


@pytest.mark.parametrize(
    ("model", "tp", "cp", "message"),
    [
        ({}, 1, 1, None),
        ({"ffn_hidden_size": 64}, 2, 1, None),
        ({}, 2, 1, "has 24 of model.ffn_hidden_size, no multiple of 16; change the size or the number of ranks"),
        ({"hidden_size": 40, "num_attention_heads": 5, "num_query_groups": 1}, 1, 1, "has 40 of model.hidden_size"),
        ({}, 4, 1, "has 8 of the heads' width, no multiple of 16; change the size or the number of ranks"),
        ({"ffn_hidden_size": 40}, 1, 1, "has 40 of model.ffn_hidden_size, no multiple of 16"),
        ({}, 1, small.SEQ // 2, "has 4 of micro_batch_size * seq_length, no multiple of 8"),
    ],
)
def test_sizes_that_its_products_refuse(
    monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], tp: int, cp: int, message: str | None
) -> None:
    """Before a model is built: rows of 8, columns of 16 (assert_dim_for_fp8_exec)."""
    monkeypatch.setattr(te, "missing", lambda *_: None)
    recipe = small.recipe(model, training={"fp8": {"recipe": "current"}})
    if message is None:
        te.checked_fields(recipe, tp, cp)
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            te.checked_fields(recipe, tp, cp)


class Grouped(nn.Module):
    """TE's GroupedLinear as the door calls it, without FP8."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        params_dtype: torch.dtype,
        device: str,
    ) -> None:
        super().__init__()
        assert not bias
        self.num_gemms = num_gemms
        for i in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            self.register_parameter(f"weight{i}", nn.Parameter(weight))

    def forward(self, rows: Tensor, m_splits: list[int]) -> Tensor:
        assert not any(size % 16 for size in m_splits)
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        return torch.cat([x @ w.t() for x, w in zip(rows.split(m_splits), weights, strict=True)])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    pytorch: Any = type(sys)("transformer_engine.pytorch")
    pytorch.GroupedLinear, pytorch.Fp8Padding, pytorch.Fp8Unpadding = Grouped, lambda _: pad, lambda _: unpad
    monkeypatch.setitem(sys.modules, "transformer_engine", type(sys)("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("sparsity", [{}, {"w1": WeightSparsity(method="s_ste")}], ids=["dense", "2:4"])
def test_experts_are_its_grouped_linears(single: topology.Topology, sparsity: dict[str, WeightSparsity]) -> None:
    """With our weights, 2:4 where they are, and no state of its own: outputs and gradients are ours."""
    recipe = small.recipe(moe={"aux_loss_coefficient": 0.0})
    moe, fp8 = recipe.model.moe, Fp8(recipe="current")
    assert moe is not None
    config = transformer_config(recipe, single)
    ours = MoELayer(config, moe, single, StepState(), sparsity)
    theirs = MoELayer(config, moe, single, StepState(), sparsity, fp8=fp8, fp8_by_te=True)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict())  # nothing more
    x, results = torch.randn(5, 2, 32), []
    for layer in (ours.train(), theirs.train()):
        for sparse in layer.experts.sparsity.values():  # type: ignore[operator,union-attr]
            sparse.begin_step(0, 4)
        hidden = x.clone().requires_grad_()
        y, _ = layer(hidden)
        wanted = [hidden, *layer.experts.parameters()]
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-6)
    assert theirs._compute(x.new_empty(0, 32), torch.zeros(moe.num_experts, dtype=torch.long)).shape == (0, 32)


def test_its_linear_layer_multiplies_by_the_2_4_weight(single: topology.Topology) -> None:
    """And the parameter gets its gradient (straight through); the layer is as it was, also after an error."""

    class Linear(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(size, size))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t()

    fp8 = Fp8(recipe="current")
    product = Product("linear", StepState(), single.tp_cp_group, WeightSparsity(method="s_ste"), fp8)
    layer: Any = te.linear(Linear, product, None).module(8)  # type: ignore[operator,union-attr]
    weight = layer.weight
    layer.sparsity.begin_step(0, 4)
    x = torch.randn(3, 8)
    y = layer(x)
    expected = layer.sparsity(weight).detach()
    assert (expected == 0).float().mean() == 0.5
    assert_close(y, x @ expected.t(), 1e-6)
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert_close(gradient, torch.ones(8, 3) @ x, 1e-6)
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 7))
    assert layer.weight is weight
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
