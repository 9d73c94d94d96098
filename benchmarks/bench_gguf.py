"""GGUF files of models: bytes, and greedy words of llama.cpp beside transformers'.

    python benchmarks/bench_gguf.py NAME=FOLDER ... --types f16 q8_0 q4_0 --data SOURCE \\
        --files FOLDER --out JSON

Every file is converted and proven by `launch.sh gguf` first, unless FOLDER has it already. Then
both go on greedily after the beginnings of test documents. llama.cpp's own program measures speed:

    llama-bench -m FILE -t 2 -p 256 -n 64 -r 2 -o jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib.commands.gguf.__main__ import main as convert  # noqa: E402
from lib.data.documents import Corpus  # noqa: E402
from lib.data.sources import parse_source  # noqa: E402
from lib.gguf.llama import ask, start  # noqa: E402

BEGINNING = 24  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--data", nargs="+", required=True, metavar="SOURCE")
    parser.add_argument("--files", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--beginnings", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="that are written after each")
    parser.add_argument("--out", required=True, metavar="JSON")
    args = parser.parse_args()
    documents = Corpus(parse_source(args.data[0], "--data")).documents("test")
    texts = [documents[i] for i in range(args.beginnings)]
    files = []
    for entry in args.models:
        name, _, folder = entry.partition("=")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [tokenizer(text).input_ids[:BEGINNING] for text in texts]
        expected = greedy(folder, prompts, args.tokens)
        for kind in args.types:
            file = args.files / f"{name}-{kind}.gguf"
            if not file.is_file():
                convert([folder, str(file), "--type", kind, "--data", *args.data])
            pairs = list(zip(by_llama_cpp(file, prompts, args.tokens), expected, strict=True))
            figures = {"model": name, "type": kind, "bytes": file.stat().st_size}
            figures["same_completions"] = sum(ours == theirs for ours, theirs in pairs)
            figures["same_tokens"] = sum(alike(*pair) for pair in pairs) / len(pairs)
            files.append(figures)
            print(json.dumps(figures), flush=True)
    found = {"beginnings": args.beginnings, "tokens": args.tokens, "files": files}
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n", "utf-8")


@torch.no_grad()
def greedy(folder: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What transformers writes after each prompt, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    inputs = (torch.tensor([ids]) for ids in prompts)
    written = (model.generate(i, attention_mask=torch.ones_like(i), **settings) for i in inputs)
    return [ids[0, -tokens:].tolist() for ids in written]


def by_llama_cpp(file: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    server = start(str(file), BEGINNING + tokens + 8)
    fields = {"n_predict": tokens, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    written = []
    for ids in prompts:
        asked = fields | {"prompt": ids, "cache_prompt": False}
        written.append(ask(server, "/completion", asked)["tokens"])
    return written


def alike(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


if __name__ == "__main__":
    main()
