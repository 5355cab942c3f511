"""verify passes on what is right, and names each of five classic mistakes planted in the production code."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from megasparse.cli import app
from megasparse.config import Recipe
from megasparse.topology import Layout
from megasparse.verify import Report, possible_layouts, show, verify
from tests import small
from tests.helpers import run_distributed
from tests.verify import bugs

DROPLESS: dict[str, Any] = {"aux_loss_coefficient": 0.05, "layers": [1, 1]}
CAPACITY = {**DROPLESS, "capacity_factor": 1.0}


def recipe_of(moe: dict[str, Any]) -> Recipe:
    """Clipping to a tenth of a usual norm."""
    optimizer = {"clip_grad": 0.1}
    return small.recipe({"tie_embeddings": True, "vocab_size": 95}, moe, optimizer=optimizer)


def verified(recipe: Recipe, layouts: str, bug: Callable[[], Any] | None = None, steps: int = 2) -> Report:
    def run(fn: Any, world_size: int, *args: Any, timeout: float) -> list[Any]:
        if bug is None:
            return run_distributed(fn, world_size, *args, timeout=timeout)
        return run_distributed(bugs.planted, world_size, bug, fn, *args, timeout=timeout)

    return verify(recipe, [Layout.parse(text) for text in layouts.split(",")], steps, run)


@pytest.mark.parametrize("moe", [DROPLESS, CAPACITY], ids=["dropless", "capacity"])
def test_what_is_right_passes(moe: dict[str, Any]) -> None:
    report = verified(recipe_of(moe), "tp2ep2,pp2,dp2,cp2", steps=3)
    assert report.passed
    for comparison in report.comparisons:
        assert comparison.worst < 5e-6
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


def test_the_recipe_of_the_planted_bugs_clips_and_has_an_auxiliary_loss() -> None:
    from megasparse.verify.observe import observe

    raw = recipe_of(DROPLESS).model_dump(mode="json")
    first = run_distributed(observe, 1, raw, 1)[0].scalars[0]
    assert first["grad_norm"] > 0.1
    assert 0.05 * first["load_balance_loss"] > 1e-4 * first["loss"]


def test_the_default_layouts_find_all_five() -> None:
    """Each of them is caught by a layout that verify takes by itself."""
    recipe = recipe_of(DROPLESS)
    default = {str(layout) for layout in possible_layouts(recipe)}
    assert default == {"dp2", "tp2+sp", "pp2", "cp2", "ep2dp2", "tp2pp2ep2"}


def test_noise_is_listed_and_not_judged() -> None:
    """A key's bias adds the same to a query's score of every key: its gradient is rounding alone."""
    model = {"bias": "all", "normalization": "LayerNorm", "activation": "gelu", "position_embedding": "learned"}
    recipe = small.recipe({**model, "vocab_size": 95, "num_query_groups": 4})
    report = verified(recipe, "tp2")
    assert report.passed


def test_an_impossible_layout_is_refused_before_anything_runs() -> None:
    def run(*_: Any, **__: Any) -> list[Any]:
        raise AssertionError("something ran")

    with pytest.raises(ValueError, match=r"layout tp4 on 4 processes: model\.num_query_groups=2 is not divisible"):
        verify(recipe_of(DROPLESS), [Layout.parse("tp2"), Layout.parse("tp4")], 2, run)


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
    assert len(found["comparisons"][0]["tensors"]) == 18  # the embedding, the last norm and eight of each layer


@pytest.mark.slow
def test_command_line(tmp_path: Any) -> None:
    """Exit status 0 and a file of figures for a recipe that is right."""
    path, out = tmp_path / "recipe.yaml", tmp_path / "out.json"
    path.write_text(yaml.safe_dump(recipe_of(DROPLESS).model_dump(mode="json")))
    arguments = ["verify", str(path), "--layouts", "ep2", "--steps", "1", "--json", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "equal" in done.output
    assert json.loads(out.read_text())["passed"] is True
