"""Choose the tokens of a GGUF file by texts, which llama.cpp's own tokenizer splits."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...data.documents import Corpus, batches, check_corpus, many_documents
from ...data.gguf_file import write
from ...data.gguf_vocabulary import GgufVocabulary, tokenizer_model
from ...data.languages import language_text
from ...data.lines import LINES
from ...data.sources import has_test, parse_source, parse_sources
from ...data.token_choice import (
    HELD_OUT,
    MOST_CHARACTERS,
    MOST_ROWS,
    PRICE,
    Choice,
    choose,
    round_up,
)
from ...run.flags import PRICED
from ...util.errors import UserError
from ...util.progress import progress
from ..gguf.llama import INSTALL, Llama

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROUNDS = 16  # of counting, each over a part of the documents that is spread over the text
STEP = 1_000_000  # characters counted at a time


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that `corpora_of` and `choose_by_text` read, but --rows."""
    add = parser.add_argument
    text = "languages to keep, as BCP 47 tags; reads FineWeb2 from the Hub"
    add("--language", nargs="+", default=[], metavar="TAG", help=text)
    text = "texts whose tokens stay: files, folders or Hub datasets"
    add("--data", nargs="+", default=[], metavar="SOURCE", help=text)
    add("--column", default="text", help="column of the texts (default: text)")
    text = f"tokens saved per million for which an unused one stays (default: {PRICE})"
    add("--price", type=PRICED, default=PRICE, metavar="TOKENS", help=text)


def corpora_of(
    args: argparse.Namespace, needed: Sequence[str] = ("gguf", "xllamacpp")
) -> list[Corpus]:
    """Return the texts that --language and --data name; a tenth of a file is held out.

    Raises UserError if one cannot be read, and if one of the packages `needed` is missing.
    """
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(f"IN {args.source}", f"{missing[0]} is not installed", f"Run {INSTALL}")
    named = [(language_text(tag)[1], "--language") for tag in args.language]
    sources = [parse_source(text, flag, as_text=True) for text, flag in named]
    sources += parse_sources(args.data, "--data", column=args.column, as_text=True)
    corpora = [Corpus(each, bool(each.path) and not has_test(each)) for each in sources]
    for corpus in corpora:
        check_corpus(corpus, "train")
    return corpora


def check_saving(args: argparse.Namespace, left: int, rows: int, what: str) -> None:
    """Raise UserError for the model `what` if most of its rows would be left."""
    if left > MOST_ROWS * rows:
        problem = f"{left} of {rows} rows would stay, over {MOST_ROWS:.0%}"
        fix = "Give text of fewer languages, or --rows"
        if args.keep or args.rows:
            fix = "Name a shorter list" if args.keep else "Give fewer --rows"
        raise UserError(what, problem, fix)


def tokenizer_of(path: Path, vocabulary: GgufVocabulary, kept: Sequence[int]) -> Llama:
    """Return llama.cpp's tokenizer with the tokens `kept`, from a file of a few megabytes."""
    for _ in write(path, *tokenizer_model(vocabulary.trimmed(kept)[0])):
        pass
    try:
        return Llama(path)
    except ValueError as error:
        fix = "Only a vocabulary that llama.cpp reads can be trimmed"
        raise UserError(vocabulary.file.what, str(error), fix) from error
    finally:
        path.unlink()


def choose_by_text(
    args: argparse.Namespace, corpora: Sequence[Corpus], vocabulary: GgufVocabulary, llama: Llama
) -> Choice:
    """Count the train texts, every tenth document apart, and choose the tokens.

    In n tokens of text, a token that was not seen saves about 1 / n: counting ends where that is
    below its row's price, since the list would hardly change.
    """
    encode, counts = llama.encode_all, np.zeros((2, vocabulary.rows), np.int64)
    beside = Path(args.source).absolute().parent / "tokenizer.json"
    if tokenizer := _read_tokenizer(beside):  # ten times as fast
        tokenizer.no_truncation()
        tokenizer.no_padding()

        def fast(texts: list[str]) -> list[np.ndarray]:
            batch = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, np.int32) for encoding in batch]

        proof = [*LINES]
        for corpus in corpora:
            proof += islice(corpus.documents("test"), 64)
        fits = tokenizer.get_vocab_size() <= vocabulary.rows
        if fits and all(map(np.array_equal, fast(proof), encode(proof))):
            encode = fast
            print(f"{beside} gives the same tokens, and counts them")
    start = 0  # every tenth document of all is held out
    for corpus in corpora:
        documents, total, read = many_documents(corpus, HELD_OUT), MOST_CHARACTERS, 0
        numbers = count(start)
        if not corpus.source.hub:
            total = min(total, sum(map(len, documents)))
            # in rounds over the text, whose genres may stand one after the other
            order = [i for first in range(ROUNDS) for i in range(first, len(documents), ROUNDS)]
            documents = [documents[i] for i in order]
            numbers = iter([start + i for i in order])
            start += len(order)
        enough, before = 1e6 / args.price if args.price else math.inf, counts[0].sum()
        with progress(total, f"counting tokens of {corpus.source.name}", "B") as on_progress:
            for batch in batches(documents, total, STEP):
                for ids in encode(batch):
                    np.add.at(counts[0], ids, 1)
                    if next(numbers) % HELD_OUT == HELD_OUT - 1:
                        np.add.at(counts[1], ids, 1)
                read += (size := sum(map(len, batch)))
                on_progress(size)
                if (n := counts[0].sum() - before) >= enough:
                    break
        if n >= enough and read < total:
            which = f"{read:,} of at most {total:,} characters are counted"
            print(f"{corpus.source.name}: {which}; a token not seen is not worth its row")
    needed = {int(i) for ids in llama.encode_all(vocabulary.template_texts()) for i in ids}
    tokens = vocabulary.vocabulary(needed)
    choice = choose(tokens, counts[0], counts[1], price=args.price, rows=args.rows)
    if args.rows and len(choice.ids) > args.rows:
        problem = "bytes, special tokens and the chat template take more"
        raise UserError(
            f"--rows {args.rows}", problem, f"Give at least {round_up(len(choice.ids))}"
        )
    return choice


def _read_tokenizer(file: Path) -> Tokenizer | None:
    """Return the tokenizer of a file, or None if it cannot be read, as a Git LFS pointer."""
    if not (file.is_file() and find_spec("tokenizers")):
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # noqa: BLE001  tokenizers raises no other
        return None
