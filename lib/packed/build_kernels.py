"""Build kernels.cpp, in a process of its own: python -P build_kernels.py NAME SOURCE FOLDER

Compiling needs torch.utils.cpp_extension, which cannot be imported if the program around it has
imported pip, or has Python's own distutils for another reason. This file imports only torch.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path


def build(name: str, source: str, folder: str) -> None:
    """Compile `source` to FOLDER/NAME.so."""
    from torch.utils.cpp_extension import load

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # hides a long "not g++"
    # finds the ninja of a virtual environment that is not activated
    os.environ["PATH"] = os.pathsep.join(
        [os.environ.get("PATH", ""), str(Path(sys.executable).parent)]
    )
    # only for the compiler: torch has OpenMP loaded; Apple's compiler has none
    flags = ["-O2", *([] if sys.platform == "darwin" else ["-fopenmp"])]
    load(name, source, extra_cflags=flags, build_directory=folder, is_python_module=False)


def reason(error: Exception) -> str:
    """Return the cause, in one line, from a compiler's output without its command."""
    first, *output = str(error).strip().splitlines() or [""]
    wrong = [line.strip() for line in output if "error:" in line or "not found" in line]
    if first.startswith("Error building extension") and wrong:
        return f"{wrong[0]}. Install a C++ compiler (g++)"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


if __name__ == "__main__":
    try:
        build(*sys.argv[1:])
    except Exception as error:  # compilers and loaders raise exceptions of all classes
        sys.exit(reason(error))
