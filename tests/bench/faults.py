"""What a run leaves behind when something goes wrong, and what the next one does with it.

    python tests/bench/faults.py [--kills 20] [--seed 0]

Kills main.py and a sweep with SIGKILL at random moments, fills the disk, changes a text, cuts a
shard, takes away the right to write, starts two runs in one folder, edits what was saved; after
each, the same command is run again. Prints a table.
Full and read-only disks are small tmpfs, which take root to mount; without it they are left out.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from support import content  # noqa: E402

from lib.util.folders import MANIFEST, unexpected_file  # noqa: E402

Row = tuple[str, str, str]
QUICK = "--device cpu --seqlen 32 --nsamples 8 --prune_method sparsegpt".split()
QUICK += ["--calibration_data", "uk"]


def started(*argv: str) -> subprocess.Popen:
    settings = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *argv], env=os.environ | settings, **pipes)


def ran(*argv: str) -> tuple[int, str, str]:
    """Exit status, stdout, and what stands last on stderr but progress."""
    process = started(*argv)
    out, said = process.communicate(timeout=300)
    lines = [line for line in said.strip().splitlines() if "%|" not in line]
    return process.returncode, out, lines[-1] if lines else ""


def at_work(process: subprocess.Popen, word: str) -> float:
    """The moment in which the process prints a line with the word: what it had to import is in."""
    while line := process.stdout.readline():
        if word in line:
            break
    return time.perf_counter()


def time_at_work(word: str, argv: Callable[[str], list[str]]) -> float:
    """The shortest of three, each with its own output: most kills are to come before the end."""
    times = []
    for number in range(3):
        process = started(*argv(f"timed-{number}"))
        begin = at_work(process, word)
        process.communicate()
        times.append(time.perf_counter() - begin)
    return min(times)


def killed(seconds: float, word: str, *argv: str) -> bool:
    """Whether the command still ran when it was killed, so long after it came to work."""
    process = started(*argv)
    at_work(process, word)
    time.sleep(seconds)
    over = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return not over


def state_of(model: Path, known: dict[str, dict[str, str]]) -> str:
    """Which whole model stands there."""
    for path in (model, model.with_name(f"{model.name}.being-replaced")):
        if path.is_dir() and not unexpected_file(path) and (path / MANIFEST).is_file():
            weights = {"model.safetensors": content(path).get("model.safetensors")}
            names = [name for name, files in known.items() if weights.items() <= files.items()]
            return (names or ["an unknown model"])[0] + ("" if path == model else ", put aside")
    return "NO WHOLE MODEL"


def kills_while_saving(kills: int, rng: random.Random) -> Iterator[Row]:
    argv = [str(ROOT / "main.py"), "--model", "llama", *QUICK]
    old = [*argv, "--seed", "1", "--save_model", "saved"]
    again = [*argv, "--save_model", "saved", "--resume", "kept"]
    ran(*argv, "--save_model", "whole")
    ran(*old)
    known = {"the old model": content("saved"), "the new model": content("whole")}
    whole = time_at_work("memory:", lambda out: [*argv, "--save_model", out, "--resume", "k"])
    left: Counter = Counter()
    for _ in range(kills):
        killed(rng.uniform(0, 0.5 * whole), "memory:", *again)  # the rest is taking leave
        found = state_of(Path("saved"), known)
        left[
            f"{found}, blocks kept: {'some' if list(Path('kept').glob('block-*')) else 'none'}"
        ] += 1
        if found == "the new model":  # so that the next kill meets the old one
            shutil.rmtree("saved")
            shutil.rmtree("kept", ignore_errors=True)
            ran(*old)
    status, _, said = ran(*again)
    same = content("saved")["model.safetensors"] == content("whole")["model.safetensors"]
    rest = [
        path.name for path in Path().iterdir() if ".partial" in path.name or "lock" in path.name
    ]
    yield (
        f"SIGKILL at {kills} random moments; --save_model over a model, --resume",
        told(left),
        f"status {status} {said}; bytes of an uninterrupted run: {same}; left over: {rest}",
    )


def kills_of_a_sweep(kills: int, rng: random.Random) -> Iterator[Row]:
    flags = "--models llama --methods wanda sparsegpt --types unstructured 2:4 --save_models"
    own = ["-m", "lib.commands.sweep", *flags.split(), "--calibration", "uk"]

    def command(out: str) -> list[str]:
        return [*own, "--out", out, "--", *QUICK[:6]]

    ran(*command("whole"))
    whole = time_at_work("runs,", command)
    left: Counter = Counter()
    for _ in range(kills):
        if len(list(Path("runs").rglob("results.json"))) == 5:
            shutil.rmtree("runs")
        killed(rng.uniform(0, whole), "runs,", *command("runs"))
        left[f"{len(list(Path('runs').rglob('results.json')))} of 5 runs finished"] += 1
    status, out, _ = ran(*command("runs"))
    said = next(line for line in out.splitlines() if " finished before" in line)
    yield (
        f"SIGKILL at {kills} random moments of a sweep of 5 runs",
        told(left),
        f"status {status}: {said}; the table of one not killed: {table('runs') == table('whole')}",
    )


def table(folder: str) -> list[str]:
    """The report's rows."""
    text = Path(folder, "report.md").read_text("utf-8")
    return [line for line in text.splitlines() if line.startswith("|")]


@contextmanager
def mounted(*options: str) -> Iterator[Path | None]:
    place = Path(tempfile.mkdtemp(dir="."))
    done = subprocess.run(
        ["mount", "-t", "tmpfs", *options, "none", str(place)], capture_output=True
    )
    try:
        yield None if done.returncode else place
    finally:
        if not done.returncode:
            subprocess.run(["umount", str(place)])


def disks(_: int, __: random.Random) -> Iterator[Row]:
    argv = [str(ROOT / "main.py"), "--model", "llama", *QUICK]
    with mounted("-o", "size=400k") as place:
        if place is None:
            yield "disks that are full or read-only", "not tried: mount needs root", ""
            return
        for flag in ("--save_model", "--resume"):
            status, _, said = ran(*argv, flag, str(place / "there"))
            left = sorted(path.name for path in place.rglob("*") if path.is_file())
            again, _, _ = ran(*argv, flag, "room")
            yield (
                f"{flag} on a disk that fills up",
                f"status {status}: {said}; files: {left}",
                f"with room: status {again}",
            )
            shutil.rmtree("room", ignore_errors=True)
            for path in place.iterdir():
                shutil.rmtree(path, ignore_errors=True)
    with mounted("-o", "ro") as place:
        for flag in ("--save_model", "--save"):
            start = time.perf_counter()
            status, _, said = ran(*argv, flag, str(place / "there"))
            spent = time.perf_counter() - start
            yield f"{flag} on a read-only disk", f"status {status} after {spent:.1f} s: {said}", ""


def inputs(_: int, __: random.Random) -> Iterator[Row]:
    argv = [str(ROOT / "main.py"), "--model", "llama", *QUICK]
    begun = [*argv, "--resume", "begun"]
    process = started(*begun)
    while not list(Path("begun").glob("block-*.safetensors")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    with changed(Path("uk/train.jsonl"), lambda data: data.replace("сонце", "місяць")):
        status, _, said = ran(*begun)
    again, _, _ = ran(*begun)
    yield "a text changed, then --resume", f"status {status}: {said}", f"put back: status {again}"
    flags = "--models llama --methods wanda --types unstructured --calibration uk --out texts"
    sweep = ["-m", "lib.commands.sweep", *flags.split(), "--", *QUICK[:6]]
    ran(*sweep)
    with changed(Path("uk/train.jsonl"), lambda data: data.replace("сонце", "місяць")):
        status, out, _ = ran(*sweep)
    lines = [line for line in out.splitlines() if "again" in line or "finished before" in line]
    yield "a text changed between two sweeps", "; ".join(lines), f"status {status}"
    shard = sorted(Path("sharded").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    cut = [*argv, "--model", "sharded"]
    status, _, said = ran(*cut)
    shard.write_bytes(whole)
    again, _, _ = ran(*cut)
    yield "a shard cut short", f"status {status}: {said}", f"put back: status {again}"


def losses(_: int, __: random.Random) -> Iterator[Row]:
    """What a user could lose, or be given wrongly without a word."""
    argv = [str(ROOT / "main.py"), "--model", "llama", *QUICK]
    yield two_runs_in_one_folder(argv)
    save = [*argv, "--save_model", "trained"]
    ran(*save)
    file = Path("trained/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    status, _, message = ran(*save)
    kept = file.read_bytes() == bytes(data)
    yield "weights trained in place, as long as before", f"status {status}: {message}", f"{kept=}"
    mine = Path("away/process-0/thesis.txt")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    status, _, message = ran(*argv, "--offload", "away")
    yield "a user's file in --offload", f"status {status} {message}", f"kept: {mine.exists()}"
    yield output_without_a_reader(argv)
    yield sweep_without_its_model()
    yield damaged_mask(argv)


def two_runs_in_one_folder(argv: list[str]) -> Row:
    ran(*argv, "--save_model", "alone")
    first = started(*argv, "--save_model", "first", "--resume", "both")
    while not list(Path("both").glob("block-*")) and first.poll() is None:
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)  # so that it is at work all the while
    status, _, message = ran(*argv, "--seed", "1", "--save_model", "second", "--resume", "both")
    first.send_signal(signal.SIGCONT)
    first.communicate()
    same = content("alone")["model.safetensors"] == content("first")["model.safetensors"]
    return (
        "another run in the same --resume",
        f"the second: status {status}: {message}",
        f"the first: status {first.returncode}, bytes as alone: {same}",
    )


def output_without_a_reader(argv: list[str]) -> Row:
    command = [sys.executable, *argv, "--save_model", "unread"]
    settings = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONIOENCODING="ascii")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | settings
    )
    process.stdout.readline()
    process.stdout.close()
    status = process.wait()
    saved = Path("unread/model.safetensors").is_file()
    return "the reader of stdout goes, on an ASCII terminal", f"status {status}", f"saved: {saved}"


def sweep_without_its_model() -> Row:
    flags = "--models llama --methods wanda --types unstructured --calibration uk --out moved"
    sweep = ["-m", "lib.commands.sweep", *flags.split(), "--", *QUICK[:6]]
    ran(*sweep)
    before = content("moved")
    Path("llama").rename("elsewhere")
    status, _, message = ran(*sweep)
    Path("elsewhere").rename("llama")
    figures = [name for name in before if name.endswith("results.json")]
    kept = all(content("moved")[name] == before[name] for name in figures)
    return "a sweep again, its model moved", f"status {status}: {message}", f"figures kept: {kept}"


def damaged_mask(argv: list[str]) -> Row:
    from safetensors.torch import load_file, save_file

    ran(*argv, "--replace_sparse_layers", "--save_model", "packed")
    file = Path("packed/model.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".mask"))
    tensors[name].flatten()[:8] |= 255
    save_file(tensors, file, {"format": "pt"})
    flags = ["--model", "packed", "--eval_only", "--eval_data", "uk", "--offload", "mask"]
    status, _, message = ran(argv[0], *flags, *QUICK[:4])
    return "a packed mask with more bits than values", f"status {status}: {message}", ""


@contextmanager
def changed(file: Path, change: Callable[[str], str]) -> Iterator[None]:
    before = file.read_text("utf-8")
    file.write_text(change(before), "utf-8")
    try:
        yield
    finally:
        file.write_text(before, "utf-8")


def told(left: Counter) -> str:
    return "; ".join(f"{count} x {what}" for what, count in left.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each kind (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
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
