"""Vocabulary trimming: keep only the tokens that the texts of one language use.

    python main.py --model MODEL --trim_vocabulary --calibration_data uk --prune_method admm ...
    python main.py --model MODEL --trim_vocabulary --vocabulary_data uk en --save_model OUT

It keeps every token that the sources' train text uses, with all tokens that it is merged from. It
also keeps the bytes, special and added tokens, and the tokens of the chat template and the configs.
A small text does not use all tokens of its language. Therefore 10% of the documents are held out of
a first count. If that count's tokens split them into over RISE more tokens, unused tokens are added
until the rise is below GOAL. The most likely ones for the text's scripts come first. They also fill
the rows up to a multiple of 64. Reserved special tokens are removed, unless a text, the template or
a config uses them. All other rows of the embedding and the head are removed, which makes the model
smaller in every engine.

    trimmed = trim_vocabulary(...)      reads no weights, returns the smaller tokenizer
    trimmed.verify(tests)                checks that test texts decode to the same text
    trimmed.hold_out(test, seqlen)      windows of a test text by both tokenizers, of equal bytes
    keep_rows_(model, trimmed.rows)     trims the model; check_same_outputs compares its logits
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data.chats import Document
from .data.documents import Corpus, pieces_of
from .data.samples import Sample, Windows, join, packed
from .data.templates import document_text
from .data.trimmed_tokenizer import FLAG, TrimmableTokenizer
from .data.windows import sample_of, test_documents
from .model.checkpoint import Checkpoint
from .util.errors import UserError
from .util.progress import progress
from .util.quirks import MISLEADING_ROWS
from .util.ranks import DistContext

RISE = 0.003  # rise in tokens of held-out text above which the text is too small
GOAL = 0.001  # rise below which the kept likely tokens are enough
HELD_OUT = 10  # every tenth document is held out
HELD_CHARACTERS = 1_000_000  # largest amount of held-out text
UNLIKELY = 3e-8  # expected share of a token in a text below which it is not worth a row
MEASURED_BYTES = 2**15  # bytes of a test text on which both vocabularies are measured
MEASURED_TOKENS = 1024  # largest window for that, in tokens
TOO_COSTLY = 0.02  # rise of bits per byte above which a warning is printed
HUB_CHARACTERS = 100_000_000  # counted in a Hub dataset; local text is counted in full
BATCH_CHARACTERS = 4_000_000  # tokenized at a time, on all cores
COMMON_LETTER = 1e-4  # least share of the texts' tokens with a letter for the letter to be common
MULTIPLE = 64  # granularity of rows, for fast matrix products on GPUs
# scripts and signs that are rare in texts, some beyond the first 65,536
RARE_SIGNS = "🦉🏳️‍🌈 漢字の書き方 한국어 ไทย ꙮ𝔘𐍈 ﷽ ⅷ\u200b\ufeff\t\r\n  \x00¤"
PROOF_TOKENS = 256  # tokens of a test window whose logits are compared
NOTE = (
    "The vocabulary was trimmed: fewer tokens share the probability, so perplexity falls by "
    "itself. Compare with other vocabularies by bits per byte."
)


@dataclass
class TrimmedVocabulary:
    """The smaller vocabulary.

    `rows` (rows,) holds the original row of each new one; rows beyond the tokenizer's ids have no
    token. `record` goes into results.json.
    """

    original_tokenizer: PreTrainedTokenizerBase
    tokenizer: PreTrainedTokenizerBase
    rows: Tensor
    record: dict[str, Any] = field(default_factory=dict)
    # windows by the original and by the trimmed tokenizer, and the number of bytes that count
    held_out: tuple[Windows, Windows, int] | None = None

    @property
    def digest(self) -> str:
        hasher = hashlib.sha256(self.rows.numpy().tobytes())
        hasher.update(self.tokenizer.backend_tokenizer.to_str().encode())
        return hasher.hexdigest()[:16]

    def verify(self, corpora: Iterable[Corpus]) -> list[str]:
        """Compare the tokenizers on the test texts, and return a line on each.

        Raises UserError if a text decodes differently.
        """
        texts = [RARE_SIGNS, *RARE_SIGNS]
        _, damaged = self._compare(texts)
        if damaged:
            raise UserError(
                FLAG,
                f"{texts[damaged - 1]!r} decodes differently with the trimmed tokenizer",
                "Leave the flag out",
            )
        lines, self.record["tests"] = [], []
        for corpus in corpora:
            source, (test, damaged) = corpus.source, self._compare(test_documents(corpus))
            if damaged:
                problem = f"its test document {damaged} decodes differently with the trimmed "
                raise source.error(f"{problem}tokenizer", f"Leave {FLAG} out")
            self.record["tests"].append({"name": source.name} | test)
            lines.append(
                f"{source.name}: all {test['documents']} test documents decode to the same text, "
                f"{test['alike']} have the same tokens, {test['rise']:+.2%} tokens"
            )
        return lines

    def hold_out(self, corpus: Corpus, seqlen: int) -> None:
        """Set `held_out` to windows by both tokenizers: a test text, or the answers of dialogues.

        At most MEASURED_BYTES, spread over the documents. A text's first token is predicted too,
        from BOS or an end token, so that all its bytes count.
        """
        seqlen = min(seqlen, MEASURED_TOKENS)
        documents = test_documents(corpus)
        piece = re.compile(rf"\S[\s\S]{{0,{seqlen}}}(?=\s|$)")  # rarely over seqlen tokens
        pieces: list[Document] = []
        for document in documents:
            pieces += piece.findall(document) if isinstance(document, str) else [document]
        step = max(1, sum(len(str(each).encode()) for each in pieces) // MEASURED_BYTES)
        size, cuts, tokenizers = 0, ([], []), (self.original_tokenizer, self.tokenizer)
        for document in pieces[::step]:
            pair = [self._sample(each, document) for each in tokenizers]
            if all(0 < len(sample.ids) <= seqlen for sample in pair):
                counted = pair[0].ids[pair[0].mask]
                text = self.original_tokenizer.decode(counted, clean_up_tokenization_spaces=False)
                size += len((document if isinstance(document, str) else text).encode())
                for cut, sample in zip(cuts, pair, strict=True):
                    cut.append(sample)
        if size:
            self.held_out = (*(join(list(packed(cut, seqlen))) for cut in cuts), size)
            self.record["measured_on"] = {"name": corpus.source.name, "bytes": size}

    @staticmethod
    def _sample(tokenizer: PreTrainedTokenizerBase, document: Document) -> Sample:
        if not isinstance(document, str):
            return sample_of(tokenizer, document)
        begins = tokenizer.bos_token_id
        begins = tokenizer.eos_token_id if begins is None else begins
        (ids,) = encode_all(tokenizer, [document])
        ids = torch.tensor([begins or 0, *ids])
        return Sample(ids, torch.arange(len(ids)) > 0)

    def record_cost(self, nats_original: float, nats_trimmed: float) -> list[str]:
        """Record both models' losses on `held_out`, summed in nats; return lines on the cost."""
        record, size = self.record, self.held_out[-1]
        original, trimmed = (nats / math.log(2) / size for nats in (nats_original, nats_trimmed))
        record |= {"bits_per_byte_original": original, "bits_per_byte_trimmed": trimmed}
        cost = trimmed / original - 1
        name = record["measured_on"]["name"]
        lines = [
            f"trimming costs {cost:+.2%} bits per byte on {size:,} bytes of {name}: original "
            f"{original:.4f}, trimmed {trimmed:.4f}"
        ]
        if cost > TOO_COSTLY:
            lines.append(
                f"{FLAG}: more than {TOO_COSTLY:.0%} is much, since the text uses too little of "
                "the vocabulary. Give more text in the language with --vocabulary_data."
            )
        return lines

    def _compare(self, documents: Iterable[Document]) -> tuple[dict[str, Any], int | None]:
        """Compare how both tokenizers encode and decode documents.

        Returns a record, and the number of the first document that decodes to another text, if any.
        The record has the number of documents, the number with equal tokens, the tokens by both
        tokenizers, and their rise as a share.
        """
        n_documents = n_alike = n_before = n_after = 0
        damaged, old_ids = None, self.rows.tolist()
        for batch in batches(document_text(self.original_tokenizer, each) for each in documents):
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
        record = self.record
        reserved = f", {record['reserved']} reserved ones are removed" if record["reserved"] else ""
        line = (
            f"vocabulary: {record['rows']} of {record['rows_before']} rows stay, "
            f"{record['tokens']} of {record['tokens_before']} tokens{reserved}; the texts use "
            f"{record['used']}"
        )
        if not record["likely"]:
            return line
        why = "the texts are too short to hold any out"
        if record["rise"] is not None:
            why = f"held-out text took {record['rise']:+.2%} tokens without them"
        return f"{line}, and {record['likely']} likely ones are kept, since {why}"


def trim_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    config: Any,
    corpora: Sequence[Corpus],
    dist: DistContext,
    *,
    rows: int,
    config_ids: set[int],
) -> TrimmedVocabulary:
    """Count the train text of `corpora`, choose the tokens, and make the smaller tokenizer.

    `rows` is the number of rows of the model's embedding, `config_ids` are the ids in its configs.
    Raises UserError if the tokenizer cannot be trimmed.
    """
    tokens = TrimmableTokenizer(tokenizer, str(checkpoint))
    required = tokens.required_ids() | tokens.template_ids()
    required |= config_ids & tokens.id_to_token.keys()
    reserved = tokens.reserved_ids() - required
    required = {part for index in required for part in tokens.merge_parts(index)}
    unnamed = sorted(i for i in config_ids if i < rows and i not in tokens.id_to_token)
    counts, held = count_tokens(corpora, tokenizer, dist)
    used = [i for i in counts.nonzero().flatten().tolist() if i in tokens.id_to_token]
    if used and used[-1] >= rows:
        raise UserError(
            FLAG,
            f"the texts use token {tokens.id_to_token[used[-1]]!r} with the id {used[-1]}, "
            f"but the embedding of {checkpoint} has {rows} rows",
            "Resize it to the tokenizer, or remove the added tokens",
        )
    options = dict(
        reserved=reserved | {i for i in tokens.id_to_token if i >= rows}, n_unnamed=len(unnamed)
    )
    rise, likely = _likely_tokens(tokens, counts, held, required, options)
    chosen = choose_tokens(tokens, counts, required, likely=likely, **options)
    model_ids = {tokens.token_to_id[token] for token in tokens.model_tokens}
    kept = sorted(chosen, key=lambda index: (index not in model_ids, index))  # added tokens last
    order = _row_order(tokens, kept, unnamed=unnamed, rows=rows)
    smaller = tokens.trimmed_tokenizer(kept, config, checkpoint.trust_remote_code)
    trimmed = TrimmedVocabulary(tokenizer, smaller, torch.tensor(order))
    trimmed.record = {
        "rows": len(order),
        "rows_before": rows,
        "tokens": len(kept),
        "tokens_before": len(tokens.id_to_token),
        "used": len(used),
        "rise": rise,
        "likely": likely,
        "reserved": len(reserved - chosen),
        "sources": [corpus.source.text for corpus in corpora],
        "digest": trimmed.digest,
    }
    return trimmed


def _likely_tokens(
    tokens: TrimmableTokenizer,
    counts: Tensor,
    held: list[str],
    required: set[int],
    options: dict[str, Any],
) -> tuple[float | None, int]:
    """Return the rise in tokens of `held` by the tokens of other text, and how many more it needs.

    The first count is `counts` (tokens,) without `held`. The second value is the least number of
    unused tokens, most likely first, for a rise of at most GOAL, or all if none suffices. It is
    all, and the rise None, if no text could be held out.
    """
    ids = encode_all(tokens.tokenizer, held)
    before = sum(map(len, ids))
    used = torch.tensor([*chain(*ids)], dtype=torch.long)
    first = counts - torch.bincount(used, minlength=len(counts))

    order, most = _fill_order(tokens, first)
    if not held:
        return None, most

    def rise(likely: int) -> float:
        kept = choose_tokens(tokens, first, required, likely=likely, order=order, **options)
        bare = Tokenizer.from_str(json.dumps(tokens.trimmed_json(sorted(kept))))
        cut = bare.encode_batch_fast(held, add_special_tokens=False)
        return sum(len(each.ids) for each in cut) / max(before, 1) - 1

    bare_rise = rise(0)
    if bare_rise <= RISE:
        return bare_rise, 0
    low, high = 0, -(-most // MULTIPLE)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if rise(middle * MULTIPLE) <= GOAL else (middle, high)
    return bare_rise, high * MULTIPLE


def _row_order(
    tokens: TrimmableTokenizer, kept: Sequence[int], unnamed: list[int], rows: int
) -> list[int]:
    """Return the original row of each new one: those of `kept`, then rows without a token.

    A kept token without a row, which only the tokenizer's settings can name, gets a row that would
    otherwise be removed.
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
    likely: int = 0,
    order: list[int] | None = None,
) -> set[int]:
    """Return the tokens to keep: `required`, and those with `counts` (tokens,) above 0.

    `required` is closed over merges, and every other token comes with its parts. Tokens of
    `_fill_order` fill the vocabulary, with `n_unnamed` rows without a token, by `likely` more and
    up to a multiple of MULTIPLE; a token is added only if its parts fit. `reserved` tokens are kept
    only if texts use them.
    """
    order, used, chosen = order or _fill_order(tokens, counts)[0], counts > 0, set(required)
    chosen.update(*(tokens.merge_parts(index) for index in order if used[index]))
    limit = _round_up(len(chosen) + likely + n_unnamed) - n_unnamed
    for index in order:
        if len(chosen) == limit:
            break
        if index not in chosen and index not in reserved:
            new = tokens.merge_parts(index) - chosen
            chosen |= new if len(chosen) + len(new) <= limit else set()
    return chosen


def _fill_order(tokens: TrimmableTokenizer, counts: Tensor) -> tuple[list[int], int]:
    """Return all tokens, by falling count and then most likely first, and how many are likely.

    A tokenizer learns its most frequent tokens first. By Zipf's law, the token of rank r among
    the N of a script thus has about 1 / (r ln N) of that script's share of the text. Tokens with
    letters that are not common in the text, and those below UNLIKELY, come last.
    """
    n_letters: Counter[str] = Counter()
    shares: Counter[str | None] = Counter()  # by script; None: no letters
    used = [(i, n) for i, n in enumerate(counts.tolist()) if n and i in tokens.id_to_token]
    for index, n in used:
        shares[tokens.scripts[index]] += n
        for letter in set(tokens.texts[index]):
            n_letters[letter] += n
    total = sum(shares.values())
    common = {letter for letter, n in n_letters.items() if n >= COMMON_LETTER * total}
    by_count = [index for index, _ in sorted(used, key=lambda item: (-item[1], item[0]))]
    ranks: Counter[str | None] = Counter()
    sizes = Counter(tokens.scripts.values())
    expected: dict[int, float] = {}
    for index, script in sorted(tokens.scripts.items()):
        ranks[script] += 1
        zipf = ranks[script] * math.log(sizes[script] + 1)
        known = bool(tokens.texts[index]) and common.issuperset(tokens.texts[index])
        expected[index] = shares[script] / total / zipf if known and total else 0.0
    unused = sorted(tokens.id_to_token.keys() - set(by_count), key=lambda i: (-expected[i], i))
    return by_count + unused, sum(expected[index] >= UNLIKELY for index in unused)


def _round_up(rows: int) -> int:
    """Return the next multiple of MULTIPLE that is not in MISLEADING_ROWS."""
    rounded = rows + -rows % MULTIPLE
    return rounded + MULTIPLE if rounded in MISLEADING_ROWS else rounded


def count_tokens(
    corpora: Sequence[Corpus], tokenizer: PreTrainedTokenizerBase, dist: DistContext
) -> tuple[Tensor, list[str]]:
    """Return how often each token occurs in the train text, (tokens,) int64, and a sample.

    The sample is every HELD_OUT-th text (a piece if texts are few), up to HELD_CHARACTERS. The
    processes of `dist` share the texts. Raises UserError for any problem with them.
    """
    n_tokens = max(tokenizer.get_vocab().values()) + 1
    counts, held, room = torch.zeros(n_tokens, dtype=torch.long), [], HELD_CHARACTERS
    for corpus in corpora:
        source, documents = corpus.source, corpus.documents("train")
        if not source.hub and len(documents) < HELD_OUT:
            documents = [piece for document in documents for piece in pieces_of(document)]
        total, limit = (None, HUB_CHARACTERS) if source.hub else (len(documents), math.inf)
        what, seen = f"counting tokens of {source.name}", 0
        with progress(total, what, "text", dist.is_main) as on_progress:
            for batch in batches(documents, limit):
                for document in batch[-(seen + 1) % HELD_OUT :: HELD_OUT]:
                    if room > 0:
                        held.append(document_text(tokenizer, document))
                        room -= len(held[-1])
                seen += len(batch)
                local = [document_text(tokenizer, each) for each in batch[dist.rank :: dist.size]]
                ids = torch.tensor([*chain(*encode_all(tokenizer, local))], dtype=torch.long)
                counts += torch.bincount(ids, minlength=n_tokens)
                on_progress(len(batch))
    counts = counts.to(dist.device)
    dist.sum_([counts])
    return counts.cpu(), held


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of texts, encoded on all cores, without special tokens."""
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
