"""The demo's texts: Ukrainian and English stories, stored compressed in lib/demo/texts/."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib.util.files import write_text

LANGUAGES = ("uk", "en")
FOLDER = Path(__file__).parent / "texts"


def read_stories(count: int) -> dict[str, list[str]]:
    """Return the first `count` stories of each language."""
    stories = {}
    for language in LANGUAGES:
        with gzip.open(FOLDER / f"{language}.jsonl.gz", "rt", encoding="utf-8") as lines:
            stories[language] = [json.loads(line)["text"] for line in lines][:count]
        assert len(stories[language]) == count, f"{language} has fewer than {count} stories"
    return stories


def write_texts(folder: Path, stories: Mapping[str, Sequence[str]], n_test: int) -> None:
    """Write FOLDER/LANGUAGE/{train,test}.jsonl, rows {"text": ...}; the last ones are the test."""
    for language, texts in stories.items():
        target = folder / language
        target.mkdir(parents=True, exist_ok=True)
        for split, part in (("train", texts[:-n_test]), ("test", texts[-n_test:])):
            rows = (json.dumps({"text": text}, ensure_ascii=False) for text in part)
            write_text(target / f"{split}.jsonl", "".join(f"{row}\n" for row in rows))
