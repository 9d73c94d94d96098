"""The demo's texts: Ukrainian and English stories composed from two small grammars.

The same seed gives the same stories. The two languages share no letter, no word list and no
template, so that a model has to learn them apart.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib.demo import en, uk
from lib.util.files import write_text

LANGUAGES = {"uk": uk.document, "en": en.document}
CHARACTERS = 1600  # of the shortest story: some 400 tokens of the demo's tokenizer
STARTS = r"^(?:— |“)?|[.!?] |\. — |[.!?,]” “"  # of a line, a sentence, a speaker's next sentence


def compose(documents: int, seed: int = 0) -> dict[str, list[str]]:
    """`documents` stories in every language, each of CHARACTERS characters or more."""
    stories = {}
    for language, document in LANGUAGES.items():
        rng = random.Random(f"{language} {seed}")
        lengths = (rng.randint(CHARACTERS, 2 * CHARACTERS) for _ in range(documents))
        stories[language] = [capitalised(document(rng, length)) for length in lengths]
    return stories


def capitalised(text: str) -> str:
    """With an upper-case letter wherever something begins."""
    return re.sub(rf"(?m)({STARTS})(\w)", lambda found: found[1] + found[2].upper(), text)


def write_texts(folder: Path, texts: Mapping[str, Sequence[str]], test: int) -> None:
    """FOLDER/LANGUAGE/{train,test}.jsonl, rows {"text": ...}; the last `test` stories are test."""
    for language, some in texts.items():
        target = folder / language
        target.mkdir(parents=True, exist_ok=True)
        for name, part in (("train", some[:-test]), ("test", some[-test:])):
            rows = (json.dumps({"text": text}, ensure_ascii=False) for text in part)
            write_text(target / f"{name}.jsonl", "".join(f"{row}\n" for row in rows))
