"""Pairs for `launch.sh tasks --pairs`: sentences of UA-GEC's test part, right and wrong.

    pip install ua-gec
    python tests/bench/ua_gec_pairs.py ua-gec.jsonl

They are what an annotator corrected: grammar, spelling and words. Pairs that differ in punctuation
and case alone are left out, and of the rest 300 are drawn. UA-GEC is under CC BY 4.0.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

PAIRS = 300
SHORTEST, LONGEST = 30, 250  # characters of a right sentence


def letters(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


def corrected() -> Iterator[tuple[str, str]]:
    """(right, wrong) sentences, each right one once."""
    from ua_gec import Corpus

    seen = set()
    for document in Corpus(partition="test", annotation_layer="gec-only"):
        sentences = zip(document.target_sentences, document.source_sentences, strict=False)
        for good, bad in (map(str.strip, pair) for pair in sentences):
            fits = SHORTEST <= len(good) <= LONGEST and "\n" not in good + bad
            if fits and good not in seen and letters(good) != letters(bad):
                seen.add(good)
                yield good, bad


def main(out: str) -> None:
    pairs = [{"good": good, "bad": bad} for good, bad in corrected()]
    random.Random(0).shuffle(pairs)
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs[:PAIRS]]
    Path(out).write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
