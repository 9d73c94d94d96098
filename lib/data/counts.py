"""How often the tokens of a tokenizer occur in texts, and how two of them cut the same texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
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

HUB_CHARACTERS = 100_000_000  # of a hub set that are counted; local text is counted whole
BATCH_CHARACTERS = 4_000_000  # that are tokenised at a time, on all cores
LONGEST = 1_000_000  # characters that are tokenised in one go
BREAK = re.compile(r"\n(?=\S)")  # no tokenizer joins a line's first letter to the line before
# of scripts and signs that few texts have, some of them beyond the first 65,536
UNSEEN = "🦉🏳️‍🌈 漢字の書き方 한국어 ไทย ꙮ𝔘𐍈 ﷽ ⅷ\u200b\ufeff\t\r\n  \x00¤"


def plain(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of what is behind a fast tokenizer that neither cuts texts short nor fills them up."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


@dataclass
class Counted:
    """How often each token occurs, (tokens,) int64, and in how many documents and characters."""

    counts: Tensor
    documents: int = 0
    characters: int = 0


def count_tokens(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    rank: int = 0,
    size: int = 1,
) -> Counted:
    """Count the train text of `sources`; of several processes each tokenises every `size`th text.

    The first shows how far it is. UserError for whatever is wrong with the texts.
    """
    backend = plain(tokenizer)
    found = Counted(torch.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=torch.long))
    for source in sources:
        with open_documents(source, "train") as (documents, _):
            streamed = isinstance(documents, StreamedRows)
            texts = (text for _, text in documents) if streamed else iter(documents)
            known = None if source.hub else len(documents)
            with progress(known, f"counting tokens of {source.name}", "text", rank == 0) as bar:
                mine = _share(_bounded(texts, source, found), rank, size, bar)
                for batch in _batches(chain.from_iterable(map(_cut, mine))):
                    encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
                    ids = torch.tensor([i for one in encoded for i in one.ids], dtype=torch.long)
                    found.counts += torch.bincount(ids, minlength=len(found.counts))
    return found


def _bounded(texts: Iterable[str], source: Source, found: Counted) -> Iterator[str]:
    """The texts to be counted, all processes' ones, as they are counted in."""
    left = HUB_CHARACTERS if source.hub else None
    for text in texts:
        found.documents += 1
        found.characters += len(text)
        yield text
        if left is not None:
            left -= len(text)
            if left <= 0:
                return


def _share(texts: Iterable[str], rank: int, size: int, bar) -> Iterator[str]:
    for number, text in enumerate(texts):
        if number % size == rank:
            yield text
        bar(1)


def _cut(text: str) -> Iterator[str]:
    """A very long text in parts that are tokenised side by side."""
    start = 0
    while len(text) - start > LONGEST and (found := BREAK.search(text, start + LONGEST)):
        yield text[start : found.end()]
        start = found.end()
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
class Compared:
    """How two tokenizers cut the same documents."""

    documents: int = 0
    alike: int = 0  # cut into the same tokens
    before: int = 0  # tokens
    after: int = 0
    damaged: int | None = None  # the first document that does not read the same, if any

    @property
    def rise(self) -> float:
        """In tokens, as a share of those before."""
        return self.after / max(self.before, 1) - 1


def compared(
    source: Source,
    before: PreTrainedTokenizerBase,
    after: PreTrainedTokenizerBase,
    rows: Tensor,
) -> Compared:
    """The test documents of a source; `rows` (tokens,): what each token after was before."""
    with open_documents(source, "test") as (documents, _):
        return compared_texts(test_documents(source, documents), before, after, rows)


def compared_texts(
    texts: Iterable[str],
    before: PreTrainedTokenizerBase,
    after: PreTrainedTokenizerBase,
    rows: Tensor,
) -> Compared:
    """See `compared`."""
    found, old_numbers = Compared(), rows.tolist()
    one, other = plain(before), plain(after)
    for batch in _batches(texts):
        old, new = (
            [encoding.ids for encoding in each.encode_batch_fast(batch, add_special_tokens=False)]
            for each in (one, other)
        )
        read = one.decode_batch(old, skip_special_tokens=False)
        again = other.decode_batch(new, skip_special_tokens=False)
        for text_before, text_after, ids_before, ids_after in zip(
            read, again, old, new, strict=True
        ):
            found.documents += 1
            if text_before != text_after and found.damaged is None:
                found.damaged = found.documents
            found.alike += ids_before == [old_numbers[i] for i in ids_after]
            found.before += len(ids_before)
            found.after += len(ids_after)
    return found
