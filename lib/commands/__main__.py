"""The commands by name: `langprune NAME`, or in a checkout `bash launch.sh NAME`.

pip installs lib/ as the package langprune, with main.py inside it.
"""

from __future__ import annotations

import os
import re
import sys

from ..util.cli import CALLED, Parser, run
from ..util.errors import UserError
from ..util.processes import PACKAGE, main_of

LIST = """\
NAME ..., where NAME is a command; NAME --help lists its flags

prune for a language:
  prune --model MODEL ...        masks by text: Wanda, SparseGPT, ADMM; as main.py
  sweep --models MODEL ...       many prunings: methods, types, texts and seeds
  report RUN ...                 tables with intervals, LaTeX, CSV and pictures

make a smaller file:
  trim IN OUT --language uk      remove other languages' tokens, also from GGUF
  gguf IN OUT.gguf               convert to GGUF, verified with llama.cpp
  compare A.gguf B.gguf ...      which file is better in your languages
  compress MODEL OUT --data ...  trim, quantize to 4 bits, convert and measure

more:
  demo                           run the pipeline on a tiny model, offline
  overlap RUN_A RUN_B ...        compare the weights that two prunings keep
  dialogues MODEL OUT --data ... write answers of a chat model, to calibrate it
  tasks DATA OUT                 write tasks for lm-eval from your documents
  unpack IN OUT                  convert a packed model to a plain dense one
  export OUT NEW --to mlx        convert a 4-bit model for vLLM, MLX or ONNX
  ubertext DUMPS OUT             build the published Ukrainian texts from dumps

MODEL: Hub id (owner/name) or local folder."""
NAMES = re.findall(r"(?m)^  (\w+)", LIST)


def start(argv: list[str]) -> None:
    """Run the command named by the first argument; without one, list all."""
    from .. import __version__

    called = "bash launch.sh" if PACKAGE == "lib" else "langprune"
    os.environ[CALLED] = called
    name, *argv = argv or ["help"]
    if name in ("help", "--help", "-h"):
        print(called, LIST)
    elif name == "--version":
        print(f"langprune {__version__}")
    elif name not in NAMES:
        fix = f"List all with {called} --help"
        Parser().error(str(UserError(name, "no such command exists", fix)))
    else:
        main_of("main" if name == "prune" else f"commands.{name}")(argv)


def main() -> None:
    """Run the command named by the first argument, and exit with its status."""
    sys.exit(run(start))


if __name__ == "__main__":
    main()
