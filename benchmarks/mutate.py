"""Change one line of lib/ at a time, and check that the tests named for it fail.

    python benchmarks/mutate.py [--only TEXT ...]

mutations.txt has them. A line is found by its text, which only one line of lib/ and main.py may
have, so that moving files changes nothing; without it the change is `gone`. Every change is tested
in a forked process, in a copy of the tree. First the tests must pass without any change. Status 1
unless all changes are `killed`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 900  # seconds, after which a test hangs
ENDS = {0: "survived", 1: "killed", 2: "killed"}  # by pytest's exit status


def mutations() -> list[tuple[str, str, str]]:
    """Return test, old line and new line of every mutation."""
    found, file = [], ""
    for line in Path(__file__).with_name("mutations.txt").read_text("utf-8").splitlines():
        test, _, change = line.partition(": ")
        old, arrow, new = change.partition(" => ")
        if arrow and line[0] != "#":
            found.append((f"{file}::{test}", old, new))
        file = line if line.startswith("tests/") else file
    return found


def place_of(tree: Path, old: str) -> tuple[Path, int] | None:
    """Return the file and the number of the one line with this text."""
    files = [tree / "main.py", *tree.glob("lib/**/*.py")]
    found = [
        (file, number)
        for file in files
        for number, line in enumerate(file.read_text("utf-8").splitlines())
        if line.strip() == old
    ]
    return found[0] if len(found) == 1 else None


def import_all_but_lib(tree: Path) -> None:
    """Import what tests import of other packages, which forked processes then have."""
    code = "import sys, accelerate, matplotlib.figure, pandas, pytest, scipy.stats, support\n"
    code += "import lib.run.check, lib.run.steps, lib.commands.trim.folder; print(*sys.modules)"
    environment = os.environ | dict(PYTHONPATH=f"{tree}{os.pathsep}{tree / 'tests'}")
    names = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    for name in names.split():
        with suppress(Exception):  # lib and tests are not found here
            importlib.import_module(name)


def run(tree: Path, tests: Sequence[str], output: Path) -> str:
    """Run tests in a forked process, in `tree`; return how they ended."""
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        os.chdir(tree)
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.path[:] = [path for path in sys.path if Path(path or ".").resolve().parent != ROOT]
        sys.dont_write_bytecode = True
        import pytest

        flags = "-n 0 -m= -x -q -c pyproject.toml -o cache_dir=.cache"
        os._exit(pytest.main([*flags.split(), *tests]))
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return ENDS.get(os.waitstatus_to_exitcode(status), f"broken, see {output}")
        time.sleep(0.05)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return "hangs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=[], nargs="+", metavar="TEXT", help="of test or lines")
    only = parser.parse_args().only
    os.environ |= dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ |= dict(HF_HUB_DISABLE_PROGRESS_BARS="1", COLUMNS="80", TORCH_CPP_LOG_LEVEL="FATAL")
    todo = [one for one in mutations() if not only or any(t in " ".join(one) for t in only)]
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        tree, output = Path(name) / "tree", Path(name) / "output"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".*_cache", "results"))
        import_all_but_lib(tree)
        tests = sorted({test for test, *_ in todo})
        if run(tree, tests, output) != "survived":
            print(output.read_text("utf-8")[-3000:], "tests fail without a change", sep="\n")
            return 1
        for test, old, new in todo:
            start, place = time.monotonic(), place_of(tree, old)
            if place is None:
                how = "gone"
            else:
                file, number = place
                lines = file.read_text("utf-8").splitlines(keepends=True)
                lines[number] = lines[number].replace(old, new)
                file.write_text("".join(lines), "utf-8")
                how = run(tree, [test], output)
                shutil.copy2(ROOT / file.relative_to(tree), file)  # as it was compiled
            counts[how] += 1
            where = place[0].relative_to(tree) if place else "?"
            print(f"{how}, {time.monotonic() - start:.0f} s: {where}: {old} -> {new}", flush=True)
    print(", ".join(f"{count} {how}" for how, count in counts.items()), f"of {len(todo)} mutations")
    return 0 if set(counts) == {"killed"} else 1


if __name__ == "__main__":
    sys.exit(main())
