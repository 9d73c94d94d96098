"""Code as text: the modules of Python's standard library, without its tests (license: PSF).

python benchmarks/code_text.py FOLDER       # FOLDER/train.jsonl, FOLDER/test.jsonl
"""

import json
import sys
import sysconfig
from pathlib import Path

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "encodings"}
TEST_EVERY = 12  # modules: every twelfth is test text

library, out = Path(sysconfig.get_paths()["stdlib"]), Path(sys.argv[1])
paths = [path for path in library.rglob("*.py") if LEFT_OUT.isdisjoint(path.parts)]
texts = [path.read_text("utf-8", errors="ignore") for path in sorted(paths)]
texts = [text for text in texts if len(text) > 1000]
out.mkdir(parents=True)
for split, some in (("test", texts[::TEST_EVERY]), ("train", texts)):
    held = {*texts[::TEST_EVERY]} if split == "train" else set()
    rows = [json.dumps({"text": text}) for text in some if text not in held]
    (out / f"{split}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    print(f"{split}: {len(rows)} modules, {sum(map(len, rows)) / 1e6:.1f} MB")
