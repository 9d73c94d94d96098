"""Compare GGUF files in your languages: loss, KL divergence and speed, in llama.cpp.
For users who choose between files of a model: which is better in my language, and by how much?

    bash launch.sh compare REFERENCE.gguf FILE.gguf [FILE.gguf ...] --language uk en

The first file is the reference, best a BF16 or Q8_0 one. The others advance beside it, as many as
fit into memory, one passage at a time, so that no logits are stored. Intervals are paired over
documents. Texts of your own use tell more than web text. With --out, the same command goes on with
what was interrupted, and more files may join.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from ... import __version__
from ...gguf.llama import has_gpu
from ...run.flags import POSITIVE
from ...util.cli import make_parser
from ...util.errors import UserError, fields_named
from ...util.files import check_new_folder, check_writable, write_text
from ...util.host import available, gib
from .measure import File, measure, open_files
from .passages import LONGEST, PASSAGES, corpora_of, digest_of, passages_of
from .table import print_table, write_files

KEPT = "compare.json"


@fields_named(eval_data=None)
def main(arguments: list[str]) -> None:
    args = _parser().parse_args(arguments)
    _check(args)
    files = open_files(args.files)
    texts = passages_of(corpora_of(args), files, args.passages)
    reference = None if args.no_reference else files[0].label
    asked = {
        "reference": reference,
        "versions": [__version__, metadata.version("xllamacpp")],
        "gpu_layers": args.gpu_layers,
        "texts": {name: digest_of(passages) for name, passages in texts.items()},
        "files": {each.label: [each.file.size, _changed(each)] for each in files},
    }
    path = Path(args.out or "", KEPT)
    record = {"asked": asked, "speeds": {}, "losses": {}, "compared": {}}
    if args.out and path.is_file():
        record = json.loads(path.read_text("utf-8"))
        kept = record.get("asked", {})
        if kept | {"files": asked["files"] | kept.get("files", {})} != asked:
            problem = "it holds a comparison of other files, texts or versions"
            raise UserError(f"--out {args.out}", problem, "Name a new folder")
        record["asked"] = asked

    def keep() -> None:
        if args.out:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(record, ensure_ascii=False))

    _say_memory(files)
    try:
        measure(record, files, texts, args.gpu_layers, keep)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*["the same command goes on"] * bool(args.out)) from None
    tables = print_table(record)
    if args.out:
        write_files(path.parent, record, tables)
        print(f"{args.out} has the tables, and {KEPT} the losses by document")


def _changed(file: File) -> float:
    """Return when a file was changed."""
    return max(path.stat().st_mtime for path in file.file.paths)


def _check(args: argparse.Namespace) -> None:
    if len(args.files) < 2:
        raise UserError(f"FILE {args.files[0]}", "it is the only file", "Name two or more")
    if not (args.language or args.data):
        fix = "Give --language or --data"
        raise UserError(f"FILE {args.files[0]}", "no text to compare on is named", fix)
    if args.gpu_layers and not has_gpu():
        problem = "the installed xllamacpp computes on no GPU here"
        raise UserError(f"--gpu_layers {args.gpu_layers}", problem, "Leave it out")
    if args.out:
        check_writable("--out", args.out)
        if not (Path(args.out) / KEPT).is_file():
            check_new_folder("--out", args.out)


def _say_memory(files: Sequence[File]) -> None:
    """Print a line if the two largest files that are open together exceed the memory."""
    needed = files[0].file.size + max(each.file.size for each in files[1:])
    if needed > (free := available()):
        print(
            f"memory: two files take {gib(needed)}, and {gib(free)} are free, so they may be read "
            "from disk again and again, which is slow",
            flush=True,
        )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("compare", __doc__)
    add = parser.add_argument
    text = "GGUF files (of several parts, any one), the reference first"
    add("files", nargs="+", metavar="FILE", help=text)
    text = "languages, as BCP 47 tags; reads the test text of FineWeb2 from the Hub"
    add("--language", nargs="+", default=[], metavar="TAG", help=text)
    text = "your own texts, which tell more than web text: files, folders or Hub datasets"
    add("--data", nargs="+", default=[], metavar="SOURCE", help=text)
    add("--column", default="text", help="column of the texts (default: text)")
    text = f"passages of each text, of up to {LONGEST} tokens (default: {PASSAGES})"
    add("--passages", type=POSITIVE, default=PASSAGES, metavar="N", help=text)
    text = "compare losses alone, each file with each"
    add("--no_reference", action="store_true", help=text)
    text = "layers on a GPU, if the package has a backend for it (default: 0)"
    add("--gpu_layers", type=POSITIVE, default=0, metavar="N", help=text)
    text = "folder for tables and losses; the same command goes on there (default: only print)"
    add("--out", metavar="FOLDER", help=text)
    return parser
