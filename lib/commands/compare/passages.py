"""The passages on which files are compared: beginnings of test documents, equal for all files."""

from __future__ import annotations

import argparse
import hashlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from ...data.chats import Dialogue
from ...data.documents import Corpus
from ...data.hub import TEST_DOCUMENTS
from ...data.languages import REQUESTS, script_of
from ...util.errors import counted
from ...vocabulary.proof import FEW
from ..trim import choosing
from .measure import File

PASSAGES = 32  # of each text
LONGEST = 512  # tokens of the reference, with the one that begins a text


def corpora_of(args: argparse.Namespace) -> dict[str, Corpus]:
    """Return the test texts of --language and --data by name."""
    corpora = choosing.corpora_of(args, needed=(), splits=["test"])
    names = [*args.language, *(corpus.source.name for corpus in corpora[len(args.language) :])]
    for name, corpus in zip(names, corpora, strict=True):
        if names.count(name) > 1:
            raise corpus.source.error("it is named twice", "Name it once")
    return dict(zip(names, corpora, strict=True))


def passages_of(
    corpora: Mapping[str, Corpus], files: Sequence[File], count: int
) -> dict[str, list[str]]:
    """Return passages by text, each the beginning of a document, spread over all.

    It has up to LONGEST tokens of the first file, and fits into the context of each. Raises
    UserError for a text with fewer than two documents, and for dialogues.
    """
    texts = {}
    for name, corpus in corpora.items():
        read = islice(corpus.documents("test"), TEST_DOCUMENTS)
        documents = [each for each in read if each.strip()]
        if any(isinstance(text, Dialogue) for text in documents):
            raise corpus.source.error("it holds dialogues, and texts are compared", "Give texts")
        n_passages = min(count, len(documents))
        if n_passages < 2:
            problem = f"it has {counted(len(documents), 'test document')} for --passages {count}"
            raise corpus.source.error(problem, "Give at least 2, for an interval over documents")
        if n_passages < min(FEW, count):
            held_out = ", a tenth of its documents" * corpus.is_parted("test")
            few = counted(n_passages, "test document")
            print(f"{name}: only {few}{held_out}, so intervals are wide", flush=True)
        chosen = [documents[n * len(documents) // n_passages] for n in range(n_passages)]
        expected = script_of(REQUESTS.get(name.partition("-")[0], ""))
        if expected and (found := script_of("".join(chosen))) != expected:
            print(f"{name}: most letters are {found}, and those of {name} are {expected}")
        texts[name] = [_beginning(text, files) for text in chosen]
    return texts


def _beginning(text: str, files: Sequence[File]) -> str:
    """Return the longest beginning whose window is short enough for all files."""
    limits = [each.context for each in files]
    limits[0] = min(limits[0], LONGEST)

    def exceeds(letters: int) -> bool:
        pairs = zip(files, limits, strict=True)
        return any(len(file.window(text[:letters])) > limit for file, limit in pairs)

    text = text[: 8 * LONGEST]  # tokens are shorter on average
    return text[: max(1, bisect_left(range(1, len(text) + 1), True, key=exceeds))]


def digest_of(passages: Sequence[str]) -> dict[str, Any]:
    """Return the number of passages, their bytes, and a digest of them."""
    data = [passage.encode() for passage in passages]
    digest = hashlib.sha256(b"\0".join(data)).hexdigest()
    return {"documents": len(data), "bytes": [*map(len, data)], "sha256": digest}
