"""main.py where only torch, transformers and accelerate are installed, with what these need."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from support import QUICK, ROOT, content, ended, python, results

MISSING = "datasets,pyarrow,pandas,bitsandbytes,matplotlib,sentencepiece,langcodes,ninja,lm_eval"
# runs a program where the modules named in argv[1] are not to be found
BARE = """
import runpy, sys

sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.usefixtures("elsewhere")
def test_prunes_and_saves(tmp_path: Path) -> None:
    tiny.write_model("llama")
    tiny.write_texts("uk")
    argv = ["--prune_method", "sparsegpt", "--calibration_data", "uk", "--save_model", "saved"]
    argv += ["--model", "llama", *QUICK, "--save", "out"]
    done = ended(python(BARE, MISSING, ROOT / "main.py", *argv, folder=tmp_path))
    assert done.status == 0, done.err
    assert results()["versions"]["torch"] and "model.safetensors" in content("saved")
