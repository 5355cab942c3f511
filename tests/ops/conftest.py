"""Triton reads TRITON_INTERPRET when it is first imported, which other tests may have done already. So each way has a
process of its own: ``interpreter`` and ``compiler``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch


def _start(interpret: str) -> None:
    os.environ["TRITON_INTERPRET"] = interpret
    torch.set_num_threads(1)


def _process(interpret: str) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_start, initargs=(interpret,))


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with _process("1") as process:
        yield process


@pytest.fixture(scope="session")
def compiler() -> Iterator[ProcessPoolExecutor]:
    with _process("0") as process:
        yield process
