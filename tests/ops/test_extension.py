"""C++ sources become operators once, or one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasparse.ops import extension

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled libraries go."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions" / "megasparse"


def test_a_source_is_compiled_once(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "one.cpp"
    source.write_text(SOURCE)
    extension.load(source)
    (library,) = folder.glob("one-*.so")
    made = library.stat().st_mtime_ns
    extension.load(source)
    assert library.stat().st_mtime_ns == made
    source.write_text(SOURCE.replace("42", "43"))
    extension.load(source)
    assert len(list(folder.glob("one-*.so"))) == 2
    monkeypatch.setattr(extension, "FLAGS", [*extension.FLAGS, "-DOTHER"])
    extension.load(source)
    assert len(list(folder.glob("one-*.so"))) == 3


def test_no_compiler(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (tmp_path / "two.cpp").write_text(SOURCE)
    with pytest.raises(RuntimeError, match="there is no no-such-compiler: install a C"):
        extension.load(tmp_path / "two.cpp")
    assert not list(folder.glob("two*"))


def test_a_source_that_does_not_compile(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "three.cpp").write_text("int f() { return nothing; }")
    with pytest.raises(RuntimeError, match=r"(?s)three\.cpp.*failed:.*nothing"):
        extension.load(tmp_path / "three.cpp")
    assert not list(folder.glob("three*.so"))
