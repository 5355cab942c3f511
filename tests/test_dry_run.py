"""Dry runs: at sizes that no machine here has, and that what is wrong is seen."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from megasparse import dry_run as module
from megasparse import placement, topology
from megasparse.config import Recipe
from megasparse.dry_run import check_groups, check_parts, dry_run, show
from megasparse.layout import Layout
from megasparse.model import build_model
from megasparse.parameters import parameters
from megasparse.placement import local_weights
from tests import small
from tests.helpers import REPOSITORY, run_distributed


@pytest.fixture(autouse=True)
def _no_world() -> None:
    topology.leave()


def recipe_of(layout: str, **training: Any) -> Recipe:
    parsed = Layout.parse(layout)
    model = {"num_layers": 6, "tie_embeddings": True, "qk_norm": "full", "vocab_size": 97, "bias": "qkv"}
    moe = {"layers": [0, 1, 1, 0, 1, 1], "shared_expert_ffn_hidden_size": 16}
    return small.recipe(model, moe, {"micro_batch_size": 1, **training}, parallel=parsed.parallel())


def sizes_and_groups(raw: dict[str, Any]) -> dict[str, Any]:
    """What a real rank has: parameters, and the members of its groups."""
    recipe = Recipe.model_validate(raw)
    place = small.start(recipe)
    chunks, _ = build_model(recipe, place, 97)
    return found(place, chunks)


def found(place: topology.Topology, chunks: torch.nn.ModuleList) -> dict[str, Any]:
    groups = {name: dist.get_process_group_ranks(g) for name, g in vars(place).items() if name.endswith("_group")}
    weights = [(w.name, w.shape, w.slabs, tuple(w.tensor.shape), w.copy) for w in local_weights(chunks, place)]
    return {"groups": groups, "weights": weights}


@pytest.mark.parametrize("layout", ["tp2pp2ep2", "pp2vp3ep2", "tp2ep4dp2", "cp2ep4dp2"])
def test_a_pretended_rank_is_the_real_one(layout: str) -> None:
    recipe = recipe_of(layout)
    parsed = Layout.parse(layout)
    real = run_distributed(sizes_and_groups, parsed.world_size, recipe.model_dump(mode="json"))
    for rank in range(parsed.world_size):
        with topology.pretended(parsed, rank) as place, torch.device("meta"):
            assert found(place, build_model(recipe, place, 97)[0]) == real[rank]


@pytest.mark.parametrize("layout", ["single", "tp2pp2ep8dp128", "pp3vp2ep8dp16", "tp2cp4ep8dp8+sp", "pp6ep2dp2+zero1"])
def test_every_stage_is_checked(layout: str) -> None:
    parsed = Layout.parse(layout)
    recipe = recipe_of(layout, global_batch_size=768, precision="bf16")
    run = dry_run(recipe, parsed.world_size)
    assert run.layout == parsed
    assert sum(stage.layers for stage in run.stages) == 6
    assert run.count.total == sum(torch.Size(s).numel() for s in parameters(recipe.model, 97, small.SEQ).values())
    assert not dist.is_initialized()
    console = Console(width=100, record=True, file=io.StringIO())
    show(recipe, run, console)
    text = console.export_text()
    assert f"{run.count.total:,} parameters, {run.count.active:,} active" in text
    assert f"on {parsed.world_size} processes" in text


def test_world_sizes() -> None:
    """The one asked for, or the recipe's, or the fewest processes that the layout needs."""
    recipe = recipe_of("tp2pp2ep4", global_batch_size=32)
    assert dry_run(recipe).layout.world_size == 8
    written = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"world_size": 16})})
    assert dry_run(written).layout.dp == 4
    assert dry_run(written, 32).layout.dp == 8
    with pytest.raises(ValueError, match="tp=2 x pp=2 x cp=1 do not divide them"):
        dry_run(recipe, 6)


def test_what_fp8_kernels_refuse_is_said() -> None:
    """A CPU emulates it, so it is no error here."""
    for width, misfit in ((48, None), (40, "a process has 40 of model.ffn_hidden_size, no multiple of 16")):
        model = {"vocab_size": 97, "ffn_hidden_size": width}
        run = dry_run(small.recipe(model, training={"fp8": {"recipe": "current"}}))
        assert run.fp8_misfit == misfit
    console = Console(width=100, record=True, file=io.StringIO())
    show(small.recipe(model), run, console)
    assert "training.fp8 on a GPU: a process has 40 of model.ffn_hidden_size" in console.export_text()


def test_no_vocabulary_is_the_users_to_mend() -> None:
    with pytest.raises(
        ValueError, match=r"model.vocab_size is not set, and unused is not a finished data set .*set it"
    ):
        dry_run(small.recipe())


def pretended(layout: str) -> Iterator[tuple[topology.Topology, torch.nn.ModuleList]]:
    with topology.pretended(Layout.parse(layout), 5) as place, torch.device("meta"):
        yield place, build_model(recipe_of(layout), place, 97)[0]


def test_a_wrong_group_is_seen() -> None:
    for place, _ in pretended("tp2pp2ep4dp4"):
        check_groups(place)
        for change, message in (
            ({"ep_group": place.tp_group}, "the expert group has 2 ranks, not 4"),
            ({"tp_rank": 0}, "rank 5 is not number 0 of its tensor group"),
            ({"ep_group": place.expert_dp_group, "ep": 2}, "expert data group has 2 ranks, not 4"),
            ({"replica_group": dist.new_group([8, 10, 12, 14])}, "rank 5 is not in its replica group"),
            (
                {"replica_group": dist.new_group([4, 5, 6, 7])},
                "the tensor and the replica group share more than rank 5",
            ),
        ):
            with pytest.raises(AssertionError, match=message):
                check_groups(replace(place, **change))


def test_a_missing_part_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = placement._place
    for place, chunks in pretended("tp2pp2ep4dp4"):
        check_parts(chunks, place)
        for change, message in (
            (lambda slabs, rank: slabs if rank else (), "missing|elements"),
            (lambda slabs, rank: slabs[:1], "missing|elements"),
            (lambda slabs, rank: tuple(replace(s, offsets=(0,) * len(s.offsets)) for s in slabs), "missing|elements"),
        ):
            monkeypatch.setattr(
                placement,
                "_place",
                lambda p, t, r, change=change: (real(p, t, r)[0], change(real(p, t, r)[1], t.tp_rank + t.ep_rank)),
            )
            with pytest.raises(AssertionError, match=message):
                check_parts(chunks, place)
            monkeypatch.setattr(placement, "_place", real)


def test_a_model_that_is_not_the_recipes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("pp2")
    whole = module.parameters
    monkeypatch.setattr(module, "parameters", lambda *a: {**whole(*a), "decoder.layers.6.x": (1,)})
    with pytest.raises(AssertionError, match=r"decoder.layers.6.x: the stages hold None, the model has \(1,\)"):
        dry_run(recipe)


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megasparse", "train", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )


def test_the_command_line() -> None:
    recipe = str(REPOSITORY / "examples" / "pretrain.yaml")
    done = command_line(recipe, "model.vocab_size=4096", "--dry-run", "--layout", "tp2pp2ep4", "--world-size", "8")
    assert done.returncode == 0, done.stderr
    assert "tp2pp2ep4dp2 on 8 processes" in done.stdout
    assert re.search(r"stage .* layers .* peak", done.stdout)
    wrong = command_line(recipe, "model.vocab_size=4096", "--dry-run", "--layout", "tp3")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: layout tp3 on 3 processes: ")
    alone = command_line(recipe, "--world-size", "4")
    assert alone.returncode == 2
    assert "--world-size 4 is of a dry run" in alone.stderr


def test_deepspeeds_settings_on_the_command_line(tmp_path: Path) -> None:
    recipe = str(REPOSITORY / "examples" / "pretrain.yaml")
    settings = str(REPOSITORY / "ds_configs" / "zero2.json")
    done = command_line(recipe, "model.vocab_size=4096", "--dry-run", "--deepspeed-config", settings)
    assert done.returncode == 0, done.stderr
    assert "ep2dp2+zero2 on 2 processes" in done.stdout
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"gradient_clipping": 0.5}')
    refused = command_line(recipe, "--dry-run", "--deepspeed-config", str(wrong))
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert line.endswith(f"{wrong} sets gradient_clipping, which is the recipe's optimizer.clip_grad: set that")


def test_no_weight_takes_memory() -> None:
    """Mixtral 8x22B's 141 billion weights: the process has less than 1 GB, most of it libraries."""
    program = (
        "import re, sys; from pathlib import Path; from megasparse.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print('kB', re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    recipe = str(REPOSITORY / "examples" / "hopper" / "mixtral_8x22b.yaml")
    done = subprocess.run(
        [sys.executable, "-c", program, "train", recipe, "--dry-run"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "140,620,634,112 parameters" in done.stdout
    found = re.search(r"^kB (\d+)$", done.stdout, re.M)
    assert found
    assert int(found[1]) < 1_000_000
