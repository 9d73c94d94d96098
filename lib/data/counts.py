"""Token counts of texts, and a comparison of two tokenizers on the same texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.data.chats import Dialogue
from lib.data.documents import read_documents
from lib.data.sources import Source
from lib.data.templates import text_by
from lib.util.progress import progress

HUB_CHARACTERS = 100_000_000  # counted of a hub set; local text is counted whole
BATCH_CHARACTERS = 4_000_000  # tokenised at a time, on all cores


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of a fast tokenizer's backend without truncation and padding."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def count_tokens(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, rank: int = 0, size: int = 1
) -> Tensor:
    """Return how often each token occurs in the sources' train text: (tokens,) int64.

    Process `rank` of `size` counts every `size`th text. Raises UserError for whatever is wrong with
    the texts.
    """
    backend = plain_backend(tokenizer)
    n_tokens = max(tokenizer.get_vocab().values()) + 1
    counts = torch.zeros(n_tokens, dtype=torch.long)
    for source in sources:
        documents, _ = read_documents(source, "train")
        total, limit = (None, HUB_CHARACTERS) if source.hub else (len(documents), math.inf)
        what = f"counting tokens of {source.name}"
        with progress(total, what, "text", rank == 0) as on_progress:
            for batch in batches(documents, limit):
                own = [text_by(tokenizer, each) for each in batch[rank::size]]
                encodings = backend.encode_batch_fast(own, add_special_tokens=False)
                ids = torch.tensor([i for e in encodings for i in e.ids], dtype=torch.long)
                counts += torch.bincount(ids, minlength=n_tokens)
                on_progress(len(batch))
    return counts


def batches(
    texts: Iterable[str | Dialogue], limit: float = math.inf
) -> Iterator[list[str | Dialogue]]:
    """Yield lists of at least BATCH_CHARACTERS characters until `limit` characters were read."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        limit -= len(text)
        if limit <= 0:
            break
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def compare_tokenizers(
    documents: Iterable[str | Dialogue],
    before: PreTrainedTokenizerBase,
    after: PreTrainedTokenizerBase,
    rows: Tensor,
) -> tuple[dict[str, Any], int | None]:
    """Compare how two tokenizers cut and decode texts.

    `rows` (tokens,) holds, for each id of the second tokenizer, the id of the same token in the
    first one. Returns how many documents there are, how many are cut into the same tokens, and the
    tokens by both, whose rise is a share; and the number of the first document that decodes to
    another text, if any.
    """
    n_documents = n_alike = n_before = n_after = 0
    damaged, old_ids = None, rows.tolist()
    backends = plain_backend(before), plain_backend(after)
    for batch in batches(text_by(before, document) for document in documents):
        cut, read = [], []  # ids and decoded texts of both tokenizers
        for backend in backends:
            encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
            cut.append([encoding.ids for encoding in encodings])
            read.append(backend.decode_batch(cut[-1], skip_special_tokens=False))
        for ids, new_ids, text, new_text in zip(*cut, *read, strict=True):
            n_documents += 1
            if text != new_text and damaged is None:
                damaged = n_documents
            n_alike += ids == [old_ids[index] for index in new_ids]
            n_before += len(ids)
            n_after += len(new_ids)
    record = {"documents": n_documents, "alike": n_alike, "tokens_before": n_before}
    rise = n_after / max(n_before, 1) - 1
    return record | {"tokens": n_after, "rise": rise}, damaged
