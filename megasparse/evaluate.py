"""How well a trained model predicts text: perplexity and bits per byte of files, and lm-eval's tasks."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megasparse.data.corpus import Corpus
from megasparse.files import write_atomic
from megasparse.inference import CheckpointModel, HuggingFaceModel, Model, is_main


@dataclass
class Text:
    """One of the files or folders that are scored, each document by itself."""

    name: str
    documents: list[NDArray[np.int32]]  # their tokens
    utf8_bytes: int
    skipped: dict[str, int]  # documents that are no text, by reason
    nats: float = 0.0  # the sum over its tokens
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = sum(map(len, self.documents))

    def figures(self) -> dict[str, Any]:
        return {
            "file": self.name,
            "documents": len(self.documents),
            "skipped": self.skipped,
            "tokens": self.tokens,
            "bytes": self.utf8_bytes,
            "nats_per_token": self.nats / self.tokens,
            "perplexity": math.exp(self.nats / self.tokens),
            "bits_per_byte": self.nats / math.log(2) / self.utf8_bytes,
        }


def evaluate(
    model: CheckpointModel | HuggingFaceModel,
    files: list[Path],
    tasks: list[str] | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    task_path: Path | None = None,
    limit: int | None = None,
    text_key: str = "text",
    json_path: Path | None = None,
) -> dict[str, Any]:
    """Score ``files`` and run ``tasks`` with a model that is not loaded yet; prints tables, writes ``json_path``.

    ``window``, ``stride``: see ``spans``; None: the model's own, and half of it. ``batch_size``: windows at a time,
    whose logits take batch_size * window * vocabulary * 4 bytes. ``limit``: examples of each task. Every rank of a job
    calls it and returns the figures (those of tasks on the first rank only). ValueError for what the user can mend,
    before the model is loaded."""
    if not files and not tasks:
        raise ValueError("nothing to evaluate: give files of text, or --tasks")
    if json_path is not None and not json_path.parent.is_dir():
        raise ValueError(f"--json {json_path}: there is no folder {json_path.parent}, make it first")
    if isinstance(model, CheckpointModel) and model.layout.cp > 1:
        raise ValueError(f"--layout {model.layout}: evaluation does not split the sequence, leave out cp")
    seen, step = check_windows(model, window, stride)
    harness = _harness() if tasks else None
    manager = harness.find_tasks(tasks, task_path) if harness else None
    texts = [read_text(model, path, text_key) for path in files]

    model.load()
    figures: dict[str, Any] = {"model": str(model.path), "window": seen, "stride": step, "batch_size": batch_size}
    console = Console()
    if texts:
        score(model, texts, seen, step, batch_size)
        figures["files"] = [text.figures() for text in texts]
        figures["all"] = together(texts).figures()
        if is_main():
            console.print(table_of_texts(figures))
    if harness:
        figures["tasks"] = harness.run_tasks(model, tasks, manager, window, batch_size, limit)
        if is_main():
            console.print(table_of_tasks(figures["tasks"]))
    if json_path is not None and is_main():
        write_atomic(json_path, json.dumps(figures, indent=1) + "\n")
    return figures


# Before the model is loaded -------------------------------------------------------------------------------------------


def check_windows(model: Model, window: int | None, stride: int | None) -> tuple[int, int]:
    """(window, stride) in tokens. ValueError if the model has no positions for the window, or a stride would leave
    tokens out."""
    seen = model.window if window is None else window
    if model.longest is not None and seen > model.longest:
        raise ValueError(f"--window {seen} is more than the {model.longest} positions of {model.path}: lower it")
    step = max(1, seen // 2) if stride is None else stride
    if step > seen:
        raise ValueError(f"--stride {step} is more than --window {seen}, tokens between would be left out: lower it")
    return seen, step


def read_text(model: Model, path: Path, text_key: str) -> Text:
    """ValueError if ``path`` cannot be read or holds no text."""
    corpus = Corpus([path], text_key, validation_fraction=0.0)
    scan = corpus.scan()
    documents = [np.asarray(model.encode(document.text), dtype=np.int32) for document in corpus]
    if not any(map(len, documents)):
        reasons = ", ".join(f"{count} {reason}" for reason, count in scan.skipped.items())
        raise ValueError(f"{path} holds no text to score ({reasons or 'no documents'}): leave it out")
    return Text(str(path), documents, scan.utf8_bytes, scan.skipped)


def _harness() -> Any:
    """megasparse.harness; ValueError where lm-eval is not installed."""
    for library in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"--tasks needs {library}, which is not installed: pip install 'megasparse[eval]'")
    from megasparse import harness

    return harness


# Perplexity -----------------------------------------------------------------------------------------------------------


def spans(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """The windows (start, end, scored) of a document. Each begins ``stride`` tokens after the last one, predicts the
    ``window`` tokens start .. end, and scores those that no window before it scored, from ``scored`` on.

    What it reads are the tokens start - 1 .. end - 1; before the first of a document is the end-of-document token. So
    every token is scored once, and has window - stride tokens of context or all there are."""
    scored = 0
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        yield start, end, scored
        if end == tokens:
            return
        scored = end


def score(model: Model, texts: list[Text], window: int, stride: int, batch_size: int) -> None:
    """Sum the nats of every text's tokens. Windows of like length are put together."""
    windows = [
        (end - start, text, document, start, end, scored)
        for text in texts
        for document in text.documents
        for start, end, scored in spans(len(document), window, stride)
    ]
    windows.sort(key=lambda window: -window[0])
    with Progress(console=Console(stderr=True), transient=True, disable=not is_main()) as progress:
        bar = progress.add_task("scoring tokens", total=sum(text.tokens for text in texts))
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            tokens = torch.full((len(batch), batch[0][0]), model.prefix)
            for row, (length, _, document, start, end, _) in zip(tokens, batch, strict=True):
                before = model.prefix if start == 0 else int(document[start - 1])
                row[:length] = torch.tensor([before, *document[start : end - 1].tolist()])
            for logits, (length, text, document, start, end, scored) in zip(model.logits(tokens), batch, strict=True):
                targets = torch.tensor(document[scored:end].tolist(), device=logits.device)
                losses = F.cross_entropy(logits[scored - start : length], targets, reduction="none")
                text.nats += losses.double().sum().item()
                progress.advance(bar, end - scored)


def together(texts: list[Text]) -> Text:
    skipped: dict[str, int] = {}
    for text in texts:
        for reason, count in text.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    documents = [document for text in texts for document in text.documents]
    return Text("all", documents, sum(t.utf8_bytes for t in texts), skipped, sum(t.nats for t in texts))


# What is printed ------------------------------------------------------------------------------------------------------


def table_of_texts(figures: dict[str, Any]) -> Table:
    title = f"{figures['model']}: windows of {figures['window']} tokens every {figures['stride']}"
    table = Table(title=title, title_justify="left")
    table.add_column("file", overflow="fold")
    for column in ("documents", "tokens", "bytes", "nats/token", "perplexity", "bits/byte"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in [*figures["files"], *([figures["all"]] if len(figures["files"]) > 1 else [])]:
        skipped = "".join(f", {count} skipped: {reason}" for reason, count in row["skipped"].items())
        table.add_row(
            f"{row['file']}{skipped}",
            *(f"{row[key]:,}" for key in ("documents", "tokens", "bytes")),
            f"{row['nats_per_token']:.4f}",
            f"{row['perplexity']:.4g}",
            f"{row['bits_per_byte']:.4f}",
        )
    return table


def table_of_tasks(found: dict[str, Any]) -> Table:
    """lm-eval names a figure METRIC,FILTER and its standard error METRIC_stderr,FILTER."""
    table = Table(title="lm-eval", title_justify="left")
    for column in ("task", "metric"):
        table.add_column(column, overflow="fold")
    for column in ("value", "standard error"):
        table.add_column(column, justify="right")
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, _, kept = name.partition(",")
            if not isinstance(value, float | int) or metric.endswith("_stderr") or not kept:
                continue
            error = values.get(f"{metric}_stderr,{kept}")
            shown = f"{error:.4f}" if isinstance(error, float | int) else ""
            table.add_row(task, metric if kept == "none" else f"{metric} ({kept})", f"{value:.4f}", shown)
    return table
