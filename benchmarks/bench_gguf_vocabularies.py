"""Trim llama.cpp's own vocabularies, and check its test texts with their expected ids.

    python benchmarks/bench_gguf_vocabularies.py FOLDER --data texts/uk texts/en

FOLDER is llama.cpp's models/, with ggml-vocab-*.gguf and their .inp and .out. Each vocabulary gets
a model of one block of zeros, is trimmed to half its rows, and read again by llama.cpp. A test
text whose expected tokens are all kept must have them, under their new ids; others must decode as
before. Prints a table, and one line for each vocabulary that is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.commands.trim.__main__ import main as trim  # noqa: E402
from lib.gguf.file import GgufFile, write  # noqa: E402
from lib.gguf.llama import Llama  # noqa: E402
from lib.gguf.vocabulary import TOKENS, tokenizer_model  # noqa: E402
from lib.util.errors import UserError  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", nargs="+", required=True)
    args = parser.parse_args()
    print("| Vocabulary | Kind | Rows | Kept | Test texts | With all tokens kept | Seconds |")
    print("|---|---|---:|---:|---:|---:|---:|")
    trimmed = refused = 0
    for path in sorted(args.folder.glob("ggml-vocab-*.gguf")):
        name, file = path.stem.removeprefix("ggml-vocab-"), GgufFile(path, path.name)
        with tempfile.TemporaryDirectory() as folder:
            whole, out = Path(folder) / "whole.gguf", Path(folder) / "out.gguf"
            start = time.monotonic()
            try:
                if TOKENS not in file.fields:
                    raise UserError(name, "it has no tokens", "")
                for _ in write(whole, *tokenizer_model(file.fields)):
                    pass
                half = str(len(file.fields[TOKENS].value) // 128 * 64)
                with redirect_stdout(StringIO()):
                    trim([str(whole), str(out), "--rows", half, "--data", *args.data])
            except UserError as error:
                print(f"{name}: {error}", file=sys.stderr)
                refused += 1
                continue
            seconds = time.monotonic() - start
            before, after = Llama(whole), Llama(out)
            kept = np.array(json.loads(Path(f"{out}.vocabulary.json").read_text("utf-8"))["ids"])
        texts, alike = [], 0
        if (given := Path(f"{path}.inp")).is_file():
            texts = given.read_bytes().decode().split("\n__ggml_vocab_test__\n")
            answers = Path(f"{path}.out").read_text("utf-8").splitlines()
            for text, answer in zip(texts, answers, strict=False):
                expected = [int(word) for word in answer.split()]
                ids = kept[after.encode(text)].tolist()
                if set(expected) <= set(kept.tolist()):
                    # special tokens at the end may be missing in expected ids, which parse none
                    same = ids == expected or before.encode(text).tolist() == ids
                    assert same, f"{name}: {text!r} has {ids}, not {expected}"
                    alike += ids == expected
                else:
                    whole_text = before.decode(before.encode(text))
                    same = whole_text == after.decode(after.encode(text))
                    assert same or file.value("tokenizer.ggml.model") == "bert", f"{name}: {text!r}"
        kind, rows = file.value("tokenizer.ggml.model"), len(file.fields[TOKENS].value)
        cells = name, kind, f"{rows:,}", f"{len(kept):,}", len(texts), alike, f"{seconds:.0f}"
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        trimmed += 1
    print(f"\n{trimmed} of {trimmed + refused} are trimmed")


if __name__ == "__main__":
    main()
