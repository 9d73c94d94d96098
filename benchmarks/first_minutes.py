"""New users' ways, from `git clone` to tokens in llama.cpp: what they took, and made.

    python benchmarks/first_minutes.py FOLDER MODEL=LANGUAGE=TEXTS[=FLAGS] ... --cpu_clock

Each is a clone of this checkout, `pip install` of it (without what it needs, which this Python must
have), `langprune compress` in an empty folder, and a text gone on with by llama.cpp; a row each.
With --cpu_clock a second is one of a processor's work: on a machine that others use too, and with
OMP_NUM_THREADS=1, it shows how one idle core would do, but for the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 48
CLOCK = """\
import os, time
def clock():
    of = os.times()
    return time.process_time() + of.children_user + of.children_system
time.monotonic = time.perf_counter = clock
"""
HEAD = (
    *("model", "typed", "minutes", "MB: before", "file"),
    *("bits per byte: before", "after", "tokens a second: before", "file", "llama.cpp writes"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="new folder for all of it")
    parser.add_argument("ways", nargs="+", metavar="MODEL=LANGUAGE=TEXTS[=FLAGS]")
    parser.add_argument("--cpu_clock", action="store_true")
    args = parser.parse_args()
    print("|", " | ".join(HEAD), f"|\n|{'---|' * len(HEAD)}", flush=True)
    for number, way in enumerate(args.ways):
        row = walk(args.folder.resolve() / str(number), args.cpu_clock, way)
        print("|", " | ".join(row), "|", flush=True)


def walk(folder: Path, clock: bool, way: str) -> list[str]:
    """Go one way in a new folder and return its row."""
    model, language, texts, more = (way.split("=") + [""])[:4]
    site, work, name = folder / "site", folder / "work", Path(model).name
    work.mkdir(parents=True)  # the user's, not the clone
    log = (folder / "log.txt").open("wb")

    def call(*command: object, **options: object) -> None:
        subprocess.run(list(map(str, command)), check=True, stdout=log, stderr=log, **options)

    call("git", "clone", ROOT, folder / "clone")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation")
    call(*pip, "--target", site, folder / "clone")
    if clock:
        (site / "sitecustomize.py").write_text(CLOCK)
    os.symlink(Path(model).resolve(), work / name)
    os.symlink(Path(texts).resolve(), work / Path(texts).name)
    typed = [name, "small", "--language", language, "--data", Path(texts).name]
    typed += more.split()
    before, start = os.times(), time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(site)}
    call(sys.executable, site / "bin" / "langprune", "compress", *typed, cwd=work, env=environment)
    seconds, after = time.monotonic() - start, os.times()
    if clock:
        seconds = sum(after[2:4]) - sum(before[2:4])
    tests = next(Path(texts).glob("test*.jsonl"))
    lines = (work / "small-compress" / "compressed.md").read_text("utf-8").splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = {name: figures for name, *figures in cells}
    sizes, speeds = rows["on disk, MB"], rows["tokens/s"]
    bits = rows[f"{Path(texts).name}, bits per byte"]
    row = [name, f"`langprune compress {shlex.join(typed)}`", f"{seconds / 60:.1f}"]
    row += [sizes[0], sizes[-1], *bits[:2], speeds[0]]
    if (work / "small.gguf").exists():
        row += continued(work / "small.gguf", tests)
    return row


def continued(file: Path, tests: Path) -> tuple[str, str]:
    """Return llama.cpp's tokens for a second of one core's work, and what it writes."""
    sys.path.insert(0, str(ROOT))
    from lib.gguf.llama import ask, start

    prompt = " ".join(json.loads(tests.open(encoding="utf-8").readline())["text"].split()[:8])
    server = start(str(file), 512)
    fields = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "ignore_eos": True}
    for _ in range(2):  # the first reads the file
        began = time.process_time()
        answer = ask(server, "/completion", fields)
        spent = time.process_time() - began
    words = " ".join(f"{prompt} → {answer['content']}".split()).replace("|", "/")
    return f"{TOKENS / spent:.1f}", words


if __name__ == "__main__":
    main()
