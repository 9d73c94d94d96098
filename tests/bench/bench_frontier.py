"""Bytes against bits per byte: a model pruned, quantised and both, by this project and llama.cpp.

    python tests/bench/bench_frontier.py DENSE --pruned 50%=P50 70%=P70 --data uk --llama BUILT \
        --out frontier -- --device cpu --seqlen 512 --nsamples 32

DENSE and the pruned models are folders that main.py saved dense; each pruned one is packed at 16
and 4 bits. llama.cpp's programs, in the folder BUILT, quantise DENSE with an importance matrix of
the train text; the files are dequantised and measured by main.py like all others. Bytes are those
of the tensors. `--out` keeps results, and the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import table
from safetensors.torch import load_file, save_file

from lib.util.command import add_debug_flag, run, split_argv

ROOT = Path(__file__).resolve().parents[2]
TYPES = ("q8_0", "q4_k_m", "q4_0", "q3_k_m", "q2_k", "iq3_xxs")
CHUNKS, WINDOW = 32, 512  # of the importance matrix, and tokens of each
TEXT = 2_000_000  # characters of the train text, from which they come


class Point(NamedTuple):
    """One model: the line of the picture that it is on, its label there, and what was measured."""

    series: str
    label: str
    size: int  # bytes of its tensors
    bits_per_byte: float
    perplexity: float


def child(*command: object) -> None:
    """Run a command, which says itself why it failed."""
    status = subprocess.run([str(part) for part in command]).returncode
    if status:
        sys.exit(status)


def measured(folder: Path, flags: Sequence[object]) -> tuple[float, float]:
    """Run main.py, unless `folder` shows that it was; return bits per byte and perplexity."""
    results = folder / "results.json"
    if not results.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        child(sys.executable, ROOT / "main.py", *flags, "--save", folder)
    (test,) = json.loads(results.read_text("utf-8"))["evaluation"]
    return test["bits_per_byte"], test["perplexity"]


def tensor_bytes(folder: Path) -> int:
    files = folder.glob("*.safetensors")
    return sum(tensor.nbytes for file in files for tensor in load_file(file).values())


def dequantise(file: Path, dense: Path, folder: Path) -> None:
    """Write `dense` with the matrices of a GGUF file into `folder`."""
    import torch
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map, quants

    reader = GGUFReader(file)
    config = json.loads((dense / "config.json").read_text("utf-8"))
    name = reader.fields["general.architecture"].contents()
    kind = next(kind for kind, its in MODEL_ARCH_NAMES.items() if its == name)
    names = get_tensor_name_map(kind, config["num_hidden_layers"])
    found = {tensor.name: tensor for tensor in reader.tensors}
    state = load_file(dense / "model.safetensors")
    for own, weight in state.items():
        its = names.get_name(own, try_suffixes=(".weight",))
        if weight.dim() != 2 or its not in found:
            continue
        values = torch.tensor(quants.dequantize(found[its].data, found[its].tensor_type))
        if name == "llama" and its.endswith(("attn_q.weight", "attn_k.weight")):
            values = in_halves(values, config, own)
        if (values - weight.float()).norm() > 0.7 * weight.float().norm():
            raise ValueError(f"{file}: {its} is not {own}")
        state[own] = values
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def in_halves(values, config: dict, name: str):
    """Undo the order of a head's rows that llama.cpp wants: pairs, for halves in transformers."""
    heads = config["num_attention_heads"]
    heads = heads if name.endswith("q_proj.weight") else config.get("num_key_value_heads", heads)
    rows, width = values.shape
    return values.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def own_points(args: argparse.Namespace, passed_on: list[str]) -> Iterator[Point]:
    """Measure DENSE, and the pruned models as they are packed."""
    common = ["--eval_data", args.data, *passed_on]
    flags = ["--model", args.model, "--eval_only", *common]
    yield Point("dense", "16 bits", tensor_bytes(args.model), *measured(args.out / "dense", flags))
    for label, model in args.pruned:
        for bits in ("16", "4"):
            folder = args.out / f"{label.replace('%', '')}-at-{bits}"
            flags = ["--model", model, "--replace_sparse_layers", "--pack_bits", bits, *common]
            flags += ["--eval_only"] if bits == "16" else ["--calibration_data", args.data]
            figures = measured(folder, [*flags, "--save_model", f"{folder}-model"])
            yield Point(label, f"{bits} bits", tensor_bytes(Path(f"{folder}-model")), *figures)


def llama_points(args: argparse.Namespace, passed_on: list[str]) -> Iterator[Point]:
    """Measure DENSE by each of llama.cpp's types."""
    from gguf import GGUFReader

    whole, matrix = args.out / "f16.gguf", args.out / "imatrix.gguf"
    if not whole.is_file():
        child("bash", ROOT / "launch.sh", "gguf", args.model, whole, "--type", "f16")
    if not matrix.is_file():
        text = args.out / "train.txt"
        lines = Path(args.data, "train.jsonl").read_text("utf-8").splitlines()
        text.write_text("\n".join(json.loads(line)["text"] for line in lines)[:TEXT], "utf-8")
        imatrix = [args.llama / "llama-imatrix", "-m", whole, "-f", text, "-o", matrix]
        child(*imatrix, "--chunks", CHUNKS, "-c", WINDOW)
    for kind in args.types:
        file, folder = args.out / f"{kind}.gguf", args.out / kind
        dense = args.out / f"{kind}-dequantised"
        if not file.is_file():
            child(args.llama / "llama-quantize", "--imatrix", matrix, whole, file, kind)
        if not folder.is_dir():
            shutil.rmtree(dense, ignore_errors=True)
            dequantise(file, args.model, dense)
        flags = ["--model", dense, "--eval_only", "--eval_data", args.data, *passed_on]
        size = sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)
        yield Point("llama.cpp", kind.upper(), size, *measured(folder, flags))
        shutil.rmtree(dense, ignore_errors=True)


def draw(points: Sequence[Point], file: Path) -> None:
    """Draw a line for each series; points more than 35% above the best one fall out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.6), layout="tight")
    axes = figure.subplots()
    most = 1.35 * min(point.bits_per_byte for point in points)
    for series in dict.fromkeys(point.series for point in points):
        its = [p for p in points if p.series == series and p.bits_per_byte < most]
        line = "none" if series == "llama.cpp" else "-"
        sizes, bits = [p.size / 1e6 for p in its], [p.bits_per_byte for p in its]
        axes.plot(sizes, bits, linestyle=line, marker="o", label=series)
        for label, *place in zip([p.label for p in its], sizes, bits, strict=True):
            axes.annotate(label, place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("MB of the weights, embedding included (log scale)")
    axes.set_ylabel("bits per byte of test text, lower is better")
    axes.legend()
    figure.savefig(file, dpi=150)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="DENSE", help="local folder of a dense model")
    parser.add_argument(
        "--pruned",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        type=lambda text: tuple(text.split("=", 1)),
    )
    parser.add_argument("--data", required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--llama", type=Path, metavar="BUILT", help="folder of its programs")
    parser.add_argument("--types", nargs="*", default=TYPES, help=f"default: {' '.join(TYPES)}")
    parser.add_argument("--out", type=Path, default=Path("frontier"), help="models and results")
    add_debug_flag(parser)
    own, passed_on = split_argv(argv)
    args = parser.parse_args(own)
    args.out.mkdir(parents=True, exist_ok=True)
    points = [*own_points(args, passed_on)]
    if args.llama:
        points += llama_points(args, passed_on)
    points.sort(key=lambda point: -point.size)
    header = ["", "", "MB", "bits per byte", "perplexity"]
    cells = [[*p[:2], f"{p[2] / 1e6:.1f}", f"{p[3]:.4f}", f"{p[4]:.2f}"] for p in points]
    table(header, cells)
    records = json.dumps([point._asdict() for point in points], indent=1)
    (args.out / "frontier.json").write_text(records + "\n", "utf-8")
    draw(points, args.out / "frontier.png")
    print(f"picture: {args.out / 'frontier.png'}")


if __name__ == "__main__":
    sys.exit(run(main))
