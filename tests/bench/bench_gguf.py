"""GGUF files of models: bytes, and greedy words of llama.cpp beside transformers'.

    python tests/bench/bench_gguf.py NAME=FOLDER ... --types f16 q8_0 q4_0 --data SOURCE \\
        --files FOLDER --out JSON [--llama FOLDER]

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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.data.documents import open_documents  # noqa: E402
from lib.data.sources import parse_source  # noqa: E402
from lib.gguf.command import is_ours, record_of  # noqa: E402
from lib.gguf.command import main as convert  # noqa: E402
from lib.gguf.llama_cpp import ask  # noqa: E402

BEGINNING = 24  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--data", nargs="+", required=True, metavar="SOURCE")
    parser.add_argument("--files", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--llama", metavar="FOLDER", help="for types of llama-quantize")
    parser.add_argument("--beginnings", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="that are written after each")
    parser.add_argument("--out", required=True, metavar="JSON")
    args = parser.parse_args()
    with open_documents(parse_source(args.data[0], "--data"), "test") as (documents, _):
        texts = [documents[i] for i in range(args.beginnings)]
    found = {"beginnings": args.beginnings, "tokens": args.tokens, "files": []}
    for entry in args.models:
        name, _, folder = entry.partition("=")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [tokenizer(text).input_ids[:BEGINNING] for text in texts]
        expected = greedy(folder, prompts, args.tokens)
        for weight_type in args.types:
            file = args.files / f"{name}-{weight_type}.gguf"
            measured = measure(args, folder, file, prompts=prompts, expected=expected)
            found["files"].append({"model": name} | measured)
            print(json.dumps({"model": name} | measured, ensure_ascii=False), flush=True)
            for words in zip(prompts, expected, measured["completions"], strict=True):
                beginning, theirs, ours = (tokenizer.decode(ids) for ids in words)
                print(f"{beginning!r}\n  transformers: {theirs!r}\n  llama.cpp:    {ours!r}")
    text = json.dumps(found, indent=1, ensure_ascii=False)
    Path(args.out).write_text(text + "\n", "utf-8")


@torch.no_grad()
def greedy(folder: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What transformers writes after each prompt, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    written = []
    for ids in prompts:
        given = torch.tensor([ids])
        out = model.generate(given, attention_mask=torch.ones_like(given), **settings)
        written.append(out[0, len(ids) :].tolist())
    return written


def measure(
    args: argparse.Namespace,
    folder: str,
    file: Path,
    *,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> dict:
    """Convert and prove one file if it is not there, and run it."""
    weight_type = file.stem.rpartition("-")[2]
    if not is_ours(file):
        more = ["--llama", args.llama] if args.llama else []
        convert([folder, str(file), "--type", weight_type, "--data", *args.data, *more])
    record = json.loads(record_of(file).read_text("utf-8"))
    assert record["type"] == weight_type, file
    request = {"prompts": prompts, "continued": args.tokens}
    completions = ask(file, request | {"context": BEGINNING + args.tokens + 8})["completions"]
    pairs = list(zip(completions, expected, strict=True))
    return {
        "type": weight_type,
        "bytes": file.stat().st_size,
        "same_completions": sum(ours == theirs for ours, theirs in pairs),
        "same_tokens": sum(_alike(ours, theirs) for ours, theirs in pairs) / len(pairs),
        "proof": record["proof"],
        "completions": completions,
    }


def _alike(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


if __name__ == "__main__":
    main()
