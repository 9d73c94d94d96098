"""Pairs for `launch.sh tasks --pairs`: a sentence, and the same with something wrong in it.

    python benchmarks/make_pairs.py DATA OUT.jsonl [COUNT]

Of the test documents of DATA sentences of 5 to 20 words are drawn, and two neighbouring words of
three letters or more change places. Where DATA is `ua-gec` they are the sentences of the test part
of that package (Ukrainian, CC-BY-4.0) beside what a human corrected in them, grammar only.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.data.documents import Corpus
from lib.data.sources import parse_source
from lib.util.cli import run
from lib.util.files import write_text

SENTENCE = re.compile(r"\S[^\n.!?…]*[.!?…](?=\s|$)")
WORDS = range(5, 21)


def swapped(data: str, draw: random.Random) -> Iterator[tuple[str, str]]:
    texts = Corpus(parse_source(data, "DATA")).documents("test")
    found = {match[0] for text in texts for match in SENTENCE.finditer(text)}
    sentences = sorted(each for each in found if len(each.split()) in WORDS)
    for sentence in draw.sample(sentences, len(sentences)):
        words = sentence.split()
        plain = [word.isalpha() and word.islower() and len(word) > 2 for word in words]
        both = [plain[i] and plain[i + 1] for i in range(len(words) - 1)]
        places = [i for i, good in enumerate(both) if good and words[i] != words[i + 1]]
        if places:
            place = draw.choice(places)
            words[place], words[place + 1] = words[place + 1], words[place]
            yield " ".join(sentence.split()), " ".join(words)


def corrected(draw: random.Random) -> Iterator[tuple[str, str]]:
    import ua_gec

    documents = ua_gec.Corpus(partition="test", annotation_layer="gec-only").get_documents()
    pairs = [
        (good, bad)
        for each in documents
        if each.meta.annotator_id == 1
        for good, bad in zip(each.target_sentences, each.source_sentences, strict=True)
        if good.split() != bad.split() and len(good.split()) in WORDS
    ]
    yield from draw.sample(pairs, len(pairs))


def main(argv: list[str]) -> None:
    data, out, count = argv[0], Path(argv[1]), int(argv[2]) if len(argv) > 2 else 200
    draw = random.Random(0)
    pairs = corrected(draw) if data == "ua-gec" else swapped(data, draw)
    rows = [{"good": good, "bad": bad} for (good, bad), _ in zip(pairs, range(count), strict=False)]
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{out}: {len(rows)} pairs")


if __name__ == "__main__":
    sys.exit(run(main))
