"""The vocabulary of one language: a model keeps only the tokens that the language's texts use.

    python main.py --model MODEL --trim_vocabulary --calibration_data uk --prune_method admm ...
    python main.py --model MODEL --trim_vocabulary --vocabulary_data uk en --save_model OUT

It keeps every token that the sources' train text uses, with all tokens that it is merged from;
the bytes; special and added tokens; the tokens of the chat template and the configs; and, up to a
multiple of 64, tokens that no text uses but that are written with the texts' letters, most frequent
first. Special tokens that are merely reserved go, unless a text, the template or a config uses
them. All other rows of the embedding and the head are removed, which makes the model smaller in
every engine.

    trimmed = trim_vocabulary(...)      before any weight is read: the smaller tokenizer
    trimmed.prove(sources)              test texts decode to the same text
    keep_rows_(model, trimmed.rows)     and check_same_outputs: the model computes the same
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data.chats import Document
from .data.documents import read_documents
from .data.sources import Source
from .data.templates import text_by
from .data.tokenizer import FLAG, TrimmableTokenizer
from .data.windows import test_documents
from .distributed.context import DistContext
from .model.access import Checkpoint
from .util.errors import UserError
from .util.progress import progress

HUB_CHARACTERS = 100_000_000  # counted of a hub set; local text is counted whole
BATCH_CHARACTERS = 4_000_000  # tokenised at a time, on all cores
COMMON_LETTER = 1e-4  # share of the texts' tokens that have a letter, from which it is common
MULTIPLE = 64  # the number of rows is a multiple of this, for fast matrix products on GPUs
# with these numbers of rows llama.cpp's converter mistakes a LLaMA for CodeLlama or Granite
MISLEADING_ROWS = frozenset({32016, 49152})
# scripts and signs that are rare in texts, some of them beyond the first 65,536
RARE_SIGNS = "🦉🏳️‍🌈 漢字の書き方 한국어 ไทย ꙮ𝔘𐍈 ﷽ ⅷ\u200b\ufeff\t\r\n  \x00¤"
PROOF_TOKENS = 256  # of a test window, for logits before and after
NOTE = (
    "The vocabulary was trimmed: fewer tokens share the probability, so perplexity falls by "
    "itself. Compare with other vocabularies by bits per byte."
)


@dataclass
class TrimmedVocabulary:
    """The smaller vocabulary.

    `rows` (rows,) holds the original row of each new one; rows past the tokenizer's ids have no
    token. `facts` is the record for results.json.
    """

    original_tokenizer: PreTrainedTokenizerBase
    tokenizer: PreTrainedTokenizerBase
    rows: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        hasher = hashlib.sha256(self.rows.numpy().tobytes())
        hasher.update(self.tokenizer.backend_tokenizer.to_str().encode())
        return hasher.hexdigest()[:16]

    def prove(self, sources: Iterable[Source]) -> list[str]:
        """Compare the tokenizers on the test texts, and return a line on each.

        Raises UserError if a text decodes differently.
        """
        texts = [RARE_SIGNS, *RARE_SIGNS]
        _, damaged = self._compare(texts)
        if damaged:
            raise UserError(
                f"{FLAG}: {texts[damaged - 1]!r}, which is in no text, decodes differently "
                "with the trimmed tokenizer; leave the flag out"
            )
        lines, self.facts["tests"] = [], []
        for source in sources:
            texts = test_documents(source, read_documents(source, "test")[0])
            test, damaged = self._compare(texts)
            if damaged:
                raise source.error(
                    f"its test document {damaged} decodes differently with the trimmed tokenizer; "
                    f"leave {FLAG} out"
                )
            self.facts["tests"].append({"name": source.name} | test)
            lines.append(
                f"{source.name}: all {test['documents']} test documents read the same, "
                f"{test['alike']} are cut alike, {test['rise']:+.2%} tokens"
            )
        return lines

    def _compare(self, documents: Iterable[Document]) -> tuple[dict[str, Any], int | None]:
        """Compare how both tokenizers cut and decode documents.

        Returns how many documents there are, how many are cut into the same tokens, and the tokens
        by both, whose rise is a share; and the number of the first document that decodes to another
        text, if any.
        """
        n_documents = n_alike = n_before = n_after = 0
        damaged, old_ids = None, self.rows.tolist()
        for batch in batches(text_by(self.original_tokenizer, each) for each in documents):
            cut, read = [], []  # ids and decoded texts of both tokenizers
            for tokenizer in (self.original_tokenizer, self.tokenizer):
                cut.append(encode_all(tokenizer, batch))
                decode = tokenizer.backend_tokenizer.decode_batch
                read.append(decode(cut[-1], skip_special_tokens=False))
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

    def summary(self) -> str:
        facts = self.facts
        reserved = f", {facts['reserved']} reserved ones go" if facts["reserved"] else ""
        return (
            f"vocabulary: {facts['rows']} of {facts['rows_before']} rows stay, "
            f"{facts['tokens']} of {facts['tokens_before']} tokens{reserved}; the texts use "
            f"{facts['used']}"
        )


def trim_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    config: Any,
    sources: Sequence[Source],
    dist: DistContext,
    *,
    rows: int,
    config_ids: set[int],
) -> TrimmedVocabulary:
    """Count the train text of `sources`, choose the tokens, and make the smaller tokenizer.

    `rows` is the number of rows of the model's embedding, `config_ids` are the ids in its configs.
    Raises UserError if the tokenizer can't be trimmed.
    """
    tokens = TrimmableTokenizer(tokenizer, str(checkpoint))
    required = tokens.required_ids() | tokens.template_ids()
    required |= config_ids & tokens.id_to_token.keys()
    reserved = tokens.reserved_ids() - required
    required = {part for index in required for part in tokens.merge_parts(index)}
    unnamed = sorted(i for i in config_ids if i < rows and i not in tokens.id_to_token)
    counts = count_tokens(sources, tokenizer, dist)
    used = [i for i in counts.nonzero().flatten().tolist() if i in tokens.id_to_token]
    if used and used[-1] >= rows:
        raise UserError(
            f"{FLAG}: the texts use token {tokens.id_to_token[used[-1]]!r} with the id {used[-1]}, "
            f"but the embedding of {checkpoint} has {rows} rows; resize the embedding to the "
            "tokenizer, or remove the tokens that were added to it"
        )
    chosen = choose_tokens(
        tokens,
        counts,
        required,
        reserved=reserved | {i for i in tokens.id_to_token if i >= rows},
        n_unnamed=len(unnamed),
    )
    model_ids = {tokens.token_to_id[token] for token in tokens.model_tokens}
    kept = sorted(chosen, key=lambda index: (index not in model_ids, index))  # added tokens last
    order = _row_order(tokens, kept, unnamed=unnamed, rows=rows)
    smaller = tokens.trimmed_tokenizer(kept, config, checkpoint.trust_remote_code)
    trimmed = TrimmedVocabulary(tokenizer, smaller, torch.tensor(order))
    trimmed.facts = {
        "rows": len(order),
        "rows_before": rows,
        "tokens": len(kept),
        "tokens_before": len(tokens.id_to_token),
        "used": len(used),
        "reserved": len(reserved - chosen),
        "sources": [source.text for source in sources],
        "digest": trimmed.digest,
    }
    return trimmed


def _row_order(
    tokens: TrimmableTokenizer, kept: Sequence[int], unnamed: list[int], rows: int
) -> list[int]:
    """Return the original row of each new one: those of `kept`, then rows without a token.

    A kept token without a row, which only the tokenizer's settings can name, gets a row that would
    have been dropped.
    """
    spare = [i for i in range(rows) if i not in tokens.id_to_token and i not in unnamed]
    missing = min(_round_up(len(kept) + len(unnamed)), rows) - len(kept) - len(unnamed)
    order = [*kept, *sorted(unnamed + spare[: max(0, missing)])]
    used = set(order)
    dropped = (i for i in range(rows - 1, -1, -1) if i not in used)
    return [i if i < rows else next(dropped, rows - 1) for i in order]


def choose_tokens(
    tokens: TrimmableTokenizer,
    counts: Tensor,
    required: set[int],
    *,
    reserved: set[int] | frozenset[int] = frozenset(),
    n_unnamed: int = 0,
) -> set[int]:
    """Return the tokens that stay: `required`, and those that texts use by `counts` (tokens,).

    `required` is closed over merges, and every other token comes with its parts. The tokens of
    `_fill_order` fill the vocabulary, with `n_unnamed` rows that have no token, up to a multiple of
    MULTIPLE; of those with parts only what fits. `reserved` tokens stay only where texts use them.
    """
    order, used, chosen = _fill_order(tokens, counts), counts > 0, set(required)
    chosen.update(*(tokens.merge_parts(index) for index in order if used[index]))
    limit = _round_up(len(chosen) + n_unnamed) - n_unnamed
    for index in order:
        if len(chosen) == limit:
            break
        if index not in chosen and index not in reserved:
            new = tokens.merge_parts(index) - chosen
            chosen |= new if len(chosen) + len(new) <= limit else set()
    return chosen


def _fill_order(tokens: TrimmableTokenizer, counts: Tensor) -> list[int]:
    """Return all tokens: by falling count, then those of the texts' common letters, then others.

    In equal places the order is the tokenizer's, which learnt its most frequent tokens first.
    """
    n_letters: Counter[str] = Counter()
    used = [(i, n) for i, n in enumerate(counts.tolist()) if n and i in tokens.id_to_token]
    for index, n in used:
        for letter in set(tokens.id_to_token[index]):
            n_letters[letter] += n
    least = COMMON_LETTER * int(counts.sum())
    common = {letter for letter, n in n_letters.items() if n >= least}
    by_count = [index for index, _ in sorted(used, key=lambda item: (-item[1], item[0]))]
    unused = sorted(tokens.id_to_token.keys() - set(by_count))
    return by_count + sorted(unused, key=lambda i: not common.issuperset(tokens.id_to_token[i]))


def _round_up(rows: int) -> int:
    """Return the next multiple of MULTIPLE that is no MISLEADING_ROWS."""
    rounded = rows + -rows % MULTIPLE
    return rounded + MULTIPLE if rounded in MISLEADING_ROWS else rounded


def count_tokens(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, dist: DistContext
) -> Tensor:
    """Return how often each token occurs in the sources' train text: (tokens,) int64.

    The processes of `dist` share the texts. Raises UserError for whatever is wrong with these.
    """
    n_tokens = max(tokenizer.get_vocab().values()) + 1
    counts = torch.zeros(n_tokens, dtype=torch.long)
    for source in sources:
        documents, _ = read_documents(source, "train")
        total, limit = (None, HUB_CHARACTERS) if source.hub else (len(documents), math.inf)
        what = f"counting tokens of {source.name}"
        with progress(total, what, "text", dist.is_main) as on_progress:
            for batch in batches(documents, limit):
                own = [text_by(tokenizer, each) for each in batch[dist.rank :: dist.size]]
                ids = torch.tensor([*chain(*encode_all(tokenizer, own))], dtype=torch.long)
                counts += torch.bincount(ids, minlength=n_tokens)
                on_progress(len(batch))
    counts = counts.to(dist.device)
    dist.sum_([counts])
    return counts.cpu()


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of texts, cut on all cores, without special tokens."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def batches(texts: Iterable[Document], limit: float = math.inf) -> Iterator[list[Document]]:
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
