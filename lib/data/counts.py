"""Token counts of texts, and a comparison of two tokenizers on the same texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.data.documents import open_documents
from lib.data.hub import StreamedRows
from lib.data.sources import Source
from lib.data.windows import test_documents
from lib.util.progress import progress

HUB_CHARACTERS = 100_000_000  # counted of a hub set; local text is counted whole
BATCH_CHARACTERS = 4_000_000  # tokenised at a time, on all cores
LONGEST = 1_000_000  # characters tokenised as one text
BREAK = re.compile(r"\n(?=\S)")  # no tokenizer joins a line's first letter to the line before
# scripts and signs that are rare in texts, some of them beyond the first 65,536
RARE_SIGNS = "🦉🏳️‍🌈 漢字の書き方 한국어 ไทย ꙮ𝔘𐍈 ﷽ ⅷ\u200b\ufeff\t\r\n  \x00¤"


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of a fast tokenizer's backend without truncation and padding."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


@dataclass
class TokenCounts:
    """How often each token occurs, (tokens,) int64, in so many documents and characters."""

    counts: Tensor
    documents: int = 0
    characters: int = 0


def count_tokens(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    rank: int = 0,
    size: int = 1,
) -> TokenCounts:
    """Count the tokens of the sources' train text.

    Process `rank` of `size` tokenises every `size`th text; process 0 shows the progress. Raises
    UserError for whatever is wrong with the texts.
    """
    backend = plain_backend(tokenizer)
    n_tokens = max(tokenizer.get_vocab().values()) + 1
    total = TokenCounts(torch.zeros(n_tokens, dtype=torch.long))
    for source in sources:
        with open_documents(source, "train") as (documents, _):
            streamed = isinstance(documents, StreamedRows)
            texts = (text for _, text in documents) if streamed else iter(documents)
            n_texts = None if source.hub else len(documents)
            with progress(n_texts, f"counting tokens of {source.name}", "text", rank == 0) as bar:
                share = _share(_limited(texts, source, total), rank, size, bar)
                for batch in _batches(chain.from_iterable(map(_cut, share))):
                    encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
                    ids = torch.tensor([i for e in encodings for i in e.ids], dtype=torch.long)
                    total.counts += torch.bincount(ids, minlength=n_tokens)
    return total


def _limited(texts: Iterable[str], source: Source, total: TokenCounts) -> Iterator[str]:
    """Yield the texts of a source, at most HUB_CHARACTERS of a hub set, and add them to `total`."""
    left = HUB_CHARACTERS if source.hub else None
    for text in texts:
        total.documents += 1
        total.characters += len(text)
        yield text
        if left is not None:
            left -= len(text)
            if left <= 0:
                return


def _share(texts: Iterable[str], rank: int, size: int, bar: Callable[..., None]) -> Iterator[str]:
    """Yield the texts of one process."""
    for number, text in enumerate(texts):
        if number % size == rank:
            yield text
        bar(1)


def _cut(text: str) -> Iterator[str]:
    """Yield the parts of a very long text, which are tokenised side by side."""
    start = 0
    while len(text) - start > LONGEST and (line := BREAK.search(text, start + LONGEST)):
        yield text[start : line.end()]
        start = line.end()
    yield text[start:]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass
class TokenizerComparison:
    """How two tokenizers cut the same documents."""

    documents: int = 0
    alike: int = 0  # documents that are cut into the same tokens
    before: int = 0  # tokens by the first tokenizer
    after: int = 0  # tokens by the second one
    damaged: int | None = None  # number of the first document that decodes to another text

    @property
    def rise(self) -> float:
        """The additional tokens as a share of those before."""
        return self.after / max(self.before, 1) - 1


def compare_on_source(
    source: Source,
    before: PreTrainedTokenizerBase,
    after: PreTrainedTokenizerBase,
    rows: Tensor,
) -> TokenizerComparison:
    """Compare two tokenizers on the test documents of a source; see `compare_on_texts`."""
    with open_documents(source, "test") as (documents, _):
        return compare_on_texts(test_documents(source, documents), before, after, rows)


def compare_on_texts(
    texts: Iterable[str],
    before: PreTrainedTokenizerBase,
    after: PreTrainedTokenizerBase,
    rows: Tensor,
) -> TokenizerComparison:
    """Compare how two tokenizers cut and decode texts.

    `rows` (tokens,) holds, for each id of the second tokenizer, the id of the same token in the
    first one.
    """
    comparison, old_ids = TokenizerComparison(), rows.tolist()
    backends = plain_backend(before), plain_backend(after)
    for batch in _batches(texts):
        ids_before, ids_after = (
            [e.ids for e in backend.encode_batch_fast(batch, add_special_tokens=False)]
            for backend in backends
        )
        decoded_before, decoded_after = (
            backend.decode_batch(ids, skip_special_tokens=False)
            for backend, ids in zip(backends, (ids_before, ids_after), strict=True)
        )
        for text, other_text, ids, other_ids in zip(
            decoded_before, decoded_after, ids_before, ids_after, strict=True
        ):
            comparison.documents += 1
            if text != other_text and comparison.damaged is None:
                comparison.damaged = comparison.documents
            comparison.alike += ids == [old_ids[index] for index in other_ids]
            comparison.before += len(ids)
            comparison.after += len(other_ids)
    return comparison
