"""verify passes on what is right, and names each of five classic mistakes planted in the production code."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from megasparse.cli import app
from megasparse.config import Recipe
from megasparse.layout import Layout
from megasparse.processes import Workers
from megasparse.verify import Report, possible_layouts, show, verify
from tests import small
from tests.helpers import RankError, run_distributed
from tests.verify import bugs

DROPLESS: dict[str, Any] = {"aux_loss_coefficient": 0.05, "layers": [1, 1]}
CAPACITY = {**DROPLESS, "capacity_factor": 1.0}


def recipe_of(
    moe: dict[str, Any], precision: str = "fp32", fp8: dict[str, Any] | None = None, **sections: Any
) -> Recipe:
    """Clipping to a tenth of a usual norm."""
    model = {"tie_embeddings": True, "vocab_size": 95}
    return small.recipe(model, moe, {"precision": precision, "fp8": fp8}, optimizer={"clip_grad": 0.1}, **sections)


def verified(recipe: Recipe, layouts: str, bug: Callable[[], Any] | None = None, steps: int = 2) -> Report:
    def run(fn: Any, world_size: int, *args: Any, timeout: float) -> list[Any]:
        if bug is None:
            return run_distributed(fn, world_size, *args, timeout=timeout)
        return run_distributed(bugs.planted, world_size, bug, fn, *args, timeout=timeout)

    return verify(recipe, [Layout.parse(text) for text in layouts.split(",")], steps, run)


TWO_FOUR = {"weights": {"method": "sr_ste", "decay": 1e-4, "targets": ["."], "dense_end": 0.2}}


@pytest.mark.parametrize(
    ("moe", "sections"),
    [
        (DROPLESS, {}),
        (CAPACITY, {"sparsity": TWO_FOUR}),
        (DROPLESS, {"sparsity": TWO_FOUR, "fp8": {"recipe": "delayed", "margin": 1}}),
    ],
    ids=["dropless", "capacity and 2:4 weights", "2:4 weights in FP8"],
)
def test_what_is_right_passes(moe: dict[str, Any], sections: dict[str, Any]) -> None:
    report = verified(recipe_of(moe, **sections), "tp2ep2,pp2,dp2,cp2", steps=3)
    assert report.passed
    for comparison in report.comparisons:
        assert comparison.worst < 5e-6
        assert not report.rounded
        assert comparison.first == comparison.diagnosis == ""
        assert set(comparison.groups) == {"embedding", "norms", "attention", "router", "experts"}
        assert 0 < comparison.margin < 0.1


BUGS = [
    (bugs.experts_over_the_wrong_group, "ep2", "averaged over the wrong group", "mlp.experts.w"),
    (bugs.aux_loss_scaled_by_tensor_parallelism, "tp2", "auxiliary loss is scaled by the layout", ""),
    (
        bugs.norm_without_experts_of_later_ranks,
        "tp2ep2",
        "norm does not: it counts experts on the first of 2 ranks only",
        "",
    ),
    (bugs.tied_weight_not_summed, "pp2", "tied embedding's gradient alone is off", "embedding.word_embeddings"),
    (bugs.micro_batches_counted_twice, "dp2", "every gradient is 2.00 times", "embedding.word_embeddings"),
]


@pytest.mark.parametrize("moe", [DROPLESS, CAPACITY], ids=["dropless", "capacity"])
@pytest.mark.parametrize(("bug", "layout", "diagnosis", "first"), BUGS, ids=[bug.__name__ for bug, *_ in BUGS])
def test_a_planted_bug_is_found_and_named(
    bug: Callable[[], Any], layout: str, diagnosis: str, first: str, moe: dict[str, Any]
) -> None:
    """In the reference and in the layout, as a real mistake would be. Clipping is active, the auxiliary loss moves the
    loss by more than 1e-4: neither hides it."""
    report = verified(recipe_of(moe), layout, bug)
    assert not report.passed
    (comparison,) = report.comparisons
    assert diagnosis in comparison.diagnosis
    assert first in comparison.first
    assert comparison.worst > 1e-4, "not rounding"


@pytest.mark.parametrize(("scaling", "layout"), [("current", "tp2"), ("delayed", "dp2")])
def test_scales_of_a_rank_alone_are_found(scaling: str, layout: str) -> None:
    report = verified(recipe_of(DROPLESS, fp8={"recipe": scaling}), layout, bugs.fp8_scales_of_each_rank, steps=3)
    (comparison,) = report.comparisons
    assert not report.passed
    assert comparison.worst > 1e-4, "not rounding"
    assert bool(comparison.contradictions) is (scaling == "delayed"), "histories that differ are in the state"


def test_other_lists_of_key_blocks_are_found_and_named() -> None:
    """Where attention chooses by itself the lists are the same in every layout; a planted mistake is named."""
    sparse = {"selector": "nsa", "block_size": 4, "blocks": 4, "compression_size": 4, "compression_stride": 2}
    report = verified(small.recipe({"vocab_size": 95, "sparse_attention": sparse}), "tp2,cp2")
    assert report.passed
    sparse = {"selector": "strided", "block_size": 2, "stride": 5}
    report = verified(
        small.recipe({"vocab_size": 95, "sparse_attention": sparse}), "tp2", bugs.strides_by_the_head_of_the_rank
    )
    (comparison,) = report.comparisons
    assert not report.passed
    assert comparison.diagnosis.endswith("so do lists of key blocks, step 0, layer 0, token 8, K/V head 1 first")
    assert all(place.endswith("K/V head 1") for place in comparison.flipped)


@pytest.mark.parametrize(
    ("bug", "layout", "off"),
    [
        (None, "tp2ep2", []),
        (bugs.aux_loss_scaled_by_tensor_parallelism, "tp2", ["sizes", "updates"]),
        (bugs.norm_without_experts_of_later_ranks, "tp2ep2", ["own norm"]),
        (bugs.tied_weight_not_summed, "pp2", ["norm", "sizes", "updates"]),
        (bugs.micro_batches_counted_twice, "dp2", ["norm", "sizes", "updates"]),
    ],
    ids=["right", "auxiliary", "norm", "tied", "micro-batches"],
)
def test_in_the_precision_of_the_recipe(bug: Callable[[], Any] | None, layout: str, off: list[str]) -> None:
    """Another optimizer of DeepSpeed steps in bf16 (it always averages experts over their own group): what rounding
    leaves of the comparison still finds mistakes."""
    report = verified(recipe_of(DROPLESS, "bf16"), layout, bug)
    (found,) = report.rounded
    assert found.precision == "bf16"
    assert found.figures["loss"] > 1e-6, "it did not run in fp32 again"
    assert found.off == off
    assert found.passed is report.passed is (bug is None)
    console = Console(file=io.StringIO(), width=120)
    show(report, console)
    assert "the same in bf16" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_recipe_of_the_planted_bugs_clips_and_has_an_auxiliary_loss() -> None:
    from megasparse.verify.observe import observe

    raw = recipe_of(DROPLESS).model_dump(mode="json")
    first = run_distributed(observe, 1, raw, 1)[0].scalars[0]
    assert first["grad_norm"] > 0.1
    assert 0.05 * first["load_balance_loss"] > 1e-4 * first["loss"]


def test_the_default_layouts_find_all_five() -> None:
    """Each of them is caught by a layout that verify takes by itself."""
    recipe = recipe_of(DROPLESS)
    default = {str(layout) for layout in possible_layouts(recipe)[0]}
    assert default == {"dp2", "tp2+sp", "pp2", "cp2", "ep2dp2", "tp2pp2ep2"}


def test_a_layout_that_fails_is_reported_and_the_next_one_runs() -> None:
    def run(fn: Any, world_size: int, raw: dict[str, Any], *args: Any, timeout: float) -> list[Any]:
        if raw["parallel"]["pp"] == 2:
            raise RankError("rank 1 of 2 failed")
        return run_distributed(fn, world_size, raw, *args, timeout=timeout)

    report = verify(recipe_of(DROPLESS), [Layout.parse("pp2"), Layout.parse("ep2")], 1, run)
    assert not report.passed
    assert [(c.layout, c.passed, c.error) for c in report.comparisons] == [
        ("pp2", False, "rank 1 of 2 failed"),
        ("ep2dp2", True, ""),
    ]
    console = Console(file=io.StringIO(), width=120)
    show(report, console)
    assert "pp2: rank 1 of 2 failed" in console.file.getvalue()  # type: ignore[attr-defined]
    assert json.loads(report.to_json())["comparisons"][0]["worst"] is None


def test_an_impossible_layout_is_refused_before_anything_runs() -> None:
    def run(*_: Any, **__: Any) -> list[Any]:
        raise AssertionError("something ran")

    with pytest.raises(ValueError, match=r"layout tp4 on 4 processes: model\.num_query_groups=2 is not divisible"):
        verify(recipe_of(DROPLESS), [Layout.parse("tp2"), Layout.parse("tp4")], 2, run)
    large = small.recipe({"hidden_size": 1600, "num_attention_heads": 25, "num_query_groups": 25})
    with pytest.raises(ValueError, match=r"model\.num_attention_heads=25 is not divisible by tp=2"):
        verify(large, [Layout.parse("tp2")], 2, run)


def test_tables_and_json() -> None:
    report = verified(recipe_of(DROPLESS), "dp2", bugs.micro_batches_counted_twice)
    console = Console(file=io.StringIO(), width=120)
    show(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "differs" in text
    assert "the first to differ: gradient of embedding.word_embeddings.weight in step 1" in text
    found = json.loads(report.to_json())
    assert found["passed"] is False
    assert found["comparisons"][0]["layout"] == "dp2"
    assert found["comparisons"][0]["groups"]["experts"]["factor"] == pytest.approx(2.0, rel=1e-2)
    assert (
        len(found["comparisons"][0]["tensors"]) == 22
    )  # the embedding, the last norm, eight weights and two buffers of each layer


@pytest.mark.parametrize("bug", [None, bugs.micro_batches_counted_twice], ids=["right", "wrong"])
def test_command_line(bug: Callable[[], Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit status 0 for a recipe that is right and 1 for one that is not, and a file of figures."""
    if bug is not None:
        right = Workers.run

        def run(self: Workers, *args: Any, timeout: float) -> list[Any]:
            fn, world_size, *others = args
            return right(self, bugs.planted, world_size, bug, fn, *others, timeout=timeout)

        monkeypatch.setattr(Workers, "run", run)
    path, out = tmp_path / "recipe.yaml", tmp_path / "out.json"
    path.write_text(yaml.safe_dump(recipe_of(DROPLESS).model_dump(mode="json")))
    arguments = ["verify", str(path), "training.seed=7", "--layouts", "dp2", "--steps", "1", "--json", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == (0 if bug is None else 1), done.output
    assert ("equal" if bug is None else "every gradient is 2.00 times") in done.output
    assert json.loads(out.read_text())["passed"] is (bug is None)
