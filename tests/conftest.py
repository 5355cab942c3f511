"""What every test finds: one thread, one seed, no network, no wandb."""

from __future__ import annotations

import gc
import os

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", WANDB_MODE="disabled")

from collections.abc import Iterator

import pytest
import torch

from megasparse import topology

torch.set_num_threads(1)
collect_ignore = [] if "CLUSTER_INSIDE" in os.environ else ["cluster"]  # of tests/cluster/two_hosts.sh


def pytest_collection_finish() -> None:
    """What was imported is no garbage to look through in every collection, as in topology.shutdown."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)


@pytest.fixture(scope="module")
def single() -> Iterator[topology.Topology]:
    """One process: its groups, made once for a file's tests, as each group costs threads."""
    yield topology.initialize()
    topology.shutdown()
