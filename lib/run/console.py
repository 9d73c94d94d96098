"""Everything that can be run, by name: `langprune NAME`, or in a checkout `bash launch.sh NAME`.

pip installs main.py and lib/ side by side as in the repository. Their folder goes to the front of
sys.path, as when main.py is run as a file.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = """\
NAME ..., where NAME is one of these; NAME --help lists its flags

  demo                       the whole job in small, on a text and a model that it makes
  prune --model MODEL        one run, with flags of your own: the same as python main.py

  unstructured MODEL         SparseGPT, half of the weights
  semistructured MODEL       SparseGPT, 2:4, with packed linears
  c4 MODEL                   SparseGPT, half of the weights, calibrated on English C4
  dense MODEL                perplexity of the model as it is
  vocabulary MODEL OUT       its vocabulary trimmed for --vocabulary_data SOURCE ...; no pruning

  compress MODEL OUT --language uk   a small model for every engine, in --minutes 30

  sweep --models MODEL ...       methods x types x ratios x calibration sets x seeds, one table
  languages MODEL SOURCE ...     prunings for two or more languages, and what their masks share
  report RUN ...                 table and pictures of finished runs
  overlap RUN_A RUN_B ...        what masks share, and what goes with the loss in other languages
  tasks DATA OUT                 tasks for lm-eval from documents, for --tasks and --include_path
  unpack IN OUT                  a packed model as a plain dense one
  gguf IN OUT.gguf               a saved model for llama.cpp and ollama, proven on --data SOURCE ...

In a checkout alone:
  bench                          speed and memory, beside llm-compressor
  bench_sparse products | model  packed weights beside dense ones: speed, size, loading
  gpu                            what must hold on a GPU and how fast it is, in 25 minutes

MODEL: hub id (owner/name) or local folder."""
NAMES = re.findall(r"(?m)^  (\w+)", LIST)
RECIPES = {  # flags of main.py
    "unstructured": "--prune_method sparsegpt",
    "semistructured": "--prune_method sparsegpt --sparsity_type 2:4 --replace_sparse_layers",
    "c4": "--prune_method sparsegpt --prune_on_c4",
    "dense": "--eval_only",
    "vocabulary": "--trim_vocabulary",
}
BENCHES = {"bench": "bench.py", "bench_sparse": "bench_sparse.py", "gpu": "gpu/first_run.py"}


def program(name: str, argv: list[str]) -> tuple[str | Path, list[str]]:
    """Return what `name` runs, a module's name or a file, and its arguments."""
    if name in BENCHES:
        return ROOT / "tests" / "bench" / BENCHES[name], argv
    if name not in RECIPES or argv[:1] == ["--help"]:
        return "main" if name in ("prune", *RECIPES) else f"lib.commands.{name}", argv
    needed = 2 if name == "vocabulary" else 1
    given, flags = argv[:needed], RECIPES[name].split()
    if len(given) < needed or any(word.startswith("-") for word in given):
        raise ValueError(f"{name}: name {'MODEL and OUT' if needed > 1 else 'MODEL'} before flags")
    flags += ["--save_model", *given[1:]] if needed > 1 else []
    return "main", ["--model", given[0], *flags, "--save", f"out/{name}", *argv[needed:]]


def start(argv: list[str]) -> None:
    """Run the command that the first argument names; without one, list them."""
    from lib import __version__
    from lib.util.command import CALLED, Parser

    called = "bash launch.sh" if Path(sys.argv[0]).name == "console.py" else "langprune"
    os.environ[CALLED] = called
    name, *argv = argv or ["help"]
    if name in ("help", "--help", "-h"):
        print(called, LIST)
    elif name == "--version":
        print(f"langprune {__version__}")
    elif name not in NAMES:
        Parser().error(f"{name}: no such command; {called} --help lists all")
    else:
        try:
            what, sys.argv[1:] = program(name, argv)
        except ValueError as error:
            Parser().error(str(error))
        if isinstance(what, Path):
            os.execv(sys.executable, [sys.executable, str(what), *argv])
        runpy.run_module(what, run_name="__main__", alter_sys=True)


def main() -> None:
    """Run the command that the first argument names, and exit with its status."""
    sys.path.insert(0, str(ROOT))
    from lib.util.command import run

    sys.exit(run(start))


if __name__ == "__main__":
    main()
