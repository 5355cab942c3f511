"""The one door between CUDA and CPU: what it redirects without CUDA, and that with CUDA it redirects nothing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import pytest
import torch

from megasparse import platform, topology
from megasparse.config import Recipe
from megasparse.engine import Engine
from megasparse.model import build_model
from tests import small
from tests.helpers import REPOSITORY

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here: nothing is redirected")


def fresh(program: str, **environment: str) -> str:
    """What ``program`` prints in a new interpreter."""
    kept = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


REDIRECTED = "current_device synchronize manual_seed get_rng_state set_rng_state"


def patched() -> dict[str, Any]:
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.tensor_parallel.random as random

    names = {f"torch.cuda.{name}": getattr(torch.cuda, name) for name in REDIRECTED.split()}
    megatron = {"get": random._get_cuda_rng_state, "set": random._set_cuda_rng_state, "torch": schedules.torch}
    return {**names, **megatron, "Tensor.cuda": torch.Tensor.cuda}


def test_activate_twice_is_once() -> None:
    platform.activate()
    before = patched()
    platform.activate()
    assert patched() == before


WITH_CUDA = f"""
import torch
from unittest import mock
names = "{REDIRECTED}".split()
before = [getattr(torch.cuda, name) for name in names], torch.Tensor.cuda
from megasparse import platform
assert before == ([getattr(torch.cuda, name) for name in names], torch.Tensor.cuda), "importing it changes nothing"
with mock.patch.object(torch.cuda, "is_available", return_value=True):
    with (
        mock.patch.object(torch.cuda, "set_device") as chosen,
        mock.patch.object(torch.cuda, "device_count", side_effect=[4, 1]),
    ):
        platform.activate()
        platform.activate()
    assert [call.args for call in chosen.call_args_list] == [(3,), (0,)], "srun may show each task its own device only"
    assert platform.backend() == "nccl"
    with mock.patch.object(torch.cuda, "current_device", return_value=3):
        assert platform.device() == torch.device("cuda:3")
assert before == ([getattr(torch.cuda, name) for name in names], torch.Tensor.cuda), "nothing is patched on a GPU"
import os, sys
assert "DS_ACCELERATOR" not in os.environ
import megatron.core.pipeline_parallel.schedules as schedules
assert schedules.torch is torch
print("done")
"""

RANK_3 = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}


def test_with_cuda_nothing_is_redirected() -> None:
    assert fresh(WITH_CUDA, **RANK_3).endswith("done\n")


WITHOUT_CUDA = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stdout)
from megasparse import platform
assert "DS_ACCELERATOR" not in os.environ, "importing it changes nothing"
platform.activate()
platform.activate()
assert os.environ["DS_ACCELERATOR"] == "cpu"
from deepspeed.accelerator import get_accelerator
print("accelerator", get_accelerator()._name)
"""


@cpu_only
def test_without_cuda_deepspeed_takes_the_cpu_and_it_is_said_once() -> None:
    output = fresh(WITHOUT_CUDA)
    assert output.endswith("accelerator cpu\n")
    assert output.count("megasparse: no CUDA") == 1


@cpu_only
def test_what_is_redirected_works() -> None:
    platform.activate()
    assert platform.device() == torch.device("cpu")
    assert platform.backend() == "gloo"
    assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"
    tensor = torch.ones(3)
    assert tensor.cuda() is tensor
    assert tensor.cuda(0, non_blocking=True) is tensor
    assert torch.nn.Linear(2, 2).cuda()(torch.ones(1, 2)).shape == (1, 2)
    torch.cuda.synchronize()
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)
    torch.cuda.manual_seed(5)
    expected = torch.rand(3)
    assert torch.equal(torch.rand(3, generator=torch.Generator().manual_seed(5)), expected)


@cpu_only
def test_the_schedules_see_torch_and_zeros_on_the_cpu() -> None:
    import megatron.core.pipeline_parallel.schedules as schedules

    platform.activate()
    made = schedules.torch.zeros([2], dtype=torch.int, device="cuda")
    assert (made.device.type, made.dtype, made.tolist()) == ("cpu", torch.int32, [0, 0])
    for name in ("ones", "Tensor", "autograd", "distributed", "no_grad", "float32"):
        assert getattr(schedules.torch, name) is getattr(torch, name)
    with pytest.raises(AttributeError):
        _ = schedules.torch.no_such_thing


@cpu_only
def test_a_request_for_cuda_elsewhere_still_fails() -> None:
    """The redirection is of known calls: our own mistakes are not papered over."""
    platform.activate()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2).to("cuda")
    assert not torch.cuda.is_available()


@cpu_only
def test_fp16_is_allowed_with_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: False)
    with caplog.at_level(logging.WARNING, logger="megasparse"):
        platform.allow_fp16()
        assert accelerator.is_fp16_supported()
        platform.allow_fp16()
    assert len([r for r in caplog.records if "fp16" in r.message]) == 1


def test_fp16_on_cuda_is_deepspeeds_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: False)
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        platform.allow_fp16()
    assert not accelerator.is_fp16_supported()


@cpu_only
def test_megatrons_tracker_keeps_streams_apart(single: topology.Topology) -> None:
    """A fork draws from its own generator, goes on where it stopped, and leaves the ordinary one as it was."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    before = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with get_cuda_rng_tracker().fork():
            drawn.append(torch.rand(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], torch.rand(3))


def test_the_device_may_be_one_without_memory() -> None:
    with torch.device("meta"):
        assert platform.device().type == "meta"
    assert platform.device().type != "meta"


@cpu_only
def test_recompute_draws_the_same_dropout(single: topology.Topology) -> None:
    """mcore saves and restores the generators it takes for the GPU's: with the redirected ones, recomputed layers
    have the masks of the first pass, and gradients are those without recomputation."""

    def gradients(recipe: Recipe) -> list[torch.Tensor]:
        engine = Engine(recipe, single, *build_model(recipe, single, small.VOCAB))
        torch.manual_seed(3)
        results = [engine.train_step(small.batches(recipe, s), s, 1e-2) for s in range(2)]
        return [torch.tensor([r.loss, r.grad_norm]) for r in results] + [p.detach() for p in engine.chunks.parameters()]

    dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
    plain, recomputed, none = (
        gradients(small.recipe(model, {}, {"recompute": recompute}, parallel={"zero_stage": 0}))
        for model, recompute in ((dropout, "none"), (dropout, "full"), ({}, "none"))
    )
    for a, b in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(plain[0], none[0], rtol=1e-3), "dropout does something"


def test_the_clock_says_what_lies_between_start_and_stop() -> None:
    clock = platform.Clock()
    clock.start()
    assert clock.seconds() == 0.0, "it was not stopped"
    time.sleep(0.05)
    clock.stop()
    time.sleep(0.05)
    assert 0.05 <= clock.seconds() < 0.095
    clock.start()
    clock.stop()
    assert clock.seconds() < 0.05
