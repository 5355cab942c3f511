"""Bad steps: done again, skipped, gone back from. What follows equals a run in which nothing happened."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megasparse import topology
from megasparse.checkpoint.folder import latest
from megasparse.config import Faults, Recipe, load_recipe
from megasparse.engine import Engine, Limits, StepResult
from megasparse.faults import FaultLog, Spikes, Steps
from megasparse.metrics.record import read_faults, read_metrics
from megasparse.train import train
from tests import small
from tests.helpers import run_distributed
from tests.test_engine import engine_of
from tests.test_train import make_corpus, run, without_timing, write_recipe


@dataclass(frozen=True)
class Trained:
    """What six steps end with."""

    results: list[StepResult]
    state: dict[str, Tensor]  # weights, router biases, masks, scales
    skipped_in_a_row: int
    events: list[tuple[str, int, str]]  # kind, step from 1, message


def spoil(engine: Engine, name: str, when: Callable[[], bool]) -> None:
    """On the last rank, a NaN in the gradient of the first weight whose name has ``name`` in it, while ``when``."""
    if dist.get_rank() == dist.get_world_size() - 1:
        weight = next(p for n, p in engine.chunks.named_parameters() if p.requires_grad and name in n)

        def spoilt(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[1] = math.nan
            return gradient

        weight.register_hook(lambda gradient: spoilt(gradient) if when() else gradient)


def trained(
    recipe: Recipe, folder: Path, name: str, bad_step: int | None, times: int, left_out: int | None = None
) -> Trained:
    """Six steps, of which ``bad_step`` is spoilt so many times and ``left_out`` is not done at all."""
    place = small.start(recipe)
    engine = engine_of(recipe, place)
    step, passes = 0, 0

    def count() -> None:
        nonlocal passes
        passes += step == bad_step

    engine.before_step = count
    spoil(engine, name, lambda: step == bad_step and passes < times)
    folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(engine, FaultLog(folder, lambda _: None))
    results = []
    for step in range(6):
        if step != left_out:
            batches = small.batches(recipe, step, place.dp_rank, place.dp)
            results.append(steps.step(batches, step, 3e-3 / (1 + step)))
    dist.barrier()
    state = {n: t.clone() for n, t in engine.chunks.state_dict().items() if torch.is_tensor(t)}
    events = [(event["kind"], event["step"], event["message"]) for event in read_faults(folder)]
    return Trained(results, state, steps.skipped_in_a_row, events)


def assert_same(ours: Trained, theirs: Trained) -> None:
    """To the bit."""
    for mine, other in zip(ours.results, theirs.results, strict=True):
        for field in fields(StepResult):
            of_mine, of_other = getattr(mine, field.name), getattr(other, field.name)
            assert torch.equal(of_mine, of_other) if torch.is_tensor(of_mine) else of_mine == of_other, field.name
    assert ours.state.keys() == theirs.state.keys()
    for name, value in theirs.state.items():
        assert torch.equal(ours.state[name], value), name


# Everything that a step draws or moves: dropout, router noise and biases; masks, scales and histories.
RANDOM = {"model": {"hidden_dropout": 0.1}, "moe": {"jitter": 0.05, "bias_update_rate": 0.01}}
EXPERTS = [r"\.mlp\.experts"]
POOLED = {"selector": "pooled", "block_size": 4, "blocks": 4, "dense_start": 0.05, "ramp": 0.15}
AST = {"method": "ast", "decay": 0.02, "boost": 4, "score": "wanda", "refresh_interval": 1}
ONCE: dict[str, tuple[int, str, dict[str, Any]]] = {  # processes, the weight that is spoilt, recipe
    "fp32": (1, "", {}),
    "zero0": (1, "", {"parallel": {"zero_stage": 0}}),
    "zero2": (1, "", {"parallel": {"zero_stage": 2}}),
    "bf16": (1, "", {"training": {"precision": "bf16"}}),
    "fp8": (1, "", {"training": {"fp8": {"recipe": "delayed", "amax_history_len": 3}}}),
    "blocks": (1, "", {"model": {**RANDOM["model"], "sparse_attention": POOLED}}),
    "first masks": (1, "", {"sparsity": {"weights": {**AST, "dense_start": 0.15}}}),
    "ep2, S-STE": (
        2,
        "experts",
        {
            "parallel": {"ep": 2},
            "sparsity": {"weights": {"method": "s_ste", "targets": EXPERTS, "refresh_interval": 1}},
        },
    ),
    "dp2, zero0": (2, "experts", {"parallel": {"zero_stage": 0}}),
    "tp2": (2, "layernorm", {"parallel": {"tp": 2}}),
    "tp2, zero0": (2, "layernorm", {"parallel": {"tp": 2, "zero_stage": 0}}),
    "pp2, tied": (2, "output_layer", {"parallel": {"pp": 2}, "model": {**RANDOM["model"], "tie_embeddings": True}}),
}


@pytest.mark.parametrize("case", ONCE)
def test_a_nan_that_comes_once_leaves_no_trace(case: str, tmp_path: Path) -> None:
    """On one rank, also where others hold copies of that weight."""
    world, name, sections = ONCE[case]
    recipe = small.recipe(**{**RANDOM, **sections})
    calm = run_distributed(trained, world, recipe, tmp_path / "calm", name, None, 0)
    disturbed = run_distributed(trained, world, recipe, tmp_path / "disturbed", name, 3, 1)
    for ours, theirs in zip(disturbed, calm, strict=True):
        assert_same(ours, theirs)
        assert theirs.events == []
        said = "the gradient norm was not finite the first time; done again it was good"
        assert ours.events == [("retried", 4, said)]
    if "sparsity" in sections:  # the bad step is one in which masks are made, with "first masks" for the first time
        assert ("flip_rate" in calm[0].results[3].sparsity) == (case != "first masks")
        assert {"mass_kept"} <= calm[0].results[3].sparsity.keys()
        assert sum(result.sparsity.get("flip_rate", 0.0) for result in calm[0].results) > 0


@pytest.mark.parametrize(
    "sections",
    [{}, {"parallel": {"zero_stage": 0}}, {"training": {"precision": "bf16"}}, {"faults": {"retry": False}}],
    ids=["fp32", "zero0", "bf16", "no retry"],
)
def test_a_nan_that_stays_is_skipped_as_if_that_batch_were_not_there(sections: dict[str, Any], tmp_path: Path) -> None:
    recipe = small.recipe(**{"moe": {"bias_update_rate": 0.01}, **sections})  # nothing random: the other draws less
    (skipped,) = run_distributed(trained, 1, recipe, tmp_path / "skipped", "", 3, 99)
    (reference,) = run_distributed(trained, 1, recipe, tmp_path / "reference", "", None, 0, 3)
    assert skipped.results[3].skipped
    assert_same(replace(skipped, results=skipped.results[:3] + skipped.results[4:]), reference)
    assert skipped.events == [("skipped", 4, "the gradient norm was not finite; skipped")]
    assert (skipped.skipped_in_a_row, reference.events) == (0, [])


def test_without_retry_what_comes_once_is_skipped(tmp_path: Path) -> None:
    recipe = small.recipe(faults={"retry": False})
    (skipped,) = run_distributed(trained, 1, recipe, tmp_path, "", 5, 1)
    assert [kind for kind, _, _ in skipped.events] == ["skipped"]
    assert skipped.skipped_in_a_row == 1


def test_the_search_for_a_loss_scale_is_no_event(tmp_path: Path) -> None:
    """What is not finite in fp16 is skipped at once, counted, and the scale falls, from the second time on."""
    (found,) = run_distributed(trained, 1, small.recipe(training={"precision": "fp16"}), tmp_path, "", 5, 1)
    assert found.results[5].skipped
    assert found.skipped_in_a_row == 1 + sum(result.skipped for result in found.results[4:5])
    assert found.events == []


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


def test_a_record_that_cannot_be_written_is_said(single: topology.Topology, tmp_path: Path) -> None:
    said: list[str] = []
    FaultLog(tmp_path / "gone", said.append).note("retried", "it was good", 7)
    assert said == [
        f"could not note in {tmp_path / 'gone' / 'faults.jsonl'}: No such file or directory",
        "step 7: it was good",
    ]


def diverging(recipe_file: Path, run_dir: Path, overrides: list[str], times: int) -> str | None:
    """A run whose step 7 is spoilt so many times, by weights that go bad on the last rank: so are those after it. What
    it ends with, if with an error."""
    whole_step, spoilt = Engine.train_step, 0

    def train_step(engine: Engine, batches: Any, step: int, *rest: Any, **options: Any) -> StepResult:
        nonlocal spoilt
        if step == 6 and not options.get("again") and spoilt < times and dist.get_rank() == dist.get_world_size() - 1:
            spoilt += 1
            engine.chunks[0].embedding.word_embeddings.weight.data[:, 0] = math.nan  # type: ignore[union-attr]
        return whole_step(engine, batches, step, *rest, **options)

    with mock.patch.object(Engine, "train_step", train_step):
        try:
            train(load_recipe(recipe_file, overrides), run_dir)
        except ValueError as error:
            return str(error)
    return None


BACK = ["faults.max_skipped_steps=2", "faults.max_rollbacks=1"]


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, []),
        (2, ["parallel.ep=2", "training.async_save=true", "faults.spike_deviations=9", "faults.spike_window=8"]),
    ],
    ids=["one process", "two, and saved beside the run"],
)
def test_back_to_the_last_checkpoint(processes: int, overrides: list[str], tmp_path: Path, corpus: Path) -> None:
    path, calm, back = write_recipe(tmp_path, corpus), tmp_path / "calm", tmp_path / "back"
    assert run("train", path, *overrides, "--run-dir", calm, processes=processes).returncode == 0
    errors = run_distributed(diverging, processes, path, back, [*overrides, *BACK], 1)
    assert errors == [None] * processes
    assert without_timing(back) == without_timing(calm)
    assert [record["step"] for record in read_metrics(back)] == list(range(1, 13))
    faults = read_faults(back)
    assert [(fault["kind"], fault["step"]) for fault in faults] == [("skipped", 7), ("skipped", 8), ("rollback", 8)]
    assert faults[-1]["message"] == (
        "2 steps in a row had a loss or gradient norm that was not finite or spiked, last step 8: back to step_4"
    )
    assert latest(back / "checkpoints") == back / "checkpoints" / "step_12"


@pytest.mark.parametrize(
    ("overrides", "kinds", "said"),
    [
        (BACK, ["skipped"] * 2 + ["rollback"] + ["skipped"] * 2, "last step 8: lower optimizer.lr="),
        (BACK[:1], ["skipped"] * 2, "last step 8: lower optimizer.lr="),
        (
            [*BACK, "training.save_interval=0"],
            ["skipped"] * 2,
            "last step 8; there is no checkpoint before them: lower optimizer.lr=",
        ),
    ],
    ids=["twice", "not wanted", "no checkpoint"],
)
def test_a_run_ends_when_it_cannot_go_back(
    overrides: list[str], kinds: list[str], said: str, tmp_path: Path, corpus: Path
) -> None:
    (error,) = run_distributed(diverging, 1, write_recipe(tmp_path, corpus), tmp_path / "run", overrides, 9)
    assert "2 steps in a row had a loss or gradient norm that was not finite" in error
    assert said in error
    assert f"raise faults.max_rollbacks={int('faults.max_rollbacks=1' in overrides)}, or resume" in error
    assert [fault["kind"] for fault in read_faults(tmp_path / "run")] == kinds


def test_what_counts_as_a_spike_is_in_the_checkpoint(tmp_path: Path, corpus: Path) -> None:
    """Resumed, the same steps are skipped as if the run had not ended."""
    path, folder = write_recipe(tmp_path, corpus, steps=16), tmp_path / "run"
    spikes = ["faults.spike_deviations=0.5", "faults.spike_window=8", "training.keep_checkpoints=4"]
    assert run("train", path, *spikes, "--run-dir", folder).returncode == 0
    whole, faults = without_timing(folder), read_faults(folder)
    assert any("skipped" in record for record in whole[8:])
    assert run("train", path, *spikes, "--run-dir", folder, "--resume", "--checkpoint", "step_8").returncode == 0
    assert without_timing(folder) == whole
    again = [(fault["step"], fault["message"]) for fault in read_faults(folder)[len(faults) :]]
    assert again == [(fault["step"], fault["message"]) for fault in faults if fault["step"] > 8]


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
    return make_corpus(tmp_path_factory.mktemp("corpus"))
