"""``megasparse prepare``: a corpus -> tokenizer, token files and a manifest, in one folder.

Work in progress lies in ``<output>/.work``: the tokenizer, one shard per chunk of documents, the merged files. A run
that was cut short, even by SIGKILL, goes on from there and its result is the same to the byte. The finished files are
renamed into place together, the manifest last.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from rich.console import Console
from rich.progress import Progress

from megasparse import __version__
from megasparse.data.corpus import Corpus, stable_fraction
from megasparse.data.manifest import MANIFEST_FILE, HeldOut, Manifest, Settings, Split, read_manifest
from megasparse.data.shards import read_shard, tokenise
from megasparse.data.tokenizer import FILES as TOKENIZER_FILES
from megasparse.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megasparse.files import sha256_of_file, sync, written_aside

TOKENIZER_SAMPLE_BYTES = 100_000_000  # of training text, at most, to train SentencePiece on

_WORK = ".work"
_LIBRARIES = ("megatron-core", "numpy", "sentencepiece", "tokenizers")


class PrepareConfig(BaseModel):
    """What to prepare, and where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path  # folder to write
    sources: list[Path] | None = None  # folders and files of text; None: the standard library of this Python
    text_key: str = "text"  # field of JSON lines and parquet rows that holds the text
    tokenizer: str = "sentencepiece"  # "sentencepiece": train one; else the path of a .model or tokenizer.json
    eod_token: str | None = None  # tokenizer.json: token that ends a document; None: eos_token of its config
    vocab_size: PositiveInt = 4096  # of the SentencePiece model to train
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05  # of documents, held out by a hash of their name
    workers: PositiveInt = Field(default_factory=lambda: os.cpu_count() or 1)  # processes; any number, same result
    overwrite: bool = False  # replace a data set of other settings


def prepare(config: PrepareConfig) -> Manifest:
    """Write the data set that ``config`` describes, or find it there already.

    Raises ValueError, naming what to change, if a source or the tokenizer cannot be used, the folder holds something
    else, or the disk is full.
    """
    try:
        return _prepare(config, Console(highlight=False, soft_wrap=True))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"the disk of output {config.output} is full: free space and run again, finished parts are kept"
        ) from None
    except BrokenProcessPool:
        raise ValueError(
            f"one of workers={config.workers} processes was killed, perhaps for lack of memory: "
            "run again with fewer, finished parts are kept"
        ) from None


def _prepare(config: PrepareConfig, console: Console) -> Manifest:
    corpus = Corpus(config.sources, config.text_key, config.validation_fraction)
    given = None if config.tokenizer == "sentencepiece" else load_tokenizer(Path(config.tokenizer), config.eod_token)
    if given is None and config.eod_token is not None:
        raise ValueError(f"eod_token={config.eod_token!r} is for a given tokenizer.json: SentencePiece has its own")
    console.print("reading the corpus")
    scan = corpus.scan()
    if scan.documents == 0:
        raise ValueError(f"the sources hold no document to use (skipped: {scan.skipped}): give text in UTF-8")
    for reason, count in scan.skipped.items():
        console.print(f"skipped {count} documents: {reason}")
    settings = Settings(
        corpus_hash=scan.hash,
        tokenizer="sentencepiece" if given is None else given.hash,
        vocab_size=config.vocab_size if given is None else None,
        validation_fraction=config.validation_fraction,
    )
    if (existing := _existing(config, settings)) is not None:
        console.print(f"{config.output} is already prepared from this corpus with these settings: nothing to do")
        shutil.rmtree(config.output / _WORK, ignore_errors=True)  # left by a run killed just after its last step
        return existing

    work = _open_work(config.output, settings)
    tokenizer = _make_tokenizer(given, corpus, scan.utf8_bytes, config.vocab_size, work, console)
    dtype = DType.optimal_dtype(tokenizer.vocab_size).__name__
    (work / "shards").mkdir(exist_ok=True)
    stage = tokenise(corpus, work / "tokenizer", work / "shards", dtype, config.workers)
    _show(stage, scan.characters, f"tokenising, workers={config.workers}", console)
    console.print("merging")
    train = _merge(work, "train", dtype)
    validation = None
    if config.validation_fraction > 0:
        held_out = _merge(work, "validation", dtype)
        validation = HeldOut(
            **held_out.model_dump(), gzip9_bytes=scan.validation_gzip9_bytes, xz_bytes=scan.validation_xz_bytes
        )
    manifest = Manifest(
        settings=settings,
        sources=["stdlib"] if config.sources is None else [str(s) for s in config.sources],
        text_key=config.text_key,
        skipped=scan.skipped,
        ignored_files=corpus.ignored_files,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        dtype=dtype,  # type: ignore[arg-type]
        train=train,
        validation=validation,
        versions={"megasparse": __version__, "python": platform.python_version()}
        | {n: importlib.metadata.version(n) for n in _LIBRARIES},
    )
    splits = [split for split in (train, validation) if split is not None]
    if sum(split.utf8_bytes for split in splits) != scan.utf8_bytes:
        raise ValueError("the sources changed while they were read: run again")
    for split in splits:
        if split.lossy_documents:
            name = "training" if split is train else "validation"
            console.print(
                f"the tokenizer does not give back exactly {split.lossy_documents} of {split.documents} {name} "
                f"documents ({split.lossy_utf8_bytes} of {split.utf8_bytes} bytes)"
            )
    _publish(config.output, work, manifest)
    return manifest


def _existing(config: PrepareConfig, settings: Settings) -> Manifest | None:
    """The data set that is already there; ValueError if it, or whatever lies there, is another."""
    output = config.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file: name a folder")
    if config.overwrite:
        return None
    if (output / MANIFEST_FILE).exists():
        try:
            manifest = read_manifest(output)
        except ValueError as error:
            raise ValueError(f"{error} (set overwrite to replace what is there)") from None
        for field, there in manifest.settings:
            if there != (asked := getattr(settings, field)):
                raise ValueError(
                    f"output {output} holds a data set with {field}={there}, not {asked}: "
                    "name another folder or set overwrite"
                )
        return manifest
    if output.is_dir() and any(output.iterdir()) and not (output / _WORK).is_dir():
        raise ValueError(f"output {output} holds other files: name another folder or set overwrite")
    return None


def _open_work(output: Path, settings: Settings) -> Path:
    """The folder of work in progress: that of an interrupted run with equal settings, else a new one."""
    work = output / _WORK
    file = work / "settings"
    identity = settings.model_dump_json() + __version__
    if work.is_dir() and (not file.is_file() or file.read_text() != identity):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as aside:
        aside.write_text(identity)
    return work


def _make_tokenizer(
    given: Tokenizer | None, corpus: Corpus, corpus_bytes: int, vocab_size: int, work: Path, console: Console
) -> Tokenizer:
    """The tokenizer in ``work/tokenizer``, trained or copied there if an interrupted run has not."""
    folder, aside = work / "tokenizer", work / "tokenizer.tmp"
    if not folder.is_dir():
        if given is None:
            console.print(f"training SentencePiece, vocab_size={vocab_size}")
            given = train_sentencepiece(_sample(corpus, corpus_bytes), vocab_size)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        given.save(aside)
        for file in aside.iterdir():
            sync(file)
        aside.rename(folder)
        sync(work)
    return load_tokenizer(folder)


def _sample(corpus: Corpus, corpus_bytes: int) -> Iterator[str]:
    """Training texts: all of them, or those that a hash of the name picks to make TOKENIZER_SAMPLE_BYTES."""
    fraction = TOKENIZER_SAMPLE_BYTES / corpus_bytes
    return (d.text for d in corpus if not d.validation and stable_fraction(f"tokenizer/{d.name}") < fraction)


def _show(stage: Iterable[int], total: int, title: str, console: Console) -> None:
    """Run a stage that yields its progress: a bar on a terminal, else a line at each tenth."""
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task, done = progress.add_task(title, total=total), 0
        for amount in stage:
            progress.advance(task, amount)
            if not console.is_terminal and 10 * (done + amount) // total > 10 * done // total:
                console.print(f"{title}: {100 * (done + amount) // total}%")
            done += amount


def _merge(work: Path, name: str, dtype: str) -> Split:
    """Join the shards' parts of one split into ``<work>/<name>.bin`` and ``.idx``, one sequence per document."""
    bin_file, idx_file = work / f"{name}.bin", work / f"{name}.idx"
    builder = IndexedDatasetBuilder(str(bin_file), dtype=getattr(np, dtype))
    counts = np.zeros(3, dtype=np.int64)
    for shard in sorted((work / "shards").glob("*.npz")):
        part = read_shard(shard, name)
        counts += part.counts
        for document in np.split(part.ids, np.cumsum(part.lengths)[:-1]) if len(part.lengths) else []:
            builder.add_document(document, [len(document)])  # type: ignore[arg-type]
    documents, tokens = len(builder.sequence_lengths), sum(builder.sequence_lengths)
    builder.finalize(str(idx_file))
    if documents == 0:
        raise ValueError(
            f"no document fell to {name}: a hash of its name places each, so give more documents "
            "or change validation_fraction (0: hold nothing out)"
        )
    sync(bin_file)
    sync(idx_file)
    utf8_bytes, lossy_documents, lossy_utf8_bytes = counts.tolist()
    return Split(
        documents=documents,
        tokens=tokens,
        utf8_bytes=utf8_bytes,
        lossy_documents=lossy_documents,
        lossy_utf8_bytes=lossy_utf8_bytes,
        bin_bytes=bin_file.stat().st_size,
        idx_bytes=idx_file.stat().st_size,
        bin_sha256=sha256_of_file(bin_file),
        idx_sha256=sha256_of_file(idx_file),
    )


def _publish(output: Path, work: Path, manifest: Manifest) -> None:
    """Put the finished files in the place of what was there, the manifest last, and clear up."""
    files = [f"{name}.{kind}" for name in ("train", "validation") for kind in ("bin", "idx")]
    for name in [MANIFEST_FILE, *files, *TOKENIZER_FILES]:
        (output / name).unlink(missing_ok=True)
    for file in (work / "tokenizer").iterdir():
        with written_aside(output / file.name) as aside:
            shutil.copyfile(file, aside)
    for name in files:
        if (work / name).exists():
            os.replace(work / name, output / name)
    with written_aside(output / MANIFEST_FILE) as aside:
        aside.write_text(manifest.model_dump_json(indent=2) + "\n")
    shutil.rmtree(work)
