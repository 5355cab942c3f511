"""DeepSpeed's JSON: that it ends in the recipe, and in what DeepSpeed is told; and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megasparse import topology
from megasparse.config import Recipe, deepspeed_overrides, dump_recipe, load_recipe
from tests import small
from tests.helpers import REPOSITORY
from tests.test_engine import engine_of

FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))


def read(tmp_path: Path, settings: Any, *overrides: str) -> Recipe:
    """A small recipe with what the file says."""
    (tmp_path / "recipe.yaml").write_text(dump_recipe(small.recipe()))
    path = tmp_path / "settings.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return load_recipe(tmp_path / "recipe.yaml", [*deepspeed_overrides(path), *overrides])


EXPECTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # in the recipe; in DeepSpeed's own config
    "zero0": ({"zero_stage": 0}, {"zero_optimization_stage": 0}),
    "zero1": ({"zero_stage": 1}, {"zero_optimization_stage": 1}),
    "zero2": ({"zero_stage": 2}, {"zero_optimization_stage": 2}),
    "zero1_offload": ({"offload_optimizer": True}, {"zero_optimization_stage": 1}),
    "bf16": ({"precision": "bf16", "zero_stage": 1}, {"zero_optimization_stage": 1}),
    "fp16": ({"precision": "fp16", "loss_scale": 65536.0, "loss_scale_window": 1000}, {}),
    "comms_logger": ({"zero_stage": 1}, {}),
    "flops_profiler": ({"zero_stage": 1}, {}),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_end_in_the_recipe_and_in_deepspeed(path: Path, single: topology.Topology, tmp_path: Path) -> None:
    from deepspeed.comm.comm import comms_logger

    recipe = read(tmp_path, path.read_text())
    ours, theirs = EXPECTED[path.stem]
    fields = {**vars(recipe.parallel), **vars(recipe.training)}
    assert {name: fields[name] for name in ours} == ours
    engine = engine_of(recipe, single)
    config = engine.deepspeed._config
    assert config.zero_optimization_stage == recipe.parallel.zero_stage
    assert {name: getattr(config, name) for name in theirs} == theirs
    assert engine.deepspeed.fp16_enabled() == (recipe.training.precision == "fp16")
    assert engine.deepspeed.bfloat16_enabled() == (recipe.training.precision == "bf16")
    assert bool(config.zero_config.offload_optimizer) == recipe.parallel.offload_optimizer
    assert comms_logger.enabled == (path.stem == "comms_logger")
    assert recipe.parallel.deepspeed.flops_profiler.enabled == (path.stem == "flops_profiler")
    first = engine.train_step(small.batches(recipe, 0), 0, 1e-3)
    assert not first.skipped
    assert load_recipe(_dumped(recipe, tmp_path)) == recipe


def _dumped(recipe: Recipe, tmp_path: Path) -> Path:
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe))
    return path


def test_the_bucket_is_deepspeeds(single: topology.Topology, tmp_path: Path) -> None:
    recipe = read(tmp_path, {"zero_optimization": {"reduce_bucket_size": 5000}})
    engine = engine_of(recipe, single)
    assert engine.optimizer.reduce_bucket_size == 5000
    reference = engine_of(small.recipe(), single)
    for step in range(2):
        a, b = (e.train_step(small.batches(recipe, step), step, 1e-3) for e in (engine, reference))
        assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)


def test_what_is_said_later_counts(tmp_path: Path) -> None:
    assert read(tmp_path, {"zero_optimization": {"stage": 2}}, "parallel.zero_stage=0").parallel.zero_stage == 0
    assert read(tmp_path, {"bf16": {"enabled": False}, "fp16": {"enabled": True}}).training.precision == "fp16"
    assert read(tmp_path, {"fp16": {"enabled": True, "initial_scale_power": 4}}).training.loss_scale == 16.0
    off = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    assert not read(tmp_path, off, "parallel.zero_stage=1").parallel.offload_optimizer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batch_size": 8}, "sets train_batch_size, which is the recipe's training.global_batch_size: set that"),
        ({"train_micro_batch_size_per_gpu": 8}, "the recipe's training.micro_batch_size"),
        ({"gradient_accumulation_steps": 8}, "the recipe's training.global_batch_size and training.micro_batch_size"),
        ({"optimizer": {"type": "Adam"}}, "sets optimizer, which is the recipe's optimizer"),
        ({"scheduler": {}}, "sets scheduler, which is the recipe's schedule"),
        ({"gradient_clipping": 1.0}, "sets gradient_clipping, which is the recipe's optimizer.clip_grad"),
        ({"zero_optimization": {"overlap_comm": True}}, "sets zero_optimization.overlap_comm: gradients are reduced"),
        ({"wall_clock_breakdown": True}, "sets wall_clock_breakdown: its timers are"),
        ({"zero_optimization": {"stage3_max_live_parameters": 1}}, "unknown key zero_optimization.stage3_max_live"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "which it cannot be"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 1}}}, "offload_optimizer.ratio: leave"),
        ({"zero_optimization": 2}, "has zero_optimization=2, which it cannot be"),
        ({"bf16": {"enabled": "yes"}}, "has bf16="),
        ({"bf16": {"enabled": True, "immediate_grad_update": True}}, "unknown key bf16.immediate_grad_update"),
        ({"fp16": {"enabled": True, "hysteresis": 2}}, "unknown key fp16.hysteresis"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "enables bf16 and fp16"),
        ({"comms_logger": {"verbose": True}}, "unknown key comms_logger.verbose"),
        ({"nonsense": 1}, "has an unknown key nonsense: leave it out"),
        ([1], "is not a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_what_is_not_deepspeeds_is_refused(settings: Any, message: str, tmp_path: Path) -> None:
    path = str(tmp_path / "settings.json")
    with pytest.raises(ValueError, match=f"{re.escape(path)}.*{re.escape(message)}") as caught:
        read(tmp_path, settings)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--deepspeed-config: no file .*none.json"):
        deepspeed_overrides(tmp_path / "none.json")


def test_a_wrong_value_is_the_recipes_to_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parallel.zero_stage = 'two'"):
        read(tmp_path, {"zero_optimization": {"stage": "two"}})
