"""Compare the tokens of texts before and after trimming, in a GGUF file or a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ..data.chats import Document
from ..data.documents import Corpus
from ..data.lines import LINES
from ..util.errors import UserError, counted, first_of

MANY = 2_000  # test documents of each source that are compared
LINES_NAME = "lines in many scripts"
FEW = 24  # test documents: with fewer, the choice of tokens and their cost are uncertain


def texts_to_compare(
    corpora: Iterable[Corpus], text_of: Callable[[Document], str]
) -> dict[str, list[str]]:
    """Return texts by name: the test documents, then lines in many scripts with their letters.

    Prints a line if the test documents are few.
    """
    tests = {}
    for corpus in corpora:
        documents = islice(corpus.documents("test"), MANY)
        tests[corpus.source.name] = [text_of(document) for document in documents]
    texts = held_out(tests)
    if tests and len(texts) < FEW:
        size = sum(len(text.encode()) for text in texts)
        print(
            f"little text: {counted(len(texts), 'test document')} of {size:,} bytes, so the choice "
            f"of tokens and their cost are uncertain. Give {FEW} test documents or more, or "
            f"{10 * FEW} documents, of which a tenth is held out",
            flush=True,
        )
    return tests | {LINES_NAME: [*LINES, *(c for line in LINES for c in line)]}


def held_out(tests: dict[str, list[str]]) -> list[str]:
    """Return the test documents of all sources that are not blank."""
    texts = (text for name, texts in tests.items() if name != LINES_NAME for text in texts)
    return [text for text in texts if text.strip()]


def compare_texts(
    tests: dict[str, list[str]], before: Any, after: Any, kept: Sequence[int], lossy: bool
) -> tuple[list[dict[str, Any]], str]:
    """Compare the tokens of all texts, print a line on each set of test documents, and return the
    counts and a line on the languages that were removed."""
    records = []
    for name, texts in tests.items():
        record, line = compare_tokens(name, texts, before, after, kept, lossy)
        records.append(record)
        if name != LINES_NAME:
            print(f"proven, tokens: {line}", flush=True)
    return records, f"removed languages, by {line}"


def compare_tokens(
    name: str, texts: list[str], before: Any, after: Any, kept: Sequence[int], lossy: bool
) -> tuple[dict[str, Any], str]:
    """Compare the tokens of texts with both vocabularies, and return the counts and a line.

    `before` and `after` are a `Llama` or have its methods. Raises UserError if a text has other
    tokens although all of its own are kept, and if it decodes to another text, except for letters
    and words that became unknown, which are named, in a `lossy` vocabulary: one without bytes.
    """
    rows, known = np.array(kept), np.zeros(before.rows, bool)
    known[rows] = True
    n_alike = n_before = n_after = 0
    unknown: set[str] = set()

    def differs(text: str) -> bool:
        return before.decode(before.encode(text)) != after.decode(after.encode(text))

    encoded = zip(texts, before.encode_all(texts), after.encode_all(texts), strict=True)
    for text, old, new in encoded:
        alike, problem = np.array_equal(old, rows[new]), ""
        n_alike += alike
        n_before += len(old)
        n_after += len(new)
        if known[old].all() and not alike:
            problem = "has other tokens"
        elif not alike and before.decode(old) != after.decode(new):
            lost = {letter for letter in text if differs(letter)} if lossy else set()
            lost = lost or {word for word in text.split() if differs(word)}
            problem = "decodes differently" * (not lossy or not lost)
            unknown |= lost
        if problem:
            problem = f"with the trimmed vocabulary it {problem}"
            raise UserError(f"{name}, {text[:40]!r}", problem, "Please report this")
    rise = n_after / max(n_before, 1) - 1
    named = f", but {len(unknown)} letters or words became unknown: {first_of(sorted(unknown))}"
    line = f"{name}: {rise:+.2%} tokens, the same ones in {n_alike:,} of {len(texts):,} texts; all "
    line += f"decode to the same text{named * bool(unknown)}"
    counts = {"documents": len(texts), "alike": n_alike, "tokens_before": n_before}
    counts |= {"tokens": n_after, "rise": rise, "unknown": len(unknown)}
    return {"name": name} | counts, line
