"""Benchmark: this project and llm-compressor prune one model on the same windows, turn by turn.

    python benchmarks/bench.py --model MODEL --calibration_data DIR

Prints medians over rounds of the seconds of pruning alone, their ratio, the peak resident memory
and the perplexity of both. llm-compressor is installed into an environment of its own on first use.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.util.cli import add_debug_flag, run
from lib.util.errors import UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PEER = "llmcompressor==0.14.0.1"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="hub id or local folder")
    parser.add_argument("--calibration_data", required=True, help="folder with train and test text")
    parser.add_argument("--nsamples", type=int, default=32, help="windows (default: 32)")
    parser.add_argument("--seqlen", type=int, default=512, help="window in tokens (default: 512)")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--types", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--dtype", default="float32", help="of this project (default: float32)")
    parser.add_argument("--device", default="cpu", help="of this project (default: cpu)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--save", default="out/bench", help="folder for results and charts")
    parser.add_argument("--peer_env", help="llm-compressor's environment (default: SAVE/peer-env)")
    parser.add_argument("--no_peer", action="store_true", help="measure this project alone")
    add_debug_flag(parser)
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    folder = Path(args.save).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model", "calibration_data"):  # the runs start in the project's folder
        if Path(getattr(args, name)).exists():
            setattr(args, name, str(Path(getattr(args, name)).absolute()))
    bench = Bench(args, folder)
    print(HEAD)
    for method in args.methods:
        for kind in args.types:
            print(bench.compare(method, kind), flush=True)


HEAD = (
    "| method | type | here, s | llm-compressor, s | ratio | GiB | its GiB | perplexity | its |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


class Bench:
    """The runs of one benchmark: every one in a process of its own."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.peer = (
            None if args.no_peer else peer_python(Path(args.peer_env or folder / "peer-env"))
        )
        self.windows = dump_windows(self.flags("wanda", "unstructured"), folder)
        # most rounds are for the seconds of pruning; evaluating a whole test set takes longer
        self.brief = brief_test(Path(args.calibration_data), folder / "brief", args.seqlen)

    def flags(self, method: str | None, kind: str, model: str | None = None) -> list[str]:
        """Flags of main.py for one run; a dense evaluation of `model` where `method` is None."""
        args = self.args
        flags = ["--model", model or args.model, "--device", args.device, "--dtype", args.dtype]
        flags += ["--calibration_data", args.calibration_data, "--seqlen", str(args.seqlen)]
        flags += ["--completions", "0"]
        if method is None:
            return [*flags, "--eval_only"]
        flags += ["--nsamples", str(args.nsamples), "--prune_method", method]
        return [*flags, "--sparsity_type", kind]

    def compare(self, method: str, kind: str) -> str:
        """A line of the table, from `rounds` runs of each side, alternating."""
        ours, theirs = [], []
        saved = self.folder / "peer-model"
        for number in range(self.args.rounds):
            brief = [] if number == 0 else ["--eval_data", str(self.brief)]
            ours.append(self.run_here([*self.flags(method, kind), *brief]))
            if self.peer:
                theirs.append(self.run_peer(method, kind, *([saved] if number == 0 else [])))
        seconds = statistics.median(one["seconds"]["prune"] for one in ours)
        peak = max(one["peak_memory"]["host"] for one in ours) / 2**30
        perplexity = next(iter(ours[0]["perplexity"].values()))
        its = ["-"] * 4
        if theirs:
            its_seconds = statistics.median(one["seconds"] for one in theirs)
            its_peak = max(one["peak"] for one in theirs) / 2**30
            dense = self.run_here(self.flags(None, kind, str(saved)))
            its = [f"{its_seconds:.1f}", f"{seconds / its_seconds:.2f}", f"{its_peak:.2f}"]
            its.append(f"{next(iter(dense['perplexity'].values())):.3f}")
        cells = [method, kind, f"{seconds:.1f}", its[0], its[1], f"{peak:.2f}", its[2]]
        return "| " + " | ".join([*cells, f"{perplexity:.3f}", its[3]]) + " |"

    def run_here(self, flags: list[str]) -> dict:
        out = self.folder / "run"
        call([sys.executable, "main.py", *flags, "--save", str(out)])
        return json.loads((out / "results.json").read_text("utf-8"))

    def run_peer(self, method: str, kind: str, *save: Path) -> dict:
        report = self.folder / "peer.json"
        given = [self.args.model, self.windows, method, kind, "0.5", report, *save]
        call([self.peer, HERE / "bench_peer.py", *given])
        return json.loads(report.read_text("utf-8"))


def call(command: list) -> None:
    """Run a command from the project's folder, its output shown only if it fails."""
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(" ".join(command[:4]), f"it failed:\n{done.stderr[-2000:]}", "")


def peer_python(env: Path) -> Path:
    """Python of llm-compressor's environment, which is made if need be."""
    python = env / "bin" / "python"
    if not (env / "ready").exists():
        print(f"installing {PEER} into {env}", flush=True)
        call([sys.executable, "-m", "venv", env.resolve()])
        call([python.absolute(), "-m", "pip", "install", "-q", PEER])
        (env / "ready").touch()
    return python.absolute()


def dump_windows(flags: list[str], folder: Path) -> Path:
    """The calibration windows that main.py draws, in a file."""
    from safetensors.torch import save_file

    from lib.run import flags as main_flags
    from lib.run.check import check

    run = check(main_flags.build_parser().parse_args(flags))
    path = folder / "windows.safetensors"
    save_file({"windows": run.windows.calibration.ids.contiguous()}, path)
    return path


def brief_test(source: Path, folder: Path, seqlen: int) -> Path:
    """A test set of little more than a window, from the documents of `source`."""
    folder.mkdir(exist_ok=True)
    wanted, lines = 16 * seqlen, []  # characters; more than a window in any language
    with next(source.glob("test*.jsonl")).open(encoding="utf-8") as rows:
        while sum(map(len, lines)) < wanted and (row := rows.readline()):
            lines.append(row)
    (folder / "test.jsonl").write_text("".join(lines), "utf-8")
    return folder


if __name__ == "__main__":
    sys.exit(run(main))
