"""Write the tokens of a language as a list for a drafter, in the ids of the whole model.
For users of speculative decoding, whose draft predicts fewer tokens than its target.

    bash launch.sh vocabulary IN.gguf --language uk --rows 32768 --map sglang FILE.pt
    bash launch.sh vocabulary IN.gguf --data texts/uk --rows 32768 --map tensorrt-edge FOLDER

The model stays whole. Tokens are chosen as by trim: bytes, special tokens and those of the chat
template first, then by their count. SGLang reads the file with --speculative-token-map, for EAGLE-2
and MTP; TensorRT-Edge-LLM reads the folder with --reduced-vocab-dir. For each text, the command
prints the share of held-out tokens that are in the list.
"""

from __future__ import annotations

import argparse
import json
import struct
from itertools import islice
from pathlib import Path

import numpy as np

from ..data.gguf_file import GgufFile
from ..data.gguf_vocabulary import GgufVocabulary
from ..run.flags import POSITIVE
from ..util.cli import make_parser
from ..util.errors import UserError
from ..util.files import check_new_folder, check_writable, staged_folder, temporary_folder
from .trim.choosing import add_text_flags, corpora_of
from .trim.file import choose_tokens, reader_of, tokenizer_of

MAPS = ("sglang", "tensorrt-edge")
MANY = 2_000  # test documents of each source


def main(arguments: list[str]) -> None:
    args = _parser().parse_args(arguments)
    engine, name = args.map
    path, flag = Path(name).absolute(), f"--map {engine}"
    if engine not in MAPS:
        raise UserError(flag, "the engine is unknown", f"Give one of {', '.join(MAPS)}")
    if engine == "sglang" and path.exists():
        raise UserError(f"{flag} {name}", "it exists", "Name a new file")
    if engine == "sglang":
        check_writable(flag, str(path.parent))
    else:
        check_new_folder(flag, name)
    if not (args.language or args.data):
        fix = "Give --language or --data"
        raise UserError(f"IN {args.source}", "no text says which tokens to keep", fix)
    corpora = corpora_of(args)
    vocabulary = GgufVocabulary(GgufFile(Path(args.source), f"IN {args.source}"))
    with temporary_folder() as folder:
        llama = tokenizer_of(folder / "whole.gguf", vocabulary, range(vocabulary.rows))
        args.keep, text_of = None, reader_of(vocabulary)
        ids = choose_tokens(args, corpora, vocabulary, llama, text_of)[0]
    for corpus in corpora:
        texts = [*islice(corpus.documents("test"), MANY)]
        tokens = np.concatenate(llama.encode_all(texts))
        held = np.isin(tokens, ids).mean()
        print(
            f"{corpus.source.name}: {held:.2%} of {len(tokens):,} held-out tokens are in the list"
        )
    if engine == "sglang":
        import torch

        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(ids, path)
    else:
        data = np.array(ids, "<i4").tobytes()
        entry = {"dtype": "I32", "shape": [len(ids)], "data_offsets": [0, len(data)]}
        head = json.dumps({"vocab_map": entry}).encode()  # of a safetensors file
        counts = {"vocab_size": vocabulary.rows, "reduced_vocab_size": len(ids)}
        with staged_folder(path, flag) as partial:
            whole = struct.pack("<Q", len(head)) + head + data
            (partial / "vocab_map.safetensors").write_bytes(whole)
            text = json.dumps(counts | {"method": "langprune", "digest": vocabulary.digest(ids)})
            (partial / "reduced_vocab.json").write_text(text, "utf-8")
    print(f"{path.name}: {len(ids):,} of {vocabulary.rows:,} tokens")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("vocabulary", __doc__)
    add = parser.add_argument
    add("source", metavar="IN.gguf", help="GGUF file of the target model, or of its draft")
    add_text_flags(parser)
    text = "number of tokens in the list (default: 32768)"
    add("--rows", type=POSITIVE, default=32768, metavar="N", help=text)
    text = f"engine, one of {', '.join(MAPS)}, and new file or folder"
    add("--map", nargs=2, required=True, metavar=("ENGINE", "PATH"), help=text)
    return parser
