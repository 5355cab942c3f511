"""C++ sources of the CPU paths: compiled at their first use, kept in torch's folder for extensions."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root, include_paths, library_paths

FLAGS = ["-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"]


def load(source: Path) -> None:
    """Compile ``source`` for this processor and torch, if that was not done before, and register its operators.

    RuntimeError without a C++ compiler. Processes that start together wait for the first one; its lock dies with it. A
    library appears under its name when it is whole.
    """
    command = [
        *[get_cxx_compiler(), *FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"],
        *[*(f"-I{path}" for path in include_paths()), str(source)],
        *[*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"],
    ]
    identity = f"{command} {torch.__version__} {_processor()}".encode() + source.read_bytes()
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "megasparse"
    library = folder / f"{source.stem}-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _compile(command, library)
    torch.ops.load_library(library)


def _compile(command: list[str], library: Path) -> None:
    aside = library.with_suffix(f".{os.getpid()}")
    try:
        subprocess.run([*command, "-o", str(aside)], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(
            f"{library.stem} is compiled at its first use and there is no {command[0]}: install a C++ compiler (g++) "
            "or set CXX to one"
        ) from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command)} failed:\n{error.stderr[:2000]}") from None
    aside.replace(library)


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
