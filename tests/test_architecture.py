"""The house stays a house: which file may import what, read from the syntax trees of the sources."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megasparse"

# Imports point from a higher level to a lower one, or stay on their level without going round in a circle.
LEVELS = [
    {"ops", "supervisor"},
    {"topology"},
    {"layers", "sparsity"},
    {"model", "placement"},
    {
        "engine",
        "fragments",
        "memory",
        "optimizer",
        "profiling",
        "deepspeed_profilers",
        "hopper",
        "pruning",
        "data",
        "metrics",
        "flops",
        "checkpoint",
        "generate",
        "distillation",
        "signals",
        "pulse",
        "replicas",
    },
    {"processes", "faults"},
    {"train", "dry_run", "verify", "evaluate", "harness", "inference", "monitor", "report"},
    {"cli"},
    {"__main__", "tools"},
]
# Anyone but ops may import a leaf; a leaf imports no room but platform and launch.
LEAVES = {"", "config", "files", "launch", "layout", "parameters", "platform", "schedule"}
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Where a library may be imported, as regular expressions on the path below megasparse/.
ONLY_IN = {
    # The expert layer, and platform.py for the accelerator's word on fp16.
    "deepspeed": r"(engine|optimizer|deepspeed_profilers|topology|platform)\.py|checkpoint/.*|layers/moe\.py",
    "triton": r"ops/.*",
    "lm_eval": r"harness\.py",
    "transformer_engine": r"layers/[a-z0-9_]+\.py",
}

TOP_LEVEL = {
    "megasparse",
    "examples",
    "tools",
    "ds_configs",
    "tests",
    "Dockerfile",
    "README.md",
    # what packaging, continuous integration and licences need
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
    "LICENSE",
    ".ci",
    ".gitignore",
    ".dockerignore",
}


def sources(*folders: str) -> dict[str, str]:
    """Path below the repository -> source text."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


def room_of(path: str) -> str:
    """``megasparse/layers/moe.py`` -> ``layers``; the package's own ``__init__`` is ''."""
    parts = path.removesuffix(".py").split("/")
    room = parts[1] if parts[0] == "megasparse" else parts[0]
    return "" if room == "__init__" else room


def imports(source: str) -> Iterator[str]:
    """Every module or name imported at run time, dotted in full; imports under TYPE_CHECKING are not."""
    tree = ast.parse(source)
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test).endswith("TYPE_CHECKING")
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def imported_rooms(source: str) -> set[str]:
    names = [name.split(".") for name in imports(source)]
    rooms = {parts[1] for parts in names if parts[0] == "megasparse" and len(parts) > 1}
    return {room for room in rooms if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()}


def wrong_directions(path: str, source: str) -> list[str]:
    room = room_of(path)
    wrong = [f"{path}: relative import {name}" for name in imports(source) if name.startswith(".")]
    if room not in LEVEL_OF and room not in LEAVES:
        return [*wrong, f"{path}: {room} has no place in LEVELS or LEAVES"]
    for other in sorted(imported_rooms(source) - {room}):
        if room in LEAVES:
            allowed = other in ("platform", "launch")
        elif other in LEAVES:
            allowed = room != "ops" or other == "platform"
        else:
            allowed = LEVEL_OF[other] <= LEVEL_OF[room]
        if not allowed:
            wrong.append(f"{path}: {room or 'megasparse'} imports {other}")
    return wrong


def strangers(path: str, source: str) -> list[str]:
    """Libraries imported outside their place."""
    below = path.removeprefix("megasparse/")
    libraries = {name.split(".")[0] for name in imports(source)}
    return [
        f"{path}: imports {library}"
        for library, place in ONLY_IN.items()
        if library in libraries and not re.fullmatch(place, below)
    ]


def guesses(path: str, source: str) -> list[str]:
    """A setting read with a default that the recipe does not know, and errors that vanish."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(), _]):
                name = ast.unparse(owner).split(".")[-1]
                if re.fullmatch(r"(.*_)?(cfg|conf|config|args|options|recipe|settings|training|parallel|moe)", name):
                    found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
            case ast.ExceptHandler(type=None):
                found.append(f"{path}:{node.lineno}: bare except")
            case ast.ExceptHandler(type=caught, body=[ast.Pass()]) if re.search(
                r"\b(ImportError|ModuleNotFoundError|Exception|BaseException)\b", ast.unparse(caught)
            ):
                found.append(f"{path}:{node.lineno}: {ast.unparse(caught)} is swallowed")
    return found


def circles(texts: dict[str, str]) -> str | None:
    """A circle of imports between rooms, or None."""
    graph: dict[str, set[str]] = {}
    for path, source in texts.items():
        room = room_of(path)
        graph.setdefault(room, set()).update(imported_rooms(source) - {room})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return None


@pytest.mark.parametrize("check", [wrong_directions, strangers, guesses])
def test_sources(check):
    assert [line for path, text in sources("megasparse").items() for line in check(path, text)] == []


def test_tools_and_examples_stand_above():
    texts = sources("tools", "examples")
    assert [line for path, text in texts.items() for line in guesses(path, text)] == []
    below = sources("megasparse")
    assert [path for path, text in below.items() if {"tools", "examples", "tests"} & {*_tops(text)}] == []


def _tops(source: str) -> set[str]:
    return {name.split(".")[0] for name in imports(source)}


def test_no_circles_between_rooms():
    assert circles(sources("megasparse")) is None


def test_transformer_engine_has_one_door():
    doors = [path for path, text in sources("megasparse").items() if "transformer_engine" in _tops(text)]
    assert len(doors) <= 1


def test_the_loop_can_be_read_in_one_sitting():
    lines = (PACKAGE / "train.py").read_text().splitlines()
    assert len(lines) < 300


def test_top_level_is_fixed():
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {file.split("/")[0] for file in files} - TOP_LEVEL == set()


def test_tests_mirror_the_package():
    modules = [Path(path).relative_to("megasparse") for path in sources("megasparse")]
    mirrored = [
        f"tests/{module.with_name('test_' + module.name).as_posix()}"
        for module in modules
        if module.name not in ("__init__.py", "__main__.py")
    ]
    assert [path for path in mirrored if not (ROOT / path).exists()] == []


# The checks can fail.


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("megasparse/ops/x.py", "from megasparse.config import Model", "ops imports config"),
        ("megasparse/ops/x.py", "import megasparse.topology as t", "ops imports topology"),
        ("megasparse/ops/x.py", "from megasparse import platform", None),
        ("megasparse/topology.py", "from megasparse.layout import Layout", None),
        ("megasparse/layout.py", "from megasparse.topology import Topology", "layout imports topology"),
        ("megasparse/layers/x.py", "def f():\n    from megasparse import model", "layers imports model"),
        ("megasparse/layers/x.py", "from megasparse.ops.experts import permute", None),
        ("megasparse/data/x.py", "from megasparse.train import train", "data imports train"),
        ("megasparse/engine.py", "from megasparse.data.loader import Batch", None),
        ("megasparse/config/model.py", "from megasparse import schedule", "config imports schedule"),
        ("megasparse/schedule.py", "if TYPE_CHECKING:\n    from megasparse.config import Schedule", None),
        ("megasparse/layers/x.py", "from . import moe", "relative import"),
        ("megasparse/novel.py", "", "novel has no place"),
    ],
)
def test_wrong_directions_are_seen(path: str, source: str, wrong: str | None):
    found = wrong_directions(path, source)
    assert found == [] if wrong is None else wrong in "".join(found)


@pytest.mark.parametrize(
    ("path", "source", "is_wrong"),
    [
        ("megasparse/model.py", "import deepspeed.comm", True),
        ("megasparse/layers/attention.py", "from deepspeed.utils import groups", True),
        ("megasparse/layers/moe.py", "from deepspeed.utils import groups", False),
        ("megasparse/layers/x.py", "import triton.language as tl", True),
        ("megasparse/ops/x/triton.py", "import triton.language as tl", False),
        ("megasparse/ops/x.py", "import transformer_engine.pytorch", True),
        ("megasparse/layers/fp8.py", "import transformer_engine.pytorch", False),
    ],
)
def test_strangers_are_seen(path: str, source: str, is_wrong: bool):
    assert bool(strangers(path, source)) == is_wrong


@pytest.mark.parametrize(
    ("source", "is_wrong"),
    [
        ("getattr(cfg, 'x', 1)", True),
        ("getattr(self.config, 'x', None)", True),
        ("getattr(model_config, 'x', None)", True),
        ("getattr(parameter, 'sequence_parallel', False)", False),
        ("getattr(config, 'x')", False),
        ("try:\n    f()\nexcept:\n    g()", True),
        ("try:\n    import fast\nexcept ImportError:\n    pass", True),
        ("try:\n    f()\nexcept (ValueError, Exception):\n    pass", True),
        ("try:\n    f()\nexcept OSError:\n    pass", False),
    ],
)
def test_guesses_are_seen(source: str, is_wrong: bool):
    assert bool(guesses("megasparse/x.py", source)) == is_wrong


def test_circles_are_seen():
    texts = {
        "megasparse/engine.py": "from megasparse.data.loader import Batch",
        "megasparse/data/loader.py": "from megasparse.metrics import x",
        "megasparse/metrics.py": "from megasparse import engine",
    }
    assert set((circles(texts) or "").split(" -> ")) == {"engine", "data", "metrics"}
