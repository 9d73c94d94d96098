"""llama.cpp's program llama-quantize, for the types that the converter can't write."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from lib.gguf.child import threads
from lib.gguf.types import TYPES
from lib.util.errors import UserError

PROGRAM = "llama-quantize"
PLACES = ("build/bin", "bin", ".")  # of a checkout
WITHOUT = ", ".join(name for name, kind in reversed(TYPES.items()) if not kind.program)
REASON = re.compile(r"error|exception|fail|invalid|requires", re.IGNORECASE)


def program(llama: str | None, name: str = PROGRAM) -> Path | None:
    """Return where a program of llama.cpp is: in the checkout `llama`, else on PATH."""
    places = [Path(llama) / place / name for place in PLACES] if llama else []
    built = next((place for place in places if os.access(place, os.X_OK)), None)
    on_path = shutil.which(name)
    return built or (Path(on_path) if on_path else None)


def check_quantiser(weight_type: str | None, llama: str | None, imatrix: str | None) -> None:
    """Raise UserError if the program, or the importance matrix that a type needs, is missing."""
    kind = TYPES[weight_type] if weight_type else None
    if kind is None or not kind.program:
        if imatrix:
            raise UserError(f"--imatrix: of use for types of {PROGRAM} only, which --type names")
        return
    if not program(llama):
        raise UserError(
            f"--type {weight_type}: needs {PROGRAM}, on PATH or built in the checkout that "
            f"--llama names ({PLACES[0]}); without it: {WITHOUT}"
        )
    if kind.needs_imatrix and not imatrix:
        raise UserError(
            f"--type {weight_type}: needs --imatrix FILE, which llama.cpp's llama-imatrix makes of "
            "a text and the model's f16 file"
        )
    if imatrix and not Path(imatrix).is_file():
        raise UserError(f"--imatrix {imatrix}: no such file")


def quantise(
    before: Path, file: Path, *, weight_type: str, llama: str | None, imatrix: str | None
) -> str:
    """Write `file` from the 16-bit file `before`; return the program's version.

    Raises UserError with the program's own reason if it fails.
    """
    options = ["--imatrix", imatrix] if imatrix else []
    tool = [str(program(llama)), *options, str(before), str(file), TYPES[weight_type].program]
    done = subprocess.run([*tool, str(threads())], capture_output=True, text=True, errors="replace")
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode or not file.is_file():
        reasons = [line for line in lines if REASON.search(line)] or lines or ["-"]
        raise UserError(f"--type {weight_type}: {PROGRAM} failed: {reasons[0]}")
    version = next((line for line in lines if line.startswith("version:")), "")
    return " ".join([PROGRAM, *version.split()[1:]])
