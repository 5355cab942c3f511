"""Tasks of lm-eval (EleutherAI's Language Model Evaluation Harness), the only place that imports it."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
from rich.console import Console
from rich.progress import Progress

from megasparse.inference import CheckpointModel, HuggingFaceModel, is_main

MAX_NEW_TOKENS = 256  # HFLM's, where a task does not say
BOOTSTRAPS = 100_000  # simple_evaluate's, for standard errors

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts, context's tokens, tokens to score)


def find_tasks(names: list[str], folder: Path | None) -> TaskManager:
    """Where lm-eval finds ``names``: in the YAML files of ``folder``, or among its own. ValueError naming one that is
    in neither."""
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--task-path {folder}: no such folder, give one with tasks in YAML")
    path = None if folder is None else str(folder)
    manager = TaskManager(include_path=path, include_defaults=False)
    if set(names) <= set(manager.all_subtasks):  # reading lm-eval's own, ten thousand files, takes many seconds
        return manager
    manager = TaskManager(include_path=path)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "give its folder as --task-path"
            raise ValueError(f"--tasks {name}: lm-eval has no such task: {hint}")
    return manager


def run_tasks(
    model: CheckpointModel | HuggingFaceModel,
    names: list[str],
    manager: TaskManager,
    window: int | None,
    batch_size: int,
    limit: int | None,
) -> dict[str, Any]:
    """What lm-eval's simple_evaluate finds, fit for JSON. Every rank calls it; {} but on the first of each host.

    ``window``: tokens the model sees; None: of a checkpoint its window, of a Hugging Face model what lm-eval says.
    ``limit``: examples of each task."""
    if isinstance(model, CheckpointModel):
        lm: TemplateLM = CheckpointLM(model, window or model.window, batch_size)
    else:
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=model.model, tokenizer=model.tokenizer, max_length=window, batch_size=batch_size)
    if not is_main():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # the first rank says the same
    found = simple_evaluate(
        model=lm,
        tasks=list(names),
        batch_size=batch_size,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=BOOTSTRAPS if is_main() else 0,
    )
    return json.loads(json.dumps(found or {}, default=handle_non_serializable))


class CheckpointLM(TemplateLM):
    """A checkpoint as lm-eval asks it: with the windows and truncation of its HFLM, text by greedy search."""

    def __init__(self, model: CheckpointModel, max_length: int, batch_size: int) -> None:
        super().__init__()
        self.model, self.max_length, self.batch_size = model, max_length, batch_size

    @property
    def eot_token_id(self) -> int:
        return self.model.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.model.encode(string)

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """(log-probability of the tokens to score, are they what greedy search gives) of each request."""
        for texts, _context, scored in requests:
            if len(scored) > self.max_length:
                text = texts[1] if texts else ""
                raise ValueError(
                    f"--window {self.max_length} is less than the {len(scored)} tokens of {text[:60]!r}, which a task "
                    "scores: raise it"
                )
        # Longest first; those that differ in their last token only share a row.
        collator = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1]) - len(request[2]), request[1] + request[2]),
            group_by="contexts",
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        found: list[tuple[float, bool]] = []
        with self._progress("scoring", len(requests)) as advance:
            for chunk in collator.get_batched(n=self.batch_size):
                inputs = [(context + scored)[-(self.max_length + 1) :][:-1] for _, context, scored in chunk]
                tokens = torch.full((len(inputs), max(map(len, inputs))), self.model.prefix)
                for row, ids in zip(tokens, inputs, strict=True):
                    row[: len(ids)] = torch.tensor(ids)
                rows = F.log_softmax(self.model.logits(tokens), -1)
                for (texts, context, scored), ids, row in zip(chunk, inputs, rows, strict=True):
                    here = row[len(ids) - len(scored) : len(ids)].unsqueeze(0)
                    for _texts, targets, logs in collator.get_cache(
                        req_str=texts, cxt_toks=context, cont_toks=scored, logits=here
                    ):
                        found.append(_score(logs[0, -len(targets) :], targets))
                        advance()
        return collator.get_original(found)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_probability
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        settings = [self._settings(request) for request in requests]
        texts = []
        with self._progress("writing", len(requests)) as advance:
            for request, (until, count) in zip(requests, settings, strict=True):
                texts.append(self._write(request.args[0], until, count))
                advance()
        return texts

    def _settings(self, request: Any) -> tuple[list[str], int]:
        """(strings that end a text, tokens at most)."""
        settings: Any = normalize_gen_kwargs(request.args[1], MAX_NEW_TOKENS)
        if settings["do_sample"]:
            raise ValueError(
                f"--tasks {request.task_name} samples, a checkpoint writes by greedy search only: leave it out"
            )
        if settings["max_gen_toks"] >= self.max_length:
            raise ValueError(
                f"--window {self.max_length} has no room for the {settings['max_gen_toks']} tokens that --tasks "
                f"{request.task_name} asks for: raise it, or set max_gen_toks in the task"
            )
        return handle_stop_sequences(settings["until"], eos=None), settings["max_gen_toks"]

    def _write(self, context: str, until: list[str], count: int) -> str:
        model, stops = self.model, [stop for stop in until if stop]
        prompt = model.encode(context)[-(self.max_length - count) :] or [model.prefix]
        new = model.generate(prompt, count, until=lambda ids: any(stop in model.decode(ids) for stop in stops))
        return postprocess_generated_text(model.decode(new), stops, None)

    @contextlib.contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Any]:
        with Progress(console=Console(stderr=True), transient=True, disable=not is_main()) as progress:
            bar = progress.add_task(what, total=total)
            yield lambda: progress.advance(bar)


def _score(logs: torch.Tensor, targets: list[int]) -> tuple[float, bool]:
    """logs [tokens, vocab]: of the places of ``targets``."""
    ids = torch.tensor(targets, device=logs.device)
    return float(logs.gather(-1, ids.unsqueeze(-1)).sum()), bool((logs.argmax(-1) == ids).all())
