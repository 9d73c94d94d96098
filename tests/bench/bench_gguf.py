"""GGUF files of models: bytes, tokens a second in llama.cpp, greedy words beside transformers'.

    python tests/bench/bench_gguf.py NAME=FOLDER ... --types f16 q8_0 q4_0 --data SOURCE --out JSON

Every file is converted and proven by `launch.sh gguf` first. Then both go on greedily after the
beginnings of test documents; speed is llama.cpp's own figure for tokens one at a time, the median
over the beginnings. OMP_NUM_THREADS says on how many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.data.documents import open_documents  # noqa: E402
from lib.data.sources import parse_source  # noqa: E402
from lib.gguf.child import run_child  # noqa: E402
from lib.gguf.command import main as convert  # noqa: E402
from lib.gguf.command import record_of  # noqa: E402

BEGINNING = 24  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--data", required=True, metavar="SOURCE")
    parser.add_argument("--beginnings", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="that are written after each")
    parser.add_argument("--out", required=True, metavar="JSON")
    args = parser.parse_args()
    with open_documents(parse_source(args.data, "--data"), "test") as (documents, _):
        texts = [documents[i] for i in range(args.beginnings)]
    found = {"machine": platform.processor(), "threads": os.environ.get("OMP_NUM_THREADS")}
    found |= {"beginnings": args.beginnings, "tokens": args.tokens, "files": []}
    for entry in args.models:
        name, _, folder = entry.partition("=")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [tokenizer(text).input_ids[:BEGINNING] for text in texts]
        expected = greedy(folder, prompts, args.tokens)
        for weight_type in args.types:
            measured = measure(folder, weight_type, args, prompts, expected)
            found["files"].append({"model": name} | measured)
            print(json.dumps({"model": name} | measured, ensure_ascii=False), flush=True)
            shown = measured["completions"][0]
            print("  transformers:", tokenizer.decode(expected[0]))
            print("  llama.cpp:   ", tokenizer.decode(shown), flush=True)
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
    folder: str,
    weight_type: str,
    args: argparse.Namespace,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> dict:
    """Convert, prove and run one file."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "model.gguf"
        convert([folder, str(out), "--type", weight_type, "--data", args.data])
        proof = json.loads(record_of(out).read_text("utf-8"))["proof"]
        request = {"model": str(out), "prompts": prompts, "continued": args.tokens}
        answer = run_child("lib.gguf.llama_cpp", request | {"context": BEGINNING + args.tokens + 8})
        size = out.stat().st_size
    completions = [one["tokens"] for one in answer["completions"]]
    pairs = list(zip(completions, expected, strict=True))
    return {
        "type": weight_type,
        "bytes": size,
        "tokens_per_second": round(median(o["per_second"] for o in answer["completions"]), 1),
        "prompt_per_second": round(
            median(o["prompt_per_second"] for o in answer["completions"]), 1
        ),
        "same_completions": sum(ours == theirs for ours, theirs in pairs),
        "same_tokens": sum(_alike(ours, theirs) for ours, theirs in pairs) / len(pairs),
        "logits": proof["logits"],
        "completions": completions[:1],
    }


def _alike(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


if __name__ == "__main__":
    main()
