"""A vocabulary of one language: of a model's tokens only those that texts use, proven to do.

    python main.py --model MODEL --trim_vocabulary --calibration_data uk --prune_method admm ...
    bash launch.sh vocabulary MODEL OUT --data uk en

What stays: every token that the sources' train text uses, with all that merges make it of; bytes,
special and added tokens, and what the chat template and the configs name; and of the rest the next
most frequent ones, until there is a multiple of 64. Rows of the embedding and of the head that
spell other languages go, which every engine realises.

    trimmed = choose(...)             before any weight is read: the smaller tokenizer
    trimmed.prove(source)             that test texts read the same
    trimmed.drop_rows_(model)         and check_same_logits: that the model does the same
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lib.data.counts import UNSEEN, Counted, compared, compared_texts, count_tokens
from lib.data.sources import Source
from lib.data.tokenizer import FLAG, Pieces
from lib.distributed.context import DistContext
from lib.model.access import Checkpoint
from lib.model.rows import TRIMMED_FROM, keep_rows_
from lib.util.errors import UserError

MULTIPLE = 64  # of which the number of rows is one: GPUs like their matrices so
# rows by which llama.cpp's converter takes a LLaMA for CodeLlama or Granite
TAKEN = frozenset({32016, 49152})
PROOF_TOKENS = 256  # of a test window, before and after
NOTE = (
    "The vocabulary was trimmed: fewer tokens share the probability, so perplexity falls by "
    "itself. Compare with other vocabularies by bits per byte."
)


@dataclass
class Trimmed:
    """The smaller vocabulary. `rows` (rows,): what each of its numbers was before; numbers past
    the tokenizer's are rows of the model that no token has. `facts`: what a result says of it."""

    before: PreTrainedTokenizerBase
    tokenizer: PreTrainedTokenizerBase
    rows: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of all that it changes: rows and tokenizer."""
        whole = hashlib.sha256(self.rows.numpy().tobytes())
        whole.update(self.tokenizer.backend_tokenizer.to_str().encode())
        return whole.hexdigest()[:16]

    def prove(self, sources: Iterable[Source]) -> list[str]:
        """A line for each test text: how it is cut now. UserError where one reads otherwise."""
        strange = compared_texts([UNSEEN, *UNSEEN], self.before, self.tokenizer, self.rows)
        if strange.damaged is not None:
            sign = [UNSEEN, *UNSEEN][strange.damaged - 1]
            raise UserError(
                f"{FLAG}: {sign!r}, which no text had, does not read the same with the trimmed "
                "tokenizer; nothing is saved, leave the flag out"
            )
        lines, told = [], []
        for source in sources:
            found = compared(source, self.before, self.tokenizer, self.rows)
            if found.damaged is not None:
                raise source.error(
                    f"its test document {found.damaged} does not read the same with the trimmed "
                    f"tokenizer; nothing is saved, leave {FLAG} out"
                )
            told.append(
                {"name": source.name, "documents": found.documents, "alike": found.alike}
                | {"tokens_before": found.before, "tokens": found.after, "rise": found.rise}
            )
            lines.append(
                f"{source.name}: all {found.documents} test documents read the same, "
                f"{found.alike} are cut alike, {found.rise:+.2%} tokens"
            )
        self.facts["tests"] = told
        return lines

    def line(self) -> str:
        """What was kept, for the log."""
        facts = self.facts
        return (
            f"vocabulary: {facts['rows']} of {facts['rows_before']} rows stay, "
            f"{facts['tokens']} of {facts['tokens_before']} tokens; the texts "
            f"({facts['documents']} documents, {facts['characters']} characters) use "
            f"{facts['used']}; {facts['seconds']:.1f} s"
        )

    def old(self, ids: Tensor) -> Tensor:
        """Numbers of the whole vocabulary for those of the trimmed one."""
        return self.rows.to(ids.device)[ids]

    def kept(self, logits: Tensor) -> Tensor:
        """Of logits (..., rows before) those of the tokens that stay (..., rows)."""
        return logits.index_select(-1, self.rows.to(logits.device))

    def drop_rows_(self, model: nn.Module) -> None:
        """Leave the model the rows of the trimmed vocabulary only, tied or not."""
        keep_rows_(model, self.rows)


def told_of(trimmed: Trimmed | None, config: Any) -> dict[str, Any] | None:
    """What a result says of a vocabulary that was trimmed, in this run or, as its `config` knows,
    before; None for a whole one."""
    before = getattr(config, TRIMMED_FROM, None)
    if trimmed or before is None:
        return trimmed and trimmed.facts
    rows = config.get_text_config(decoder=True).vocab_size
    return {"note": NOTE, "rows": rows, "rows_before": before}


def trim(
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    config: Any,
    sources: Sequence[Source],
    dist: DistContext,
    *,
    rows: int,
    named: set[int],
    size: int | None = None,
    minimum: int = 1,
) -> Trimmed:
    """Count the train text of `sources`, choose, and make the smaller tokenizer.

    `rows`: those of the model's embedding; `named`: tokens that its configs name; `size`: at most
    so many rows stay; `minimum`: tokens that occur less often are dropped. Processes of a `dist`
    share the counting. UserError where the tokenizer can't be trimmed, or so far.
    """
    start = time.perf_counter()
    pieces = Pieces(tokenizer, str(checkpoint))
    beyond = max(pieces.tokens) + 1
    if beyond > rows:
        raise UserError(
            f"{FLAG}: the tokenizer of {checkpoint} has tokens up to number {beyond - 1}, its "
            f"embedding {rows} rows; these do not belong together"
        )
    needed = _closure(pieces, pieces.indispensable() | (named & pieces.tokens.keys()))
    needed |= _closure(pieces, pieces.of_template())
    extra = sorted(one for one in named if one < rows and one not in pieces.tokens)
    if size is not None and len(needed) + len(extra) > size:
        raise UserError(
            f"--vocabulary_size {size}: bytes, special tokens and what the model's files name take "
            f"{len(needed) + len(extra)}; give at least so many"
        )
    if size in TAKEN:
        size -= 1
    counted = _all_counted(count_tokens(sources, tokenizer, dist.rank, dist.size), dist)
    chosen = choose(pieces, counted.counts, needed, len(extra), size, minimum)
    spare = [one for one in range(rows) if one not in pieces.tokens and one not in extra]
    most = rows if size is None else min(rows, size)
    missing = min(_filled(len(chosen) + len(extra)), most) - len(chosen) - len(extra)
    kept = pieces.in_order(chosen)
    order = kept + sorted(extra + spare[:missing])
    used = [one for one in counted.counts.nonzero().flatten().tolist() if one in pieces.tokens]
    trimmed = Trimmed(
        tokenizer,
        pieces.reloaded(kept, config, checkpoint.trust_remote_code),
        torch.tensor(order),
    )
    trimmed.facts = {
        "note": NOTE,
        "rows": len(order),
        "rows_before": rows,
        "tokens": len(kept),
        "tokens_before": len(pieces.tokens),
        "used": len(used),
        "counted": int(counted.counts.sum()),
        "documents": counted.documents,
        "characters": counted.characters,
        "sources": [source.text for source in sources],
        "digest": trimmed.digest,
        "seconds": round(time.perf_counter() - start, 3),
    }
    return trimmed


def choose(
    pieces: Pieces,
    counts: Tensor,
    needed: set[int],
    extra: int = 0,
    size: int | None = None,
    minimum: int = 1,
) -> set[int]:
    """The tokens that stay: `needed`, and by falling `counts` (tokens,) those that texts use.

    `needed` is closed over merges. Each comes with its parts; one that would not fit into `size`
    with `extra` rows is left out. What is missing to a multiple of MULTIPLE is filled up, to the
    next one where the first is TAKEN.
    """
    number = torch.arange(len(counts))
    by_count = number[torch.argsort(counts, descending=True, stable=True)].tolist()
    by_count = [one for one in by_count if one in pieces.tokens]
    times = counts.tolist()
    kept, most = set(needed), float("inf") if size is None else size - extra
    for one in by_count:
        if times[one] < minimum:
            break
        _take_(kept, pieces, one, most)
    least = _filled(len(kept) + extra) - extra
    for one in by_count:  # of equal count, 0 too, those that were learnt first
        if len(kept) >= least:
            break
        _take_(kept, pieces, one, min(least, most))
    return kept


def _filled(rows: int) -> int:
    """The next multiple of MULTIPLE, of those that are not TAKEN."""
    filled = rows + -rows % MULTIPLE
    return filled + MULTIPLE if filled in TAKEN else filled


def _take_(kept: set[int], pieces: Pieces, one: int, most: float) -> None:
    """Add a token with its parts, if there is room."""
    if one not in kept:
        more = pieces.parts(one) - kept
        if len(kept) + len(more) <= most:
            kept |= more


def _closure(pieces: Pieces, numbers: Iterable[int]) -> set[int]:
    return {part for one in numbers for part in pieces.parts(one)}


def _all_counted(mine: Counted, dist: DistContext) -> Counted:
    """What all processes counted; documents and characters each of them has seen."""
    if dist.size > 1:
        dist.barrier()
        counts = mine.counts.to(dist.device)
        for handle in dist.all_reduce_([counts]):
            handle.wait()
        mine.counts = counts.cpu()
    return mine


def check_same_logits(before: Tensor, after: Tensor) -> float:
    """Relative difference of logits (1, positions, rows) of the kept tokens, before and after.

    UserError where it is beyond rounding: over eight roundings of the dtype, or over 1e-5.
    """
    assert before.shape == after.shape
    limit = max(8 * torch.finfo(before.dtype).eps, 1e-5)
    before, after = before.double(), after.double()
    ratio = float((after - before).norm() / before.norm().clamp_min(1e-300))
    if not ratio <= limit:
        raise UserError(
            f"{FLAG}: logits of the whole and of the trimmed model differ by {ratio:.2g} (rounding "
            f"explains {limit:.2g}); nothing is saved, leave the flag out"
        )
    return ratio
