"""Token counts of texts, and a comparison of two tokenizers on the same texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.data.documents import open_documents
from lib.data.sources import Source
from lib.util.progress import progress

HUB_CHARACTERS = 100_000_000  # counted of a hub set; local text is counted whole
BATCH_CHARACTERS = 4_000_000  # tokenised at a time, on all cores


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
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, rank: int = 0, size: int = 1
) -> TokenCounts:
    """Count the tokens of the sources' train text.

    Process `rank` of `size` tokenises every `size`th text, and sees the number of documents and
    characters of all; process 0 shows the progress. Raises UserError for whatever is wrong with
    the texts.
    """
    backend = plain_backend(tokenizer)
    n_tokens = max(tokenizer.get_vocab().values()) + 1
    total = TokenCounts(torch.zeros(n_tokens, dtype=torch.long))

    def own_texts(texts: Iterable[str], limit: float) -> Iterator[str]:
        read = 0
        for number, text in enumerate(texts):
            read += len(text)
            total.documents += 1
            total.characters += len(text)
            if number % size == rank:
                yield text
            on_progress(1)
            if read >= limit:
                return

    for source in sources:
        with open_documents(source, "train") as (documents, _):
            n_texts = None if source.hub else len(documents)
            what = f"counting tokens of {source.name}"
            with progress(n_texts, what, "text", rank == 0) as on_progress:
                texts = own_texts(documents, HUB_CHARACTERS if source.hub else float("inf"))
                for batch in batches(texts):
                    encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
                    ids = torch.tensor([i for e in encodings for i in e.ids], dtype=torch.long)
                    total.counts += torch.bincount(ids, minlength=n_tokens)
    return total


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of at least BATCH_CHARACTERS characters, the last one with what is left."""
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


def compare_tokenizers(
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
    for batch in batches(texts):
        cut, read = [], []  # ids and decoded texts of both tokenizers
        for backend in backends:
            encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
            cut.append([encoding.ids for encoding in encodings])
            read.append(backend.decode_batch(cut[-1], skip_special_tokens=False))
        for ids, new_ids, text, new_text in zip(*cut, *read, strict=True):
            comparison.documents += 1
            if text != new_text and comparison.damaged is None:
                comparison.damaged = comparison.documents
            comparison.alike += ids == [old_ids[index] for index in new_ids]
            comparison.before += len(ids)
            comparison.after += len(new_ids)
    return comparison
