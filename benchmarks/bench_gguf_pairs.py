"""Speed and memory of GGUF files in llama.cpp, alone and with a draft, whole and trimmed in turn.

    python benchmarks/bench_gguf_pairs.py TARGET.gguf SMALL.gguf \\
        --prompts uk=texts/uk/test.jsonl code=texts/code/test.jsonl \\
        [--drafts DRAFT.gguf SMALL_DRAFT.gguf] [--threads 1 2] [--rounds 3] \\
        --label NAME --out JSON

SMALL is TARGET after `langprune trim`, SMALL_DRAFT is DRAFT trimmed with --keep and SMALL's list;
NAME=FILE.gguf instead takes any files. `benchmarks/code_text.py` writes texts of code. Each run is
a process of its own; the order turns in each round. A prompt begins with the line in the middle of
a document; answers are greedy. Prints tokens/s of prompt and generation (median), accepted of
drafted tokens, and the peak of resident memory, of which the mapped file is a part. Run it alone on
the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.gguf.llama import ask, start  # noqa: E402
from lib.util.host import peak_host_memory  # noqa: E402

LETTERS = 240  # of each prompt
KEPT = "prompt_per_second", "predicted_per_second", "draft_n", "draft_n_accepted"


def prompts_of(path: str, count: int) -> list[str]:
    rows = Path(path).read_text("utf-8").splitlines()[:count]
    texts = [json.loads(row)["text"] for row in rows]
    return [text[text.rfind("\n", 0, len(text) // 2) + 1 :][:LETTERS] for text in texts]


def run(model: str, draft: str, prompts: dict[str, list[str]], tokens: int) -> None:
    """Answer prompts, and print timings as JSON."""
    import xllamacpp

    if draft:
        plain = xllamacpp.CommonParams

        def with_draft() -> object:
            settings = plain()
            settings.speculative.draft.mparams.path = draft
            kind = xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE
            settings.speculative.types = [kind]
            return settings

        xllamacpp.CommonParams = with_draft
    server, found = start(model, 1024), {}
    for text, some in prompts.items():
        for prompt in some:
            fields = {"prompt": prompt, "n_predict": tokens, "temperature": 0}
            answer = ask(server, "/completion", fields | {"cache_prompt": False})
            timings = {key: answer["timings"].get(key, 0) for key in KEPT}
            found.setdefault(text, []).append(timings)
    print(json.dumps({"timings": found, "memory": peak_host_memory()}), flush=True)


def summary(runs: list[dict[str, Any]], text: str) -> tuple[float, float, int, int, float]:
    """Return median tokens/s of prompts and generation, accepted and drafted tokens, and MB."""
    timings = [each for one in runs for each in one["timings"][text]]
    prompt, generation = (median(each[key] for each in timings) for key in KEPT[:2])
    once = runs[0]["timings"][text]  # equal in each round, since answers are greedy
    drafted, taken = (sum(each[key] for each in once) for key in KEPT[2:])
    return prompt, generation, taken, drafted, max(one["memory"] for one in runs) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="whole and trimmed, or NAME=FILE.gguf of each")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="NAME=JSONL")
    parser.add_argument("--drafts", nargs=2, default=[])
    parser.add_argument("--label", required=True, help="name of the model in the figures")
    parser.add_argument("--count", type=int, default=8, help="prompts of each text")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", nargs="+", default=["2"])
    parser.add_argument("--out", required=True)
    parser.add_argument("--one", nargs=2, help="this script's own use")
    args = parser.parse_args()
    files = dict(entry.split("=", 1) for entry in args.prompts)
    if args.one:
        prompts = {name: prompts_of(path, args.count) for name, path in files.items()}
        run(*args.one, prompts, args.tokens)
        return
    named = dict(each.split("=", 1) for each in args.models if "=" in each)
    named = named or dict(zip(("whole", "trimmed"), args.models, strict=True))
    pairs = {name: (model, "") for name, model in named.items()}
    for name, model, draft in zip(list(pairs), args.models, args.drafts, strict=False):
        pairs[f"{name}, with its draft"] = (model, draft)
    runs, out = [], Path(args.out)
    before = json.loads(out.read_text("utf-8")) if out.is_file() else []
    for number in range(args.rounds):
        for threads in args.threads:
            for name in list(pairs)[:: 1 if number % 2 else -1]:
                argv = [sys.executable, *sys.argv, "--one", *pairs[name]]
                environment = os.environ | {"OMP_NUM_THREADS": threads}
                options = dict(check=True, capture_output=True, text=True, env=environment)
                found = json.loads(subprocess.run(argv, **options).stdout.splitlines()[-1])
                runs.append({"model": args.label, "name": name, "threads": threads} | found)
                out.write_text(json.dumps([*before, *runs]) + "\n", "utf-8")
    speeds = "Prompt (tokens/s) | Generation (tokens/s)"
    print(f"| Run | Threads | Text | {speeds} | Accepted | Drafted | Memory (MB) |")
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for threads in args.threads:
        for name, text in ((name, text) for name in pairs for text in files):
            mine = [one for one in runs if (one["name"], one["threads"]) == (name, threads)]
            prompt, generation, taken, drafted, memory = summary(mine, text)
            cells = [name, threads, text, f"{prompt:.1f}", f"{generation:.1f}", str(taken)]
            print("|", " | ".join([*cells, str(drafted), f"{memory:.0f}"]), "|")


if __name__ == "__main__":
    main()
