"""What a run leaves behind when something goes wrong, and what the next one does with it.

    python benchmarks/faults.py [--kills 20] [--seed 0]

Kills main.py and a sweep with SIGKILL at random moments, fills the disk, changes a text, cuts a
shard, names folders that are not empty, starts two runs in one folder, closes the reader of the
output, damages what was saved; after each, the same command is run again. Prints a table. Full and
read-only disks are small tmpfs, which take root to mount; without it they are left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from support import PROGRESS  # noqa: E402

Row = tuple[str, str, str]
FLAGS = "--device cpu --seqlen 32 --nsamples 8 --prune_method sparsegpt --calibration_data uk"
MAIN, SWEEP = "main", "lib.commands.sweep.__main__"
PRUNE = [MAIN, "--model", "llama", *FLAGS.split()]
SWEPT = [SWEEP, *"--models llama --types unstructured 2:4 --calibration uk".split()]
SETTINGS = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")


def work(folder: str, module: str, *argv: str) -> None:
    """Run a command in a process that was forked off; a sweep has its runs in the same process."""
    os.chdir(folder)
    for name, stream in (("said.out", 1), ("said.err", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    from lib.commands.sweep import __main__ as sweep
    from lib.util import cli

    def call(name: str, *arguments: object) -> int:
        return cli.run(import_module(name).main, [str(each) for each in arguments])

    sweep.call = call
    sys.exit(call(module, *argv))


def started(*argv: str) -> multiprocessing.Process:
    """Start `python -m ARGV...`; it writes to the files said.out and said.err."""
    context = multiprocessing.get_context("forkserver")
    heavy = ["datasets", "pandas", "matplotlib.figure", "transformers.models.llama.modeling_llama"]
    context.set_forkserver_preload([*heavy, "lib.run.steps", "lib.commands.report.__main__"])
    Path("said.out").unlink(missing_ok=True)
    process = context.Process(target=work, args=(os.getcwd(), *argv))
    process.start()
    return process


def run(*argv: str) -> tuple[str, str]:
    """Return status and last line on stderr but progress, and stdout."""
    process = started(*argv)
    process.join()
    out, err = (Path(name).read_text("utf-8") for name in ("said.out", "said.err"))
    lines = [line for line in err.strip().splitlines() if not PROGRESS.search(line)]
    return f"status {process.exitcode} {lines[-1] if lines else ''}".strip(), out


def wait_for_line(process: multiprocessing.Process, word: str) -> float:
    """Return the moment in which the process prints a line with the word: imports are done."""
    said = Path("said.out")
    while process.is_alive() and not (said.exists() and word in said.read_text("utf-8")):
        time.sleep(0.01)
    return time.perf_counter()


def kill(seconds: float, word: str, *argv: str) -> None:
    """Start a command and kill it so many seconds after it has printed the word."""
    process = started(*argv)
    wait_for_line(process, word)
    time.sleep(seconds)
    process.kill()
    process.join()


def time_at_work(word: str, argv: list[str]) -> float:
    process = started(*argv)
    begin = wait_for_line(process, word)
    process.join()
    return time.perf_counter() - begin


def saved(folder: str) -> bytes:
    """Return the saved weights, whatever their files are."""
    return b"".join(file.read_bytes() for file in sorted(Path(folder).glob("*.safetensors")))


def told(left: Counter) -> str:
    return "; ".join(f"{count} x {what}" for what, count in left.most_common())


def kills_while_saving(kills: int, rng: random.Random) -> Iterator[Row]:
    again = [*PRUNE, "--save_model", "new", "--resume", "kept"]
    whole = time_at_work("memory:", [*PRUNE, "--save_model", "whole", "--resume", "timed"])
    left: Counter = Counter()
    for _ in range(kills):
        kill(rng.uniform(0, whole), "memory:", *again)
        state = "no model"
        if Path("new").exists():
            state = "the whole model" if saved("new") == saved("whole") else "NO WHOLE MODEL"
            shutil.rmtree("new")  # so that the next run has something to do
        if Path("new.partial").exists():  # the next run would say that it is to be removed
            state = "part of a model"
            shutil.rmtree("new.partial")
        blocks = "some" if list(Path("kept").glob("block-*")) else "none"
        left[f"{state}, blocks kept: {blocks}"] += 1
    status, _ = run(*again)
    rest = [path.name for path in Path().iterdir() if "partial" in path.name or "lock" in path.name]
    yield (
        f"SIGKILL at {kills} random moments; --save_model, --resume",
        told(left),
        f"{status}; bytes of an uninterrupted run: {saved('new') == saved('whole')}; left: {rest}",
    )


def kills_of_a_sweep(kills: int, rng: random.Random) -> Iterator[Row]:
    def command(out: str) -> list[str]:
        own = [*SWEPT, "--methods", "wanda", "sparsegpt", "--save_models", "--out", out]
        return [*own, "--", *FLAGS.split()[:6]]

    def table(folder: str) -> list[str]:
        text = Path(folder, "report.md").read_text("utf-8")
        return [line for line in text.splitlines() if line.startswith("|")]

    whole = time_at_work("runs,", command("whole-sweep"))
    left: Counter = Counter()
    for _ in range(kills):
        kill(rng.uniform(0, whole), "runs,", *command("runs"))
        finished = len(list(Path("runs").rglob("results.json")))
        left[f"{finished} of 5 runs finished"] += 1
        if finished == 5:
            shutil.rmtree("runs")
    status, out = run(*command("runs"))
    said = [line for line in out.splitlines() if " finished before" in line][:1]
    same = table("runs") == table("whole-sweep")
    name = f"SIGKILL at {kills} random moments of a sweep of 5 runs"
    yield name, told(left), f"{status} {said}; the table of one not killed: {same}"


@contextmanager
def mounted(*options: str) -> Iterator[Path | None]:
    place = Path(tempfile.mkdtemp(dir="."))
    mount = ["mount", "-t", "tmpfs", *options, "none", str(place)]
    failed = subprocess.run(mount, capture_output=True).returncode
    try:
        yield None if failed else place
    finally:
        if not failed:
            subprocess.run(["umount", str(place)])


def disks(_: int, __: random.Random) -> Iterator[Row]:
    for kind, option in (("full", "size=400k"), ("read-only", "ro")):
        for flag in ("--save_model", "--resume", "--save"):
            with mounted("-o", option) as place:
                if place is None:
                    yield f"{flag} on a {kind} disk", "not tried: mount needs root", ""
                    continue
                status, _ = run(*PRUNE, flag, str(place / "there"))
                left = sorted(path.name for path in place.rglob("*") if path.is_file())
            again, _ = run(*PRUNE, flag, "room")
            shutil.rmtree("room", ignore_errors=True)
            yield f"{flag} on a {kind} disk", f"{status}; files: {left}", f"with room: {again}"


@contextmanager
def changed(file: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    before = file.read_bytes()
    file.write_bytes(change(before))
    try:
        yield
    finally:
        file.write_bytes(before)


def other_words(text: bytes) -> bytes:
    return text.replace("сонце".encode(), "місяць".encode())


def inputs(_: int, __: random.Random) -> Iterator[Row]:
    begun, text = [*PRUNE, "--resume", "begun"], Path("uk/train.jsonl")
    interrupt(begun, "begun", signal.SIGKILL).join()
    with changed(text, other_words):
        status, _ = run(*begun)
    yield "a text changed, then --resume", status, f"put back: {run(*begun)[0]}"
    sweep = [*SWEPT, "--methods", "wanda", "--out", "texts", "--", *FLAGS.split()[:6]]
    run(*sweep)
    with changed(text, other_words):
        status, out = run(*sweep)
    lines = [line for line in out.splitlines() if "again" in line or "finished before" in line]
    yield "a text changed between two sweeps", "; ".join(lines), status
    Path("llama").rename("elsewhere")
    status, _ = run(*sweep)
    Path("elsewhere").rename("llama")
    kept = len(list(Path("texts").rglob("results.json")))
    yield "a sweep again, its model moved", status, f"results kept: {kept} of 3"
    with changed(sorted(Path("sharded").glob("*.safetensors"))[1], lambda data: data[: 10**5]):
        status, _ = run(*PRUNE, "--model", "sharded")
    yield "a shard cut short", status, f"put back: {run(*PRUNE, '--model', 'sharded')[0]}"


def interrupt(argv: list[str], folder: str, how: signal.Signals) -> multiprocessing.Process:
    """Send a signal to a run that has finished a block."""
    process = started(*argv)
    while not list(Path(folder).glob("block-*.safetensors")) and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, how)
    return process


def losses(_: int, __: random.Random) -> Iterator[Row]:
    """What a user could lose, or be given wrongly without a word."""
    run(*PRUNE, "--save_model", "alone")
    first = interrupt([*PRUNE, "--save_model", "a", "--resume", "both"], "both", signal.SIGSTOP)
    status, _ = run(*PRUNE, "--seed", "1", "--save_model", "b", "--resume", "both")
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    same = saved("a") == saved("alone")
    yield "another run in the same --resume", status, f"the first's bytes as alone: {same}"
    for flag in ("--save_model", "--offload_folder", "--save"):
        mine = Path("mine", "log_book.txt")
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        status, _ = run(*PRUNE, flag, "mine")
        kept = [file.name for file in mine.parent.iterdir() if file.read_bytes() == b"mine"]
        yield f"a user's file in {flag}", status, f"kept as {kept}"
        shutil.rmtree("mine")
    yield "--save_model that exists", run(*PRUNE, "--save_model", "alone")[0], ""
    argv = [sys.executable, ROOT / "main.py", *PRUNE[1:], "--save_model", "unread"]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(argv, env=os.environ | SETTINGS, **pipe)
    process.stdout.readline()
    process.stdout.close()
    status = process.wait()
    left = [name for name in ("unread", "unread.partial") if list(Path(name).glob("*.safetensors"))]
    yield "the reader of stdout goes", f"status {status}", f"model or blocks kept in {left}"
    run(*PRUNE, "--replace_sparse_layers", "--save_model", "packed")
    file = Path("packed/model.safetensors")
    tensors = load_file(file)
    tensors[next(name for name in tensors if name.endswith(".mask"))].flatten()[:8] |= 255
    save_file(tensors, file, {"format": "pt"})
    flags = [*FLAGS.split()[:4], "--eval_only", "--eval_data", "uk"]
    yield "a packed mask with more bits than values", run(MAIN, "--model", "packed", *flags)[0], ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each kind (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    os.environ |= SETTINGS | {"PYTHONPATH": os.pathsep.join(sys.path[:2])}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        deep = tiny.tiny_llama(num_hidden_layers=24)
        for name, size in (("llama", "1GB"), ("sharded", "500KB")):
            tiny.tiny_tokenizer().save_pretrained(name)
            deep.save_pretrained(name, max_shard_size=size)
        tiny.write_texts("uk")
        print("| what was done | what was left | what the next run did |\n|---|---|---|")
        for kind in (losses, inputs, disks, kills_while_saving, kills_of_a_sweep):
            for row in kind(args.kills, random.Random(args.seed)):
                print(f"| {' | '.join(row)} |", flush=True)
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
