"""Bytes against bits per byte at equal training: quantized, pruned and both, here and by llama.cpp.

    python benchmarks/bench_frontier.py MODEL --data uk --tokens 131072 --llama BUILT \
        --out frontier -- --device cpu --seqlen 512

Every model is MODEL, whole or with its vocabulary trimmed; rounded to q4_0 or iq4_nl on the train
text; or trained on the same windows: as it is, as these, with fewer neurons, with half or 60% of
its weights at 4 bits. What has 16 bits is quantized by llama.cpp's programs, in the folder BUILT,
with an importance matrix of the train text; the files are dequantized and measured by main.py like
all others, on the whole test text and on others that `--also` names. All are timed in one run by
one thread: files by llama-bench, saved models in transformers. Bytes are those of the tensors.
`--out` keeps models and results, and the same command goes on where it was; `--only` makes some.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measure import decoding_speeds, table
from safetensors.torch import load_file, save_file

from lib.util.cli import add_debug_flag, run, split_argv

ROOT = Path(__file__).resolve().parents[1]
TYPES = ("q8_0", "q4_k_m", "q4_0", "iq4_nl", "q3_k_m")
CHUNKS, WINDOW = 32, 512  # of the importance matrix, and tokens of each
TEXT = 2_000_000  # characters of the train text, from which they come
PACKED = "--prune_method admm --allocation error --replace_sparse_layers --quantize int4"
NEURONS = "--prune_method admm --sparsity_type neurons --sparsity_ratio"
Q4_0, IQ4_NL = " --quantize q4_0", " --quantize iq4_nl"
# {label: series, flags of main.py, llama.cpp's types}
UNTOUCHED = "untouched"
MODELS = {
    UNTOUCHED: (UNTOUCHED, "", TYPES),
    "trimmed": ("trimmed", "", TYPES),
    "rounded": ("rounded on text", Q4_0, ()),
    "rounded, iq4_nl": ("rounded on text to iq4_nl", IQ4_NL, ()),
    "trained": ("trained", "", TYPES),
    "q4_0": ("trained as q4_0", Q4_0, ()),
    "iq4_nl": ("trained as iq4_nl", IQ4_NL, ()),
}
UNTRAINED = UNTOUCHED, "trimmed", "rounded", "rounded, iq4_nl"
for share in (0.125, 0.25, 0.375, 0.5):
    label, flags = f"neurons {100 * share:g}%", f"{NEURONS} {share}"
    MODELS[label] = "neurons", flags, ("q8_0", "q4_0")
    MODELS[f"{label}, q4_0"] = "neurons, trained as q4_0", flags + Q4_0, ()
for share in (0.5, 0.6):
    MODELS[f"{share:.0%} zeros"] = "zeros, packed", f"{PACKED} --sparsity_ratio {share}", ()


class Point(NamedTuple):
    """One model: its series, its label, its file, what was measured."""

    series: str
    label: str
    model: Path | None  # for transformers
    file: Path | None  # for llama.cpp
    size: int  # bytes of its tensors
    tests: list[dict[str, Any]]  # of its results.json


def child(*command: object) -> str:
    """Run a command, which says itself why it failed; return what it prints."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def measured(folder: Path, *flags: object) -> list[dict[str, Any]]:
    """Run main.py, unless `folder` shows that it was; return the records of the test texts."""
    if not (folder / "results.json").is_file():
        resume = [] if "--eval_only" in flags else ["--resume", f"{folder}-state"]
        child(sys.executable, ROOT / "main.py", *flags, *resume, "--save", folder)
    return json.loads((folder / "results.json").read_text("utf-8"))["evaluation"]


def tensor_bytes(folder: Path) -> int:
    files = folder.glob("*.safetensors")
    return sum(tensor.nbytes for file in files for tensor in load_file(file).values())


def file_bytes(file: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)


def names_in(file: Path, folder: Path) -> Callable[[str], str | None]:
    """Return the function from a weight's name in a checkpoint to its name in a GGUF file."""
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    config = json.loads((folder / "config.json").read_text("utf-8"))
    name = GGUFReader(file).fields["general.architecture"].contents()
    kind = next(kind for kind, its in MODEL_ARCH_NAMES.items() if its == name)
    names = get_tensor_name_map(kind, config["num_hidden_layers"])
    return partial(names.get_name, try_suffixes=(".weight",))


def matrices_of(file: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return the matrices of a GGUF file by their names in the checkpoint `folder`, float32."""
    from gguf import GGUFReader, quants

    reader, name_of = GGUFReader(file), names_in(file, folder)
    architecture = reader.fields["general.architecture"].contents()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    found, state = {tensor.name: tensor for tensor in reader.tensors}, {}
    for own, weight in load_file(folder / "model.safetensors").items():
        its = name_of(own)
        if weight.dim() != 2 or its not in found:
            continue
        values = torch.tensor(quants.dequantize(found[its].data, found[its].tensor_type))
        if architecture == "llama" and its.endswith(("attn_q.weight", "attn_k.weight")):
            values = in_halves(values, config, own)
        if values.shape == weight.shape:  # another vocabulary has other rows
            if (values - weight.float()).norm() > 1.2 * weight.float().norm():  # others: 1.4
                raise ValueError(f"{file}: {its} is not {own}")
            state[own] = values
    return state


def dequantize(file: Path, dense: Path, folder: Path) -> None:
    """Write `dense` with the matrices of a GGUF file into `folder`."""
    state = load_file(dense / "model.safetensors") | matrices_of(file, dense)
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def in_halves(values, config: dict, name: str):
    """Undo the order of a head's rows that llama.cpp wants: pairs, for halves in transformers."""
    heads = config["num_attention_heads"]
    heads = heads if name.endswith("q_proj.weight") else config.get("num_key_value_heads", heads)
    rows, width = values.shape
    return values.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def points(args: argparse.Namespace, passed_on: list[str]) -> Iterator[Point]:
    """Make and measure every model, and what llama.cpp makes of it."""
    common = ["--eval_data", args.data, *args.also, "--completions", "0", *passed_on]
    whole, small = ["--model", args.model, *common], args.out / "trimmed-model"
    if not small.is_dir():
        child("bash", ROOT / "launch.sh", "trim", args.model, small, "--data", args.data)
    for label in args.only:
        series, flags, types = MODELS[label]
        name = label.replace(" ", "-").replace(",", "").replace("%", "")
        if label == UNTOUCHED:
            model, tests = args.model, measured(args.out / name, *whole, "--eval_only")
        elif label == "trimmed":
            evaluate = ["--model", small, *common, "--eval_only"]
            model, tests = small, measured(args.out / name, *evaluate)
        else:
            model = args.out / f"{name}-model"
            made = ["--model", small, *common, "--calibration_data", args.data, *flags.split()]
            made += [] if label in UNTRAINED else ["--recover", args.tokens]
            tests = measured(args.out / name, *made, "--save_model", model)
        size, file = tensor_bytes(model), None
        if kind := next((kind for kind in (Q4_0, IQ4_NL) if kind in flags), None):
            file = converted(model, args.out / f"{name}.gguf", kind.split()[1])
            size = file_bytes(file)
        yield Point(series, label, model, file, size, tests)
        for kind in types if args.llama else ():
            file = quantized(args, model, name, kind)
            dense = args.out / f"{name}-{kind}-dequantized"
            if not (args.out / f"{name}-{kind}").is_dir():
                shutil.rmtree(dense, ignore_errors=True)
                dequantize(file, model, dense)
            flags = ["--model", dense, "--teacher", args.model, "--eval_only", *common]
            tests = measured(args.out / f"{name}-{kind}", *flags)
            shutil.rmtree(dense, ignore_errors=True)
            series_of = f"{series}, {kind}" if "neurons" in label else series
            yield Point(series_of, f"{label} {kind}", None, file, file_bytes(file), tests)


def converted(model: Path, file: Path, kind: str) -> Path:
    if not file.is_file():
        child("bash", ROOT / "launch.sh", "gguf", model, file, "--type", kind)
    return file


def quantized(args: argparse.Namespace, model: Path, name: str, kind: str) -> Path:
    """Return the file that llama.cpp makes of a model in one of its types."""
    files = (args.out / f"{name}{end}.gguf" for end in (f"-{kind}", ".f16", ".imatrix"))
    file, whole, matrix = files
    if file.is_file():
        return file
    converted(model, whole, "f16")
    if not matrix.is_file():
        text = args.out / "train.txt"
        lines = Path(args.data, "train.jsonl").read_text("utf-8").splitlines()
        text.write_text("\n".join(json.loads(line)["text"] for line in lines)[:TEXT], "utf-8")
        imatrix = [args.llama / "llama-imatrix", "-m", whole, "-f", text, "-o", matrix]
        child(*imatrix, "--chunks", CHUNKS, "-c", WINDOW)
    child(args.llama / "llama-quantize", "--imatrix", matrix, whole, file, kind)
    return file


def speeds(files: Sequence[Path], llama: Path) -> dict[Path, float]:
    """Return tokens a second of each file by llama-bench, which takes turns."""
    timed: dict[Path, list[float]] = {file: [] for file in files}
    for _ in range(3):
        for file in files:
            bench = [llama / "llama-bench", "-m", file, "-t", 1, "-p", 0, "-n", 64, "-r", 1]
            timed[file].append(json.loads(child(*bench, "-o", "jsonl"))["avg_ts"])
    return {file: median(each) for file, each in timed.items()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="local folder of a dense model")
    parser.add_argument("--data", required=True, help="folder with train.jsonl and test.jsonl")
    help_ = "more texts to measure on"
    parser.add_argument("--also", nargs="+", default=[], metavar="TEXTS", help=help_)
    parser.add_argument("--tokens", type=int, default=131072, help="of each training")
    parser.add_argument("--llama", type=Path, metavar="BUILT", help="folder of its programs")
    parser.add_argument("--only", nargs="+", default=[*MODELS], choices=[*MODELS], metavar="LABEL")
    parser.add_argument("--out", type=Path, default=Path("frontier"), help="models and results")
    add_debug_flag(parser)
    own, passed_on = split_argv(argv)
    args = parser.parse_args(own)
    args.out.mkdir(parents=True, exist_ok=True)
    models = sorted(points(args, passed_on), key=lambda point: -point.size)
    files = [point.file for point in models if point.file]
    timed = speeds(files, args.llama) if args.llama else {}
    folders, saved = [point.model for point in models if point.model], {}
    if args.llama:
        torch.set_num_threads(1)  # as llama-bench
        saved = decoding_speeds(folders, "cpu", rounds=3)
    header = ["", "MB"]
    for test in models[0].tests:
        header += [f"bits per byte, {test['name']}", "loss beside dense, nats", "KL"]
    header += ["tokens a second in llama.cpp", "in transformers"]
    cells = []
    for point in models:
        figures = [f"{point.size / 1e6:.1f}"]
        for test in point.tests:
            figures.append(f"{test['bits_per_byte']:.4f}")
            for name, form in (("loss_change", "+.4f"), ("kl", ".4f")):
                error = test.get(f"{name}_standard_error", 0)
                figures.append(f"{test[name]:{form}} ± {error:.4f}" if name in test else "")
        for speed in (timed.get(point.file), saved.get(point.model)):
            figures.append(f"{speed:.0f}" if speed else "")
        cells.append([f"{point.series}: {point.label}", *figures])
    table(header, cells)
    records = [
        {name: value for name, value in test.items() if isinstance(value, int | float | str)}
        | {"series": p.series, "label": p.label, "bytes": p.size}
        | {"tokens_per_second": timed.get(p.file), "in_transformers": saved.get(p.model)}
        for p in models
        for test in p.tests
    ]
    (args.out / "frontier.json").write_text(json.dumps(records, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(run(main))
