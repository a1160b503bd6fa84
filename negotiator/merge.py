# mypy: disable-error-code="import-untyped"
"""Makes a plain Hugging Face model of a checkpoint that holds LoRA adapters.

    python -m negotiator.merge runs/<name>/checkpoints/step-N --to FOLDER

The adapters are added to the base that they were trained on, in its own precision; the tokenizer comes along.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from negotiator.config import OneSentenceParser
from negotiator.models import load_tokenizer


def merge(checkpoint: Path, to: Path) -> None:
    """Raises ValueError with one sentence for whatever the user has to change."""
    from peft import PeftModel

    settings = checkpoint / "adapter_config.json"
    if not settings.is_file():
        raise ValueError(f"{checkpoint} holds no adapters: a checkpoint without LoRA is a plain model already")
    if to.exists():
        raise ValueError(f"{to} exists: remove it, or choose another folder")
    base = json.loads(settings.read_text())["base_model_name_or_path"]
    if not (Path(base) / "config.json").is_file():
        raise ValueError(f"the base of these adapters is not at {base}: run this where that path leads to it")
    print(f"adding {checkpoint} to {base}", flush=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
    with torch.no_grad():
        merged = PeftModel.from_pretrained(model, str(checkpoint)).merge_and_unload()
    merged.save_pretrained(to)
    load_tokenizer(base).save_pretrained(to)
    print(f"saved {to}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneSentenceParser(
        prog="python -m negotiator.merge", description="Makes a plain model of a checkpoint with LoRA adapters."
    )
    parser.add_argument("checkpoint", type=Path, help="a folder runs/<name>/checkpoints/step-N")
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    try:
        merge(arguments.checkpoint, arguments.to)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
