"""A digest of the program's own code: every file that a run can import.

Comments, docstrings and blank lines change no result and do not count. The imports are followed
from main.py on; methods, which are imported by name, and the sources of compiled kernels are added.
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
BY_NAME = ("lib/methods/*.py", "lib/packed/*.py")  # imported by name at run time
COMPILED = ("*.cpp", "*.cu", "*.h")  # beside the modules that build them
C_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


@cache
def code_digest(root: Path = ROOT) -> str:
    """Return the digest of all code that `root`/main.py can run."""
    hasher = hashlib.sha256()
    for file in run_files(root):
        hasher.update(f"{file.relative_to(root).as_posix()}\n{_code_text(file)}\n".encode())
    return hasher.hexdigest()[:16]


def files_digest(files: Iterable[Path]) -> str:
    """Return the digest of Python files by their names and code."""
    hasher = hashlib.sha256()
    for file in sorted(files):
        hasher.update(f"{file.name}\n{_code_text(file)}\n".encode())
    return hasher.hexdigest()[:16]


def run_files(root: Path) -> list[Path]:
    """Return every source file of the program that a run may use."""
    pending = [root / "main.py", *(file for pattern in BY_NAME for file in root.glob(pattern))]
    files: set[Path] = set()
    while pending:
        file = pending.pop()
        if file not in files:
            files.add(file)
            pending += _imported(file, root)
    folders = {file.parent for file in files}
    compiled = {file for folder in folders for kind in COMPILED for file in folder.glob(kind)}
    return sorted(files | compiled)


def _imported(file: Path, root: Path) -> Iterator[Path]:
    """Yield the program's own files that `file` imports anywhere."""
    package = file.relative_to(root).parent.parts
    for node in _walk_statements(_parsed(file).body):
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
                module_path = root.joinpath(*name[:end])
                for source in (module_path.with_suffix(".py"), module_path / "__init__.py"):
                    if source.is_file():
                        yield source


def _walk_statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield all statements, nested ones too; no expression can hold an import."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from _walk_statements(getattr(node, part, ()))


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def _code_text(file: Path) -> str:
    """Return what decides how a source file runs, without comments and line numbers."""
    if file.suffix != ".py":
        lines = C_COMMENT.sub("", file.read_text("utf-8")).splitlines()
        return "\n".join(line.strip() for line in lines if line.strip())
    # optimize=2 leaves docstrings out
    text = file.read_text("utf-8")
    return _instructions(compile(text, "", "exec", dont_inherit=True, optimize=2))


def _instructions(code: CodeType) -> str:
    """Return a code object, and those nested in it, as text without line numbers."""
    constants = [
        _instructions(value) if isinstance(value, CodeType) else _plain(value)
        for value in code.co_consts
    ]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    return repr((code.co_name, names, counts, code.co_code, code.co_exceptiontable, constants))


def _plain(value: object) -> str:
    """Return a constant as text that is the same in every process."""
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
