"""Count the tokens of texts, by which trimming decides what stays: one rule for all tokenizers.

Documents are numbered through over all sources, dialogues too, and every tenth is held out. In n
tokens of text, a token that was not seen saves about 1 / n of it. Counting a source therefore ends
where that is below the price of a row, since the list would hardly change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..data.chats import Document
from ..data.documents import Corpus, batches, many_documents
from ..util.progress import progress

HELD_OUT = 10  # every tenth document is held out of a first count
MOST_CHARACTERS = 100_000_000  # counted of each source
ROUNDS = 16  # of counting, each over a part of the documents that is spread over the text
STEP = 1_000_000  # characters counted at a time
Encode = Callable[[list[str]], Sequence[np.ndarray]]


def count_tokens(
    corpora: Sequence[Corpus],
    encode: Encode,
    text_of: Callable[[Document], str],
    ids: int,
    price: float,
) -> np.ndarray:
    """Return how often each token occurs in the train text, and in its held-out part: (2, ids).

    `encode` gives the tokens of texts, and `text_of` the text of a document. `price` are the tokens
    per million of text that a row saves at least. Prints a line for a source that is not counted
    to its end. Raises UserError for any problem with the texts.
    """
    counts, start = np.zeros((2, ids), np.int64), 0
    enough = 1e6 / price if price else math.inf
    for corpus in corpora:
        documents, total = many_documents(corpus, HELD_OUT), MOST_CHARACTERS
        numbers = order = None
        if not corpus.source.hub:
            total = min(total, sum(map(len, documents)))
            # in rounds over the text, whose genres may stand one after the other
            order = [i for first in range(ROUNDS) for i in range(first, len(documents), ROUNDS)]
            documents = [documents[i] for i in order]
        read = seen = tokens = 0
        with progress(total, f"counting tokens of {corpus.source.name}", "B") as on_progress:
            for batch in batches(documents, total, STEP):
                numbers = np.arange(seen, seen + len(batch)) if order is None else order[seen:]
                encoded = encode([text_of(document) for document in batch])
                for number, found in zip(numbers, encoded, strict=False):
                    held_out = (start + number) % HELD_OUT == HELD_OUT - 1
                    np.add.at(counts[: 1 + held_out], (slice(None), found), 1)
                    tokens += len(found)
                seen += len(batch)
                read += (size := sum(map(len, batch)))
                on_progress(size)
                if tokens >= enough:
                    break
        if tokens >= enough and read < total:
            which = f"{read:,} of at most {total:,} characters are counted"
            print(f"{corpus.source.name}: {which}; a token not seen is not worth its row")
        start += seen if order is None else len(order)
    return counts
