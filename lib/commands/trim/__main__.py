"""Trim the vocabulary of a GGUF file, or of a model folder, without the model in memory.
For users who run a model of any size for one language, or a few, or embed texts with it.

    bash launch.sh trim IN.gguf OUT.gguf --language uk
    bash launch.sh trim MODEL OUT --language uk

The tokens that the text uses stay, with those from which they are merged, all bytes and special
tokens, and the likely ones that are worth their rows. The rows of all others are left out of each
table with a row for each token; everything else is copied by bytes. Then tokens, bytes and
predictions, or vectors of held-out sentences, must be those of IN. OUT appears with its list of
tokens, OUT.vocabulary.json or OUT/vocabulary.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.documents import passages
from ...data.gguf_file import GgufFile, Tensor, header, write
from ...data.gguf_vocabulary import GgufVocabulary
from ...data.lines import LINES
from ...data.token_choice import MULTIPLE, PRICE, read_list
from ...data.trimming_cost import cost_line, record_cost
from ...run.flags import MULTIPLES
from ...util.cli import make_parser, typed
from ...util.errors import UserError
from ...util.files import check_writable, partial_of, sync, temporary_folder, write_text
from ...util.host import available, gib
from ...util.progress import progress
from ..gguf.llama import Llama
from ..gguf.llama_cpp import run_child
from .choosing import add_text_flags, check_saving, choose_by_text, corpora_of, tokenizer_of
from .predictions import compare
from .proof import compare_tokens, texts_to_compare

EXAMPLES = """examples:
  {0} IN.gguf OUT.gguf --language uk en
  {0} IN.gguf OUT.gguf --data texts/uk texts/code --rows 32768 --dry_run
  {0} DRAFT.gguf SMALL.gguf --keep OUT.gguf.vocabulary.json
  {0} intfloat/multilingual-e5-small e5-uk --language uk en"""
WINDOWS, POSITIONS = 24, 512  # pieces of test text whose predictions are compared, and tokens
LIMIT = 1e-5  # largest difference of log-probabilities
NOT_CAUSAL = ("t5", "bert")  # kinds of vocabulary whose models predict no next token


def main(arguments: list[str]) -> None:
    args = _parser().parse_args(arguments)
    out = Path(args.out).absolute()
    listed = out.with_name(f"{out.name}.vocabulary.json")
    is_file = args.source.endswith(".gguf")
    if is_file and out.suffix != ".gguf":
        raise UserError(f"OUT {args.out}", "the name does not end with .gguf", "Give one that does")
    for path in (out, partial_of(out), listed) if is_file else ():
        if path.exists() or path.is_symlink():
            fix = "Name a new file, or remove it"
            raise UserError(f"OUT {args.out}", f"{path.name} exists", fix)
    check_writable("OUT", str(out.parent))
    if args.keep and (args.rows or args.price != PRICE):
        flag = f"--rows {args.rows}" if args.rows else f"--price {args.price}"
        raise UserError(flag, "--keep gives the tokens", "Leave one of the two out")
    if not (args.keep or args.language or args.data):
        fix = "Give --language, --data or --keep"
        raise UserError(f"IN {args.source}", "no text says which tokens to keep", fix)
    if not is_file:
        from .folder import trim_folder  # imports torch

        trim_folder(args)
        return
    corpora = corpora_of(args)
    file = GgufFile(Path(args.source), f"IN {args.source}")
    vocabulary = GgufVocabulary(file, frozenset(args.drop))

    with temporary_folder() as folder:
        before = tokenizer_of(folder / "before.gguf", vocabulary, range(vocabulary.rows))
        record: dict[str, Any] = {
            "rows_before": vocabulary.rows,
            "sources": [str(each.source) for each in corpora],
        }
        if args.keep:
            tokens = dict(enumerate(vocabulary.tokens))
            kept = read_list("--keep", args.keep, tokens, file.what, vocabulary.named)["ids"]
        else:
            choice = choose_by_text(args, corpora, vocabulary, before)
            kept = choice.ids
            record |= {"used": choice.used, "likely": choice.likely, "rise": choice.rise}
        check_saving(args, len(kept), vocabulary.rows, f"IN {args.source}")
        vocabulary.check_count(len(kept))
        fields, tensors = vocabulary.trimmed(kept)
        size = len(header(fields, tensors, file.alignment))
        size += sum(tensor.size + -tensor.size % file.alignment for tensor in tensors)
        digest = vocabulary.digest(kept)
        record |= {"rows": len(kept), "digest": digest, "bytes_before": file.size, "bytes": size}
        used = ""
        if not args.keep:
            used = f"; the texts use {record['used']:,}, likely are {record['likely']:,}"
        megabytes = f"{file.size / 1e6:,.1f} MB become {size / 1e6:,.1f}"
        rows = f"{len(kept):,} of {vocabulary.rows:,} rows stay"
        print(f"vocabulary: {rows}{used}; {megabytes}", flush=True)
        if dropped := [name for name in file.fields if name not in fields]:
            print(f"fields left out: {', '.join(dropped)}")
        after = tokenizer_of(folder / "after.gguf", vocabulary, kept)
        tests = texts_to_compare(corpora)
        record["tests"] = [
            compare_tokens(name, texts, before, after, kept, vocabulary.kind in NOT_CAUSAL)
            for name, texts in tests.items()
        ]
        if args.dry_run:
            print("nothing is written (--dry_run)")
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(out.parent).free) < size:
            problem = f"it needs {gib(size)}, and its disk has {gib(free)} left"
            raise UserError(f"OUT {args.out}", problem, "Name a file on another disk")
        partial, start = partial_of(out), time.monotonic()
        try:
            partial.touch(exist_ok=False)
        except FileExistsError:
            problem = "another run writes it now"
            raise UserError(f"OUT {args.out}", problem, "Name a new file") from None
        try:
            with progress(size, f"writing {out.name}", "B") as on_progress:
                for step in write(partial, fields, tensors, file.alignment):
                    on_progress(step)
            record["seconds_written"] = written = time.monotonic() - start
            _check_bytes(partial, tensors)
            seconds = time.monotonic() - start - written
            tables = sum(tensor.kept is not None for tensor in tensors)
            print(
                f"written in {written:.1f} s; {tables} tensors have the kept rows of IN, and "
                f"{len(tensors) - tables} are IN's, by bytes ({seconds:.1f} s)"
            )
            texts = [text for name in list(tests)[1:] for text in tests[name] if text.strip()]
            texts, kind = texts or LINES, vocabulary.kind
            missing = _predict(file, partial, before, after, texts, kept, kind, record)
            tokens = [vocabulary.tokens[index] for index in kept]
            kept_list = {"ids": kept, "tokens": tokens, "rows": kept, "record": record}
            write_text(listed, json.dumps(kept_list, ensure_ascii=False))
            partial.rename(out)
            sync(out.parent)
        finally:
            partial.unlink(missing_ok=True)
    for projector in Path(args.source).absolute().parent.glob("*mmproj*.gguf"):
        print(f"{projector.name} beside IN works with OUT as it is")
    print(f"not verified: {', '.join(missing)}", flush=True)


def _check_bytes(partial: Path, tensors: Sequence[Tensor]) -> None:
    """Read the written file, and compare each tensor's bytes with IN's."""
    written = GgufFile(partial, f"OUT {partial.name}")  # gguf's reader takes half a minute
    for tensor, other in zip(tensors, written.tensors, strict=True):
        same, place = (other.name, other.kind) == (tensor.name, tensor.kind), 0
        for part in tensor.parts():
            data = other.data[place : place + part.size]
            same = same and np.array_equal(part.reshape(-1), data)
            place += part.size
        if not same or place != other.data.size:
            problem = f"{tensor.name} is not IN's"
            raise UserError(f"OUT {partial.name}", problem, "Check the disk")


def _predict(
    file: GgufFile,
    partial: Path,
    before: Llama,
    after: Llama,
    texts: Sequence[str],
    kept: list[int],
    kind: str,
    record: dict[str, Any],
) -> list[str]:
    """Compare the predictions of both files, print and record them, and return what was not."""
    if kind in NOT_CAUSAL:
        return ["what the model computes (it predicts no next token)"]
    predictions = "predictions and bits per byte; the cost is the rise in tokens alone"
    if 1.5 * file.size > available():  # llama.cpp maps the file, and may repack its weights
        return [f"{predictions} (memory for {gib(file.size)} is short)"]
    some = [text[:1000] for text in texts[:: max(1, len(texts) // 100)]]
    letters = sum(map(len, some)) / sum(map(len, before.encode_all(some)))  # of a token
    most = math.ceil(letters * POSITIONS / WINDOWS)
    pieces = [piece for text in texts for piece in passages(text, most)]
    pieces = [pieces[len(pieces) * i // WINDOWS] for i in range(min(WINDOWS, len(pieces)))]
    encoded = zip(before.encode_all(pieces), after.encode_all(pieces), strict=True)
    windows = [
        [[before.first, *old.tolist()], [after.first, *new.tolist()]] for old, new in encoded
    ]
    arguments = dict(before=str(file.paths[0]), after=str(partial), windows=windows, kept=kept)
    arguments |= {"places": WINDOWS, "size": 10 * file.size}  # the time limit allows for a reading
    answer = run_child("predictions", compare, **arguments)
    if "reason" in answer:
        return [f"{predictions} ({answer['reason']})"]
    if answer["distance"] > LIMIT:
        problem = f"log-probabilities differ by {answer['distance']:.2g}"
        raise UserError(f"OUT {partial.name}", problem, "Please report this")
    print(
        f"log-probabilities after {answer['beginnings']} beginnings, {answer['values']:,} values: "
        f"equal to {answer['distance']:.1g} after one constant each"
    )
    record["distance"], record["beginnings"] = answer["distance"], answer["beginnings"]
    n_bytes = sum(len(piece.encode()) for piece in pieces)
    record_cost(record, np.array(answer["before"]), np.array(answer["after"]), n_bytes)
    positions = sum(len(pair[0]) - 1 for pair in windows)
    print(cost_line(record, n_bytes, f"test text ({positions} tokens)"))
    return [f"texts past {max(len(pair[0]) for pair in windows)} tokens", "answers of the model"]


def _parser() -> argparse.ArgumentParser:
    called = typed("trim")
    parser = make_parser(
        "trim",
        __doc__,
        epilog=EXAMPLES.format(called),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    text = "GGUF file (of several parts, any one), or folder or Hub id of a model"
    add("source", metavar="IN", help=text)
    add("out", metavar="OUT", help="new file or folder to write")
    add_text_flags(parser)
    text = f"number of rows, a multiple of {MULTIPLE} (default: by --price)"
    add("--rows", type=MULTIPLES, metavar="N", help=text)
    text = "keep the tokens of this .vocabulary.json, as for a draft and its target"
    add("--keep", metavar="FILE", help=text)
    text = "leave these fields out, which may hold ids and are unknown"
    add("--drop", nargs="+", default=[], metavar="FIELD", help=text)
    add("--dry_run", action="store_true", help="print rows, size and tokens, and write nothing")
    return parser
