"""New users' ways, from `git clone` to tokens in llama.cpp: what was planned, and what it took.

    python tests/bench/first_minutes.py FOLDER MODEL=LANGUAGE=TEXTS=MINUTES ... [--cpu_clock]

Each way is a clone of this checkout, `pip install` of the clone (without what it needs, which this
Python must have), `langprune compress` in an empty folder, and llama.cpp's continuation of a text's
beginning. TEXTS is a folder or a file; `--` and what follows go to compress. A row of a table is
printed after each. With --cpu_clock a second is a second of a processor's work: on a machine that
others use too, with OMP_NUM_THREADS=1, it shows how one idle core would do, but for the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 48
CLOCK = """\
import os, time
def clock():
    of = os.times()
    return time.process_time() + of.children_user + of.children_system
time.monotonic = time.perf_counter = clock
"""
HEAD = (
    *("model", "typed", "minutes: asked", "planned", "real", "MB: before", "file"),
    *("bits per byte: before", "after", "tokens a second: before", "file", "llama.cpp writes"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="new folder for all of it")
    parser.add_argument("ways", nargs="+", metavar="MODEL=LANGUAGE=TEXTS=MINUTES")
    parser.add_argument("--cpu_clock", action="store_true")
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    print("|", " | ".join(HEAD), "|", flush=True)
    for way in args.ways:
        model, language, texts, minutes = way.split("=")
        row = walk(args.folder / Path(model).name, model, language, texts, minutes, args, more)
        print("|", " | ".join(row), "|", flush=True)


def walk(
    folder: Path,
    model: str,
    language: str,
    texts: str,
    minutes: str,
    args: argparse.Namespace,
    more: list[str],
) -> list[str]:
    """Go one way in a new folder and return its row."""
    site, work = folder.resolve() / "site", folder.resolve() / "work"
    work.mkdir(parents=True)  # the user's, not the clone
    log = (folder / "log.txt").open("wb")

    def call(*command: object, **options: object) -> None:
        subprocess.run(list(map(str, command)), check=True, stdout=log, stderr=log, **options)

    call("git", "clone", ROOT, folder / "clone")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation")
    call(*pip, "--target", site, folder / "clone")
    environment = os.environ | {"PYTHONPATH": str(site)}
    if args.cpu_clock:
        (site / "sitecustomize.py").write_text(CLOCK)
    os.symlink(Path(model).resolve(), work / "model")
    os.symlink(Path(texts).resolve(), work / Path(texts).name)
    typed = ["model", "small", "--language", language, "--data", Path(texts).name]
    typed += ["--minutes", minutes, *more]
    before = os.times()
    start = time.monotonic()
    call(sys.executable, site / "bin" / "langprune", "compress", *typed, cwd=work, env=environment)
    wall, after = time.monotonic() - start, os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])
    text = (folder / "log.txt").read_text("utf-8", errors="replace")
    planned = re.search(r"(?m)^plan: .*, about (\d+ \w+)", text)
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][2:]
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in table}
    bits = next(cells for name, cells in rows.items() if name.startswith("bits"))
    speed, words = continued(work / "small.gguf", (work / "small-compress").glob("tests/*.jsonl"))
    command = f"`langprune compress {shlex.join(typed).replace('model', Path(model).name, 1)}`"
    real = f"{(cpu if args.cpu_clock else wall) / 60:.1f} min"
    sizes = rows["on disk, MB"][0], rows["on disk, MB"][-1]
    before = rows["tokens a second"][0]
    return [
        *(Path(model).name, command, minutes, planned[1], real, *sizes, *bits[:2], before),
        *(f"{speed:.1f}", words.replace("|", "/")),
    ]


def continued(file: Path, tests: object) -> tuple[float, str]:
    """Return llama.cpp's tokens for a second of one core's work, and what it writes."""
    sys.path.insert(0, str(ROOT))
    from lib.commands.gguf.llama_cpp import start

    prompt = " ".join(json.loads(next(tests).open(encoding="utf-8").readline())["text"].split()[:8])
    server = start(str(file), 512)
    fields = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "ignore_eos": True}
    for _ in range(2):  # the first reads the file
        body, began = json.dumps(fields).encode(), time.process_time()
        request = Request(f"{server.listening_address}/completion", body)
        request.add_header("Content-Type", "application/json")
        answer = json.load(urlopen(request))
        spent = time.process_time() - began
    return TOKENS / spent, " ".join(f"{prompt} → {answer['content']}".split())


if __name__ == "__main__":
    main()
