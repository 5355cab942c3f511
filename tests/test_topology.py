"""Process groups on real ranks: who is with whom, that the groups work, and that they can be built again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megasparse import topology
from megasparse.config import parse_recipe
from megasparse.topology import Layout, check_layout, nearest_layouts, stage_layers
from tests import small
from tests.helpers import REPOSITORY, assert_close, run_distributed
from tests.test_engine import engine_of

# Layout of four ranks -> the groups along each dimension. Expert parallelism takes neighbours of a stage.
PAIRS, APART, EACH, ALL = [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]], [[0, 1, 2, 3]]
LAYOUTS: dict[str, dict[str, list[list[int]]]] = {
    "ep2dp4": {"tp": EACH, "pp": EACH, "cp": EACH, "replica": ALL, "ep": PAIRS, "expert_dp": APART},
    "ep4dp4": {"tp": EACH, "pp": EACH, "cp": EACH, "replica": ALL, "ep": ALL, "expert_dp": EACH},
    "tp2ep2dp2": {"tp": PAIRS, "pp": EACH, "cp": EACH, "replica": APART, "ep": PAIRS, "expert_dp": APART},
    "tp2ep4dp2": {"tp": PAIRS, "pp": EACH, "cp": EACH, "replica": APART, "ep": ALL, "expert_dp": EACH},
    "pp2ep2dp2": {"tp": EACH, "pp": APART, "cp": EACH, "replica": PAIRS, "ep": PAIRS, "expert_dp": EACH},
    "tp2pp2ep2": {"tp": PAIRS, "pp": APART, "cp": EACH, "replica": EACH, "ep": PAIRS, "expert_dp": EACH},
    "cp2ep4dp2": {"tp": EACH, "pp": EACH, "cp": PAIRS, "replica": ALL, "ep": ALL, "expert_dp": EACH},
    "tp2cp2": {"tp": PAIRS, "pp": EACH, "cp": APART, "replica": APART, "ep": EACH, "expert_dp": ALL},
    "pp2vp2cp2": {"tp": EACH, "pp": APART, "cp": PAIRS, "replica": PAIRS, "ep": EACH, "expert_dp": PAIRS},
}


def every_layout() -> list[dict[str, Any]]:
    """All layouts one after the other in the same processes, with a sum of ranks through every group."""
    from deepspeed.utils import groups
    from megatron.core import parallel_state

    found = []
    for name in LAYOUTS:
        layout = Layout.parse(name)
        place = topology.initialize(layout)
        by_name = {
            "tp": place.tp_group,
            "pp": parallel_state.get_pipeline_model_parallel_group(),
            "cp": place.cp_group,
            "replica": place.replica_group,
            "ep": place.ep_group,
            "expert_dp": groups._get_expert_data_parallel_group(f"ep_size_{layout.ep}"),
        }
        members, sums = {}, {}
        for kind, group in by_name.items():
            members[kind] = dist.get_process_group_ranks(group)
            total = torch.tensor(2.0**place.rank)
            dist.all_reduce(total, group=group)
            sums[kind] = total.item()
        mpu = topology.MegatronMPU()
        found.append(
            {
                "members": members,
                "sums": sums,
                "layout": str(place),
                "tokens": sorted(dist.get_process_group_ranks(place.tp_cp_group)),
                "ranks": {"tp": place.tp_rank, "pp": place.pp_rank, "cp": place.cp_rank, "ep": place.ep_rank},
                "dp_rank": place.dp_rank,
                "stage": (place.is_first_stage, place.is_last_stage),
                "model_parallel": (mpu.get_model_parallel_world_size(), mpu.get_model_parallel_rank()),
                "replica": (mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()),
                "expert_dp": place.expert_dp,
            }
        )
        topology.shutdown()
    return found


@pytest.mark.slow
def test_groups_of_every_layout() -> None:
    by_rank = run_distributed(every_layout, 4)
    for number, (name, expected) in enumerate(LAYOUTS.items()):
        layout = Layout.parse(name)
        for rank in range(4):
            found = by_rank[rank][number]
            own = {kind: next(g for g in groups if rank in g) for kind, groups in expected.items()}
            assert found["layout"] == name
            assert found["members"] == own, (name, rank)
            assert found["sums"] == {kind: sum(2.0**r for r in group) for kind, group in own.items()}, (name, rank)
            assert found["ranks"] == {kind: own[kind].index(rank) for kind in ("tp", "pp", "cp", "ep")}, (name, rank)
            assert found["tokens"] == sorted({t for c in own["cp"] for t in next(g for g in expected["tp"] if c in g)})
            stage = found["ranks"]["pp"]
            assert found["stage"] == (stage == 0, stage == layout.pp - 1)
            assert found["model_parallel"] == (layout.tp * layout.pp, stage * layout.tp + found["ranks"]["tp"])
            assert found["replica"] == (len(own["replica"]), own["replica"].index(rank))
            assert found["dp_rank"] == own["replica"].index(rank) // layout.cp
            assert found["expert_dp"] == len(own["expert_dp"])


# The notation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layout", "world"),
    [
        ("single", Layout(), 1),
        ("tp2pp2ep2", Layout(tp=2, pp=2, ep=2), 4),
        ("tp2pp2ep2dp2", Layout(tp=2, pp=2, ep=2, dp=2), 8),
        ("ep4dp4", Layout(ep=4, dp=4), 4),
        ("tp2ep4dp2+sp", Layout(tp=2, ep=4, dp=2, sequence_parallel=True), 4),
        ("pp2vp2cp2", Layout(pp=2, vp=2, cp=2), 4),
        ("dp2+zero2", Layout(dp=2, zero_stage=2), 2),
        ("single+zero0", Layout(zero_stage=0), 1),
        ("tp2+sp+zero0+offload", Layout(tp=2, sequence_parallel=True, zero_stage=0, offload_optimizer=True), 2),
    ],
)
def test_notation(text: str, layout: Layout, world: int) -> None:
    assert Layout.parse(text) == layout
    assert str(layout) == text
    assert layout.world_size == world


@pytest.mark.parametrize(
    ("short", "long"), [("ep4", "ep4dp4"), ("tp2ep4", "tp2ep4dp2"), ("cp2ep2", "cp2ep2"), ("pp2ep2", "pp2ep2dp2")]
)
def test_data_parallelism_that_experts_need(short: str, long: str) -> None:
    assert str(Layout.parse(short)) == long


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a layout: write it like tp2pp2ep2"),
        ("tp", "is not a layout"),
        ("tp0", "is not a layout"),
        ("xp2", "is not a layout"),
        ("tp2tp4", "says tp twice"),
        ("tp2+fast", "unknown flag 'fast'"),
    ],
)
def test_what_is_no_notation(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Layout.parse(text)


def test_a_recipe_and_a_world_are_a_layout() -> None:
    recipe = small.recipe(moe={}, parallel={"tp": 2, "ep": 4})
    assert str(check_layout(recipe, 4)) == "tp2ep4dp2"
    assert str(check_layout(recipe, 8)) == "tp2ep4dp4"
    again = parse_recipe({**recipe.model_dump(mode="json"), "parallel": Layout.parse("tp2ep4").parallel()})
    assert again == recipe


# What is possible ---------------------------------------------------------------------------------------------------

DENSE = {"model.moe": None}
BY_QUERY_BLOCKS = {"selector": "local", "block_size": 5, "query_block_size": 5}
TILES = {"model.head_dim": 64}
TWO_FOUR = {"sparsity.weights": {"method": "ste", "targets": ["."]}}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("tp4", {}, "model.num_query_groups=2 is not divisible by tp=4"),
    ("tp2", {"model.ffn_hidden_size": 49}, "model.ffn_hidden_size=49 is not divisible by tp=2"),
    (
        "tp2",
        {"model.moe.shared_expert_ffn_hidden_size": 7},
        "model.moe.shared_expert_ffn_hidden_size=7 is not divisible by tp=2",
    ),
    ("single+sp", {}, "sequence_parallel=true needs tp > 1"),
    *[
        (layout, {"training.fp8": {"recipe": "block"}, **changes}, message)
        for layout, changes, message in (
            ("tp2", {"model.head_dim": 48}, "(num_attention_heads + 2 num_query_groups)=384 is not divisible by 128 x"),
            ("tp2", {"model.head_dim": 32}, "head_dim x num_attention_heads=128 is not divisible by 128 x tp=2: "),
            ("tp2", TILES, None),
            ("tp2", {**TILES, **DENSE, "model.ffn_hidden_size": 384}, "ffn_hidden_size=384 is not divisible by 128 x"),
            (
                "tp2",
                {**TILES, "model.moe.shared_expert_ffn_hidden_size": 64},
                "moe.shared_expert_ffn_hidden_size=64 is not divisible by 128 x tp=2: training.fp8 has such tiles",
            ),
            ("cp2", {"data.seq_length": 128}, "data.seq_length=128 / (2 * cp=4) x training.micro_batch_size=2 is not"),
            ("cp2", {"data.seq_length": 256}, None),
            ("ep2", {}, None),
        )
    ],
    ("cp2", {"data.seq_length": 26}, "data.seq_length=26 is not divisible by 2 * cp=4"),
    ("tp2", {"data.seq_length": 25}, "data.seq_length=25 / cp=1 is not divisible by tp=2"),
    ("tp2cp2", {"data.seq_length": 8 * 3 + 4}, None),  # 28 / 2 = 14 is even
    (
        "cp2",
        {"model.sparse_attention": BY_QUERY_BLOCKS},
        "query_block_size=5 does not divide data.seq_length=24 / (2 * ",
    ),
    ("cp2", {"model.sparse_attention": {**BY_QUERY_BLOCKS, "query_block_size": 3}}, None),
    ("tp2", TWO_FOUR | {"model.ffn_hidden_size": 52, **DENSE}, "model.ffn_hidden_size=52 is not divisible by 4 x tp=2"),
    ("tp2", TWO_FOUR | {"model.ffn_hidden_size": 52}, None),  # no layer has one
    ("tp2", TWO_FOUR | {"model.hidden_size": 30, "model.head_dim": 8}, "model.hidden_size=30 is not divisible by 4: "),
    ("single", TWO_FOUR | {"model.moe.ffn_hidden_size": 46}, "model.moe.ffn_hidden_size=46 is not divisible by 4: "),
    (
        "tp2",
        TWO_FOUR | {"model.moe.shared_expert_ffn_hidden_size": 12},
        "model.moe.shared_expert_ffn_hidden_size=12 is not divisible by 4 x tp=2",
    ),
    (
        "tp2",
        TWO_FOUR | {"model.num_attention_heads": 2, "model.head_dim": 2},
        "head_dim x (num_attention_heads + 2 num_query_groups)=12 is not divisible by 4 x tp=2",
    ),
    ("ep2", DENSE, "ep=2 needs model.moe: a dense model has no experts"),
    ("ep3", {}, "model.moe.num_experts=8 is not divisible by ep=3"),
    ("ep4dp2", {}, "ep=4 does not divide the 2 processes of a pipeline stage"),
    ("vp2", {}, "vp=2 needs pp > 1"),
    ("pp4vp2", {}, "pp * vp = 8 stages are more than model.num_layers=4"),
    ("pp2", {"parallel.layers_per_stage": [1, 2]}, "parallel.layers_per_stage=[1, 2] must have pp * vp = 2 numbers"),
    ("pp2", {"parallel.layers_per_stage": [4]}, "parallel.layers_per_stage=[4] must have pp * vp = 2 numbers"),
    ("pp2", {"parallel.layers_per_stage": [1, 3]}, None),
    ("dp8", {}, "training.global_batch_size=8 is not divisible by micro_batch_size=2 x dp=8"),
    ("pp4vp2", {"model.num_layers": 8, "training.micro_batch_size": 4}, "needs micro-batches in multiples of pp=4"),
    ("pp2", {"model.moe.aux_loss_scope": "all_layers"}, "it needs pp=1"),
    ("single+zero0", {"training.precision": "bf16"}, "training.precision=bf16 needs zero_stage >= 1"),
    ("single+zero0+offload", {}, "offload_optimizer=true needs zero_stage >= 1"),
    ("pp2+zero2", {}, "zero_stage=2 needs pp=1, not 2: it reduces gradients in each backward pass"),
    ("dp2+zero3", {}, "zero_stage=3 is not possible: DeepSpeed gathers ZeRO-3 weights in its own forward"),
]


def four_layers(layout: Layout, changes: dict[str, Any]) -> Any:
    raw = small.recipe({"num_layers": 4}, {}).model_dump(mode="json")
    raw["parallel"] = layout.parallel()
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        node = raw
        for key in parents:
            node = node[key]
        node[leaf] = value
    return parse_recipe(raw)


@pytest.mark.parametrize(("text", "changes", "message"), WRONG, ids=[f"{w[0]} {w[2]}" for w in WRONG])
def test_rules(text: str, changes: dict[str, Any], message: str | None) -> None:
    layout = Layout.parse(text)
    recipe = four_layers(layout, changes)
    if message is None:
        assert check_layout(recipe, layout.world_size) == layout
        return
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_layout(recipe, layout.world_size)
    assert str(error.value).startswith(f"layout {layout} on {layout.world_size} processes: ")
    assert "\n" not in str(error.value)


def test_a_world_that_cannot_be_split() -> None:
    """The global batch of 8 is not for 3 replicas either."""
    message = (
        "layout tp2 on 3 processes: tp=2 x pp=1 x cp=1 do not divide them: start a multiple of 2 (the nearest possi"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_layout(four_layers(Layout(tp=2), {}), 3)


@pytest.mark.parametrize(
    ("text", "changes", "nearest"),
    [
        ("tp4", {}, ["tp2dp2", "dp4", "tp2cp2"]),
        ("pp2+zero2", {}, ["pp2", "dp2+zero2", "cp2+zero2"]),
        ("ep2", DENSE, ["dp2", "cp2", "pp2"]),
        ("dp8", {}, ["cp2dp4", "ep2cp2dp4", "pp2dp4"]),
    ],
)
def test_the_nearest_possible_layouts(text: str, changes: dict[str, Any], nearest: list[str]) -> None:
    layout = Layout.parse(text)
    recipe = four_layers(layout, changes)
    found = nearest_layouts(recipe, layout, layout.world_size)
    assert found[0] == Layout.parse(nearest[0])
    for candidate in found:  # each of them passes the same check
        assert candidate.world_size == layout.world_size
        possible = four_layers(candidate, changes)
        assert check_layout(possible, layout.world_size) == replace(candidate)
    with pytest.raises(ValueError, match=f"the nearest possible: {re.escape(str(found[0]))}"):
        check_layout(recipe, layout.world_size)


@pytest.mark.parametrize(
    ("parallel", "layers", "expected"),
    [
        ({}, 5, [5]),
        ({"pp": 2}, 4, [2, 2]),
        ({"pp": 2}, 5, [3, 2]),
        ({"pp": 2, "vp": 2}, 6, [2, 2, 1, 1]),
        ({"pp": 2, "loss_weight": 2.0}, 6, [4, 2]),
        ({"pp": 4, "embedding_weight": 1.0, "loss_weight": 1.0}, 14, [3, 4, 4, 3]),
        ({"pp": 4, "embedding_weight": 0.5, "loss_weight": 2.5}, 13, [4, 4, 4, 1]),
        ({"pp": 2, "layers_per_stage": [1, 5]}, 6, [1, 5]),
    ],
)
def test_layers_of_each_stage(parallel: dict[str, Any], layers: int, expected: list[int]) -> None:
    recipe = small.recipe({"num_layers": layers}, parallel=parallel)
    assert stage_layers(recipe.parallel, layers) == expected


# In use -------------------------------------------------------------------------------------------------------------


def losses_of(layouts: list[dict[str, Any]]) -> list[list[float]]:
    """Two steps of training in each layout, one after the other in one process."""
    results = []
    for parallel in layouts:
        recipe = small.recipe(moe={}, parallel=parallel)
        place = small.start(recipe)
        engine = engine_of(recipe, place)
        steps = [engine.train_step(small.batches(recipe, s, place.dp_rank, place.dp), s, 3e-3) for s in range(2)]
        results.append([value for step in steps for value in (step.loss, step.grad_norm)])
        topology.shutdown()
    return results


def test_one_layout_leaves_nothing_to_the_next() -> None:
    """Training in a layout that follows others in the same process is what it is in a fresh one, to rounding."""
    layouts = [
        {"tp": 2, "ep": 2},
        {"pp": 2, "vp": 1},
        {"cp": 2},
        {"ep": 2},
        {"zero_stage": 2},
        {"tp": 2, "sequence_parallel": True},
    ]
    whole = run_distributed(losses_of, 1, [{}])[0][0]
    for rank in run_distributed(losses_of, 2, layouts):
        for parallel, losses in zip(layouts, rank, strict=True):
            assert_close(losses, whole, 1e-6, str(parallel))


def draws(layout: Layout) -> tuple[list[float], list[float]]:
    """From torch's generator and from that of tensor-parallel regions."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    topology.initialize(layout)
    ordinary = torch.rand(3).tolist()
    with get_cuda_rng_tracker().fork():
        return ordinary, torch.rand(3).tolist()


@pytest.mark.parametrize("layout", [Layout(tp=2, dp=2), Layout(tp=2, pp=2), Layout(tp=2, cp=2)], ids=str)
def test_seeds(layout: Layout) -> None:
    """Two tensor-parallel pairs: of two replicas, two stages or two parts of the sequence."""
    ordinary, regions = zip(*run_distributed(draws, 4, layout), strict=True)
    assert ordinary[0] == ordinary[1] != ordinary[2] == ordinary[3]
    assert len(set(map(tuple, regions))) == 4, "the halves of a tensor-parallel region have masks of their own"


def test_the_seed_matters_and_is_repeatable() -> None:
    drawn = []
    for seed in (1, 1, 2):
        topology.initialize(seed=seed)
        drawn.append(torch.rand(3).tolist())
        topology.shutdown()
    assert drawn[0] == drawn[1] != drawn[2]


def test_one_process() -> None:
    place = topology.initialize()
    try:
        assert str(place) == "single"
        assert (place.rank, place.world_size, place.dp, place.ep, place.expert_dp) == (0, 1, 1, 1, 1)
        assert place.is_first_stage
        assert place.is_last_stage
    finally:
        topology.shutdown()


def test_without_a_launcher_there_is_one_process() -> None:
    program = "from megasparse import topology; print('layout', str(topology.initialize()))"
    kept = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, env=kept, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines()[-1] == "layout single"


def test_a_layout_of_another_world_is_refused_and_leaves_room_for_another() -> None:
    """check_layout says it in words before; this is the last line."""
    with pytest.raises(AssertionError, match="tp3 is not a layout of 1 processes"):
        topology.initialize(Layout(tp=3))
    topology.shutdown()
    assert str(topology.initialize()) == "single"
    topology.shutdown()


def test_what_dropout_follows_is_said() -> None:
    assert topology.notes(small.recipe()) == []
    (fp8,) = topology.notes(small.recipe(training={"fp8": {"recipe": "block", "num_layers_at_end_in_bf16": 1}}))
    assert "training.fp8: 4 of 8 weights of linear layers and experts are multiplied in FP8 with block" in fp8
    assert "emulated" in fp8
    (note,) = topology.notes(small.recipe({"hidden_dropout": 0.1}))
    assert "model.hidden_dropout=0.1: dropout masks follow the ranks" in note
