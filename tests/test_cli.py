"""The command line: quick help, arguments handed on, errors in one line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from megasparse import __version__, cli
from megasparse.config import Recipe
from tests.checkpoint.hf import conversion

MODULE = [sys.executable, "-m", "megasparse"]
RECIPE = """
name: tiny
data: {sets: [{path: data/stdlib}], seq_length: 64}
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4}
training: {steps: 10}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, Path, bool]]:
    """The calls of megasparse.train.train, which is replaced."""
    calls: list[tuple[Recipe, Path, bool]] = []
    stub = types.ModuleType("megasparse.train")
    stub.train = lambda *arguments: calls.append(arguments) or True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megasparse.train", stub)
    return calls


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run in this process; returns the exit status."""
    monkeypatch.setattr(sys, "argv", ["megasparse", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_help_is_quick():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([*MODULE, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert {"prepare", "train"} <= set(done.stdout.split())
    assert min(seconds) < 0.5


def test_help_imports_nothing_heavy():
    script = "import sys, json, megasparse.cli; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pydantic", "yaml", "transformers"} & set(json.loads(done.stdout))


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"megasparse {__version__}\n"


def test_train(monkeypatch: pytest.MonkeyPatch, recipe: Path, trained: list[Any]):
    arguments = [recipe, "model.num_layers=4", "--run-dir", "runs/x", "optimizer.lr=0.5", "--resume"]
    assert run(monkeypatch, "train", *arguments, "--checkpoint", "step_20") == 0
    ((resolved, run_dir, resume, checkpoint),) = trained
    assert (resolved.model.num_layers, resolved.optimizer.lr) == (4, 0.5)
    assert (run_dir, resume, checkpoint) == (Path("runs/x"), True, "step_20")


def test_train_in_a_layout(monkeypatch: pytest.MonkeyPatch, recipe: Path, trained: list[Any]):
    """The notation stands for the recipe's whole parallel section."""
    assert run(monkeypatch, "train", recipe, "parallel.vp=2", "--layout", "tp2pp2+sp+zero0") == 0
    parallel = trained[0][0].parallel
    assert (parallel.tp, parallel.pp, parallel.vp, parallel.sequence_parallel, parallel.zero_stage) == (
        2,
        2,
        1,
        True,
        0,
    )


def test_train_defaults_under_the_launcher(monkeypatch: pytest.MonkeyPatch, recipe: Path, trained: list[Any]):
    """The deepspeed launcher puts --local_rank before the verb, and leaves all cores to each process."""
    for name, value in launched(1, os.cpu_count() or 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert run(monkeypatch, "--local_rank=1", "train", recipe) == 0
    assert trained[0][1:] == (Path("runs/tiny"), False, None)
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_threads_that_the_user_chose_stay(monkeypatch: pytest.MonkeyPatch, recipe: Path, trained: list[Any]):
    for name, value in launched(1, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run(monkeypatch, "train", recipe) == 0
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.yaml"], "error: no recipe at none.yaml\n"),
        (["train", "{recipe}", "model.num_layer=1"], "error: {recipe}: model.num_layer: unknown key\n"),
        (["train", "{recipe}", "steps"], "error: override 'steps' is not of the form section.key=value\n"),
        (
            ["train", "{recipe}", "--layout", "xp2"],
            "error: 'xp2' is not a layout: write it like tp2pp2ep2 or tp2+sp, from tp, pp, vp, cp, ep, dp\n",
        ),
        (["inspect", "none"], "error: none is not a whole checkpoint: it has no readable manifest.json\n"),
        (
            ["evaluate", "none", "a.txt"],
            "error: no folder at none: give a checkpoint step_N, a run folder or a Hugging Face folder\n",
        ),
        (
            ["evaluate", "none", "a.txt", "--layout", "xp2"],
            "error: 'xp2' is not a layout: write it like tp2pp2ep2 or tp2+sp, from tp, pp, vp, cp, ep, dp\n",
        ),
        (
            ["generate", "none", "--prompt", "x"],
            "error: no folder at none: give a checkpoint step_N, a run folder or a Hugging Face folder\n",
        ),
    ],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe: Path,
    arguments: list[str],
    message: str,
):
    assert run(monkeypatch, *(argument.format(recipe=recipe) for argument in arguments)) == 2
    printed = capsys.readouterr()
    assert printed.err == message.format(recipe=recipe)
    assert printed.out == ""


def launched(rank: int, world_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29_000 + os.getpid() % 900),
    }


def test_an_error_of_all_ranks_is_said_once():
    """Their supervisors leave it to rank 0's."""
    environment = {name: value for name, value in os.environ.items() if name != "MEGASPARSE_SUPERVISOR"}
    ranks = [
        subprocess.Popen(
            [*MODULE, "train", "none.yaml"],
            env={**environment, **launched(rank, 3)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    errors = [rank.communicate(timeout=60)[1].strip() for rank in ranks]
    assert errors == ["error: no recipe at none.yaml", "", ""]
    assert [rank.returncode for rank in ranks] == [2, 2, 2]


@pytest.mark.parametrize("fault", [lambda: json.loads("x"), lambda: {}["key"]], ids=["ValueError", "KeyError"])
def test_faults_that_are_not_the_users_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, recipe: Path, fault: Any):
    stub = types.ModuleType("megasparse.train")
    stub.train = lambda *_: fault()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megasparse.train", stub)
    monkeypatch.setattr(sys, "argv", ["megasparse", "train", str(recipe)])
    with pytest.raises((json.JSONDecodeError, KeyError)):
        cli.main()


def test_prepare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from megasparse.data import prepare

    configs: list[Any] = []
    monkeypatch.setattr(prepare, "prepare", configs.append)
    assert run(monkeypatch, "prepare", "--output", tmp_path, "a.txt", "b", "--text-key", "body", "--workers", 3) == 0
    assert run(monkeypatch, "prepare", "--output", tmp_path, "--tokenizer", "t.model", "--overwrite") == 0
    given = {"output": tmp_path, "workers": 3, "text_key": "body", "sources": [Path("a.txt"), Path("b")]}
    assert configs[0] == prepare.PrepareConfig(**given)
    assert configs[1].sources is None
    assert (configs[1].tokenizer, configs[1].overwrite) == ("t.model", True)


def test_prepare_offers_every_setting_with_its_default():
    import inspect

    from megasparse.data.prepare import PrepareConfig

    options = inspect.signature(cli.prepare).parameters
    assert options.keys() == PrepareConfig.model_fields.keys()
    for name, field in PrepareConfig.model_fields.items():
        if name not in ("output", "workers"):
            assert options[name].default == field.default, name


def test_prepare_names_a_missing_source(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path):
    assert run(monkeypatch, "prepare", "--output", tmp_path / "out", tmp_path / "none") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "none" in error
    assert error.count("\n") == 1


class StubModel:
    """What megasparse.inference.open_model opens."""

    prefix = 7

    def __init__(self, *arguments: object) -> None:
        self.arguments, self.asked = arguments, ()

    def load(self) -> None:
        self.asked = ("loaded",)

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def generate(self, prompt: list[int], *settings: object) -> list[int]:
        self.asked = (*self.asked, prompt, *settings)
        return [33]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[StubModel]:
    from megasparse import inference

    models: list[StubModel] = []
    monkeypatch.setattr(inference, "open_model", lambda *arguments: models.append(StubModel(*arguments)) or models[0])
    return models


def test_evaluate(monkeypatch: pytest.MonkeyPatch, opened: list[StubModel]):
    from megasparse import evaluate
    from megasparse.layout import Layout

    calls: list[Any] = []
    monkeypatch.setattr(evaluate, "evaluate", lambda *arguments, **options: calls.append((arguments, options)))
    numbers = ["--window", 64, "--stride", 16, "--batch-size", 2, "--limit", 5]
    paths = ["--task-path", "yamls", "--json", "out.json", "--tokenizer", "there"]
    how = ["--layout", "tp2pp2", "--precision", "fp32", "--text-key", "body", "--trust-remote-code"]
    assert run(monkeypatch, "evaluate", "runs/x", "a.txt", "b", "--tasks", "one,two", *numbers, *paths, *how) == 0
    assert opened[0].arguments == (Path("runs/x"), Path("there"), Layout(tp=2, pp=2), "fp32", True)
    given = {"window": 64, "stride": 16, "batch_size": 2, "limit": 5, "text_key": "body"}
    assert calls == [
        (
            (opened[0], [Path("a.txt"), Path("b")], ["one", "two"]),
            {**given, "task_path": Path("yamls"), "json_path": Path("out.json")},
        )
    ]


def test_generate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], opened: list[StubModel], tmp_path: Path
):
    """The prompt is an option or stdin, and an empty one is the start of a document; rank 0 prints."""
    settings = ["--max-new-tokens", 5, "--temperature", 0.5, "--top-p", 0.9, "--seed", 3]
    assert run(monkeypatch, "generate", tmp_path, "--prompt", "hi", *settings) == 0
    assert opened[0].arguments == (tmp_path, None, None, None, False)
    assert opened[0].asked == ("loaded", [104, 105], 5, 0.5, 0.9, 3)
    assert capsys.readouterr().out == "hi!\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("yo"))
    assert run(monkeypatch, "generate", tmp_path) == 0
    assert capsys.readouterr().out == "yo!\n"
    assert run(monkeypatch, "generate", tmp_path, "--prompt", "") == 0
    assert opened[0].asked == ("loaded", [7], 128, 0.0, 1.0, 0)
    capsys.readouterr()
    for name, value in launched(0, 2).items():
        monkeypatch.setenv(name, value)
    assert run(monkeypatch, "generate", tmp_path) == 2
    assert capsys.readouterr().err == "error: several processes cannot share stdin: give the text as --prompt\n"
    monkeypatch.setenv("RANK", "1")
    assert run(monkeypatch, "generate", tmp_path, "--prompt", "x") == 0
    assert capsys.readouterr().out == ""


def test_convert_there_and_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = conversion.theirs(tmp_path / "theirs", "llama")
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert run(monkeypatch, "convert", "from-hf", folder, ours, "--no-verify") == 0
    assert run(monkeypatch, "convert", "to-hf", ours, back, "--no-verify", "--family", "mistral") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{back}: logits were not compared"
    assert json.loads((back / "config.json").read_text())["model_type"] == "mistral"
    before, after = conversion.read(folder), conversion.read(back)
    assert before.keys() == after.keys()
    for arguments, message in (
        (("from-hf", tmp_path, ours), f"{tmp_path} is no Hugging Face model: it has no config.json"),
        (("from-hf", folder, ours), f"{ours} is there already: choose another folder or delete it"),
        (("from-hf", folder, tmp_path / "x", "--layout", "ep2"), "ep=2 needs model.moe"),
        (("to-hf", tmp_path, tmp_path / "x"), "is not a whole checkpoint"),
        (("to-hf", ours, tmp_path / "x", "--dtype", "int8"), "--dtype int8: give one of fp32, bf16, fp16"),
        (("to-hf", ours, tmp_path / "x", "--shard-size", "5"), "--shard-size 5: write it like 500MB or 5GB"),
        (("to-hf", ours, tmp_path / "x", "--packed"), "has no 2:4 weights that can be packed"),
    ):
        assert run(monkeypatch, "convert", *arguments, "--no-verify") == 2, arguments
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("error: "), error
        assert message in error
        assert not (tmp_path / "x").exists()


def test_monitor_and_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert run(monkeypatch, "monitor", tmp_path / "a", tmp_path, "--once") == 0
    assert [line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["no", "such", "folder", "yet"],
        ["no", "step", "yet"],
    ]
    assert run(monkeypatch, "report", tmp_path) == 2
    assert "is no run folder, it has no recipe.yaml" in capsys.readouterr().err
