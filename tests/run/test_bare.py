"""main.py where only torch, transformers and accelerate are installed, with what these need."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
import tiny
from support import QUICK, ROOT, content, ended, results, start

INSTALLED = ("torch", "transformers", "accelerate")
LEFT_OUT = {"datasets", "bitsandbytes", "matplotlib", "pytest", "pyarrow"}
# runs a program where the modules named in argv[1] are not to be found
BARE = """
import runpy, sys
from importlib.machinery import PathFinder

missing = set(sys.argv.pop(1).split(","))

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in missing:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def needed(names: tuple[str, ...]) -> set[str]:
    """Packages that are installed with these."""
    found, left = set(), list(names)
    while left:
        name = normal(left.pop())
        try:
            wanted = [] if name in found else metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        found.add(name)
        left += [re.match(r"[\w.-]+", one)[0] for one in wanted if "extra" not in one]
    return found


def missing() -> str:
    """Modules of all other packages that are installed here."""
    there = needed(INSTALLED)
    owners = metadata.packages_distributions()
    return ",".join(
        name for name, packages in owners.items() if not there.intersection(map(normal, packages))
    )


@pytest.mark.usefixtures("elsewhere")
def test_prunes_recovers_and_saves(tmp_path: Path) -> None:
    assert LEFT_OUT.isdisjoint(needed(INSTALLED))
    tiny.write_model("llama")
    tiny.write_texts("uk")
    argv = ["--prune_method", "sparsegpt", "--calibration_data", "uk", "--save_model", "saved"]
    argv += ["--model", "llama", *QUICK, "--recover", "64", "--save", "out"]
    done = ended(start(["-c", BARE, missing(), str(ROOT / "main.py"), *argv], tmp_path))
    assert done.status == 0, done.err
    assert not Path("out/recovery.png").exists() and "matplotlib" in done.err
    assert results()["versions"]["torch"] and "model.safetensors" in content("saved")
