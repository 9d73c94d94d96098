"""Compare what two commits write: two hundred kinds of small run, on tiny models.

    python benchmarks/compare_commits.py record CHECKOUT OUT.json [--cuda] [--only TEXT ...]
    python benchmarks/compare_commits.py compare BEFORE.json AFTER.json [--only TEXT ...]

`record` runs main.py and the commands of a checkout and adds to OUT.json, for each kind, digests of
every tensor and of the zeros, of tokenizers and other files, every field of a config, and the
figures of the JSON records. Models and texts are made once, in place/ beside OUT.json, so that two
commits recorded side by side read the same; what the runs leave stays in OUT-runs/. With --cuda the
kinds for CUDA are run instead, on the pretended device of tests/. Every run is forked off one
process that has imported everything. `compare` names what differs, with status 1 if anything does;
figures and files that only AFTER has are no difference.

tests/run_kinds.py lists the kinds. A step begins with `ranks N:` (so many processes, as torchrun
starts them) or `kill N:` (SIGKILL when file N+1 of --resume is complete and about to be renamed;
`resumed N:` starts it again). Of {OLD|NEW}, OLD is tried first; with --new, NEW alone.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))
import run_kinds  # noqa: E402

# settings, and what no two runs have alike: times, paths, versions, what a machine measures
VARYING = r"second|minute|time|date|version|path|host|commit|memory|peak|speed|per_s|/s$|hash|free"
VARYING += r"|digest|revision|created|threads|cpu|checkpoint|command|_name_or|local|flag|finger"
UNREAD = ".png", ".svg", ".md", "said", "output.txt"  # pictures, and text that others record


def make_place(place: Path) -> None:
    """Make the models, lists and texts that every run reads."""
    sys.path.insert(0, str(TESTS.parent))
    import ggufs
    import matrix
    import tiny
    from transformers import BertConfig, BertForMaskedLM
    from vocabulary import kinds as tokenizers

    os.chdir(place)
    made = matrix.Place(place)
    tiny.write_texts("en", train=tiny.sentences(60, seed=9), test=tiny.sentences(5, 8))
    for name in matrix.MODELS:
        made.make(name)
    tiny.write_model("heads", tiny.tiny_llama(hidden_size=64, head_dim=16))
    for name in run_kinds.ARCHITECTURES:
        tiny.write_model(name, tiny.ALL[name]())
    ggufs.write_texts(place / "words", ggufs.UK)
    for kind in ("gpt2", "llama", "bert"):
        ggufs.model(place / f"{kind}.gguf", kind)
    pieces, unigram = tokenizers.byte_fallback(), tokenizers.unigram(fallback=False)
    tiny.write_model("pieces", tiny.tiny_llama(vocab_size=len(pieces)), pieces)
    tiny.write_model("unigram", tiny.tiny_llama(vocab_size=len(unigram)), unigram)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    encoder = BertConfig(vocab_size=len(unigram), initializer_range=0.2, **shape)
    tiny.write_model("encoder", tiny._draw(lambda: BertForMaskedLM(encoder), 0), unigram)
    for name, texts in (("tied", "uk"), ("bfloat16", "uk"), ("gpt2.gguf", "words")):
        out = "kept.gguf" if name.endswith("gguf") else "kept"
        matrix.trimmed(name, out, texts)
        listed = "kept.gguf.vocabulary.json" if name.endswith("gguf") else "kept/vocabulary.json"
        Path(listed).rename(f"{name.removesuffix('.gguf')}.list.json")
        subprocess.run(["rm", "-r", out], check=True)
    (place / "made").touch()


def record(checkout: Path, out: Path, cuda: bool, only: list[str], forms: list[bool]) -> None:
    """Run the kinds whose names hold a text of `only`, and put what they leave into `out`."""
    place, runs = out.parent / "place", out.with_name(f"{out.stem}-runs")
    os.environ |= dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ |= dict(XDG_CACHE_HOME=str(place / "cache"), MPLBACKEND="agg", COLUMNS="80")
    if not (place / "made").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        subprocess.run([sys.executable, __file__, "make", place, place], check=True)
    sys.path[:] = [str(checkout), *(path for path in sys.path if path != str(TESTS))]
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import main  # noqa: F401

    if cuda:
        sys.path.append(str(TESTS))
        import pretended_cuda
        import torch

        pretended_cuda.install()
        torch.backends.cuda.enable_flash_sdp(False)
    for name in chosen({**run_kinds.KINDS, **run_kinds.RECORDED}, only):
        if name.startswith("cuda ") == cuda:
            folder = runs / re.sub(r"\W+", "_", name)
            for steps in dict.fromkeys(tuple(run_kinds.spelled(name, form)) for form in forms):
                failure = run_all(steps, checkout, folder, place)
                if not failure:
                    break
            found = {"failure": failure} if failure else left_behind(folder)
            print(f"{name}: {failure or 'recorded'}", flush=True)
            recorded = json.loads(out.read_text()) if out.exists() else {}
            out.write_text(json.dumps(recorded | {name: found}, indent=1, ensure_ascii=False))


def chosen(names: dict[str, Any], only: list[str]) -> list[str]:
    return [name for name in names if not only or any(text in name for text in only)]


def run_all(steps: tuple[str, ...], checkout: Path, folder: Path, place: Path) -> str:
    """Run each step in a folder with links to all of `place`; return why the first one failed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for entry in place.iterdir():
        (folder / entry.name).symlink_to(entry)
    todo = [*steps]
    while todo:
        how, number, step = re.match(r"(?:(kill|ranks) (\d+): )?(.*)", todo[0]).groups()
        module, argv = command(step)
        before = run_kinds.made(argv[1]) if module == "main.py" else ""
        if before and not (folder / argv[1]).exists():
            todo.insert(0, before)
            continue
        kill_at, size = (int(number) if how == what else None for what in ("kill", "ranks"))
        children = []
        for settings in settings_of_ranks(size or 1):
            children.append(os.fork())
            if not children[-1]:
                child(module, argv, checkout, folder, kill_at, settings)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if set(codes) != {-signal.SIGKILL if kill_at else 0}:
            said = (folder / "said").read_text().splitlines()
            said = [line for line in said if "error" in line.lower()]
            return f"status {codes}: {' '.join(said[-1:])[:300]}"
        todo.pop(0)
    return ""


def command(step: str) -> tuple[str, list[str]]:
    """Return what is run, `lib.commands` or `main.py`, and its arguments."""
    name, *words = shlex.split(step)
    if name in run_kinds.COMMANDS:
        return "lib.commands", [name, *words]
    saved = [] if {"--save_model", "--eval_only"} & {*words} else ["--save_model", "model"]
    return "main.py", ["--model", name, *run_kinds.BASE.split(), "--save", "out", *words, *saved]


def settings_of_ranks(size: int) -> list[dict[str, str]]:
    """Return the environment that torchrun gives each process; nothing for a single one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = dict(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks = [common | dict(RANK=rank, LOCAL_RANK=rank) for rank in range(size if size > 1 else 0)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks] or [{}]


def child(
    module: str,
    argv: list[str],
    checkout: Path,
    folder: Path,
    kill_at: int | None,
    settings: dict[str, str],
) -> None:
    """Be `python MODULE ARGV` in this forked process, in `folder`; never returns.

    With `kill_at` the process is killed as soon as so many files of `--resume kept` are there and
    another one is complete.
    """
    os.chdir(folder)
    os.environ |= settings
    for stream in (1, 2):
        os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    complete = []

    def before_rename(event: str, values: tuple) -> None:
        if event == "os.rename" and re.search(r"kept/[^/]*\.safetensors$", str(values[1])):
            complete.append(values[1])
            if len(complete) > kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at is not None:
        sys.addaudithook(before_rename)
    sys.argv, status = [module, *argv], 0
    try:
        if module == "main.py":
            runpy.run_path(str(checkout / module), run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        status = left.code or 0
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def left_behind(folder: Path) -> dict[str, Any]:
    """Return digests of tensors, zeros and files, fields of configs, and figures of records.

    A trimmed folder from which a run began adds its figures alone.
    """
    found: dict[str, dict] = {"tensors": {}, "masks": {}, "files": {}, "figures": {}}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or not path.is_file() or name.endswith(UNREAD):
            continue
        given = "-trimmed/" in name
        if path.suffix == ".safetensors" and not given:
            read_tensors(path, str(path.parent.relative_to(folder)), found)
        elif path.suffix == ".gguf":
            read_gguf(path, name, found)
        elif "config" in path.name:
            value = without_varying(json.loads(path.read_text("utf-8")))
            found["files"] |= {} if given else {name: value}
        elif path.suffix == ".json" and path.name != "tokenizer.json":
            value = json.loads(path.read_text("utf-8"))
            if not path.name.endswith("index.json"):
                collect(value, found["figures"])
            if path.name.endswith("vocabulary.json"):
                lists = {key: digest_of(value[key]) for key in ("ids", "tokens", "rows")}
                found["files"][path.name] = lists
        elif path.suffix == ".csv":
            rows = csv.DictReader(path.read_text("utf-8").replace(str(folder), "").splitlines())
            lines = {f"{number}: {k}": v for number, row in enumerate(rows) for k, v in row.items()}
            found["files"][name] = without_varying(lines)
        elif not given:
            data = path.read_bytes().replace(str(folder).encode(), b"")
            if path.suffix == ".txt":  # a table for readers follows
                data = data.partition(b"\n#")[0]
            found["files"][name] = digest_of(json.loads(data) if name.endswith("json") else data)
    found["figures"] = {name: sorted(found["figures"][name]) for name in sorted(found["figures"])}
    return found


def digest_of(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def read_tensors(path: Path, prefix: str, found: dict[str, dict]) -> None:
    import torch
    from safetensors.torch import load_file

    for name, tensor in load_file(path).items():
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
        found["tensors"][f"{prefix}/{name}"] = digest_of(header + data)
        found["masks"][f"{prefix}/{name}"] = digest_of((tensor == 0).numpy().tobytes())


def read_gguf(path: Path, name: str, found: dict[str, dict]) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    for tensor in reader.tensors:
        header = f"{tensor.tensor_type.name} {tensor.shape.tolist()}".encode()
        found["tensors"][f"{name}/{tensor.name}"] = digest_of(header + tensor.data.tobytes())
    fields = {field.name: str(field.contents()) for field in reader.fields.values()}
    short = {key: text if len(text) < 80 else digest_of(text) for key, text in fields.items()}
    found["files"][name] = short


def without_varying(value: object) -> object:
    """Return JSON without versions, paths and dates."""
    if isinstance(value, dict):
        pairs = value.items()
        return {k: without_varying(v) for k, v in pairs if not re.search(VARYING, k)}
    return [without_varying(each) for each in value] if isinstance(value, list) else value


def collect(value: object, figures: dict[str, set], name: str = "") -> None:
    """Put every number that does not vary into `figures`, by its key alone, wherever it stands."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not re.search(VARYING, key):
                collect(entry, figures, name if name in ("perplexity", "bits_per_byte") else key)
    elif isinstance(value, list):
        for entry in value:
            collect(entry, figures, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        figures.setdefault(name, set()).add(value)


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Say in what a kind of run differs between two commits."""
    if not one or not two or "failure" in {**one, **two}:
        ends = [run.get("failure", "runs") if run else "is missing" for run in (one, two)]
        return [] if ends[0] == ends[1] else [" / ".join(ends)]
    told = []
    for what in ("tensors", "masks"):
        names = {**one[what], **two[what]}
        odd = [name for name in names if one[what].get(name) != two[what].get(name)]
        told += [f"{len(odd)} of {len(names)} {what}: {', '.join(odd[:3])}"] if odd else []
    for name, value in one["files"].items():
        other = two["files"].get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            keys = [key for key in {**value, **other} if value.get(key) != other.get(key)]
            told += [f"{name} {key} {value.get(key)} / {other.get(key)}" for key in keys]
        elif value != other:
            told.append(f"{name} {'differs' if other else 'is missing'}")
    for name, values in one["figures"].items():
        others = two["figures"].get(name, [])
        if not {*values} <= {*others}:
            told.append(f"{name} {values[:6]} / {others[:6]}")
    return told


def compare(before: dict[str, Any], after: dict[str, Any], only: list[str]) -> int:
    """Print what differs; return how many kinds do."""
    names = chosen({**before, **after}, only)
    told = {name: differences(before.get(name, {}), after.get(name, {})) for name in names}
    differ = [name for name in told if told[name]]
    for name in differ:
        print(f"{name}: {'; '.join(told[name])}")
    print(f"{len(differ)} of {len(told)} kinds of run differ")
    return len(differ)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("do", choices=("record", "compare", "make"))
    parser.add_argument("paths", nargs=2, type=Path)
    parser.add_argument("--cuda", action="store_true", help="the kinds for CUDA instead")
    parser.add_argument("--new", action="store_true", help="of {OLD|NEW}, NEW alone")
    parser.add_argument("--only", default=[], nargs="+", metavar="TEXT", help="of names of kinds")
    given = parser.parse_args()
    first, second = (path.absolute() for path in given.paths)
    if given.do == "make":
        make_place(first)
    elif given.do == "record":
        forms = [True] if given.new else [False, True]
        record(first, second, given.cuda, given.only, forms)
    else:
        read = (json.loads(path.read_text()) for path in (first, second))
        sys.exit(compare(*read, given.only) > 0)
