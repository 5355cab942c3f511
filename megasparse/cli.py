"""The command line: parse, call, print. Heavy imports wait inside the verbs, so that help is immediate."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megasparse import __version__, supervisor
from megasparse.launch import Launch, launch

if TYPE_CHECKING:
    from megasparse.checkpoint.hf.prove import Run
    from megasparse.inference import CheckpointModel, HuggingFaceModel

PACKAGE = Path(__file__).parent
# What megatron-core, DeepSpeed and torch say of themselves and of each other at every start.
DEPENDENCIES_WARN = [
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "`torch.distributed.*` is deprecated",
    "`torch.jit",
]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def main() -> None:
    """Run the command line. A ValueError of ours is the user's to mend: one line on stderr and exit status 2."""
    try:
        app()
    except Exception as error:
        if isinstance(error, ValueError) and _raised_here(error):
            message = " ".join(str(error).split())
            if not supervisor.report("refused", message):
                print(f"error: {message}", file=sys.stderr, flush=True)
            sys.exit(2)
        what = f"raised {type(error).__name__}: {error}".partition("\n")[0]
        if not supervisor.report("raised", what, traceback.format_exc()):
            raise
        sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"megasparse {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    local_rank: Annotated[
        int, typer.Option("--local_rank", hidden=True, help="Passed by the deepspeed launcher, which also sets RANK.")
    ] = 0,
) -> None:
    """Pretrain sparse language models: the same recipe on a laptop's CPU and on a GPU cluster."""
    for message in DEPENDENCIES_WARN:
        warnings.filterwarnings("ignore", message)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megasparse").setLevel(logging.INFO)


@app.command()
def prepare(
    output: Annotated[Path, typer.Option(help="Folder to write the data set to.")],
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files and folders of .txt, .py, .md, .jsonl(.gz, .zst) and .parquet. None: the source of this "
            "Python's standard library.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="'sentencepiece' trains one; else the path of a .model or tokenizer.json.")
    ] = "sentencepiece",
    eod_token: Annotated[
        str | None, typer.Option(help="Of a tokenizer.json: the token that ends a document, if its config names none.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=1, help="Of the SentencePiece tokenizer to train.")] = 4096,
    text_key: Annotated[str, typer.Option(help="Field of the text in JSON lines and parquet.")] = "text",
    validation_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of documents held out, chosen by a stable hash.")
    ] = 0.05,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one for each CPU.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a data set prepared with other settings.")] = False,
) -> None:
    """Turn text into a tokenizer and a data set for training. Goes on where a run before was stopped."""
    from megasparse.data.prepare import PrepareConfig
    from megasparse.data.prepare import prepare as run

    run(
        PrepareConfig(
            output=output,
            sources=sources or None,
            tokenizer=tokenizer,
            eod_token=eod_token,
            vocab_size=vocab_size,
            text_key=text_key,
            validation_fraction=validation_fraction,
            workers=workers or len(os.sched_getaffinity(0)),
            overwrite=overwrite,
        )
    )


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; examples/ has some.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values to change, such as model.num_layers=4.", show_default=False),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="In place of the recipe's parallel section, such as tp2pp2ep2+sp; dp is what is left."),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints, metrics and plots. Default: runs/ and the recipe's name."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the run folder.")
    ] = False,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Go on if there is a checkpoint, start if there is none.")
    ] = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="With --resume: go on from this one, such as step_20.", show_default=False)
    ] = None,
    deepspeed_config: Annotated[
        Path | None,
        typer.Option(help="JSON of DeepSpeed's settings, of which ds_configs/ has some; overrides come after it."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Do not train: check the layout's groups and parts, say what processes need."),
    ] = False,
    world_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --dry-run: processes. Default: parallel.world_size, or the fewest that the layout needs."
        ),
    ] = None,
) -> None:
    """Train a recipe. For several processes: deepspeed --num_gpus N --module megasparse train RECIPE.

    SIGTERM and SIGUSR1, to any process: save after the step at hand and end with exit status 75.
    """
    if not dry_run:
        _start(alone=True)
    from megasparse.config import deepspeed_overrides, load_recipe

    if world_size is not None and not dry_run:
        raise ValueError(f"--world-size {world_size} is of a dry run: add --dry-run, or start as many processes")
    settings = deepspeed_overrides(deepspeed_config) if deepspeed_config else []
    resolved = load_recipe(recipe, [*settings, *(overrides or []), *_layout_overrides(layout)])
    if dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it is the same with a GPU, which it does not need
        from rich.console import Console

        from megasparse import platform

        platform.activate()
        from megasparse.dry_run import dry_run as check
        from megasparse.dry_run import show

        show(resolved, check(resolved, world_size), Console())
        return
    folder = run_dir or Path("runs") / resolved.name
    from megasparse.train import train as run

    resume = resume or (auto_resume and (folder / "checkpoints" / "latest").exists())
    if not run(resolved, folder, resume, checkpoint):
        raise typer.Exit(supervisor.RESUME)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder such as runs/NAME/checkpoints/step_20.")],
    hashes: Annotated[bool, typer.Option("--hashes", help="Read every file and compare its SHA-256.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write what is printed, in full, to this file.")] = None,
) -> None:
    """Say what a checkpoint holds: step, layout, files, and every tensor with its shape. Starts no processes."""
    from megasparse.checkpoint.inspect import inspect as run

    run(checkpoint, hashes, json)


@app.command()
def verify(
    recipe: Annotated[Path, typer.Argument(help="YAML file; examples/ has some.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values to change, such as model.num_layers=4.", show_default=False),
    ] = None,
    layouts: Annotated[
        str | None,
        typer.Option(help="Such as tp2,pp2vp2,ep2,cp2,tp2pp2ep2. Default: what the recipe asks for, and the usual."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 5,
    json: Annotated[Path | None, typer.Option(help="File for every figure.")] = None,
) -> None:
    """Prove layouts equal to one process: train the recipe, made small, in each of them on this machine's CPU.

    Exit status 1 if any loss, gradient or weight differs by more than 1e-5, or a token takes another route.
    """
    from megasparse import platform
    from megasparse.config import load_recipe

    resolved = load_recipe(recipe, overrides)
    platform.activate()
    from rich.console import Console

    from megasparse.files import write_atomic
    from megasparse.layout import Layout
    from megasparse.processes import Workers
    from megasparse.verify import show
    from megasparse.verify import verify as run

    chosen = None if layouts is None else [Layout.parse(text) for text in layouts.split(",")]
    with Workers() as workers:
        report = run(resolved, chosen, steps, workers.run)
    show(report, Console())
    if json is not None:
        write_atomic(json, report.to_json())
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            help="Checkpoint step_N, a run folder (its latest), or a Hugging Face folder.", show_default=False
        ),
    ],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files and folders of .txt, .py, .md, .jsonl(.gz, .zst) and .parquet to score.", show_default=False
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens seen at a time. Default: data.seq_length; of a Hugging Face model up to 2048."
        ),
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows. Default: window // 2.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows, or requests of tasks, at a time.")] = 8,
    tasks: Annotated[str | None, typer.Option(help="Of lm-eval, such as hellaswag,arc_easy.")] = None,
    task_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own in lm-eval's YAML.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for every figure.")] = None,
    layout: Annotated[
        str | None, typer.Option(help="To run a checkpoint in, such as tp2pp2ep2; dp is what is left.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="In place of the model's own: fp32, bf16 or fp16.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Its folder or file, if it is not with the model.")] = None,
    text_key: Annotated[str, typer.Option(help="Field of the text in JSON lines and parquet.")] = "text",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that a Hugging Face folder brings.")
    ] = False,
) -> None:
    """Score text, in perplexity and bits per byte, and run lm-eval's tasks.

    For several processes: deepspeed --num_gpus N --module megasparse evaluate MODEL ... --layout LAYOUT.
    """
    _start()
    opened = _open_model(model, tokenizer, layout, precision, trust_remote_code)
    from megasparse.evaluate import evaluate as run

    run(
        opened,
        files or [],
        tasks.split(",") if tasks else None,
        window=window,
        stride=stride,
        batch_size=batch_size,
        task_path=task_path,
        limit=limit,
        text_key=text_key,
        json_path=json,
    )


@app.command()
def generate(
    model: Annotated[
        Path,
        typer.Argument(
            help="Checkpoint step_N, a run folder (its latest), or a Hugging Face folder.", show_default=False
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="Text to continue. Default: what is on stdin.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the best token each time.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the fewest tokens that have this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    layout: Annotated[
        str | None, typer.Option(help="To run a checkpoint in, such as tp2pp2ep2; dp is what is left.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="In place of the model's own: fp32, bf16 or fp16.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Its folder or file, if it is not with the model.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that a Hugging Face folder brings.")
    ] = False,
) -> None:
    """Continue a text."""
    place = _start()
    if prompt is None and place.world_size > 1:
        raise ValueError("several processes cannot share stdin: give the text as --prompt")
    opened = _open_model(model, tokenizer, layout, precision, trust_remote_code)
    tokens = opened.encode(sys.stdin.read() if prompt is None else prompt) or [opened.prefix]
    opened.load()
    new = opened.generate(tokens, max_new_tokens, temperature, top_p, seed)
    if place.rank == 0:
        typer.echo(opened.decode(tokens + new))


convert = typer.Typer(no_args_is_help=True, help="Checkpoints from and to Hugging Face folders.")
app.add_typer(convert, name="convert")


@convert.command("from-hf")
def from_hf(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Checkpoint to write.", show_default=False)],
    layout: Annotated[
        str, typer.Option(help="To compute logits in for the comparison, on as many processes of this machine.")
    ] = "single",
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="Field of config.json that changes no logits, or beginning of names of tensors to leave out."
        ),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare logits with transformers'.")] = True,
) -> None:
    """Convert a Hugging Face model to a checkpoint: for training.initial_checkpoint, evaluate and generate.

    Goes on where a run before was stopped. The result is there only if every tensor on both sides has its counterpart
    and, unless that is turned off, the logits are equal.
    """
    from rich.console import Console

    from megasparse.checkpoint.hf.from_hf import from_hf as run
    from megasparse.layout import Layout

    with _workers(verify) as ranks:
        proof = run(source, output, Layout.parse(layout), frozenset(ignore or ()), ranks, Console(stderr=True))
    typer.echo(f"{output}: {proof or 'logits were not compared'}")


@convert.command("to-hf")
def to_hf(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint step_N, saved in any layout, or a run folder.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. Default: that of training.")] = None,
    shard_size: Annotated[str, typer.Option(help="Of a safetensors file, such as 500MB or 5GB.")] = "5GB",
    family: Annotated[
        str | None,
        typer.Option(
            help="model_type, such as mistral. Default: the first that can say the model, or else megasparse."
        ),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder or file, of a checkpoint that has none.")] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="2:4 weights as values and places, for megasparse's own loader.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Compare logits with transformers'.")] = True,
) -> None:
    """Convert a checkpoint to a Hugging Face folder, 2:4 weights as dense ones with zeros.

    Goes on where a run before was stopped. The result is there only if every tensor on both sides has its counterpart
    and, unless that is turned off, the logits are equal.
    """
    from rich.console import Console

    from megasparse.checkpoint.hf.to_hf import Options, parse_size
    from megasparse.checkpoint.hf.to_hf import to_hf as run

    options = Options(dtype, parse_size(shard_size), family, tokenizer, packed)
    with _workers(verify) as ranks:
        proof = run(checkpoint, output, options, ranks, Console(stderr=True))
    typer.echo(f"{output}: {proof or 'logits were not compared'}")


@app.command()
def monitor(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; they need not exist yet.", show_default=False)],
    once: Annotated[bool, typer.Option("--once", help="Print what there is and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show where runs are: step, losses, speed, expert load, and what went wrong. Ends on Ctrl-C."""
    from megasparse.monitor import monitor as run

    run(runs, once, interval)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, of a run that goes on or has ended.", show_default=False)],
) -> None:
    """Write RUN/report.html: the run in one page, to read without network and scripts."""
    from megasparse.report.page import report as write

    typer.echo(write(run))


@contextlib.contextmanager
def _workers(wanted: bool) -> Iterator[Run | None]:
    """What runs functions on several processes, which are started when it is first called."""
    if not wanted:
        yield None
        return
    from megasparse.processes import Workers

    with Workers() as workers:
        yield workers.run


def _open_model(
    path: Path, tokenizer: Path | None, layout: str | None, precision: str | None, trust_remote_code: bool
) -> CheckpointModel | HuggingFaceModel:
    from megasparse import platform
    from megasparse.layout import Layout

    parsed = None if layout is None else Layout.parse(layout)
    platform.activate()
    from megasparse.inference import open_model

    return open_model(path, tokenizer, parsed, precision, trust_remote_code)


def _layout_overrides(layout: str | None) -> list[str]:
    if layout is None:
        return []
    from megasparse.layout import Layout

    return [f"parallel.{name}={str(value).lower()}" for name, value in Layout.parse(layout).parallel().items()]


def _start(alone: bool = False) -> Launch:
    """Of a command that runs on several processes (``alone``: or on one): under a supervisor, and with this process's
    part of the host's cores, before torch starts its threads: launchers leave all of them to each. An OMP_NUM_THREADS
    of the user's stays."""
    place = launch()
    if alone or place.world_size > 1:
        supervisor.supervise(place)
    if place.local_world_size > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // place.local_world_size)))
    if place.rank > 0:
        logging.getLogger("megasparse").setLevel(logging.ERROR)
    return place


def _raised_here(error: BaseException) -> bool:
    """Was it megasparse's own code that raised? A library's ValueError is no message to the user."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return PACKAGE in Path(trace.tb_frame.f_code.co_filename).parents
