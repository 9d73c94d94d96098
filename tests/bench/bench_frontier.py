"""Bytes against bits per byte: a model pruned, quantised and both, by this project and llama.cpp.

    python tests/bench/bench_frontier.py DENSE --pruned 50%=P50 70%=P70 --data uk --llama LLAMA \
        --out frontier -- --device cpu --seqlen 512 --nsamples 32

DENSE and the pruned models are folders that main.py saved at 16 bits. Each pruned one is packed at
16, 8 and 4 bits, embedding and head at 8 with the last two; DENSE is rounded to 8, 4 and 3 bits
likewise, and its bytes are counted without masks. llama.cpp (a folder with build/bin, or on PATH)
quantises DENSE with an importance matrix of the train text; its files are dequantised and measured
by main.py like all others. Bytes are those of the tensors. `--out` keeps results, and the same
command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench_gguf import program
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stages import Run, Stage, do

from lib.report.markdown import padded_table
from lib.report.plots import style
from lib.report.results import load_runs
from lib.util.command import add_debug_flag, run, split_argv
from lib.util.files import write_text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TYPES = ("q8_0", "q4_k_m", "q4_0", "q3_k_m", "q2_k", "iq3_xxs")
BITS = (16, 8, 4)
DENSE_BITS = (8, 4, 3)
CHUNKS, WINDOW = 32, 512  # of the importance matrix, and tokens of each
TEXT = 2_000_000  # characters of the train text, from which they come


@dataclass(frozen=True)
class Point:
    """One model: the line of the picture that it is on, its label there, and its stage."""

    series: str
    label: str
    stage: str
    size: int  # bytes of its tensors


def tensor_bytes(folder: Path, kinds: tuple[str, ...] = ()) -> int:
    """Bytes of the tensors of a checkpoint, or of those whose names end in one of `kinds`."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if not kinds or name.endswith(kinds):
                    tensor = tensors.get_tensor(name)
                    total += tensor.nbytes
    return total


def dense_bytes(folder: Path, bits: int) -> int:
    """Of a model that pack_dense.py rounded, in a dense form: no masks, every weight has `bits`.

    What was rounded to zero has no value in the packed form, and at 3 bits the others have four.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    missing = 0
    for rows, width, kept in config["linears"].values():
        missing += -(-rows * width * bits // 8) - -(-kept * config["bits"] // 8)
    return tensor_bytes(folder) - tensor_bytes(folder, (".mask",)) + missing


def child(*command: object) -> None:
    """Run a command, which says itself why it failed."""
    status = subprocess.run([str(part) for part in command]).returncode
    if status:
        sys.exit(status)


def in_child(flags: Sequence[str], script: tuple = (ROOT / "main.py",)) -> None:
    child(sys.executable, *script, *flags)


def file_bytes(file: Path) -> int:
    """Bytes of the tensors of a GGUF file."""
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)


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


def own_points(args: argparse.Namespace, passed_on: Sequence[str]) -> Iterator[Point]:
    """DENSE and the pruned models, at every number of bits."""
    data = ["--calibration_data", args.data, "--eval_data", args.data]
    pack = ["--replace_sparse_layers", "--pack_bits"]

    def stage(name: str, flags: list[str], heading: str, how: Run = in_child) -> Path:
        model = args.out / name / "model"
        keep = ["--save_model", str(model)]
        do(Stage(name, heading, [*flags, *keep]), args.out, passed_on, how)
        return model

    plain = ["--model", str(args.model), "--eval_only", "--eval_data", args.data]
    do(Stage("dense", "dense", plain), args.out, passed_on, in_child)
    yield Point("dense", "16 bits", "dense", tensor_bytes(args.model))
    for bits in DENSE_BITS:
        stored = str(max(bits, 4))
        flags = ["--model", str(args.model), *pack, stored, "--pack_embeddings", "8", *data]
        how = partial(in_child, script=(HERE / "pack_dense.py", bits))
        folder = stage(f"dense-{bits}", flags, f"dense, {bits} bits", how)
        yield Point("dense", f"{bits} bits", f"dense-{bits}", dense_bytes(folder, bits))
    for label, model in args.pruned:
        for bits in BITS:
            flags = ["--model", model, *pack, str(bits)]
            if bits == 16:
                flags += ["--eval_only", "--eval_data", args.data]
            else:
                flags += ["--pack_embeddings", "8", *data]
            name = f"{label.replace('%', '').replace(' ', '-')}-at-{bits}"
            folder = stage(name, flags, f"{label}, {bits} bits")
            yield Point(label, f"{bits} bits", name, tensor_bytes(folder))


def llama_points(args: argparse.Namespace, passed_on: Sequence[str]) -> Iterator[Point]:
    """DENSE by each of llama.cpp's types."""
    whole, matrix = args.out / "f16.gguf", args.out / "imatrix.gguf"
    if not whole.is_file():
        child("bash", ROOT / "launch.sh", "gguf", args.model, whole, "--type", "f16")
    if not matrix.is_file():
        text = args.out / "train.txt"
        lines = Path(args.data, "train.jsonl").read_text("utf-8").splitlines()
        text.write_text("\n".join(json.loads(line)["text"] for line in lines)[:TEXT], "utf-8")
        tool = program(str(args.llama), "llama-imatrix")
        child(tool, "-m", whole, "-f", text, "-o", matrix, "--chunks", str(CHUNKS), "-c", WINDOW)
    for kind in args.types:
        file, folder = args.out / f"{kind}.gguf", args.out / kind / "dequantised"
        if not file.is_file():
            child(program(str(args.llama)), "--imatrix", matrix, whole, file, kind)

        def measure(flags: Sequence[str], file: Path = file, folder: Path = folder) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            dequantise(file, args.model, folder)
            in_child(flags)
            shutil.rmtree(folder)

        flags = ["--model", str(folder), "--eval_only", "--eval_data", args.data]
        do(Stage(kind, kind, flags), args.out, passed_on, measure)
        yield Point("llama.cpp", kind.upper(), kind, file_bytes(file))


def report(args: argparse.Namespace, points: Sequence[Point]) -> None:
    """Table on the terminal and in a file, raw figures, and the picture."""
    runs = {run.folder.name: run for run in load_runs([args.out / one.stage for one in points])}
    rows = []
    for point in sorted(points, key=lambda point: -point.size):
        test = next(iter(runs[point.stage].tests.values()))
        rows.append((point, test["bits_per_byte"], test["perplexity"]))
    head = ["", "", "MB", "bits per byte", "perplexity"]
    body = [
        [point.series, point.label, f"{point.size / 1e6:.1f}", f"{bits:.4f}", f"{value:.2f}"]
        for point, bits, value in rows
    ]
    text = padded_table(head, body)
    print(text)
    write_text(args.out / "frontier.md", text + "\n")
    records = [vars(point) | {"bits_per_byte": bits, "perplexity": p} for point, bits, p in rows]
    write_text(args.out / "frontier.json", json.dumps(records, indent=1) + "\n")
    picture = args.picture or args.out / "frontier.png"
    style.save_figure(draw(rows, f"{args.model.name}: bytes against what is left"), picture)
    print(f"picture: {picture}")


def draw(rows: Sequence[tuple[Point, float, float]], title: str):
    """A line for each series; points more than 35% above the best one fall out."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = style.figure(8.5, 5.6)
    axes = figure.subplots()
    least = min(bits for _, bits, _ in rows)
    most = 1.35 * least
    for index, series in enumerate(dict.fromkeys(point.series for point, _, _ in rows)):
        its = [(point, bits) for point, bits, _ in rows if point.series == series and bits < most]
        look = {
            "color": style.pick(style.COLOURS, index),
            "marker": style.pick(style.MARKERS, index),
        }
        line = "none" if series == "llama.cpp" else "-"
        sizes = [point.size / 1e6 for point, _ in its]
        axes.plot(sizes, [bits for _, bits in its], linestyle=line, lw=1.6, label=series, **look)
        for point, bits in its:
            place = (point.size / 1e6, bits)
            axes.annotate(point.label, place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("MB of the weights, embedding included (log scale)")
    axes.set_ylabel("bits per byte of test text, lower is better")
    axes.legend(fontsize=9)
    style.open_axes(axes)
    style.title(figure, title)
    return figure


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
    parser.add_argument("--llama", type=Path, metavar="FOLDER", help="llama.cpp, built")
    parser.add_argument("--types", nargs="*", default=TYPES, help=f"default: {' '.join(TYPES)}")
    parser.add_argument("--out", type=Path, default=Path("frontier"), help="models and results")
    parser.add_argument("--picture", type=Path, help="where it goes (default: into --out)")
    add_debug_flag(parser)
    own, passed_on = split_argv(argv)
    args = parser.parse_args(own)
    args.out.mkdir(parents=True, exist_ok=True)
    points = [*own_points(args, passed_on)]
    if args.llama:
        points += llama_points(args, passed_on)
    report(args, points)


if __name__ == "__main__":
    sys.exit(run(main))
