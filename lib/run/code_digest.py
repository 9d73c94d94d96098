"""A digest of the program's own code: of every file that a run can import, without what it says.

Comments, docstrings and blank lines change no result, and do not count. Files are found by their
imports, beginning with main.py; methods, which are imported by name, and the sources of compiled
kernels are added.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = ("lib/methods/*.py", "lib/packed/*.py")  # imported by a name that only a run knows
COMPILED = ("*.cpp", "*.cu", "*.h")  # beside the modules that build them
C_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


@cache
def code_digest(root: Path = ROOT) -> str:
    """Digest of the code of a run, from `root`/main.py on."""
    whole = hashlib.sha256()
    for file in run_files(root):
        whole.update(f"{file.relative_to(root).as_posix()}\n{_meaning(file)}\n".encode())
    return whole.hexdigest()[:16]


def files_digest(files: Iterable[Path]) -> str:
    """Digest of other Python files, each by its name and its code."""
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(f"{file.name}\n{_meaning(file)}\n".encode())
    return whole.hexdigest()[:16]


def run_files(root: Path) -> list[Path]:
    """Every source file of the program that a run may use."""
    left = [root / "main.py", *(file for pattern in BY_NAME for file in root.glob(pattern))]
    files: set[Path] = set()
    while left:
        file = left.pop()
        if file not in files:
            files.add(file)
            left += _imported(file, root)
    folders = {file.parent for file in files}
    compiled = {file for folder in folders for kind in COMPILED for file in folder.glob(kind)}
    return sorted(files | compiled)


def _imported(file: Path, root: Path) -> Iterator[Path]:
    """The files of the modules that a file imports, wherever in it, if they are the program's."""
    package = file.relative_to(root).parent.parts
    for node in _statements(_parsed(file).body):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = list(package[: len(package) - node.level + 1]) if node.level else []
            module = [*above, *(node.module.split(".") if node.module else [])]
            names = [module, *([*module, alias.name] for alias in node.names)]
        else:
            continue
        for name in names:
            for end in range(1, len(name) + 1):  # a package's own file is executed too
                place = root.joinpath(*name[:end])
                for found in (place.with_suffix(".py"), place / "__init__.py"):
                    if found.is_file():
                        yield found


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements, also those inside others; no expression holds an import."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from _statements(getattr(node, part, ()))


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def _meaning(file: Path) -> str:
    """What a source file does, whatever it says about it and on which line."""
    if file.suffix != ".py":
        lines = C_COMMENT.sub("", file.read_text("utf-8")).splitlines()
        return "\n".join(line.strip() for line in lines if line.strip())
    # the second level of optimisation leaves docstrings out
    return _instructions(compile(_parsed(file), "", "exec", dont_inherit=True, optimize=2))


def _instructions(code: CodeType) -> str:
    """A code object without its line numbers, and those inside it."""
    constants = [
        _instructions(value) if isinstance(value, CodeType) else _plain(value)
        for value in code.co_consts
    ]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    return repr((code.co_name, names, counts, code.co_code, code.co_exceptiontable, constants))


def _plain(value: object) -> str:
    """A constant as text, the same in every process."""
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
