"""Whole runs through the command line: what they leave, what they refuse, and that a killed one loses nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from megasparse import cli, platform, supervisor
from megasparse.checkpoint.folder import read_manifest
from megasparse.config import load_recipe
from megasparse.data.loader import Batch
from megasparse.data.prepare import PrepareConfig, prepare
from megasparse.data.tokenizer import load_tokenizer
from megasparse.engine import Engine
from megasparse.metrics.log import MetricsLogger
from megasparse.metrics.record import read_faults, read_metrics
from megasparse.train import train
from tests.helpers import run_distributed

TEXT = "def f{i}(x):\n    return x + {i}\n\n\nclass C{i}:\n    value = {i}\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def make_corpus(folder: Path) -> Path:
    """A prepared data set of two hundred tiny documents."""
    for i in range(200):
        (folder / f"{i}.py").write_text(TEXT.replace("{i}", str(i)) * 3)
    prepare(PrepareConfig(output=folder / "set", sources=[folder], vocab_size=300, validation_fraction=0.1, workers=1))
    return folder / "set"


def write_recipe(folder: Path, corpus: Path, **training: Any) -> Path:
    raw = {
        "name": "tiny",
        "data": {"sets": [{"path": str(corpus)}], "seq_length": 32},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "hidden_dropout": 0.1,
            "moe": {"num_experts": 4, "ffn_hidden_size": 32, "jitter": 0.05, "bias_update_rate": 0.01},
        },
        "training": {
            "steps": 12,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "save_interval": 4,
            "eval_stride": 32,
            **training,
        },
        "logging": {"tensorboard": False, "wandb": "disabled"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def command(*arguments: object, processes: int = 1) -> list[str]:
    program = [sys.executable, "-m", "megasparse"]
    if processes > 1:
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(processes)]
        program = [*launcher, "--master_port", str(29500 + os.getpid() % 1000), "--module", "megasparse"]
    return [*program, *map(str, arguments)]


def run(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """The command line in processes that have imported everything."""
    return run_distributed(command_line, processes, [str(argument) for argument in arguments])[0]


def command_line(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """In this rank, as if it were a process of its own."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["megasparse", *arguments]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        pytest.raises(SystemExit) as stop,
    ):
        cli.main()
    assert isinstance(stop.value.code, int)
    return subprocess.CompletedProcess(arguments, stop.value.code, output.getvalue(), errors.getvalue())


def launch(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """As a user does."""
    return subprocess.run(
        command(*arguments, processes=processes), capture_output=True, text=True, timeout=200, env=environment()
    )


def environment() -> dict[str, str]:
    """Without what a process group of the test process itself has left there: its port is taken."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "MEGASPARSE_SUPERVISOR"}
    return {name: value for name, value in os.environ.items() if name not in launcher}


def without_timing(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "timing"} for record in read_metrics(run_dir)]


def kill_after(run_dir: Path, steps: int, arguments: list[str]) -> None:
    """Start a run and kill -9 its whole process group once ``steps`` steps are recorded and there is a checkpoint (one
    that is written beside the run may be late)."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(arguments, start_new_session=True, stdout=quiet, stderr=quiet, env=environment())
    deadline = time.monotonic() + 120
    while len(read_metrics(run_dir)) < steps or not (run_dir / "checkpoints" / "latest").exists():
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_run_explains_itself(tmp_path: Path, corpus: Path) -> None:
    recipe = write_recipe(tmp_path, corpus, eval_interval=5, eval_tokens=500)
    done = launch("train", recipe, "--run-dir", tmp_path / "run", "optimizer.lr=0.01")
    assert done.returncode == 0, done.stderr
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(1, 13))
    assert records[-1]["loss"] < records[0]["loss"]
    assert [r["step"] for r in records if "validation_loss" in r] == [5, 10, 12]
    for r in records:
        assert len(r["expert_load_by_layer"]) == 2
        assert max(r["expert_load_by_layer"]) == pytest.approx(r["expert_load"], rel=1e-3)
    final = records[-1]
    manifest = json.loads((corpus / "manifest.json").read_text())["validation"]
    assert final["gzip9_bits_per_byte"] == pytest.approx(8 * manifest["gzip9_bytes"] / manifest["utf8_bytes"])
    nats = final["validation_loss"] * manifest["tokens"]
    assert final["validation_bits_per_byte"] == pytest.approx(nats / 0.6931471805599453 / manifest["utf8_bytes"])
    for name in ("recipe.yaml", "environment.json", "loss.png", "checkpoints/latest"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    for said in ("sample:", "bits/byte", "gzip -9", "xz", "--resume"):
        assert said in done.stdout, said
    checkpoint = tmp_path / "run" / "checkpoints" / "step_12"
    assert load_tokenizer(checkpoint).hash == load_tokenizer(corpus).hash
    assert [data_set["path"] for data_set in read_manifest(checkpoint)["data"]] == [str(corpus)]

    again = run("train", recipe, "--run-dir", tmp_path / "run")
    assert again.returncode == 2
    assert "add --resume" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_equals_never_killed(tmp_path: Path, corpus: Path, processes: int) -> None:
    """To the bit, with dropout, jitter and router biases; kill -9 in the middle, twice. Two processes save beside the
    run."""
    recipe = write_recipe(tmp_path, corpus, eval_interval=3, eval_tokens=500)
    layout = ["parallel.ep=2"] if processes == 2 else []
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run("train", recipe, *layout, "--run-dir", whole, processes=processes)
    assert done.returncode == 0, done.stderr
    asynchronous = [f"training.async_save={str(processes == 2).lower()}"]
    arguments = ["train", recipe, *layout, *asynchronous, "--run-dir", killed]
    kill_after(killed, 6, command(*arguments, processes=processes))
    kill_after(killed, 9, command(*arguments, "--resume", processes=processes))
    done = launch(*arguments, "--resume", processes=processes)
    assert done.returncode == 0, done.stderr
    assert without_timing(killed) == without_timing(whole)


def test_a_longer_budget_goes_on_with_the_same_data(tmp_path: Path, corpus: Path) -> None:
    """12 steps, then 8 more: the same as 20 at once, where the learning rate does not look ahead."""
    recipe = write_recipe(tmp_path, corpus)
    constant = "schedule.type=constant"
    assert run("train", recipe, constant, "--run-dir", tmp_path / "short").returncode == 0
    longer = run("train", recipe, constant, "training.steps=20", "--run-dir", tmp_path / "short", "--resume")
    assert longer.returncode == 0, longer.stderr
    assert run("train", recipe, constant, "training.steps=20", "--run-dir", tmp_path / "long").returncode == 0
    keys = ("step", "loss", "grad_norm")
    short, long = ([[r[k] for k in keys] for r in read_metrics(tmp_path / d)] for d in ("short", "long"))
    assert short == long


def test_a_damaged_checkpoint_is_refused_and_the_one_before_resumed(tmp_path: Path, corpus: Path) -> None:
    """What is done anew from there is what was done, to the bit."""
    recipe, run_dir = write_recipe(tmp_path, corpus), tmp_path / "run"
    arguments = ["train", recipe, "schedule.type=constant", "--run-dir", run_dir]
    assert run(*arguments).returncode == 0
    first = {record["step"]: record for record in without_timing(run_dir)}
    damaged = run_dir / "checkpoints" / "step_12" / "__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    more = [*arguments, "training.steps=14", "--resume"]
    refused = run(*more)
    assert refused.returncode == 2
    (error,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert "step_12 is damaged: the SHA-256 of __0_0.distcp" in error
    assert error.endswith("resume from it: --resume --checkpoint step_8")
    done = run(*more, "--checkpoint", "step_8")
    assert done.returncode == 0, done.stderr
    assert "step_8" in done.stdout
    again = {record["step"]: record for record in without_timing(run_dir)}
    assert list(again) == list(range(1, 15))
    keys = ("loss", "grad_norm", "expert_load")
    assert [[again[s][k] for k in keys] for s in range(9, 13)] == [[first[s][k] for k in keys] for s in range(9, 13)]
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["latest", "step_12", "step_14"]


def test_a_named_checkpoint_needs_resume(tmp_path: Path, corpus: Path) -> None:
    done = run("train", write_recipe(tmp_path, corpus), "--run-dir", tmp_path / "run", "--checkpoint", "step_8")
    assert done.returncode == 2
    assert "--checkpoint step_8 is what to go on from: add --resume" in done.stderr


# Another number of processes ------------------------------------------------------------------------------------------


def consumed(recipe: Path, overrides: list[str], run_dir: Path, resume: bool) -> list[tuple[int, int, int]]:
    """Train in this rank; (step, sample, its tokens in a number) of every sequence it trained on."""
    seen = []
    step_of_the_engine = Engine.train_step

    def train_step(engine: Engine, batches: list[Batch], step: int, *rest: Any, **options: Any) -> Any:
        for batch in batches:
            for tokens, index in zip(batch.tokens, batch.token_index, strict=True):
                seen.append((step, int(index[0]) // len(index), hash(tuple(tokens.tolist()))))
        return step_of_the_engine(engine, batches, step, *rest, **options)

    with mock.patch.object(Engine, "train_step", train_step), mock.patch("megasparse.train.SAMPLE_TOKENS", 1):
        train(load_recipe(recipe, overrides), run_dir, resume)
    return seen


def test_another_number_of_processes_goes_on_with_the_next_sample(tmp_path: Path, corpus: Path) -> None:
    """1, then 4, then 2 processes: every sample once and in its step, the losses those of a run never stopped."""
    recipe = write_recipe(tmp_path, corpus)
    steady = ["schedule.type=constant", "model.hidden_dropout=0", "optimizer.eps=1e-5"]
    (expected,) = run_distributed(consumed, 1, recipe, steady, tmp_path / "whole", False)
    seen = []
    for processes, steps, layout in ((1, 4, []), (4, 8, ["parallel.ep=2"]), (2, 12, ["parallel.zero_stage=2"])):
        overrides = [*steady, *layout, f"training.steps={steps}"]
        ranks = run_distributed(consumed, processes, recipe, overrides, tmp_path / "changed", steps > 4)
        assert all(ranks)
        seen += [sample for rank in ranks for sample in rank]
    assert sorted(seen) == sorted(expected)
    assert [sample for _, sample, _ in sorted(seen)] == list(range(12 * 8))
    losses = [[record["loss"] for record in read_metrics(tmp_path / d)] for d in ("changed", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# Weights and a teacher from another run -------------------------------------------------------------------------------


def said_while_training(recipe: Path, overrides: list[str], run_dir: Path, *resume: Any) -> tuple[list[str], str]:
    """Train in this rank, with little to do at the end: what the log says, and the error if one ends it."""
    said: list[str] = []
    with (
        mock.patch.object(MetricsLogger, "say", lambda _, message: said.append(message)),
        mock.patch("megasparse.train.SAMPLE_TOKENS", 1),
    ):
        try:
            train(load_recipe(recipe, overrides), run_dir, *resume)
        except ValueError as error:
            return said, str(error)
    return said, ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A checkpoint, step_4, saved by two processes."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, corpus, steps=4)
    assert run_distributed(said_while_training, 2, recipe, ["parallel.ep=2"], folder)[0][1] == ""
    return folder / "checkpoints" / "step_4"


def test_sparse_weights_from_a_dense_run_that_teaches_them(tmp_path: Path, corpus: Path, trained: Path) -> None:
    """AST's course: begin with a dense model and learn from it. The run says so and records it; resumed, it is to the
    bit the run that was never killed, without the checkpoint it began with; another teacher is refused."""
    recipe = write_recipe(tmp_path, corpus, steps=4)
    teacher, run_dir = trained, tmp_path / "sparse"
    initial = shutil.copytree(teacher, tmp_path / "initial")
    overrides = [
        *(f"training.initial_checkpoint={initial}", f"training.teacher.checkpoint={teacher}"),
        *("training.save_interval=2", "parallel.tp=2", "model.hidden_dropout=0", "model.moe.jitter=0"),
        "sparsity.weights={method: ast, decay: 0.01, boost: 8, dense_start: 0.25}",
    ]
    (said, error), _ = run_distributed(said_while_training, 2, recipe, overrides, run_dir)
    assert error == ""
    assert any(line.startswith(f"weights from {initial} (tiny, step 4); ") for line in said)
    assert any("hidden_dropout was 0.1, is 0.0" in line for line in said)
    assert any(line.startswith(f"taught by {teacher} (tiny, step 4): 0.33 of the cross-entropy") for line in said)
    records = without_timing(run_dir)
    nats = [record["distillation_loss"] for record in records]
    assert nats[0] < 1e-6 < nats[1], "before it is sparse, the student is its teacher"
    (launch,) = json.loads((run_dir / "environment.json").read_text())
    assert (launch["initial_checkpoint"]["path"], launch["teacher"]["path"]) == (str(initial), str(teacher))

    shutil.rmtree(initial)
    for change, expected in [
        (["training.teacher.weight=0.5"], "training.teacher.weight was 0.67, is 0.5"),
        (["training.initial_checkpoint=null"], "training.initial_checkpoint was"),
        ([], ""),
    ]:
        (said, error), _ = run_distributed(
            said_while_training, 2, recipe, [*overrides, *change], run_dir, True, "step_2"
        )
        assert expected in error
        assert bool(error) == bool(expected)
    assert without_timing(run_dir) == records
    assert not any(line.startswith("weights from") for line in said)


def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path, corpus: Path, trained: Path) -> None:
    recipe, path = write_recipe(tmp_path, corpus), trained
    for override, expected in [
        (
            f"training.initial_checkpoint={tmp_path}",
            f"training.initial_checkpoint={tmp_path}: {tmp_path} is not a whole",
        ),
        (f"training.teacher.checkpoint={path}", f"training.teacher.checkpoint={path}: its vocabulary has "),
        (f"training.initial_checkpoint={path}", f"training.initial_checkpoint={path}: its vocabulary has "),
    ]:
        ((_, error),) = run_distributed(
            said_while_training, 1, recipe, [override, "model.vocab_size=999"], tmp_path / "second"
        )
        assert error.startswith(expected)
        assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.num_layer=3", "model.num_layer: unknown key"),
        ("model.moe.top_k=5", "top_k=5 is more than num_experts=4"),
        ("model.num_attention_heads=5", "num_attention_heads=5"),
        ("data.sets.0.path=/nowhere", "/nowhere"),
        ("training.global_batch_size=7", "training.global_batch_size=7"),
        ("parallel.ep=2", "layout ep2 on 1 processes"),
        ("model.vocab_size=10", "model.vocab_size=10"),
    ],
)
def test_what_is_wrong_is_one_line_before_any_work(tmp_path: Path, corpus: Path, override: str, said: str) -> None:
    done = run("train", write_recipe(tmp_path, corpus), override, "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_changed_model_is_not_resumed(tmp_path: Path, corpus: Path) -> None:
    recipe = write_recipe(tmp_path, corpus, steps=4)
    assert run("train", recipe, "--run-dir", tmp_path / "run").returncode == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for override, said in [
        ("model.hidden_size=64", "model.hidden_size was 32, is 64"),
        ("training.seed=5", "training.seed was 1234, is 5"),
        ("training.steps=4", "has all of training.steps=4 behind it"),
    ]:
        done = run("train", recipe, override, "--run-dir", tmp_path / "run", "--resume")
        assert done.returncode == 2
        assert said in done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_that_diverges_ends_and_says_so(tmp_path: Path, corpus: Path) -> None:
    recipe = write_recipe(tmp_path, corpus, steps=200)
    done = run(
        "train",
        recipe,
        "optimizer.lr=1e30",
        "optimizer.clip_grad=0",
        "faults.max_skipped_steps=3",
        "--run-dir",
        tmp_path / "run",
    )
    assert done.returncode == 2
    assert "3 steps in a row" in done.stderr
    assert "optimizer.lr=1e+30" in done.stderr


def test_a_picture_of_the_blocks_that_a_run_sees(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tools/block_map.py draws the newest checkpoint, saved in any layout; another run gets one clear error."""
    path = write_recipe(tmp_path, corpus, steps=2)
    sparse = "model.sparse_attention={selector: pooled, block_size: 4, blocks: 5, dense_end: 0.5}"
    assert run("train", path, sparse, "--run-dir", tmp_path / "sparse").returncode == 0
    program = str(Path(__file__).parents[1] / "tools/block_map.py")
    picture = tmp_path / "map.png"
    subprocess.run([sys.executable, program, str(tmp_path / "sparse"), "--output", str(picture)], check=True)
    assert picture.read_bytes().startswith(b"\x89PNG")
    recipe = tmp_path / "sparse" / "recipe.yaml"
    raw = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**raw, "model": {**raw["model"], "sparse_attention": None}}))
    monkeypatch.setattr(sys, "argv", [program, str(tmp_path / "sparse")])
    with pytest.raises(SystemExit, match=r"^error: .* has no model\.sparse_attention: there are no blocks to show$"):
        runpy.run_path(program, run_name="__main__")


@pytest.mark.slow
def test_asked_to_profile_then_to_save_and_end(tmp_path: Path, corpus: Path) -> None:
    """SIGUSR2 profiles steps and goes on; SIGUSR1 saves within a step and ends with status 75, and what is resumed
    then is the run that was never asked."""
    recipe = write_recipe(tmp_path, corpus, steps=300, save_interval=0)
    calm, asked = tmp_path / "calm", tmp_path / "asked"
    assert run("train", recipe, "--run-dir", calm).returncode == 0
    arguments = ["train", recipe, "--run-dir", asked, "--auto-resume"]
    process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.DEVNULL)

    def wait_for(what: Any) -> None:
        end = time.monotonic() + 60
        while not what():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)

    wait_for(lambda: len(read_metrics(asked)) > 5)
    os.kill(process.pid, signal.SIGUSR2)
    wait_for(lambda: list(asked.glob("profile/step_*/rank_0.json.gz")))
    assert int((asked / "pid").read_text().split()[0]) == process.pid
    recorded = len(read_metrics(asked))
    os.kill(process.pid, signal.SIGUSR1)
    assert process.wait(60) == supervisor.RESUME
    (event,) = [json.loads(line) for line in (asked / "faults.jsonl").read_text().splitlines()]
    assert event["kind"] == "signal"
    assert recorded <= event["step"] <= recorded + 2 < 300
    assert (asked / "checkpoints" / f"step_{event['step']}" / "manifest.json").exists()
    assert launch(*arguments).returncode == 0
    assert without_timing(asked) == without_timing(calm)


@pytest.mark.parametrize("file", ["metrics.jsonl", "checkpoints"])
def test_a_disk_that_is_full_is_one_line(file: str, tmp_path: Path, corpus: Path) -> None:
    """Of the record, or of a checkpoint whose folder is no longer one."""
    recipe = write_recipe(tmp_path, corpus, steps=8)
    ((code, errors),) = run_distributed(on_a_bad_disk, 1, recipe, tmp_path / "run", file)
    assert code == 2
    assert errors.startswith(f"error: could not {'write' if file == 'metrics.jsonl' else 'save'} {tmp_path / 'run'}")
    assert errors.count("\n") == 1


def on_a_bad_disk(recipe: Path, run_dir: Path, file: str) -> tuple[int, str]:
    platform.activate()  # it says once that there is no CUDA
    step_of_the_engine = Engine.train_step

    def train_step(engine: Engine, batches: list[Batch], step: int, *rest: Any, **options: Any) -> Any:
        if step == 2 and file == "metrics.jsonl":
            os.dup2(os.open("/dev/full", os.O_WRONLY), next(own_descriptors(run_dir / file)))
        if step == 2 and file == "checkpoints":
            (run_dir / file).touch()  # where the folder should be
        return step_of_the_engine(engine, batches, step, *rest, **options)

    with mock.patch.object(Engine, "train_step", train_step):
        done = command_line(["train", str(recipe), "--run-dir", str(run_dir)])
    return done.returncode, done.stderr


def test_checkpoints_that_are_gone_are_written_anew(tmp_path: Path, corpus: Path) -> None:
    """Nothing is lost as long as the run lives, and it says so."""
    recipe = write_recipe(tmp_path, corpus, steps=8, save_interval=3)
    ((code, errors),) = run_distributed(losing_its_checkpoints, 1, recipe, tmp_path / "run")
    assert (code, errors) == (0, "")
    (event,) = read_faults(tmp_path / "run")
    assert (event["kind"], event["step"]) == ("disk", 6)
    assert event["message"].startswith(f"{tmp_path / 'run' / 'checkpoints'} is gone")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step_6", "step_8"]


def losing_its_checkpoints(recipe: Path, run_dir: Path) -> tuple[int, str]:
    platform.activate()  # it says once that there is no CUDA
    step_of_the_engine = Engine.train_step

    def train_step(engine: Engine, batches: list[Batch], step: int, *rest: Any, **options: Any) -> Any:
        if step == 4:
            shutil.rmtree(run_dir / "checkpoints")
        return step_of_the_engine(engine, batches, step, *rest, **options)

    with mock.patch.object(Engine, "train_step", train_step):
        done = command_line(["train", str(recipe), "--run-dir", str(run_dir)])
    return done.returncode, done.stderr


def own_descriptors(path: Path) -> Iterator[int]:
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if link.resolve() == path.resolve():
                yield int(link.name)
