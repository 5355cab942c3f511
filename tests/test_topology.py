"""Process groups on real ranks: who is with whom, that the groups work, and that they can be built again."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megasparse import topology
from megasparse.layout import Layout
from tests import small
from tests.helpers import assert_close, run_distributed
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


def without_a_launcher() -> str:
    for name in ("WORLD_SIZE", "LOCAL_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    return str(topology.initialize())


def test_without_a_launcher_there_is_one_process() -> None:
    assert run_distributed(without_a_launcher, 1) == ["single"]


def test_a_layout_of_another_world_is_refused_and_leaves_room_for_another() -> None:
    """check_layout says it in words before; this is the last line."""
    with pytest.raises(AssertionError, match="tp3 is not a layout of 1 processes"):
        topology.initialize(Layout(tp=3))
    topology.shutdown()
    assert str(topology.initialize()) == "single"
    topology.shutdown()
