"""Imported once by the process that the ranks of distributed tests are forked from: they start in milliseconds.

Nothing here may start a thread or run a parallel torch operation, which would not survive the fork.
"""

from megasparse import platform

platform.activate()

import deepspeed  # noqa: E402, F401
import megatron.core.models.gpt  # noqa: E402, F401

import megasparse.engine  # noqa: E402, F401
