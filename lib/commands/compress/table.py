"""The table of `compress`: the original and the model, by size, speed and loss."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

from ...run.figures import shown, with_error
from ...run.results import is_trained, read_results
from ...util import processes
from ...util.errors import UserError, one_line
from ...util.files import write_text
from ...util.markdown import EMPTY, escape, padded_table
from ...util.progress import progress
from .work import FIGURES, RUN, TABLE, Compression

SAME_SOURCE = "The test texts have the source of the training texts. Other texts may lose more: "
SAME_SOURCE += "measure on yours with --eval_data."
KEPT_TOKENS = (
    "Bits per byte, loss and KL count the kept tokens alone, in both columns; trim has printed "
)
KEPT_TOKENS += "what the others cost."
ORIGINAL = "original"


def print_table(run: Compression) -> None:
    """Measure sizes and speeds, print and keep the table, and say what can be done next."""
    args, out, gguf = run.args, run.args.out, run.gguf
    results = read_results(run.inside(RUN))
    models = {ORIGINAL: args.model, Path(out).name: out}
    models |= {Path(gguf).name: gguf} if gguf and Path(gguf).exists() else {}
    rows = measured(run, models) | losses(results)
    body = [[row, *cells, *[EMPTY] * (len(models) - len(cells))] for row, cells in rows.items()]
    table = padded_table(["", *map(escape, models)], body)
    write_text(Path(run.inside(TABLE)), f"{table}\n")
    print(f"\n{table}\n")
    if results["model"] != args.model:
        print(KEPT_TOKENS)
    if "recovery" in results and not is_trained(results):
        print("training did not help; the model before it is kept")
    for record in results["completions"][:1]:
        for name in ("dense", "model"):
            print(one_line(f"{name}: {record['prompt']}{record.get(name, f' {EMPTY}')}"))
    cards = [f"{folder}/README.md" for folder in (out, *run.exports) if Path(folder).exists()]
    cards += [f"{gguf}.md"] if Path(f"{gguf}.md").exists() else []
    upload = f"hf upload YOUR_NAME/{shlex.quote(Path(out).name)} {shlex.quote(out)}"
    print(
        "",
        f"how to run it: {', '.join(cards)}",
        upload,
        f"{args.work_dir} can be removed",
        sep="\n",
    )
    if not args.eval_data:
        print(SAME_SOURCE)
    size = Path(gguf).stat().st_size / 1e6 if gguf and Path(gguf).exists() else 0
    if args.megabytes and size > args.megabytes:
        problem = f"{gguf} takes {size:.2f} MB"
        raise UserError(f"--megabytes {args.megabytes}", problem, "Ask for less")


def losses(results: dict[str, Any]) -> dict[str, list[str]]:
    """Return rows on the test texts: {row: [of the original, of the model]}."""
    rows = {}
    for test in results["evaluation"]:
        name, dense = escape(test["name"]), test["dense"]
        both = (dense, test)
        if all(each.get("bits_per_byte") for each in both):
            cells = [shown("bits_per_byte", each["bits_per_byte"]) for each in both]
            rows[f"{name}, bits per byte"] = cells
        cells = [shown("loss", math.log(each["perplexity"])) for each in both]
        rows[f"{name}, loss (nats per token)"] = cells
        rows[f"{name}, KL (nats per token)"] = ["0", with_error(test, "kl")]
    return rows


def measured(run: Compression, models: dict[str, str]) -> dict[str, list[str]]:
    """Return rows of size and speed: {row: [of each model]}; models: {column: path}."""
    from ...model.checkpoint import Checkpoint
    from ...model.device import checkpoint_dtype, dtype_name, pick_device
    from ...model.pretrained import load_config
    from .measure import ROWS

    parsed, device = run.parsed, str(pick_device(run.args.device))
    dtype = dtype_name(checkpoint_dtype(load_config(Checkpoint(run.args.out))))  # of both
    options = dict(cache_dir=parsed.cache_dir, trust_remote_code=parsed.trust_remote_code)
    file, rows = Path(run.inside(FIGURES)), {}
    with progress(len(models), "measuring", "model") as advance:
        for model in models.values():
            argv = model, file, json.dumps([device, dtype, options])
            failed = processes.call("commands.compress.measure", *argv)
            figures = {} if failed else json.loads(file.read_text("utf-8"))
            for row in ROWS:
                cell = f"{figures[row]:,.1f}" if row in figures else EMPTY
                rows.setdefault(row, []).append(cell)
            advance(1)
    return rows
