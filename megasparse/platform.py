"""The only place that tells CUDA from CPU: device, communication backend, dtypes, and megatron-core on CPU.

megatron-core is written for CUDA. Where CUDA is absent, :func:`activate` redirects the few calls it makes into
``torch.cuda`` to the CPU, so that the very same layers and schedules run on gloo. Nothing is patched on a GPU.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from typing import Any

import torch

from megasparse.launch import launch

logger = logging.getLogger("megasparse")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def has_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """This process's device: its CUDA device by local rank, else the CPU; within ``torch.device("meta")`` that, of
    which tensors have shapes and no memory."""
    if torch.get_default_device().type == "meta":
        return torch.device("meta")
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend of :func:`device`."""
    return "nccl" if has_cuda() else "gloo"


def activate() -> None:
    """Prepare this process for megatron-core and DeepSpeed; call it before importing either. Idempotent."""
    if has_cuda():
        torch.cuda.set_device(launch().local_rank % torch.cuda.device_count())  # srun may show each task only its own
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if torch.cuda.current_device is _cpu_device:
        return
    _redirect_torch_cuda()
    _redirect_megatron()
    logger.info("no CUDA: megatron-core's torch.cuda calls go to the CPU, collectives to gloo")


def peak_memory() -> int:
    """Bytes: the most that this process has held, on its CUDA device, or of the host's memory."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Clock:
    """Seconds of this process's device between ``start`` and ``stop``."""

    def start(self) -> None:
        self._started, self._stopped = self._now(), None

    def stop(self) -> None:
        self._stopped = self._now()

    def seconds(self) -> float:
        """Waits for the device; 0 if it was not stopped."""
        if self._stopped is None:
            return 0.0
        if not has_cuda():
            return self._stopped - self._started
        self._stopped.synchronize()
        return self._started.elapsed_time(self._stopped) / 1000

    @staticmethod
    def _now() -> Any:
        if not has_cuda():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def allow_fp16() -> None:
    """Let DeepSpeed train fp16 here although its CPU accelerator says no.

    It asks whether oneDNN has fast fp16 kernels; torch's own fp16 kernels are slower and right, which is enough to
    test dynamic loss scaling on a laptop.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if not has_cuda() and not accelerator.is_fp16_supported():
        logger.warning("fp16 on this CPU has no fast kernels: DeepSpeed's refusal is overridden, training is slow")
        accelerator.is_fp16_supported = lambda: True


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _redirect_torch_cuda() -> None:
    """The calls megatron-core makes with no CUDA guard around them."""
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]  # used as ``device=``
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]


class _TorchOnCpu:
    """``torch`` as megatron-core sees it: what it asks for on "cuda" or in pinned memory is a plain CPU tensor."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **kwargs)

    @staticmethod
    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(*args, **kwargs)


def _redirect_megatron() -> None:
    import megatron.core.models.common.embeddings.rope_utils as rope_utils
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.tensor_parallel.random as random

    schedules.torch = _TorchOnCpu()  # the literal device="cuda" of its token counter
    rope_utils.torch = _TorchOnCpu()  # the pinned memory of its context-parallel slicing
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
