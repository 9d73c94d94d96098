"""`langprune trim` beside trimbed, on the same text with the same number of rows.

    python benchmarks/bench_trimbed.py IN.gguf TOKENIZER --trimbed PYTHON --data texts/uk \\
        --rows 8192 16384 --folder SCRATCH --out JSON

TOKENIZER is the model's folder, whose tokenizer.json has the ids of IN; PYTHON has trimbed (PyPI),
which keeps the most frequent tokens of the text, `max_vocab_size` of them, and trims the tokenizer
alone here. Both count all train documents, or the first --documents. Held-out documents are cut by
both, and bits per byte are those of IN in llama.cpp on the same passages, its probabilities among
the kept rows alone. The seconds are those of the whole commands: ours also writes and proves.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokenizers import Tokenizer  # noqa: E402

from lib.data.documents import passages  # noqa: E402
from lib.gguf.llama import Llama  # noqa: E402

LETTERS, PASSAGES = 400, 24  # characters of a passage


def trimbed(args: argparse.Namespace, text: Path, rows: int, out: Path) -> dict[str, Any]:
    """Return trimbed's kept rows, and a function that cuts a text into ids of IN."""
    config = {"model": args.tokenizer, "output_dir": str(out), "trim_model": False}
    files = {"path": "json", "data_files": str(text), "streaming": False}
    config |= {"corpus": {"datasets": [files], "num_proc": 1}}
    config |= {"selection": {"min_count": 1, "max_vocab_size": rows}}
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(config))  # JSON is YAML
    start = time.monotonic()
    argv = [args.trimbed, "-m", "trimbed.cli", "trim", "--config", str(path)]
    subprocess.run(argv, check=True)
    seconds = time.monotonic() - start
    whole = Tokenizer.from_file(f"{args.tokenizer}/tokenizer.json")
    small = Tokenizer.from_file(str(out / "tokenizer.json"))
    old = {i: whole.token_to_id(token) for token, i in small.get_vocab().items()}

    def cut(text: str) -> list[int]:
        return [old[i] for i in small.encode(text, add_special_tokens=False).ids]

    return {"seconds": seconds, "kept": sorted(old.values()), "cut": cut}


def langprune(args: argparse.Namespace, text: Path, rows: int, out: Path) -> dict[str, Any]:
    argv = [sys.executable, "-m", "lib.commands", "trim", args.source, f"{out}.gguf"]
    start = time.monotonic()
    subprocess.run([*argv, "--data", str(text.parent), "--rows", str(rows)], check=True)
    seconds = time.monotonic() - start
    kept = json.loads(Path(f"{out}.gguf.vocabulary.json").read_text("utf-8"))["ids"]
    llama = Llama(Path(f"{out}.gguf"))
    return {
        "seconds": seconds,
        "kept": kept,
        "cut": lambda text: [kept[i] for i in llama.encode(text)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", metavar="IN.gguf")
    parser.add_argument("tokenizer", metavar="FOLDER")
    parser.add_argument("--trimbed", required=True, metavar="PYTHON")
    parser.add_argument("--data", required=True, type=Path, help="folder of train and test.jsonl")
    parser.add_argument("--documents", nargs="+", type=int, default=[0], help="0: all")
    parser.add_argument("--rows", nargs="+", type=int, required=True)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    test = args.data / "test.jsonl"
    texts = [json.loads(row)["text"] for row in test.read_text("utf-8").splitlines()]
    pieces = [piece for text in texts for piece in passages(text, LETTERS)]
    pieces = [pieces[len(pieces) * i // PASSAGES] for i in range(PASSAGES)]
    whole, found = Llama(Path(args.source)), []
    before = [whole.encode(text).tolist() for text in texts]
    for documents in args.documents:
        some = args.folder / f"{documents}" / "train.jsonl"
        some.parent.mkdir(parents=True)
        rows_of_text = (args.data / "train.jsonl").read_text("utf-8").splitlines()
        some.write_text("\n".join(rows_of_text[: documents or None]) + "\n", "utf-8")
        (some.parent / "test.jsonl").write_text(test.read_text("utf-8"), "utf-8")
        for rows in args.rows:
            for tool in (langprune, trimbed):
                out = args.folder / f"{tool.__name__}-{documents}-{rows}"
                made = tool(args, some, rows, out)
                after = [made["cut"](text) for text in texts]
                windows = [[whole.first, *made["cut"](piece)] for piece in pieces]
                bits = 0.0
                for window, logits in zip(windows, whole.logits(windows), strict=True):
                    values = logits[:-1, made["kept"]].astype(np.float64)
                    top = values.max(-1)
                    sums = np.log(np.exp(values - top[:, None]).sum(-1)) + top
                    losses = sums - logits[np.arange(len(window) - 1), window[1:]]
                    bits += losses.sum() / math.log(2)
                figures = {"tool": tool.__name__, "documents": documents or len(rows_of_text)}
                figures |= {"rows": len(made["kept"]), "seconds": round(made["seconds"], 1)}
                figures["alike"] = sum(map(list.__eq__, before, after))
                figures["of"] = len(texts)
                figures["rise"] = sum(map(len, after)) / sum(map(len, before)) - 1
                figures["bits_per_byte"] = bits / sum(len(piece.encode()) for piece in pieces)
                found.append(figures)
                print(json.dumps(figures), flush=True)
                args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
