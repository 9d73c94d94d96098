"""The first run on a GPU: what must hold there and how fast it is, one check after another.

    bash launch.sh gpu                           # in 25 minutes, on one card with 24 GB or more
    bash launch.sh gpu --resume                  # goes on with what was not done, or failed
    bash launch.sh gpu --device cpu --small      # all of it that a CPU can do, in three minutes

Needs torch, transformers and accelerate, no network and no text; what else is missing is told, and
the checks that need it are left out. Every check has a process and a time-out of its own
(steps.py): one that fails, crashes or hangs is a line with its reason, and the rest goes on. Each
line comes when it is known; the table at the end and `gpu.json`, with tracebacks, hold all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from sizes import Size
from steps import BEGUN, DONE, Results, Step, in_order, run_steps

from lib.util.command import add_debug_flag, run
from lib.util.errors import UserError

CELL = 150  # characters of a reason in a line

# in the order in which a failure says most about what follows
STEPS = [
    Step("machine", "check_machine:check_machine", 15),
    Step("kernel", "check_kernels:check_column_kernel", 30),
    Step("tests", "check_kernels:check_tests", 90),
    Step("sanitizer", "check_kernels:check_sanitizer", 60),
    Step("blocking launches", "check_results:check_blocking", 50),
    Step("products", "check_numerics:check_products", 20),
    Step("cholesky", "check_numerics:check_cholesky", 30),
    Step("masks", "check_numerics:check_masks", 20),
    Step("block: wanda", "check_speed:check_block", 25, {"method": "wanda"}),
    Step("block: sparsegpt, kernel", "check_speed:check_block", 35, {"method": "sparsegpt"}),
    Step(
        "block: sparsegpt, steps",
        "check_speed:check_block",
        40,
        {"method": "sparsegpt", "fused": False},
    ),
    Step("block: admm", "check_speed:check_block", 70, {"method": "admm"}),
    Step("profile", "check_speed:check_profile", 30),
    Step("model: sparsegpt", "check_results:check_model", 60, {"method": "sparsegpt"}),
    Step("model: wanda", "check_results:check_model", 40, {"method": "wanda"}),
    Step("model: admm", "check_results:check_model", 80, {"method": "admm"}),
    Step("2:4 layers", "check_packed:check_layers", 60),
    Step("2:4 products", "check_packed:check_products", 30),
    Step("evaluation: 32k", "check_speed:check_evaluation", 20, {"vocabulary": 32_000}),
    Step("evaluation: 128k", "check_speed:check_evaluation", 30, {"vocabulary": 128_000}),
    Step("fetched blocks", "check_results:check_fetched", 60),
    Step("load_bit 4", "check_results:check_load_bit", 40, {"bits": 4}),
    Step("load_bit 8", "check_results:check_load_bit", 40, {"bits": 8}),
    Step("collectives", "check_processes:check_collectives", 20),
    Step("two processes", "check_processes:check_two", 40),
    Step("a killed process", "check_processes:check_killed", 40),
    Step("second device", "check_results:check_second_device", 30),
    Step("sweep", "check_results:check_sweep", 50),
    Step("recovery", "check_results:check_recovery", 40),
]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch.sh gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu (default: cuda:0)")
    parser.add_argument("--small", action="store_true", help="small sizes, as a CPU can do them")
    parser.add_argument("--minutes", type=float, default=25, help="for all (default: 25)")
    parser.add_argument("--model", help="folder of a model to prune (default: a random 1B LLaMA)")
    names = [step.name for step in STEPS]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help=f"of: {', '.join(names)}"
    )
    parser.add_argument("--resume", action="store_true", help="go on: skip what is done")
    parser.add_argument(
        "--save", default="out/gpu", help="folder for gpu.json and what is made (default: out/gpu)"
    )
    add_debug_flag(parser)
    return parser


def main(argv: list[str], known: Sequence[Step] = STEPS) -> None:
    args = build_parser().parse_args(argv)
    check_device(args.device, args.small)
    if args.model and not (Path(args.model) / "config.json").is_file():
        raise UserError(f"--model {args.model}: no model's folder (it has no config.json)")
    folder = Path(args.save).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    model = str(Path(args.model).absolute()) if args.model else None
    setting = {"device": args.device, "small": args.small, "model": model}
    results = Results(folder / "gpu.json", setting, args.resume)
    steps = in_order(known, results, args.only or [])
    print(f"{len(steps)} of {len(known)} checks, {args.minutes:g} minutes; {results.file}\n")
    size = Size(args.small, str(folder / "made"), model)

    def told(number: int, step: Step, report: dict[str, Any], left: float) -> None:
        about = cell(report)
        clock = f"{int(left) // 60}:{int(left) % 60:02} left"
        line = f"{number:2}/{len(steps)}  {step.name:25} {report['result']:8}"
        print(f"{line} {report['seconds']:6.1f} s  {clock}  {about}", flush=True)

    run_steps(steps, args.device, size, results, args.minutes, settings(args.device), told)
    print("\n" + "\n".join(table(results, known)))
    if all(results.of(step).get("result") in (DONE, "skipped") for step in known):
        shutil.rmtree(size.work, ignore_errors=True)  # nothing is left to be done with it
    conclude(results)


def check_device(name: str, small: bool) -> None:
    """UserError where the device is not there, or is a CPU that would take for ever."""
    from lib.model.pretrained import pick_device

    try:
        device = pick_device(name)
    except UserError as error:
        way = "for what a CPU can do of this: bash launch.sh gpu --device cpu --small"
        raise UserError(f"{str(error).partition('; use')[0]}; {way}") from error
    if device.type == "cpu" and not small:
        raise UserError("--device cpu: would take days in full size; add --small")


def settings(device: str) -> dict[str, str]:
    """Of the environment of every check."""
    found = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu" and importlib.util.find_spec("triton"):
        found["TRITON_INTERPRET"] = "1"  # its kernels run on the CPU
    return found


def cell(report: dict[str, Any]) -> str:
    """What a report says, in a line."""
    if report["result"] != DONE:
        return report["reason"][:CELL]
    plain = {n: v for n, v in report["figures"].items() if not isinstance(v, dict)}
    rows = len(report["figures"]) - len(plain)
    return listed(plain) + (f"{'; ' if plain else ''}{rows} rows" if rows else "")


def listed(figures: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in figures.items())


def table(results: Results, steps: Sequence[Step]) -> list[str]:
    """Markdown: a row for each check, and for each case of those that have several."""
    rows = ["| check | result | s | figures, or why not |", "|---|---|---|---|"]
    known = results.known["steps"]
    for step in (step for step in steps if step.name in known):
        report = known[step.name]
        cells = [step.name, report["result"], f"{report.get('seconds', 0):.0f}"]
        cases = report.get("figures", {})
        plain = {name: value for name, value in cases.items() if not isinstance(value, dict)}
        text = listed(plain) if report["result"] == DONE else report["reason"]
        rows.append("| " + " | ".join([*cells, text.replace("|", "/")]) + " |")
        for name, value in cases.items():
            if isinstance(value, dict):
                rows.append(f"| {step.name}: {name} | | | {listed(value)} |")
    return rows


def conclude(results: Results) -> None:
    """UserError where a check has failed."""
    by_result: dict[str, list[str]] = {}
    for name, report in results.known["steps"].items():
        by_result.setdefault(report["result"], []).append(name)
    print("\n" + ", ".join(f"{len(names)} {result}" for result, names in by_result.items()))
    print(f"all figures: {results.file}")
    if failed := by_result.get("failed", []) + by_result.get(BEGUN, []):
        raise UserError(f"failed: {', '.join(failed)}; tracebacks are in {results.file}")


if __name__ == "__main__":
    sys.exit(run(main))
