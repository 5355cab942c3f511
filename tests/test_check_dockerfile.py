"""The Dockerfile as text and as steps that run here; ``tools/check_dockerfile.py`` resolves what they install."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.helpers import REPOSITORY
from tools import check_dockerfile
from tools.check_dockerfile import copy_sources, instructions, pip_steps, variables

STEPS = instructions((REPOSITORY / "Dockerfile").read_text())
CONSTRAINTS = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
# torch and numpy as NVIDIA's 26.07 image names them.
BASE_HAS = {"torch": "2.13.0a0+9186a08b2c.nv26.7.59513937", "numpy": check_dockerfile.BASE_NUMPY}
PROGRAMS = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_instructions_are_read():
    text = '# comment\nARG A=1\nFROM base\nRUN one \\\n    # comment\n    && two\nENV B=x=y\nCMD ["a"]\n'
    expected = [("ARG", "A=1"), ("FROM", "base"), ("RUN", "one && two"), ("ENV", "B=x=y"), ("CMD", '["a"]')]
    assert instructions(text) == expected
    assert variables(expected) == {"A": "1", "B": "x=y"}


def test_hadolint_finds_nothing(capfd: pytest.CaptureFixture[str]):
    assert check_dockerfile.lint() == 0
    assert capfd.readouterr().out == ""


def test_versions_are_those_verified_together():
    defaults = variables(STEPS)
    assert defaults["MEGATRON_CORE"] == CONSTRAINTS["megatron-core"]
    assert defaults["DEEPSPEED"] == CONSTRAINTS["deepspeed"]
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", defaults["BASE"])


def test_what_the_base_has_is_enough():
    """pip leaves it alone: it satisfies what megasparse requires, though torch's version is a pre-release."""
    project = (REPOSITORY / "pyproject.toml").read_text()
    for name, version in BASE_HAS.items():
        (line,) = re.findall(rf'^    "({name}\b[^"]*)"', project, re.MULTILINE)
        specifier = Requirement(line).specifier
        assert specifier.contains(Version(version)), f"{name} {version} is not {specifier}"


def test_the_constraints_keep_what_is_installed(tmp_path: Path):
    """The step that writes them, run in this environment in place of the base."""
    (step,) = [step for step in pip_steps(STEPS) if "pip list" in step]
    copy_sources(STEPS, tmp_path)
    target = tmp_path / "made.txt"
    settings = {**PROGRAMS, **variables(STEPS), "PIP_CONSTRAINT": str(target)}
    subprocess.run(["bash", "-euo", "pipefail", "-c", step], cwd=tmp_path, env=settings, check=True)
    lines = target.read_text().splitlines()
    pins = dict(line.split(";")[0].strip().split("==") for line in lines if "python_version <" not in line)
    assert pins["torch"] == importlib.metadata.version("torch")
    assert pins["numpy"] == importlib.metadata.version("numpy")
    assert pins["deepspeed"] == CONSTRAINTS["deepspeed"]
    assert pins["transformers"] == re.search(r"transformers==(\S+); python_version >=", "\n".join(lines))[1]  # type: ignore[index]
    names = [(line.split("==")[0].lower(), line.partition(";")[2]) for line in lines]
    assert len(names) == len(set(names))


def test_the_context_has_what_is_copied(tmp_path: Path):
    sources = [source for name, argument in STEPS if name == "COPY" for source in argument.split()[:-1]]
    admitted = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert [source for source in sources if f"!{source}" not in admitted] == []
    copy_sources(STEPS, tmp_path)
    for file in ("pyproject.toml", "megasparse/cli.py", "megasparse/report/page.html", "examples/pretrain.yaml"):
        assert (tmp_path / file).exists()


@pytest.mark.slow
def test_the_default_command_proves_the_installation():
    (command,) = [json.loads(argument) for name, argument in STEPS if name == "CMD"]
    command = [part.replace("/opt/megasparse", str(REPOSITORY)) for part in command]
    done = subprocess.run(command, env=PROGRAMS, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^deepspeed +0\.19", done.stdout, re.MULTILINE)
    assert "equal" in done.stdout
