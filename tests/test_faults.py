"""Bad steps: done again, skipped, gone back from. What follows equals a run in which nothing happened."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megasparse import topology
from megasparse.config import Faults, Recipe
from megasparse.engine import Engine, Limits, StepResult
from megasparse.faults import FaultLog, Spikes, Steps
from tests import small
from tests.helpers import run_distributed
from tests.test_engine import engine_of

# Everything that a step draws or moves: dropout, router noise and biases, masks that change in each step.
RANDOM = {"model": {"hidden_dropout": 0.1}, "moe": {"jitter": 0.05, "bias_update_rate": 0.01}}
S_STE = {"sparsity": {"weights": {"method": "s_ste", "targets": [r"\.mlp\.experts"], "refresh_interval": 1}}}


def spoil(engine: Engine, when: Callable[[], bool]) -> None:
    """A NaN in a gradient of the passes for which ``when`` is true."""
    finalize = engine.config.finalize_model_grads_func

    def finalize_and_spoil(*args: Any, **options: Any) -> None:
        if when():
            weight = next(p for p in engine.chunks.parameters() if p.requires_grad)
            engine._gradient(weight).view(-1)[1] = math.nan
        finalize(*args, **options)

    engine.config.finalize_model_grads_func = finalize_and_spoil


def trained(
    recipe: Recipe, folder: Path, bad_step: int | None, times: int, left_out: int | None = None
) -> tuple[list[StepResult], dict[str, Any], list[dict[str, Any]]]:
    """Six steps, of which ``bad_step`` is spoilt so many times and ``left_out`` is not done at all; what it ends
    with, and the events."""
    place = small.start(recipe)
    engine = engine_of(recipe, place)
    now, done = [0], [0]

    def when() -> bool:
        done[0] += now[0] == bad_step
        return now[0] == bad_step and done[0] <= times

    spoil(engine, when)
    folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(engine, FaultLog(folder, lambda _: None))
    results = []
    for step in range(6):
        if step != left_out:
            now[0] = step
            results.append(steps.step(small.batches(recipe, step, place.dp_rank, place.dp), step, 3e-3))
    weights = {name: parameter.detach().clone() for name, parameter in engine.chunks.named_parameters()}
    events = folder / "faults.jsonl"
    return results, weights, [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []


def same(ours: Any, theirs: Any) -> bool:
    return ours[1].keys() == theirs[1].keys() and all(torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])


@pytest.mark.parametrize(
    ("training", "parallel", "more"),
    [({}, {}, {}), ({}, {"zero_stage": 0}, {}), ({"precision": "bf16"}, {}, {}), ({}, {"ep": 2}, S_STE)],
    ids=["fp32", "zero0", "bf16", "ep2 and S-STE"],
)
def test_a_nan_that_comes_once_leaves_no_trace(
    training: dict[str, Any], parallel: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    recipe = small.recipe(**RANDOM, training=training, parallel=parallel, **more)
    world = 2 if parallel.get("ep") else 1
    calm = run_distributed(trained, world, recipe, tmp_path / "calm", None, 0)
    disturbed = run_distributed(trained, world, recipe, tmp_path / "disturbed", 3, 1)
    for ours, theirs in zip(disturbed, calm, strict=True):
        for mine, other in zip(ours[0], theirs[0], strict=True):
            for name in ("loss", "grad_norm", "aux_losses", "sparsity", "skipped"):
                assert getattr(mine, name) == getattr(other, name), name
            assert torch.equal(mine.expert_tokens, other.expert_tokens)
        assert same(ours, theirs)
    assert calm[0][2] == []
    (event,) = disturbed[0][2]
    assert (event["kind"], event["step"]) == ("retried", 4)
    assert event["message"] == "the gradient norm was not finite the first time; done again it was good"


def test_a_nan_that_stays_is_skipped_as_if_that_batch_were_not_there(tmp_path: Path) -> None:
    recipe = small.recipe(moe={"bias_update_rate": 0.01})  # nothing random: the other run draws less
    (skipped,) = run_distributed(trained, 1, recipe, tmp_path / "skipped", 3, 99)
    (reference,) = run_distributed(trained, 1, recipe, tmp_path / "reference", None, 0, 3)
    assert [result.skipped for result in skipped[0]] == [False, False, False, True, False, False]
    losses = [result.loss for result in skipped[0]]
    assert losses[:3] + losses[4:] == [result.loss for result in reference[0]]
    assert same(skipped, reference)
    (event,) = skipped[2]
    assert (event["kind"], event["step"], event["message"]) == (
        "skipped",
        4,
        "the gradient norm was not finite; skipped",
    )


def spiked(recipe: Recipe, folder: Path) -> tuple[list[bool], list[float]]:
    """Thirty steps of one batch, then twelve that learn nothing, the ninth of them with random labels."""
    place = small.start(recipe)
    engine = engine_of(recipe, place)
    steps, skipped = Steps(engine, FaultLog(folder, lambda _: None)), []
    for step in range(42):
        batches = small.batches(recipe, 0)
        for batch in batches if step == 38 else []:
            batch.labels = torch.randint(0, small.VOCAB, batch.labels.shape)
        skipped.append(steps.step(batches, step, 1e-2 if step < 30 else 0.0).skipped)
    return skipped, list(steps.spikes.losses)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_spike_is_skipped(zero_stage: int, tmp_path: Path) -> None:
    faults = {"spike_deviations": 50.0, "spike_window": 8}
    recipe = small.recipe(faults=faults, parallel={"zero_stage": zero_stage})
    ((skipped, losses),) = run_distributed(spiked, 1, recipe, tmp_path)
    assert skipped == [step == 38 for step in range(42)]
    assert len(losses) == 8
    (event,) = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert re.match(r"the loss spiked to \d\.\d+, over \d\.\d+; skipped", event["message"])
    calm = small.recipe(parallel={"zero_stage": zero_stage})
    assert not any(run_distributed(spiked, 1, calm, tmp_path)[0][0])


def result(loss: float, grad_norm: float) -> StepResult:
    return StepResult(loss, {}, grad_norm, False, 1.0, torch.zeros(0, 0), 0.0, {}, {}, {})


def test_limits_by_hand() -> None:
    spikes = Spikes(Faults(spike_deviations=3.0, spike_window=10))
    losses, norms = np.random.default_rng(0).normal(3, 0.1, 25), np.random.default_rng(1).normal(1, 0.3, 25)
    for count, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if count < 5:
            assert spikes.limits() == Limits(math.inf, math.inf)
        else:
            for limit, values in ((spikes.limits().loss, losses), (spikes.limits().grad_norm, norms)):
                window = values[max(0, count - 10) : count]
                assert limit == pytest.approx(window.mean() + 3 * window.std(), rel=1e-12)
        spikes.add(result(float(loss), float(norm)))
    again = Spikes(Faults(spike_deviations=3.0, spike_window=10))
    again.restore(json.loads(json.dumps(spikes.state())))
    assert again.limits() == spikes.limits()
    assert Spikes(Faults()).state() == {}


def diverging(recipe_file: Path, run_dir: Path, overrides: list[str], ends: bool) -> None:
    """A run whose steps 7 and 8 are spoilt by weights that went bad after step 5; the first time only, if it ends."""
    from megasparse.config import load_recipe
    from megasparse.train import train

    whole_step, spoilt = Engine.train_step, [0]

    def train_step(engine: Engine, batches: Any, step: int, *rest: Any, **options: Any) -> StepResult:
        if step == 6 and not options.get("again") and (spoilt[0] == 0 or not ends):
            spoilt[0] += 1
            engine.chunks[0].embedding.word_embeddings.weight.data[:, 0] = math.nan  # type: ignore[union-attr]
        return whole_step(engine, batches, step, *rest, **options)

    Engine.train_step = train_step  # type: ignore[method-assign]
    try:
        train(load_recipe(recipe_file, overrides), run_dir)
    finally:
        Engine.train_step = whole_step  # type: ignore[method-assign]
        topology.leave()


def test_back_to_the_last_checkpoint(tmp_path: Path, corpus: Path) -> None:
    from megasparse.metrics.record import read_faults, read_metrics
    from tests.test_train import run, write_recipe

    path = write_recipe(tmp_path, corpus)
    assert run("train", path, "--run-dir", tmp_path / "calm").returncode == 0
    overrides = ["faults.max_skipped_steps=2", "faults.max_rollbacks=1"]
    run_distributed(diverging, 1, path, tmp_path / "back", overrides, True)
    calm, back = (
        [{k: v for k, v in record.items() if k != "timing"} for record in read_metrics(tmp_path / name)]
        for name in ("calm", "back")
    )
    assert back == calm
    faults = read_faults(tmp_path / "back")
    assert [(fault["kind"], fault["step"]) for fault in faults] == [("skipped", 7), ("skipped", 8), ("rollback", 8)]
    assert "2 steps in a row" in faults[-1]["message"]
    assert faults[-1]["message"].endswith("back to step_4")
    with pytest.raises(AssertionError, match=r"2 steps in a row had .*last step 8: .*raise faults.max_rollbacks=1"):
        run_distributed(diverging, 1, path, tmp_path / "not", overrides, False)


def corrupted(recipe_file: Path, run_dir: Path, overrides: list[str]) -> None:
    """A run in which rank 1 computes wrong after its third step: one bit of a norm."""
    from megasparse.config import load_recipe
    from megasparse.train import train

    whole_step = Engine.train_step

    def train_step(engine: Engine, batches: Any, step: int, *rest: Any, **options: Any) -> StepResult:
        result = whole_step(engine, batches, step, *rest, **options)
        if step == 2 and engine.topology.rank == 1:
            bits = engine.chunks[0].decoder.final_layernorm.weight.data.view(torch.int32)  # type: ignore[union-attr]
            bits[3] ^= 1
        return result

    Engine.train_step = train_step  # type: ignore[method-assign]
    try:
        train(load_recipe(recipe_file, overrides), run_dir)
    finally:
        Engine.train_step = whole_step  # type: ignore[method-assign]


@pytest.mark.parametrize(("interval", "seen_at"), [(3, 3), (100, 4)], ids=["in time", "before a checkpoint"])
def test_silent_corruption_ends_a_run_before_it_is_saved(
    interval: int, seen_at: int, tmp_path: Path, corpus: Path
) -> None:
    from megasparse.metrics.record import read_faults
    from tests.test_train import write_recipe

    path = write_recipe(tmp_path, corpus)
    overrides = [f"faults.check_replicas_interval={interval}", "parallel.zero_stage=0"]
    said = rf"after step {seen_at} each of ranks 0, 1 holds another decoder\.final_layernorm\.weight than its copies"
    with pytest.raises(AssertionError, match=said):
        run_distributed(corrupted, 2, path, tmp_path / "run", overrides)
    (fault,) = read_faults(tmp_path / "run")
    assert (fault["kind"], fault["step"]) == ("replicas_differ", seen_at)
    assert not (tmp_path / "run" / "checkpoints" / "step_4").exists()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.test_train import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))
