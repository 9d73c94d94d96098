"""Everything that can be run, by name: `langprune NAME`, or in a checkout `bash launch.sh NAME`.

pip installs main.py and lib/ side by side as in the repository. Their folder goes to the front of
sys.path, as when main.py is run as a file.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {  # name: arguments, what it does
    "demo": ("", "the whole job in small, on a text and a model that it makes"),
    "prune": ("--model MODEL", "one run with flags of your own; prune --help lists them"),
    "compress": ("MODEL OUT", "all of it for one model: trimmed, pruned, recovered, compared"),
    "gguf": ("IN OUT.gguf", "a saved model for llama.cpp and ollama, proven on --data SOURCE ..."),
    "unpack": ("IN OUT", "a packed model as a plain dense one"),
    "sweep": ("--models MODEL ...", "methods, types, ratios, calibration sets, seeds: one table"),
    "languages": ("MODEL SOURCE ...", "prunings for several languages, and what their masks share"),
    "report": ("RUN ...", "table and pictures of finished runs"),
    "overlap": ("RUN_A RUN_B ...", "what the masks of pruned models share"),
    "tasks": ("DATA OUT", "tasks for lm-eval from documents, for --tasks and --include_path"),
    "ubertext": ("DUMPS OUT", "the published data set from raw dumps"),
}
RECIPES = {  # name: arguments, flags of `prune` that flags of your own follow, what it does
    "unstructured": ("MODEL", "--prune_method sparsegpt", "SparseGPT, half of the weights"),
    "semistructured": (
        "MODEL",
        "--prune_method sparsegpt --sparsity_type 2:4 --replace_sparse_layers",
        "SparseGPT, 2:4, with packed linears",
    ),
    "c4": (
        "MODEL",
        "--prune_method sparsegpt --prune_on_c4",
        "the first, calibrated on English C4",
    ),
    "dense": ("MODEL", "--eval_only", "perplexity of the model as it is"),
    "vocabulary": (
        "MODEL OUT",
        "--trim_vocabulary",
        "its vocabulary trimmed for --vocabulary_data SOURCE ...; no pruning",
    ),
}
BENCHES = {  # only in a checkout, likewise: programs of tests/bench
    "bench": ("", "bench.py", "speed and memory, beside llm-compressor"),
    "bench_sparse": (
        "",
        "bench_sparse.py",
        "packed weights beside dense ones: speed, size, loading",
    ),
    "gpu": ("", "gpu/first_run.py", "what must hold on a GPU and how fast it is, in 25 minutes"),
}


def program(name: str, argv: list[str]) -> tuple[str | Path, list[str]]:
    """Return what `name` runs, a module's name or a file, and its arguments."""
    if name in BENCHES:
        return ROOT / "tests" / "bench" / BENCHES[name][1], argv
    if name not in RECIPES:
        return "main" if name == "prune" else f"lib.commands.{name}", argv
    if argv[:1] in (["-h"], ["--help"]):
        return "main", argv
    needed = RECIPES[name][0].split()
    given, flags = argv[: len(needed)], RECIPES[name][1].split()
    if len(given) < len(needed) or any(word.startswith("-") for word in given):
        refuse(f"{name}: name {' and '.join(needed)} first: {called()} {name} {' '.join(needed)}")
    if len(given) > 1:
        flags += ["--save_model", given[1]]
    return "main", ["--model", given[0], *flags, "--save", f"out/{name}", *argv[len(given) :]]


def start(argv: list[str]) -> None:
    """Run the command that the first argument names; without one, list them."""
    name, *argv = argv or ["--help"]
    benches = BENCHES if (ROOT / "tests" / "bench").is_dir() else {}
    if name == "--version":
        from lib import __version__

        print(f"langprune {__version__}")
    elif name in ("-h", "--help", "help"):
        print(f"{called()} NAME ..., where NAME is one of these; NAME --help lists its flags\n")
        for group in (COMMANDS, RECIPES, benches):
            for each, (arguments, *_, text) in group.items():
                print(f"  {f'{each} {arguments}':<26} {text}")
            print()
        print("MODEL: hub id (owner/name) or local folder.")
    elif name not in COMMANDS | RECIPES | benches:
        refuse(f"{name}: no such command; {called()} --help lists all")
    else:
        what, sys.argv[1:] = program(name, argv)
        if isinstance(what, Path):
            os.execv(sys.executable, [sys.executable, *map(str, (what, *argv))])
        runpy.run_module(what, run_name="__main__", alter_sys=True)


def called() -> str:
    """Return how this was started, for messages."""
    return "bash launch.sh" if Path(sys.argv[0]).name == "console.py" else "langprune"


def refuse(mistake: str) -> NoReturn:
    print(f"error: {mistake}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Run the command that the first argument names, and exit with its status."""
    sys.path.insert(0, str(ROOT))
    from lib.util.command import run

    sys.exit(run(start))


if __name__ == "__main__":
    main()
