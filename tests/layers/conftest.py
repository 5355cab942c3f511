"""The sources of Transformer Engine's wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from tests.layers.te_sources import VERSION, Offer

WHEEL = f"transformer_engine-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="session")
def offer() -> Offer:
    """The sources of the wheel, downloaded once into a cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()) / "megasparse-wheels"
    if not (cache / WHEEL).exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", f"transformer-engine=={VERSION}"]
            result = subprocess.run([*command, "-d", folder], capture_output=True, text=True, timeout=200)
            if result.returncode:
                pytest.fail(f"no wheel of transformer-engine {VERSION} from the index: {result.stderr.strip()[-200:]}")
            os.replace(Path(folder) / WHEEL, cache / WHEEL)
    wheel = zipfile.ZipFile(cache / WHEEL)
    names = set(wheel.namelist())
    return Offer(lambda path: wheel.read(path).decode() if path in names else None)
