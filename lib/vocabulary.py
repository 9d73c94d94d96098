"""Vocabulary trimming: keep only the tokens that the texts of one language use.

    python main.py --model MODEL --trim_vocabulary --calibration_data uk --prune_method admm ...
    python main.py --model MODEL --trim_vocabulary --vocabulary_data uk en --save_model OUT

It keeps every token that the sources' train text uses, with all tokens that it is merged from. It
also keeps the bytes, special and added tokens, and the tokens of the chat template and the configs.
A small text does not use all tokens of its language: the likely ones are kept too, as far as a
held-out tenth of the documents shows that they are worth their rows (lib/data/token_choice.py).
Reserved special tokens are removed, unless a text, the template or a config uses them. All other
rows of the embedding and the head are removed, which makes the model smaller in every engine.

    trimmed = trim_vocabulary(...)      reads no weights, returns the smaller tokenizer
    trimmed.verify(tests)                checks that test texts decode to the same text
    trimmed.hold_out(test, seqlen)      windows of a test text by both tokenizers, of equal bytes
    keep_rows_(model, trimmed.rows)     trims the model; check_same_outputs compares its logits
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data.chats import Document
from .data.documents import Corpus, batches, passages
from .data.samples import Sample, Windows, join, packed
from .data.templates import document_text
from .data.token_choice import (
    PRICE,
    choose,
    read_list,
    round_up,
)
from .data.token_counts import count_tokens
from .data.trimmed_tokenizer import FLAG, TrimmableTokenizer
from .data.trimming_cost import COSTS
from .data.windows import sample_of, test_documents
from .model.checkpoint import Checkpoint
from .util.errors import UserError
from .util.files import write_text
from .util.ranks import DistContext

MEASURED_BYTES = 2**14  # of a test text, on which a CPU measures both vocabularies
MEASURED_TOKENS = 512  # largest window for that, in tokens
TOO_COSTLY = 0.02  # rise of bits per byte above which a warning is printed
# scripts and signs that are rare in texts, some beyond the first 65,536
RARE_SIGNS = "🦉🏳️‍🌈 漢字の書き方 한국어 ไทย ꙮ𝔘𐍈 ﷽ ⅷ\u200b\ufeff\t\r\n  \x00¤"
PROOF_TOKENS = 256  # tokens of a test window whose logits are compared
FLAG_ROWS = "--vocabulary_rows"
LIST = "vocabulary.json"  # in --save: the tokens of a run, for --vocabulary_rows of another
NOTE = (
    "The vocabulary was trimmed: fewer tokens share the probability, so perplexity falls by "
    "itself. Compare with other vocabularies by bits per byte."
)


class SavesTooLittle(UserError):
    """Over MOST_ROWS of the rows would stay."""


@dataclass
class TrimmedVocabulary:
    """The smaller vocabulary.

    `rows` (rows,) holds the original row of each new one; those after the `ids` have no token.
    `record` goes into results.json.
    """

    original_tokenizer: PreTrainedTokenizerBase
    tokenizer: PreTrainedTokenizerBase
    rows: Tensor
    ids: list[int]  # original ids of the tokens that stay
    record: dict[str, Any] = field(default_factory=dict)
    # windows by the original and by the trimmed tokenizer, and the number of bytes that count
    held_out: tuple[Windows, Windows, int] | None = None
    held_out_name: str = ""  # of their text

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

    def hold_out(self, corpus: Corpus, seqlen: int, size: int, most: int | None = None) -> None:
        """Set `held_out` to windows by both tokenizers: a test text, or the answers of dialogues.

        About `size` bytes and at most `most` windows, spread over the documents; window i has the
        same text by both. A text's first token is predicted too, from BOS or an end token, so that
        all its bytes count.
        """
        documents = test_documents(corpus)
        seqlen = min(seqlen, MEASURED_TOKENS * (1 if isinstance(documents[0], str) else 2))
        pieces: list[Document] = []
        for document in documents:
            pieces += passages(document, seqlen) if isinstance(document, str) else [document]
        step = max(1, sum(len(each.encode()) for each in pieces) // size)
        groups: list[list[tuple[Sample, Sample, int]]] = []  # one for each window
        filled = [0, 0]  # tokens in the last one
        for document in pieces[::step]:
            pair = self._samples(document)
            while isinstance(document, str) and max(len(one.ids) for one in pair) > seqlen:
                document = document[: len(document) // 2]
                pair = self._samples(document)
            lengths = [len(one.ids) for one in pair]
            if max(lengths) > seqlen or not all(one.mask[1:].any() for one in pair):
                continue
            text = document
            if not isinstance(document, str):
                counted = pair[0].ids[pair[0].mask]
                plain = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
                text = self.original_tokenizer.decode(counted, **plain)  # markers are no bytes
            if not groups or any(sum(pair) > seqlen for pair in zip(filled, lengths, strict=True)):
                groups.append([])
                filled = [0, 0]
            groups[-1].append((*pair, len(text.encode())))
            filled = [*map(sum, zip(filled, lengths, strict=True))]
        if groups := groups[:most]:
            size = sum(length for group in groups for *_, length in group)
            by_tokenizer = (
                join([*chain(*(packed([each[which] for each in g], seqlen) for g in groups))])
                for which in (0, 1)
            )
            self.held_out, self.held_out_name = (*by_tokenizer, size), corpus.source.name

    def _samples(self, document: Document) -> list[Sample]:
        """Return a document's tokens by both tokenizers; before a text is BOS or an end token."""
        tokenizers = self.original_tokenizer, self.tokenizer
        if not isinstance(document, str):
            return [sample_of(each, document) for each in tokenizers]
        samples = []
        for tokenizer in tokenizers:
            begins = tokenizer.bos_token_id
            begins = tokenizer.eos_token_id if begins is None else begins
            ids = torch.tensor([begins or 0, *encode_all(tokenizer, [document])[0]])
            samples.append(Sample(ids, torch.arange(len(ids)) > 0))
        return samples

    def record_cost(self, original: Tensor, trimmed: Tensor) -> None:
        """Record what trimming costs by both models' losses on `held_out`, (n,) each, in nats."""
        losses = (each.cpu().numpy() for each in (original, trimmed))
        record_cost(self.record, *losses, self.held_out[-1])
        self.record["measured_on"] = {
            "name": self.held_out_name,
            "bytes": self.held_out[-1],
            "model": self.original_tokenizer.name_or_path,
        }

    def cost_lines(self) -> list[str]:
        """Return what trimming costs; a line that names what would help, if it is much."""
        record = self.record
        if "measured_on" not in record:
            return [f"{FLAG}: its cost cannot be measured, since the test text has no window"]
        measured_on = record["measured_on"]
        lines = [cost_line(record, measured_on["bytes"], measured_on["name"])]
        cost = record["bits_per_byte_trimmed"] / record["bits_per_byte_original"] - 1
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
        why = "the texts are dialogues, or too short to hold any out"
        if record["rise"] is not None:
            why = f"held-out text took about {record['rise']:+.2%} tokens without them"
        return f"{line}, and {record['likely']} likely ones are kept, since {why}"

    def write(self, folder: Path) -> None:
        """Write LIST, from which another run takes the same tokens."""
        tokens = self.original_tokenizer.convert_ids_to_tokens(self.ids)
        kept = {"ids": self.ids, "tokens": tokens, "rows": self.rows.tolist()}
        text = json.dumps(kept | {"record": self.record}, ensure_ascii=False)
        write_text(folder / LIST, text)


def trim_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    config: Any,
    corpora: Sequence[Corpus],
    dist: DistContext,
    *,
    rows: int,
    config_ids: set[int],
    price: float = PRICE,
    kept: int | str | None = None,
    all_letters: bool = True,
) -> TrimmedVocabulary:
    """Count the train text of `corpora`, choose the tokens, and make the smaller tokenizer.

    `rows` is the number of rows of the model's embedding, `config_ids` are the ids in its configs,
    `kept` is the number of rows to keep (None: by the `price`), or a file with those of an earlier
    run. A tokenizer without bytes keeps `all_letters`, so that every text decodes as before, or
    those of the texts' scripts. Raises UserError if the tokenizer cannot be trimmed.
    """
    tokens = TrimmableTokenizer(tokenizer, str(checkpoint))
    if isinstance(kept, str):
        needed = (tokens.basic_ids() | tokens.named_ids() | config_ids) & tokens.id_to_token.keys()
        listed = read_list(FLAG_ROWS, kept, tokens.id_to_token, tokens.name, needed)
        ids, order, record = listed["ids"], listed["rows"], listed["record"]
        if (before := record.get("rows_before")) != rows:
            problem = f"its model has {before} rows, and {checkpoint} has {rows}"
            raise UserError(f"{FLAG_ROWS} {kept}", problem, "Name one of the same vocabulary")
        if record.get("measured_on", {}).get("model") != tokenizer.name_or_path:
            costs = "measured_on", *COSTS
            record = {key: value for key, value in record.items() if key not in costs}
    else:
        unnamed = sorted(i for i in config_ids if i < rows and i not in tokens.id_to_token)
        def ids_of(texts: list[str]) -> list[np.ndarray]:
            return [np.array(ids, int) for ids in encode_all(tokenizer, texts)]

        text_of, most = partial(document_text, tokenizer), max(tokens.id_to_token) + 1
        counts, held_out = count_tokens(corpora, ids_of, text_of, most, price)
        vocabulary = tokens.vocabulary(config_ids, rows)
        used = [i for i in np.flatnonzero(counts).tolist() if i in tokens.id_to_token]
        if used and used[-1] >= rows:
            raise UserError(
                FLAG,
                f"the texts use token {tokens.id_to_token[used[-1]]!r} with the id {used[-1]}, "
                f"but the embedding of {checkpoint} has {rows} rows",
                "Resize it to the tokenizer, or remove the added tokens",
            )
        options = dict(price=price, rows=kept, n_unnamed=len(unnamed))
        choice = choose(vocabulary, counts, held_out, **options)
        model_ids = {tokens.token_to_id[token] for token in tokens.model_tokens}
        ids = sorted(choice.ids, key=lambda i: (i not in model_ids, i))  # added tokens last
        order = _row_order(tokens, ids, unnamed=unnamed, rows=rows)
        if kept and len(order) > kept:
            problem = "bytes, special tokens and the chat template take more"
            raise UserError(f"{FLAG_ROWS} {kept}", problem, f"Give at least {len(order)}")
        record = {
            "rows": len(order),
            "rows_before": rows,
            "tokens": len(ids),
            "tokens_before": len(tokens.id_to_token),
            "used": choice.used,
            "rise": choice.rise,
            "likely": choice.likely,
            "reserved": len(tokens.reserved_ids() - set(ids)),
            "sources": [corpus.source.text for corpus in corpora],
        }
    smaller = tokens.trimmed_tokenizer(ids, config, checkpoint.trust_remote_code)
    trimmed = TrimmedVocabulary(tokenizer, smaller, torch.tensor(order), ids, record)
    record["digest"] = trimmed.digest
    return trimmed


def measured_bytes(device: str) -> int:
    """Return the bytes of text on which trimming is measured; a GPU measures more."""
    return MEASURED_BYTES * (1 if device == "cpu" else 4)


def _row_order(
    tokens: TrimmableTokenizer, kept: Sequence[int], unnamed: list[int], rows: int
) -> list[int]:
    """Return the original row of each new one: those of `kept`, then rows without a token.

    A kept token without a row, which only the tokenizer's settings can name, gets a row that would
    otherwise be removed.
    """
    spare = [i for i in range(rows) if i not in tokens.id_to_token and i not in unnamed]
    missing = min(round_up(len(kept) + len(unnamed)), rows) - len(kept) - len(unnamed)
    order = [*kept, *sorted(unnamed + spare[: max(0, missing)])]
    used = set(order)
    dropped = (i for i in range(rows - 1, -1, -1) if i not in used)
    return [i if i < rows else next(dropped, rows - 1) for i in order]


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of texts, encoded on all cores, without special tokens."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def record_cost(
    record: dict[str, Any], original: np.ndarray, trimmed: np.ndarray, n_bytes: int
) -> None:
    """Record COSTS by both models' losses on the same windows, (n,) each, in nats.

    The interval is that of a ratio of sums over independent windows (Cochran, Sampling Techniques,
    1977, section 6.4), with an approximation of Student's t; None for few windows.
    """
    ratio, whole, freedom = trimmed.sum() / original.sum(), original.sum(), len(original) - 1
    interval, bits = None, whole / math.log(2) / n_bytes
    if freedom > 2:
        spread = np.square(trimmed - ratio * original).sum() * len(original) / freedom
        half = math.sqrt(spread) * (1.96 + 2.37 / freedom + 2.82 / freedom**2) / whole
        interval = [float(ratio - 1 - half), float(ratio - 1 + half)]
    record |= zip(COSTS, (float(bits), float(bits * ratio), interval), strict=True)


def cost_line(record: dict[str, Any], n_bytes: int, text: str) -> str:
    """Return a line on the cost in a record, measured on so many bytes of `text`."""
    original, trimmed, interval = (record[name] for name in COSTS)
    between = " (95% interval {:+.2%} to {:+.2%})".format(*interval) if interval else ""
    return (
        f"trimming costs {trimmed / original - 1:+.2%} bits per byte{between} on {n_bytes:,} bytes "
        f"of {text}: original {original:.4f}, trimmed {trimmed:.4f}"
    )
