"""Throughput of prepare's tokenise stage, as a share of what the bare tokenizer does in as many processes.

    python tools/bench/prepare.py --workers 1 2

The stage reads the standard library, cuts it into chunks, encodes, verifies each document by decoding, and writes
shards. The bare tokenizer encodes the same texts from memory, in the same number of processes at once. The two take
turns and the median of their ratios counts, so that other load on the machine weighs on both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from megasparse.data.corpus import Corpus
from megasparse.data.shards import tokenise
from megasparse.data.tokenizer import load_tokenizer, train_sentencepiece

TARGET = 0.80


def bare(tokenizer_folder: Path) -> float:
    """Bytes per second of one process that does nothing but encode the corpus."""
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = [document.text for document in Corpus(None)]
    size = sum(len(text.encode()) for text in texts)
    start = time.perf_counter()
    for text in texts:
        tokenizer.encode(text)
    return size / (time.perf_counter() - start)


def bare_in_processes(tokenizer_folder: Path, workers: int) -> float:
    """Bytes per second of ``workers`` such processes together."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(bare, [tokenizer_folder] * workers))


def stage(corpus: Corpus, repeat: int, tokenizer_folder: Path, workers: int) -> float:
    """Bytes per second of the tokenise stage over ``repeat`` passes, the start of its processes included."""
    size = repeat * sum(len(document.text.encode()) for document in corpus)
    documents = (document for _ in range(repeat) for document in corpus)
    with tempfile.TemporaryDirectory() as shards:
        start = time.perf_counter()
        for _ in tokenise(documents, tokenizer_folder, Path(shards), "uint16", workers):
            pass
        return size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=8, help="passes over the corpus in the stage")
    parser.add_argument("--rounds", type=int, default=3, help="turns of bare and stage")
    arguments = parser.parse_args()

    corpus = Corpus(None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_sentencepiece((d.text for d in corpus if not d.validation), arguments.vocab_size).save(folder)
        for workers in arguments.workers:
            ratios = []
            for _ in range(arguments.rounds):
                alone = bare_in_processes(folder, workers)
                rate = stage(corpus, arguments.repeat, folder, workers)
                ratios.append(rate / alone)
                print(f"workers={workers}: stage {rate / 1e6:.2f} MB/s, bare {alone / 1e6:.2f} MB/s", flush=True)
            print(f"workers={workers}: ratio {statistics.median(ratios):.2f} (target {TARGET:.2f})", flush=True)


if __name__ == "__main__":
    main()
