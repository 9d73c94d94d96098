"""Size against KL: files of llama.cpp's types and of langprune's, measured alike.

    python benchmarks/bench_types.py MODEL --data en --llama FOLDER --out FOLDER \\
        --types q4_0 iq4_nl q4_k_m --ours q5_0 "auto --megabytes 97" \\
        -- --seqlen 512 --nsamples 16 --eval_windows 16 --device cpu

The library of llama.cpp in `--llama` quantizes MODEL's 32-bit file. Its importance matrix is of the
windows with which main.py quantizes. `--ours` has what follows `--quantize`, also training, or
`no_feedback` for what an importance matrix alone gives (no_feedback.py). `--files` has finished
files of MODEL's rows, such as those of compress. Each file is read back, and its weights replace
MODEL's in transformers. `--out` keeps figures.json; its rows are not measured again, so another
text, model or number of windows needs another folder.
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

import torch
from bench_frontier import ROOT, child, matrices_of, names_in
from torch import Tensor, nn

from lib.eval import perplexities
from lib.formats.registry import AUTO, GRIDS
from lib.gguf import conversion
from lib.gguf.source import make_view, open_source, pre_tokenizer_of
from lib.model.blocks import BlockRunner
from lib.run.check import check
from lib.run.flags import build_parser, check_flags
from lib.run.load import load
from lib.run.record import evaluation_record
from lib.run.steps import dense_reference, resolve_bos
from lib.util.cli import add_debug_flag, run, split_argv
from lib.vocabulary.tokenizer_model import check_of

TYPES = "q4_0 iq4_nl q4_k_m q5_0 q5_k_m q3_k_m iq4_xs q6_k q8_0 q2_k iq3_xxs".split()
WHICH = "perplexity", "bits_per_byte", "kl", "kl_standard_error", "top1_agreement"


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


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="local folder")
    parser.add_argument("--data", required=True, metavar="TEXTS")
    parser.add_argument("--llama", type=Path, metavar="FOLDER", help="has libllama.so, libggml.so")
    parser.add_argument("--types", nargs="*", default=TYPES, metavar="TYPE", help="llama.cpp's")
    parser.add_argument("--ours", nargs="*", default=[], metavar="FLAGS", help="after --quantize")
    parser.add_argument("--files", nargs="*", default=[], metavar="LABEL=FILE.gguf")
    parser.add_argument("--out", required=True, type=Path, help="files and figures")
    add_debug_flag(parser)
    own, passed_on = split_argv(argv)
    args, parser = parser.parse_args(own), build_parser()
    args.out.mkdir(parents=True, exist_ok=True)
    common = ["--model", str(args.model), "--calibration_data", args.data, *passed_on]
    flags = parser.parse_args([*common, "--quantize", "iq4_nl"])
    check_flags(parser, flags)
    job, kept = check(flags), args.out / "figures.json"
    rows = json.loads(kept.read_text("utf-8")) if kept.is_file() else []
    with ExitStack() as cleanup:
        runner = load(job, cleanup, None)
        job.windows = resolve_bos(job, runner)
        reference, squares = dense_reference(job, runner), {}
        tests = job.windows.tests

        def measure(label: str, file: Path) -> None:
            """Measure the weights of a file, and keep its row."""
            held = matrices_of(file, args.model)
            for name, parameter in runner.model.named_parameters():
                if name in held:
                    parameter.data = held[name].to(parameter.dtype)  # the reference has its own
            figures = perplexities(runner, [test.windows for test in tests], reference=reference)
            row = {"label": label, "bytes": file.stat().st_size, "types": types_of(file)}
            row |= {"tests": []}
            for test, each in zip(tests, figures, strict=True):
                record = evaluation_record(test, each)
                row["tests"].append({name: record[name] for name in ("name", *WHICH)})
                row["tests"][-1] |= {"dense": record["dense"], "windows": len(test.windows)}
            rows.append(row)
            kept.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
            print(json.dumps(row), flush=True)

        known = {row["label"] for row in rows}
        wanted = [kind for kind in args.types if f"llama.cpp {kind}" not in known]
        whole = args.out / "whole.gguf"
        if wanted:
            if not whole.is_file():
                convert(args.model, whole, "f32")
            name_of = names_in(whole, args.model)
            of_linears = mean_squares(runner, job.windows.calibration.ids)
            squares = {name_of(name): each for name, each in of_linears.items()}
        for kind in wanted:
            file = args.out / f"llama-{kind}.gguf"
            quantize(args.llama, whole, file, kind, squares)
            measure(f"llama.cpp {kind}", file)
        for words in args.ours:
            label = Path(words).stem if words.endswith(".json") else words
            if label in known:
                continue
            name = "".join(each if each.isalnum() else "-" for each in label)
            folder, file = args.out / name, args.out / f"{name}.gguf"
            if not (folder.is_dir() or file.is_file()):
                its = [word for word in words.split() if word != "no_feedback"]
                script = "main.py" if words.split() == its else "benchmarks/no_feedback.py"
                made = ["--quantize", *its, "--eval_windows", "1", "--completions", "0"]
                made += ["--save", f"{folder}-results", "--save_model", folder]
                child(sys.executable, ROOT / script, *common, *made)
            if not file.is_file():
                kind = words.split()[0]
                convert(folder, file, kind if kind in GRIDS else AUTO)
                shutil.rmtree(folder)
            measure(label, file)
        for named in args.files:
            label, file = named.split("=", 1)
            if label not in known:
                measure(label, Path(file))


if __name__ == "__main__":
    sys.exit(run(main))
