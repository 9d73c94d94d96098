"""Who may import whom, what must be installed, and what pages name; the files are only read."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from lib.run.flags import build_parser

ROOT = Path(__file__).resolve().parent.parent
LIB = ROOT / "lib"
# every entry imports from lower floors only
FLOORS = [
    ["util"],
    ["distributed", "packed"],
    ["data", "methods"],
    ["model"],
    ["pruning"],
    ["eval", "prune", "sharded"],
    ["quantize", "remove"],
    ["sparse", "vocabulary"],
    ["recover"],
    ["run"],
    ["main"],
    ["commands"],
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# packages for some uses, or in an environment of their own
OPTIONAL = """
triton lm_eval llmcompressor conversion convert_hf_to_gguf gguf xllamacpp ua_gec mlx mlx_lm onnx
onnxruntime onnxruntime_genai
""".split()


def sources(*folders: str) -> list[Path]:
    return [ROOT / "main.py", *(path for name in folders for path in (ROOT / name).rglob("*.py"))]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import, those inside functions and for the type checker too."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = file.relative_to(ROOT).parts[: -node.level] or ("lib",)  # main.py's
                module = ".".join([*package, *filter(None, [node.module])])
            whole = module == "lib"  # from lib import prune
            yield from ((node.lineno, f"lib.{n.name}" if whole else module) for n in node.names)


def test_modules_of_lib_import_each_other_relatively() -> None:
    """So that they work under any name: `lib` in a checkout, `langprune` once installed."""
    wrong = []
    for file in LIB.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            wrong += [f"{file}:{node.lineno}" for one in names if one.split(".")[0] == "lib"]
    assert not wrong, wrong


def test_imports_go_down() -> None:
    wrong = []
    for file in sources("lib"):
        here = file.relative_to(LIB).parts[0].removesuffix(".py") if LIB in file.parents else "main"
        for line, module in imports(file):
            there = module.split(".")[1] if module.startswith("lib.") else module
            if there != here and FLOOR_OF.get(here, -1) <= FLOOR_OF.get(there, -2):
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_what_is_imported_is_required() -> None:
    text = (ROOT / "requirements.txt").read_text("utf-8").lower().replace("_", "-")
    required = set(re.findall(r"(?m)^[\w.-]+", text))
    known = {"lib", "main", "tests", *OPTIONAL, *sys.stdlib_module_names}
    known |= {file.stem for file in (ROOT / "tests").rglob("*.py")}
    owners, missing = metadata.packages_distributions(), set()
    for file in sources("lib", "tests"):
        for line, module in imports(file):
            top = module.partition(".")[0]
            names = {name.lower().replace("_", "-") for name in owners.get(top, [top])}
            if top not in known and not names & required:
                missing.add(f"{file.relative_to(ROOT)}:{line} imports {top}")
    assert not missing, "not in requirements.txt: " + "; ".join(sorted(missing))


def test_pages_name_flags_and_files_that_exist() -> None:
    known = vars(build_parser().parse_args(["--model", "m"]))
    started = r"(?:main\.py|(?:launch\.sh|langprune) prune) ([^`|#\n]*)"
    wrong = []
    for page in (*ROOT.glob("*.md"), *ROOT.glob("lib/**/*.*"), *ROOT.glob("tests/bench/**/*.*")):
        if page.suffix not in (".md", ".py") or page.name == "CHANGELOG.md":
            continue
        text = page.read_text("utf-8").replace("\\\n", " ")
        flags = re.findall(r"(?<!\S)--([a-z_]+)", " ".join(re.findall(started, text)))
        wrong += [f"{page}: --{flag}" for flag in flags if flag not in known]
        links = re.findall(r"\]\(([^):#]+)(?:#[\w-]*)?\)", text) if page.suffix == ".md" else ()
        wrong += [f"{page}: {link}" for link in links if not (page.parent / link).exists()]
    assert not wrong, "\n".join(wrong)
