"""Size against KL: files of llama.cpp's types and of langprune's, by `compare`, in llama.cpp.

    python benchmarks/bench_types.py MODEL --data en --llama FOLDER --out FOLDER \\
        --types q4_0 iq4_nl q4_k_m --ours q5_0 "auto --megabytes 97" \\
        -- --seqlen 512 --nsamples 16 --device cpu

The library of llama.cpp in `--llama` quantizes MODEL's 32-bit file. Its importance matrix is of the
windows with which main.py quantizes. `--ours` has what follows `--quantize`, also training, or
`no_feedback` for what an importance matrix alone gives (no_feedback.py). Several `--data` are
NAME=TEXTS each, as "mix=pl=0.5,en=0.5"; `none` is no matrix, and weights alone. `--files` has
finished files of MODEL's rows, such as those of compress. All are compared with the 32-bit file on
`--passages` of the test text, or of `--test`. `--out` keeps files, figures.json and the tables of
`compare`; what is there is not made again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from gguf_weights import names_in
from measure import ROOT, child
from torch import Tensor, nn

from lib.commands.compare.table import Figures
from lib.formats.registry import AUTO, GRIDS
from lib.gguf import conversion
from lib.gguf.source import make_view, open_source, pre_tokenizer_of
from lib.model.blocks import BlockRunner
from lib.run.check import check
from lib.run.flags import build_parser, check_flags
from lib.run.load import load
from lib.run.steps import resolve_bos
from lib.util.cli import add_debug_flag, run, split_argv
from lib.util.files import write_text
from lib.vocabulary.tokenizer_model import check_of

NONE = "none"  # of --data: no text
TYPES = "q4_0 iq4_nl q4_k_m q5_0 q5_k_m q3_k_m iq4_xs q6_k q8_0 q2_k iq3_xxs".split()


class Settings(ctypes.Structure):
    """llama_model_quantize_params of llama.h; newer ones end with more fields."""

    _fields_ = [
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int),
        ("of_tables", ctypes.c_int * 2),
        ("switches", ctypes.c_bool * 8),
        ("importance", ctypes.c_void_p),
        ("others", ctypes.c_void_p * 16),
    ]


class Entry(ctypes.Structure):
    """llama_model_imatrix_data: the importance of a tensor's inputs."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


def quantize(folder: Path, whole: Path, file: Path, kind: str, squares: dict[str, Tensor]) -> None:
    """Let llama.cpp's library in `folder` quantize the file `whole`."""
    from gguf import LlamaFileType

    ggml, llama = (ctypes.CDLL(str(next(folder.glob(f"lib{n}.*")))) for n in ("ggml", "llama"))
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    llama.llama_model_quantize_default_params.restype = Settings
    settings = llama.llama_model_quantize_default_params()
    settings.threads, settings.file_type = 1, LlamaFileType[f"MOSTLY_{kind.upper()}"]
    entries = [(name.encode(), each.data_ptr(), len(each)) for name, each in squares.items()]
    entries = (Entry * (len(entries) + 1))(*entries)  # the last one has no name
    settings.importance = ctypes.addressof(entries)
    files = (str(each).encode() for each in (whole, file))
    if llama.llama_model_quantize(*files, ctypes.byref(settings)):
        sys.exit(f"llama.cpp does not quantize to {kind}")


@torch.no_grad()
def mean_squares(runner: BlockRunner, windows: Tensor) -> dict[str, Tensor]:
    """Return the means of each block's linear layers' squared inputs, as an importance matrix."""
    sums: dict[str, Tensor] = defaultdict(float)

    def seeing(name: str) -> Any:
        def see(module: nn.Module, args: tuple) -> None:
            sums[name] += args[0].double().square().mean((0, 1)) / len(windows)

        return see

    linears = [
        (name, module)
        for name, module in runner.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{runner.name}.")
    ]
    handles = [module.register_forward_pre_hook(seeing(name)) for name, module in linears]
    for window in windows:
        runner.model(input_ids=window[None], use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return {f"{name}.weight": each.float() for name, each in sums.items()}


def importance(model: Path, whole: Path, argv: list[str]) -> dict[str, Tensor]:
    """Return the mean squares of the windows that main.py would quantize with, by tensor."""
    parser = build_parser()
    flags = parser.parse_args([*argv, "--quantize", "iq4_nl"])
    check_flags(parser, flags)
    job, name_of = check(flags), names_in(whole, model)
    with ExitStack() as cleanup:
        runner = load(job, cleanup, None)
        means = mean_squares(runner, resolve_bos(job, runner).calibration.ids)
    return {name_of(name): each for name, each in means.items()}


def convert(folder: Path, file: Path, kind: str) -> None:
    """Convert a folder as the command gguf does, without its checks by llama.cpp."""
    source = open_source(str(folder))
    with tempfile.TemporaryDirectory(dir=file.parent) as stage:
        files = {each: f"{stage}/{each}.gguf" for each in dict.fromkeys(("f32", kind))}
        conversion.run_child(
            str(folder),
            conversion.convert,
            folder=str(make_view(source, Path(stage, "view"), folder)),
            name=folder.name,
            files=files,
            check=check_of(source.tokenizer),
            parts=pre_tokenizer_of(source.tokenizer_data),
        )
        Path(files[kind]).rename(file)


def types_of(file: Path) -> dict[str, list[int]]:
    """Return {type: tensors, weights, bytes} of a file's matrices."""
    from gguf import GGUFReader

    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in GGUFReader(file).tensors:
        if len(tensor.shape) > 1:
            row = counts[tensor.tensor_type.name.lower()]
            row[:] = row[0] + 1, row[1] + int(tensor.n_elements), row[2] + int(tensor.n_bytes)
    return dict(counts)


def rows_of(out: Path, labels: dict[str, Path]) -> list[dict[str, Any]]:
    """Return the figures of each file in what `compare` left in `out`, and those of the dense."""
    figures = Figures(json.loads((out / "compared/compare.json").read_text("utf-8")))
    rows = []
    for label, file in labels.items():
        row = {"label": label, "bytes": file.stat().st_size, "types": types_of(file), "tests": []}
        for text in figures.texts:
            found = figures.compared(file.stem, text)
            tokens = sum(found["tokens"])
            shares = np.array(found["tokens"]) / tokens
            apart = (np.array(found["kl_by_document"]) - found["kl"]["mean"]) * shares
            test = {"name": text, "kl": found["kl"]["mean"], "top1_agreement": found["equal"]}
            test |= {"kl_standard_error": float(np.sqrt(np.square(apart).sum()))}
            test |= {"kl_of_tokens": found["kl"], "passages": len(shares), "dense": {}}
            for which, place in ((file.stem, test), (figures.reference, test["dense"])):
                place["bits_per_byte"] = float(figures.bits(which, text))
                place["perplexity"] = float(np.exp(figures.losses(which, text).sum() / tokens))
            low, high = figures.over(file.stem, figures.reference, text)[1:3]
            row["tests"].append(test | {"over": [low, high]})
        rows.append(row)
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="local folder")
    parser.add_argument("--data", required=True, nargs="+", metavar="[NAME=]TEXTS")
    parser.add_argument("--test", nargs="+", metavar="TEXTS", help="default: those of --data")
    parser.add_argument("--passages", default="32")
    parser.add_argument("--llama", type=Path, metavar="FOLDER", help="has libllama.so, libggml.so")
    parser.add_argument("--types", nargs="*", default=TYPES, metavar="TYPE", help="llama.cpp's")
    parser.add_argument("--ours", nargs="*", default=[], metavar="FLAGS", help="after --quantize")
    parser.add_argument("--files", nargs="*", default=[], metavar="LABEL=FILE.gguf")
    parser.add_argument("--out", required=True, type=Path, help="files and figures")
    add_debug_flag(parser)
    own, passed_on = split_argv(argv)
    args = parser.parse_args(own)
    args.out.mkdir(parents=True, exist_ok=True)
    whole, files = args.out / "whole.gguf", {}
    if not whole.is_file():
        convert(args.model, whole, "f32")
    for text in args.data:
        name, texts = text.split("=", 1) if len(args.data) > 1 and text != NONE else (text, text)
        end = f"-{name}" if len(args.data) > 1 else ""
        # without text main.py reads some all the same, and uses none of it
        sources = (args.test[0] if text == NONE else texts).split(",")
        common = ["--model", str(args.model), "--calibration_data", *sources, *passed_on]
        wanted = {kind: args.out / f"llama-{kind}{end}.gguf" for kind in args.types}
        files |= {f"llama.cpp {kind}{end}": file for kind, file in wanted.items()}
        if missing := {kind: file for kind, file in wanted.items() if not file.is_file()}:
            squares = {} if text == NONE else importance(args.model, whole, common)
            for kind, file in missing.items():
                quantize(args.llama, whole, file, kind, squares)
        for words in args.ours:
            label = (Path(words).stem if words.endswith(".json") else words) + end
            name = "ours-" + "".join(c if c.isalnum() or c == "_" else "-" for c in label)
            folder, files[label] = args.out / name, args.out / f"{name}.gguf"
            if files[label].is_file():
                continue
            if not folder.is_dir():
                less = {"no_feedback", "no_text"} & {*words.split(), *["no_text"] * (text == NONE)}
                its = [word for word in words.split() if word not in less]
                script = "benchmarks/no_feedback.py" if less else "main.py"
                made = ["--quantize", *its, "--eval_windows", "1", "--completions", "0"]
                made += ["--save", f"{folder}-results", "--save_model", folder]
                child(sys.executable, ROOT / script, *common, *made, *(less & {"no_text"}))
            kind = words.split()[0]
            convert(folder, files[label], kind if kind in GRIDS else AUTO)
            shutil.rmtree(folder)
    files |= {label: Path(file) for label, file in (each.split("=", 1) for each in args.files)}
    compare = ["compare", whole, *files.values(), "--data", *(args.test or args.data)]
    compare += ["--passages", args.passages, "--out", args.out / "compared"]
    print(child("bash", ROOT / "launch.sh", *compare))
    rows = rows_of(args.out, files)
    write_text(args.out / "figures.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
