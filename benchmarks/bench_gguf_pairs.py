"""Speed and memory of GGUF files in llama.cpp, alone and with a draft, whole and trimmed in turn.

    python benchmarks/bench_gguf_pairs.py TARGET.gguf SMALL.gguf --prompts texts/uk/test.jsonl \\
        [--drafts DRAFT.gguf SMALL_DRAFT.gguf] [--tokens 48] [--rounds 3] --out JSON

SMALL is TARGET after `langprune trim`, SMALL_DRAFT is DRAFT trimmed with --keep and SMALL's list.
Each run is a process of its own; the order turns in each round. Answers are greedy. Prints tokens/s
of prompt and generation (median), accepted of drafted tokens, and the peak of resident memory, of
which the mapped file is a part. Run it alone on the machine; OMP_NUM_THREADS sets the threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.commands.gguf.llama_cpp import ask, start  # noqa: E402
from lib.util.host import peak_host_memory  # noqa: E402

LETTERS = 240  # of each prompt


def run(model: str, draft: str, prompts: list[str], tokens: int) -> None:
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
    server, found = start(model, 1024), []
    for prompt in prompts:
        fields = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False}
        found.append(ask(server, "/completion", fields)["timings"])
    print(json.dumps({"timings": found, "memory": peak_host_memory()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs=2)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--drafts", nargs=2, default=[])
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", required=True)
    parser.add_argument("--one", nargs=2, help="this script's own use")
    args = parser.parse_args()
    rows = Path(args.prompts).read_text("utf-8").splitlines()[: args.count]
    prompts = [json.loads(row)["text"][:LETTERS] for row in rows]
    if args.one:
        run(*args.one, prompts, args.tokens)
        return
    pairs = {"whole": (args.models[0], ""), "trimmed": (args.models[1], "")}
    for name, model, draft in zip(list(pairs), args.models, args.drafts, strict=False):
        pairs[f"{name}, with its draft"] = (model, draft)
    results: dict[str, list[dict]] = {name: [] for name in pairs}
    for number in range(args.rounds):
        for name in list(pairs)[:: 1 if number % 2 else -1]:
            argv = [sys.executable, *sys.argv, "--one", *pairs[name]]
            done = subprocess.run(argv, check=True, capture_output=True, text=True)
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            Path(args.out).write_text(json.dumps(results))
    print("| Run | Prompt (tokens/s) | Generation (tokens/s) | Accepted | Drafted | Memory (MB) |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, runs in results.items():
        timings = [each for run in runs for each in run["timings"]]
        cells = [
            f"{median(each[f'{part}_per_second'] for each in timings):.1f}"
            for part in ("prompt", "predicted")
        ]
        once = runs[0]["timings"]  # equal in each round, since answers are greedy
        cells += [
            str(sum(each.get(n, 0) for each in once)) for n in ("draft_n_accepted", "draft_n")
        ]
        cells.append(f"{max(run['memory'] for run in runs) / 1e6:.0f}")
        print("|", " | ".join([name, *cells]), "|")


if __name__ == "__main__":
    main()
