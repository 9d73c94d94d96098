"""Convert a checkpoint of pickled weights to safetensors, with a tokenizer that loads today.

    python benchmarks/to_safetensors.py MODEL NEW

MODEL is a folder or a Hub name whose weights are `pytorch_model*.bin`. They are read with
`weights_only`, so no code of theirs is run, and a file at a time. NEW also gets all other files but
weights. Names of a tokenizer's or a model's class that only differ in their letters' case from
those of transformers, as LLaMATokenizer, become these; the tokenizer is saved as tokenizer.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

INDEX = "pytorch_model.bin.index.json"
OTHER = "*.json", "*.model", "*.jinja", "*.txt"  # patterns of files that are not weights


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("new", metavar="NEW", type=Path, help="new folder")
    args = parser.parse_args(argv)
    if args.new.exists():
        parser.error(f"NEW {args.new} exists. Name a new folder")
    folder = Path(args.model)
    if not folder.is_dir():
        wanted = [*OTHER, "pytorch_model*.bin"]
        folder = Path(snapshot_download(args.model, allow_patterns=wanted))
    shards = sorted(folder.glob("pytorch_model*.bin"))
    if not shards:
        parser.error(f"MODEL {args.model} has no pytorch_model*.bin")
    args.new.mkdir(parents=True)
    places, size = {}, 0
    for shard in shards:
        tensors = torch.load(shard, map_location="cpu", mmap=True, weights_only=True)
        name = f"{shard.stem.replace('pytorch_model', 'model')}.safetensors"
        # tensors of one storage are written each for itself
        tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
        save_file(tensors, args.new / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        size += sum(value.nbytes for value in tensors.values())
        print(f"{name}: {len(tensors)} tensors", flush=True)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write(args.new / "model.safetensors.index.json", index)
    for path in (path for pattern in OTHER for path in folder.glob(pattern)):
        if path.name != INDEX:
            shutil.copyfile(path, args.new / path.name)
    for name, key in (
        ("config.json", "architectures"),
        ("tokenizer_config.json", "tokenizer_class"),
    ):
        if (file := args.new / name).is_file():
            fields = json.loads(file.read_text("utf-8"))
            if value := fields.get(key):
                fields[key] = known(value) if isinstance(value, str) else [*map(known, value)]
                write(file, fields)
    AutoConfig.from_pretrained(args.new)
    AutoTokenizer.from_pretrained(args.new).save_pretrained(args.new)
    print(f"written: {args.new}; next: python main.py --model {args.new} ...")


def known(name: str) -> str:
    """Return the class of transformers with a name of the same letters, in any case."""
    return next((each for each in dir(transformers) if each.lower() == name.lower()), name)


def write(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
