"""Process groups on real ranks: who is with whom, that the groups work, and that they can be built again."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megasparse import topology
from tests import small
from tests.helpers import REPOSITORY, assert_close, run_distributed
from tests.test_engine import engine_of

# Layout of four ranks -> name, and the groups along each dimension. Expert parallelism takes neighbours of a stage.
PAIRS, APART, EACH, ALL = [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]], [[0, 1, 2, 3]]
LAYOUTS: dict[tuple[int, int, int], tuple[str, dict[str, list[list[int]]]]] = {
    # (tp, pp, ep)
    (1, 1, 2): ("ep2dp4", {"tp": EACH, "pp": EACH, "dp": ALL, "ep": PAIRS, "expert_dp": APART}),
    (1, 1, 4): ("ep4dp4", {"tp": EACH, "pp": EACH, "dp": ALL, "ep": ALL, "expert_dp": EACH}),
    (2, 1, 2): ("tp2ep2dp2", {"tp": PAIRS, "pp": EACH, "dp": APART, "ep": PAIRS, "expert_dp": APART}),
    (2, 1, 4): ("tp2ep4dp2", {"tp": PAIRS, "pp": EACH, "dp": APART, "ep": ALL, "expert_dp": EACH}),
    (1, 2, 2): ("pp2ep2dp2", {"tp": EACH, "pp": APART, "dp": PAIRS, "ep": PAIRS, "expert_dp": EACH}),
    (2, 2, 2): ("tp2pp2ep2", {"tp": PAIRS, "pp": APART, "dp": EACH, "ep": PAIRS, "expert_dp": EACH}),
}


def every_layout() -> list[dict[str, Any]]:
    """All layouts one after the other in the same processes, with a sum of ranks through every group."""
    from deepspeed.utils import groups
    from megatron.core import parallel_state

    found = []
    for tp, pp, ep in LAYOUTS:
        place = topology.initialize(tp, pp, ep)
        by_name = {
            "tp": place.tp_group,
            "pp": parallel_state.get_pipeline_model_parallel_group(),
            "dp": place.dp_group,
            "ep": place.ep_group,
            "expert_dp": groups._get_expert_data_parallel_group(f"ep_size_{ep}"),
        }
        members, sums = {}, {}
        for name, group in by_name.items():
            members[name] = dist.get_process_group_ranks(group)
            total = torch.tensor(2.0**place.rank)
            dist.all_reduce(total, group=group)
            sums[name] = total.item()
        mpu = topology.MegatronMPU()
        found.append(
            {
                "members": members,
                "sums": sums,
                "layout": place.layout,
                "ranks": {"tp": place.tp_rank, "pp": place.pp_rank, "dp": place.dp_rank, "ep": place.ep_rank},
                "sizes": {"tp": place.tp, "pp": place.pp, "dp": place.dp, "ep": place.ep, "expert_dp": place.expert_dp},
                "stage": (place.is_first_stage, place.is_last_stage),
                "model_parallel": (mpu.get_model_parallel_world_size(), mpu.get_model_parallel_rank()),
            }
        )
        topology.shutdown()
    return found


def test_groups_of_every_layout() -> None:
    by_rank = run_distributed(every_layout, 4)
    for number, ((tp, pp, ep), (name, expected)) in enumerate(LAYOUTS.items()):
        for rank in range(4):
            found = by_rank[rank][number]
            own = {kind: next(g for g in groups if rank in g) for kind, groups in expected.items()}
            assert found["layout"] == name
            assert found["members"] == own, (name, rank)
            assert found["sums"] == {kind: sum(2.0**r for r in group) for kind, group in own.items()}, (name, rank)
            assert found["sizes"] == {kind: len(group) for kind, group in own.items()}, (name, rank)
            assert found["ranks"] == {kind: own[kind].index(rank) for kind in ("tp", "pp", "dp", "ep")}, (name, rank)
            assert found["stage"] == (found["ranks"]["pp"] == 0, found["ranks"]["pp"] == pp - 1)
            assert found["model_parallel"] == (tp * pp, found["ranks"]["pp"] * tp + found["ranks"]["tp"])
            assert ep == found["sizes"]["ep"]


def losses_of(layouts: list[dict[str, Any]]) -> list[list[float]]:
    """Two steps of training in each layout, one after the other in one process."""
    results = []
    for parallel in layouts:
        recipe = small.recipe(moe={}, parallel=parallel)
        p = recipe.parallel
        place = topology.initialize(p.tp, p.pp, p.ep, p.sequence_parallel)
        engine = engine_of(recipe, place)
        steps = [engine.train_step(small.batches(recipe, s, place.dp_rank, place.dp), s, 3e-3) for s in range(2)]
        results.append([value for step in steps for value in (step.loss, step.grad_norm)])
        topology.shutdown()
    return results


def test_one_layout_leaves_nothing_to_the_next() -> None:
    """Training in a layout that follows others in the same process is what it is in a fresh one, to rounding."""
    layouts = [{"tp": 2, "ep": 2}, {"pp": 2}, {"ep": 2}, {"ep": 1}, {"tp": 2, "sequence_parallel": True}]
    whole = run_distributed(losses_of, 1, [{}])[0][0]
    for rank in run_distributed(losses_of, 2, layouts):
        for parallel, losses in zip(layouts, rank, strict=True):
            assert_close(losses, whole, 1e-6, str(parallel))


def draws(tp: int, pp: int) -> tuple[list[float], list[float]]:
    """From torch's generator and from that of tensor-parallel regions."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    topology.initialize(tp, pp)
    ordinary = torch.rand(3).tolist()
    with get_cuda_rng_tracker().fork():
        return ordinary, torch.rand(3).tolist()


@pytest.mark.parametrize("pp", [1, 2])
def test_seeds(pp: int) -> None:
    """Two tensor-parallel pairs, of two replicas or of two stages."""
    ordinary, regions = zip(*run_distributed(draws, 4, 2, pp), strict=True)
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
        assert place.layout == "single"
        assert (place.rank, place.world_size, place.dp, place.ep, place.expert_dp) == (0, 1, 1, 1, 1)
        assert place.is_first_stage
        assert place.is_last_stage
    finally:
        topology.shutdown()


def test_without_a_launcher_there_is_one_process() -> None:
    program = "from megasparse import topology; print('layout', topology.initialize().layout)"
    kept = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, env=kept, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines()[-1] == "layout single"


@pytest.mark.parametrize("layout", [(3, 1, 1), (1, 3, 1), (1, 1, 3)])
def test_an_impossible_layout_is_refused_and_leaves_room_for_another(layout: tuple[int, int, int]) -> None:
    """Recipe.data_parallel_size says it in words before; this is the last line."""
    with pytest.raises((RuntimeError, AssertionError)):
        topology.initialize(*layout)
    topology.shutdown()
    assert topology.initialize().layout == "single"
    topology.shutdown()
