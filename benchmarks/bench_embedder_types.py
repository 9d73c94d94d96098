"""An embedder in few bits: llama.cpp's rounding with an importance matrix against the solver.

    python benchmarks/bench_embedder_types.py MODEL --data uk en --llama FOLDER --out FOLDER \\
        --types q4_k_m iq4_nl q5_0 --save FILE.json

MODEL is a sentence-transformers folder with a decoder's blocks, such as EmbeddingGemma, whose
attention is bidirectional. The matrices of its blocks are quantized by the library of llama.cpp in
`--llama`, and by lib/stages/quantize.py, with the same `--windows` of the training texts and the
model's prompt for documents. The table and the dense layers stay in float32 on both sides. Where
llama.cpp has a type that the solver lacks (q4_k, q6_k), the solver has its largest type in as many
bits or fewer. Its q8_0 is rounded to nearest, as in a GGUF file.

Each row of FILE.json is about the test passages of one language. `cosine` is the mean to the
float32 vectors, `first` the share of passages whose nearest neighbor among the others stays, and
`ten` the share of the first ten neighbors that stay. `difference` has the solver's minus
llama.cpp's: the mean and its 95% interval, by document. `bytes` and `matrices` are of the blocks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from bench_types import convert, mean_squares, quantize
from gguf import GGUFReader, quants
from gguf_weights import names_in
from torch import Tensor
from transformers import AutoModel

from lib.data.documents import Corpus, passages
from lib.data.samples import spread
from lib.data.sources import parse_sources
from lib.formats.grids import Types
from lib.formats.registry import Q8_0, TYPES
from lib.model.blocks import BlockRunner
from lib.stages.quantize import quantize as solve
from lib.util.cli import add_debug_flag, run
from lib.util.files import write_text
from lib.util.statistics import mean_interval
from lib.vocabulary.vectors import PROMPTS, Encoder, read_json

LETTERS = 4  # of a passage, for each of its tokens: most passages then have as many
FIGURES = "cosine", "first", "ten"


def measure(reference: np.ndarray, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """Return the figures of each passage (passages,); vectors are (passages, width), unit."""
    both = (each @ each.T - 4 * np.eye(len(each)) for each in (reference, vectors))
    one, other = (np.argsort(-each, 1, kind="stable")[:, :10] for each in both)
    ten = np.array([np.isin(*pair).mean() for pair in zip(one, other, strict=True)])
    first = (one[:, 0] == other[:, 0]).astype(float)
    return {"cosine": (reference * vectors).sum(1), "first": first, "ten": ten}


def type_for(tensor: Any) -> str:
    """Return the solver's type for a tensor of llama.cpp's file."""
    if (kind := tensor.tensor_type.name.lower()) in TYPES:
        return kind
    bits, ours = 8 * int(tensor.n_bytes) / int(tensor.n_elements), ("iq4_nl", "q5_0", Q8_0)
    return [name for name in ours if TYPES[name].bits_per_weight <= bits][-1]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="local folder")
    parser.add_argument("--data", required=True, nargs="+", metavar="TEXTS")
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "iq4_nl", "q5_0"], metavar="TYPE")
    parser.add_argument("--windows", type=int, default=64, help="for calibration, of all languages")
    parser.add_argument("--tokens", type=int, default=256, help="in such a window")
    parser.add_argument("--passages", type=int, default=200, help="for each language's test")
    parser.add_argument("--longest", type=int, default=256, metavar="TOKENS", help="of a passage")
    for name in ("--llama", "--out", "--save"):  # its library, its files, the figures
        parser.add_argument(name, required=True, type=Path)
    add_debug_flag(parser)
    args, start = parser.parse_args(argv), time.monotonic()
    torch.set_num_threads(1)
    encoder, whole = Encoder(args.model), args.out / "whole.gguf"
    model = AutoModel.from_pretrained(args.model, dtype=torch.float32, local_files_only=True)
    model.eval().requires_grad_(False)
    encoder.run = lambda inputs: model(**inputs).last_hidden_state[0]  # weights are replaced in it
    prompt, windows = read_json(args.model / PROMPTS)["prompts"]["document"], []
    tests: dict[str, list[tuple[int, str]]] = {}  # (document, passage) by language
    for source in parse_sources(args.data, "--data"):
        corpus, encoder.limit = Corpus(source), args.tokens
        long = [text for text in corpus.documents("train") if len(text) > 8 * args.tokens]
        for place in spread(len(long), args.windows // len(args.data)):
            windows.append(encoder.inputs([prompt + long[place]]).input_ids)
        documents, most = enumerate(corpus.documents("test")), LETTERS * args.longest
        pairs = [(number, each) for number, text in documents for each in passages(text, most)]
        tests[source.name] = [pairs[i] for i in spread(len(pairs), args.passages)]
    windows, encoder.limit = torch.cat(windows), args.longest

    def vectors() -> dict[str, np.ndarray]:
        found = {}
        for name, pairs in tests.items():
            each = np.stack([encoder([prompt + text]) for _, text in pairs]).astype(np.float64)
            found[name] = each / np.linalg.norm(each, axis=1, keepdims=True)
        print(f"{time.monotonic() - start:.0f} s")
        return found

    args.out.mkdir(parents=True, exist_ok=True)
    if not whole.is_file():
        convert(args.model, whole, "f32")
    runner, name_of, rows = BlockRunner(model, torch.device("cpu")), names_in(whole, args.model), []
    means, reference = mean_squares(runner, windows), vectors()
    names = {name: name_of(name) for name in means}
    dense = {name: model.get_parameter(name).clone() for name in names}
    for kind in args.types:
        file = args.out / f"{kind}.gguf"
        quantize(args.llama, whole, file, kind, {names[name]: each for name, each in means.items()})
        held = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        tensors = {own: held[its] for own, its in names.items()}
        for name, its in tensors.items():
            model.get_parameter(name)[:] = Tensor(quants.dequantize(its.data, its.tensor_type))
        plan = {name: type_for(its) for name, its in tensors.items()}
        found = {"llama.cpp": vectors()}
        model.load_state_dict(dense, strict=False)
        solve(runner, windows, Types(plan))
        for name in (name for name, type_ in plan.items() if type_ == Q8_0):
            model.get_parameter(name).copy_(TYPES[Q8_0].nearest(dense[name]))
        found["ours"] = vectors()
        bits = (dense[name].numel() * TYPES[type_].bits_per_weight for name, type_ in plan.items())
        sizes = {"ours": int(sum(bits)) // 8}
        sizes["llama.cpp"] = sum(int(each.n_bytes) for each in tensors.values())
        types = {"ours": Counter(plan.values())}
        types["llama.cpp"] = Counter(each.tensor_type.name.lower() for each in tensors.values())
        for name, pairs in tests.items():
            figures = {who: measure(reference[name], its[name]) for who, its in found.items()}
            of = np.array([number for number, _ in pairs])
            row = {"type": kind, "text": name, "passages": len(of), "documents": len(set(of))}
            for who, its in figures.items():
                row[who] = {figure: float(its[figure].mean()) for figure in FIGURES}
                row[who] |= {"bytes": sizes[who], "matrices": types[who]}
            apart = {each: figures["ours"][each] - figures["llama.cpp"][each] for each in FIGURES}
            row["difference"] = {n: mean_interval(a[None], of)[:3] for n, a in apart.items()}
            rows.append(row)
        write_text(args.save, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
