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
import sys
from pathlib import Path

from ...run.flags import MULTIPLES, PRICED, SHARE
from ...util.cli import NOTHING, make_parser, typed
from ...util.errors import UserError, fields_named, one_line
from ...util.files import check_writable
from ...vocabulary.choice import MULTIPLE, PRICE
from ...vocabulary.cost import MOST_COST
from .choosing import NotWorthIt, add_text_flags
from .file import trim_file

EXAMPLES = """examples:
  {0} IN.gguf OUT.gguf --language uk en
  {0} IN.gguf OUT.gguf --data texts/uk texts/code --rows 32768 --dry_run
  {0} DRAFT.gguf SMALL.gguf --keep OUT.gguf.vocabulary.json
  {0} intfloat/multilingual-e5-small e5-uk --language uk en
  {0} MODEL OUT --data texts/uk --most_cost 5%
  {0} IN.gguf OUT.gguf --data texts/uk --verify"""


@fields_named(model="IN", eval_data=None, no_chat_template=None)
def main(arguments: list[str]) -> None:
    args = _parser().parse_args(arguments)
    check_writable("OUT", str(Path(args.out).absolute().parent))
    if args.verify:
        _check_verify(args)
    if (args.keep or args.verify) and (args.rows or args.price != PRICE):
        flag = f"--rows {args.rows}" if args.rows else f"--price {args.price}"
        raise UserError(flag, "--keep or --verify gives the tokens", "Leave one of the two out")
    if not (args.keep or args.language or args.data or args.verify):
        fix = "Give --language, --data or --keep"
        raise UserError(f"IN {args.source}", "no text says which tokens to keep", fix)
    try:
        if args.source.endswith(".gguf"):
            trim_file(args)
            return
        from .folder import trim_folder  # imports torch

        trim_folder(args)
    except NotWorthIt as error:
        if args.most_cost is None:
            raise
        print(f"not trimmed: {one_line(str(error))}", file=sys.stderr, flush=True)
        raise SystemExit(NOTHING) from None


def _check_verify(args: argparse.Namespace) -> None:
    if not args.source.endswith(".gguf"):
        raise UserError("--verify", "it proves GGUF files alone", "Leave it out; name a new OUT")
    for flag in ("keep", "most_cost", "dry_run"):
        if getattr(args, flag):
            raise UserError(f"--{flag}", "--verify writes nothing", "Leave one of the two out")


def _share(text: str) -> float:
    """Parse `2%` or `0.02`; 1 and more are given as percentages, so that 2 is no mistake for 2%."""
    return PRICED(str(float(text[:-1]) / 100)) if text.endswith("%") else SHARE(text)


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
    text = (
        f"write nothing if trimming costs more (default: {MOST_COST:.0%}%); if given, the status "
    )
    text += "is then 3"
    add("--most_cost", type=_share, metavar="SHARE", help=text)
    text = "device for a folder's proof (default: a GPU if there is one)"
    add("--device", metavar="DEVICE", help=text)
    add("--cache_dir", metavar="FOLDER", help="folder for weights from the Hub")
    text = "run Python code that comes with the model, if you trust it"
    add("--trust_remote_code", action="store_true", help=text)
    text = "leave these fields out, which may hold ids and are unknown"
    add("--drop", nargs="+", default=[], metavar="FIELD", help=text)
    text = "prove a GGUF file OUT by IN, with held-out text of --data, and write nothing"
    add("--verify", action="store_true", help=text)
    add("--dry_run", action="store_true", help="print rows, size and tokens, and write nothing")
    return parser
