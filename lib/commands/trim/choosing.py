"""What a folder and a GGUF file share: the flags on texts, their documents, and the choice."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ...data.chats import Document, plain_text
from ...data.documents import Corpus, check_corpus, read_line
from ...data.languages import language_text
from ...data.sources import has_test, parse_source, parse_sources
from ...gguf.llama import INSTALL
from ...run.flags import PRICED
from ...util.errors import UserError, first_of
from ...util.host import gib
from ...util.quirks import KNOWN_PROMPTS
from ...vocabulary.choice import MOST_ROWS, PRICE, Choice, choose, read_list, round_up, with_parts
from ...vocabulary.cost import MOST_COST, cost_line
from ...vocabulary.counts import Encode
from ...vocabulary.kinds import Vocabulary


class NotWorthIt(UserError):
    """Trimming would cost more than --most_cost, or save too little."""


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that `corpora_of` and `choose_by_text` read, but --rows."""
    add = parser.add_argument
    text = "languages to keep, as BCP 47 tags; reads FineWeb2 from the Hub"
    add("--language", nargs="+", default=[], metavar="TAG", help=text)
    text = "texts whose tokens stay: files, folders or Hub datasets"
    add("--data", nargs="+", default=[], metavar="SOURCE", help=text)
    add("--column", default="text", help="column of the texts (default: text)")
    text = "texts whose tokens stay, such as 'query: '; known prompts of a model stay anyway"
    add("--prompts", nargs="+", default=[], metavar="TEXT", help=text)
    text = f"tokens saved per million for which an unused one stays (default: {PRICE})"
    add("--price", type=PRICED, default=PRICE, metavar="TOKENS", help=text)


def corpora_of(
    args: argparse.Namespace,
    needed: Sequence[str] = ("gguf", "xllamacpp"),
    splits: Sequence[str] = ("train", "test"),
) -> list[Corpus]:
    """Return the texts that --language and --data name; a tenth of a file is held out.

    Prints a line on the files of each folder that the `splits` read. Raises UserError if one cannot
    be read, and if one of the packages `needed` is missing.
    """
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(f"IN {args.source}", f"{missing[0]} is not installed", f"Run {INSTALL}")
    named = [(language_text(tag)[1], "--language") for tag in args.language]
    sources = [parse_source(text, flag) for text, flag in named]
    sources += parse_sources(args.data, "--data", column=args.column)
    corpora = [Corpus(each, bool(each.path) and not has_test(each)) for each in sources]
    for corpus in corpora:
        check_corpus(corpus, splits[0])
        if corpus.source.path and corpus.source.path.is_dir():
            print(read_line(corpus, *splits), flush=True)
    return corpora


def prompts_of(
    args: argparse.Namespace, names: Iterable[str], own: Iterable[str] = ()
) -> list[str]:
    """Return and print the texts whose tokens stay: of --prompts, the model's `own`, and those
    that are known of the families in its `names`."""
    named = re.sub(r"[\W_]+", " ", "\n".join(names).lower())
    known = [texts for name, texts in KNOWN_PROMPTS.items() if re.search(name, named)]
    prompts = [*dict.fromkeys(filter(None, chain(args.prompts, own, *known)))]
    if prompts:
        print(f"prompts whose tokens stay: {first_of([*map(repr, prompts)])}", flush=True)
    return prompts


def require_prompts_(vocabulary: Vocabulary, encode: Encode, prompts: Iterable[str]) -> None:
    """Require the tokens of prompts, with and without the blanks at their ends."""
    texts = [text for prompt in prompts for text in (prompt, prompt.rstrip())]
    vocabulary.reasons["prompts"] = {int(index) for ids in encode(texts) for index in ids}


def text_reader(
    what: str, template: str | None, tokens: Mapping[str, Any]
) -> Callable[[Document], str]:
    """Return a function for the text of a document: a dialogue by the chat template of `what`.

    `tokens` are the special tokens that a template may name. Where there is none that works, or no
    transformers to run it, a dialogue is the text of its messages, and a line says so.
    """

    @cache  # only dialogues need it
    def opened() -> Any:
        try:
            from ...data.templates import open_template  # imports torch

            return open_template(what, template, tokens)
        except (ImportError, UserError) as error:
            print(f"{what}: dialogues are read as plain text, without a chat template ({error})")

    def text_of(document: Document) -> str:
        if isinstance(document, str) or not opened():
            return plain_text(document)
        return opened().fitted(document.messages, tools=document.tools)[0]

    return text_of


def choose_by_text(
    args: argparse.Namespace, vocabulary: Vocabulary, counts: np.ndarray, n_unnamed: int = 0
) -> tuple[Choice, dict[str, Any]]:
    """Choose the tokens by their `counts` (2, ids), and record how."""
    options = dict(price=args.price, rows=args.rows, n_unnamed=n_unnamed)
    choice = choose(vocabulary, *counts, **options)
    if args.rows and len(choice.ids) + n_unnamed > args.rows:
        least = round_up(len(choice.ids) + n_unnamed)
        problem = "bytes, special tokens and the chat template take more"
        raise UserError(f"--rows {args.rows}", problem, f"Give at least {least}")
    reasons = {reason: sorted(ids) for reason, ids in vocabulary.reasons.items()}
    record = {"used": choice.used, "likely": choice.likely, "rise": choice.rise}
    used = {index for index in choice.ids if counts[0][index]}
    needed = with_parts(vocabulary, used | vocabulary.required)
    record["kept_for"] = len(used), len(needed - used), len(choice.ids) - len(needed)
    return choice, record | {"required": reasons}


def rows_line(record: Mapping[str, Any]) -> str:
    """Return how many rows stay and, if texts chose them, by which reason; each counts once."""
    line = "{rows:,} of {rows_before:,} rows stay".format(**record)
    if "kept_for" not in record:
        return line
    used, required, likely = record["kept_for"]
    of = f" of the {record['used']:,}" * (used < record["used"])
    line += f": {used:,}{of} that the texts use, {required:,} required or parts of others, "
    line += f"{likely:,} likely" + " (more text tells which are needed)" * (likely > used)
    empty = record["rows"] - used - required - likely
    return line + f", {empty:,} without a token" * bool(empty)


def read_kept(
    args: argparse.Namespace,
    vocabulary: Vocabulary,
    tokens: Mapping[int, str],
    needed: Set[int],
    what: str,
) -> dict[str, Any]:
    """Return the list of --keep, and print what the model `what` and the list's own require apart.

    Raises UserError if the list lacks the `needed` ids, or those of prompts.
    """
    needed = needed & tokens.keys() | vocabulary.reasons["prompts"]
    kept = read_list("--keep", args.keep, tokens, what, needed)
    theirs = kept["record"].get("required")  # lists of a file and a folder differ in these
    for reason, ids in vocabulary.reasons.items() if theirs else ():
        other = set(theirs.get(reason, ()))
        for who, some in (("IN alone", ids - other), ("the model of the list alone", other - ids)):
            names = [repr(tokens[index]) for index in sorted(some) if index in tokens]
            lost = f"; {n} do not stay" if (n := len(some.difference(kept["ids"]))) else ""
            if names:
                print(f"{who} requires {len(names)} tokens ({reason}): {first_of(names)}{lost}")
    return kept


def check_saving(args: argparse.Namespace, left: int, rows: int, what: str) -> None:
    """Raise NotWorthIt for the model `what` if most of its rows would be left."""
    if left > MOST_ROWS * rows:
        problem = f"{left} of {rows} rows would stay, over {MOST_ROWS:.0%}"
        fix = "Give text of fewer languages, or --rows"
        if args.keep or args.rows:
            fix = "Name a shorter list" if args.keep else "Give fewer --rows"
        raise NotWorthIt(what, problem, fix)


def check_disk(args: argparse.Namespace, folder: Path, size: int) -> None:
    """Raise UserError if the disk of the `folder` in which OUT is written has not `size` bytes."""
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < size:
        problem = f"it needs {gib(size)}, and its disk has {gib(free)} left"
        raise UserError(f"OUT {args.out}", problem, "Name a place on another disk")


def check_cost(args: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Print the cost in a record, unless it has the `reason` why it was not measured.

    Raises NotWorthIt if the cost is larger than --most_cost, by default MOST_COST, and if it is
    unknown and the flag is given. An OUT that --verify proves is there, whatever it costs.
    """
    most = MOST_COST if args.most_cost is None else args.most_cost
    problem, fix = "", "Leave the flag out"
    if "reason" not in record:
        print(cost_line(record), flush=True)
        if (cost := record["measured_on"]["cost"]) > most:
            problem = f"trimming costs {cost:.2%} bits per byte, so nothing is written"
            fix = "Give more text, more --rows, or a higher --most_cost"
    elif args.most_cost is not None:
        problem = f"the cost of trimming cannot be measured ({record['reason']})"
    if problem and not args.verify:
        default = " (default)" * (args.most_cost is None)
        raise NotWorthIt(f"--most_cost {most:g}{default}", problem, fix)
