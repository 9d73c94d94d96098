"""Everything that can be run, by name: `langprune NAME`, or in a checkout `bash launch.sh NAME`.

pip installs lib/ as the package langprune, and main.py in it; the modules of lib/ import each other
relatively.
"""

from __future__ import annotations

import os
import re
import sys

from ..util.command import CALLED, PACKAGE, Parser, main_of, run

LIST = """\
NAME ..., where NAME is one of these; NAME --help lists its flags

  demo                               the whole job in small, on a text and a model that it makes
  prune --model MODEL                one run, with flags of your own: the same as python main.py
  compress MODEL OUT --language uk   a small model for every engine, in --minutes 30

  sweep --models MODEL ...       methods x types x ratios x calibration sets x seeds, one table
  report RUN ...                 table and picture of finished runs
  overlap RUN_A RUN_B ...        what masks share, and what of it is due to the language
  dialogues MODEL OUT --data ... answers of a chat model to prompts, to compress it on
  tasks DATA OUT                 tasks for lm-eval from documents, for --tasks and --include_path
  unpack IN OUT                  a packed model as a plain dense one
  gguf IN OUT.gguf               a saved model for llama.cpp and ollama, proven on --data SOURCE ...
  export OUT NEW --to mlx        the same 4 bits for vLLM, MLX or ONNX; no number changes
  ubertext DUMPS OUT             the published data set from raw dumps, --push to a hub

MODEL: hub id (owner/name) or local folder."""
NAMES = re.findall(r"(?m)^  (\w+)", LIST)


def program(name: str) -> str:
    """Return the module that `name` runs."""
    return "main" if name == "prune" else f"commands.{name}"


def start(argv: list[str]) -> None:
    """Run the command that the first argument names; without one, list them."""
    from .. import __version__

    called = "bash launch.sh" if PACKAGE == "lib" else "langprune"
    os.environ[CALLED] = called
    name, *argv = argv or ["help"]
    if name in ("help", "--help", "-h"):
        print(called, LIST)
    elif name == "--version":
        print(f"langprune {__version__}")
    elif name not in NAMES:
        Parser().error(f"{name}: no such command; {called} --help lists all")
    else:
        main_of(program(name))(argv)


def main() -> None:
    """Run the command that the first argument names, and exit with its status."""
    sys.exit(run(start))


if __name__ == "__main__":
    main()
