"""Compare what two commits write: over a hundred kinds of small run of main.py, on tiny models.

    python benchmarks/compare_commits.py record CHECKOUT OUT.json [--cuda PROGRAM] [--only TEXT]
    python benchmarks/compare_commits.py compare BEFORE.json AFTER.json

`record` runs the main.py of a checkout and adds to OUT.json, for each kind, digests of every saved
tensor and of the zeros, and the figures of results.json. Models and texts are made once, in place/
beside OUT.json, so that two commits recorded side by side read the same; what the runs leave stays
in OUT-runs/. PROGRAM runs a Python program on a CUDA device where PRETENDED_CUDA is set; without it
kinds for CUDA are left out. Every run is forked off one process that has imported everything:
six minutes of one core. `compare` names what differs, with status 1 if anything does; figures that
only AFTER has are no difference.

kinds.txt lists the kinds, beside those of METHODS and ARCHITECTURES. There `@name` is a model or
text of place/, and of {OLD|NEW} the retired flags OLD are tried first, then NEW. A step begins
with `ranks N:` (so many processes, as torchrun starts them), `resumed N:` (killed and started
again) or `kill N:` (SIGKILL when file N+1 of --resume is complete and about to be renamed).
"""

from __future__ import annotations

import argparse
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
from string import Template
from typing import Any

ARCHITECTURES = ["Llama", "Mistral", "Qwen2", "Gemma 2", "Gemma 3", "Phi-3"]
ARCHITECTURES += ["GPT-2", "OPT", "BLOOM", "GPT-NeoX", "Mixtral", "Mamba"]
METHODS, PATTERNS = ["wanda", "sparsegpt", "admm"], ["unstructured", "2:4", "4:8"]
COMMON = "--seqlen 32 --nsamples 8 --completions 0 --batch_size 4 --eval_data @uk --save out"
FIGURES = "perplexity kl top1_agreement bits_per_byte standard_error overall loss difference"


def kinds() -> dict[str, list[str]]:
    """Return {name: flags of its runs, one after another}."""
    found, names = {}, {}
    for i, model in enumerate(ARCHITECTURES):
        for j, method in enumerate(METHODS):
            pattern = PATTERNS[(i + j) % len(PATTERNS)]
            flags = f"--model '@{model}' --calibration_data @uk --prune_method {method}"
            found[f"{model}, {method} {pattern}"] = [f"{flags} --sparsity_type {pattern}"]
    for line in Path(__file__).with_name("kinds.txt").read_text("utf-8").splitlines():
        if line and line[0] != "#" and line.split()[1] == "=":
            name, _, names[line.split()[0]] = line.partition(" = ")
        elif line and line[0] != "#":
            name, _, flags = line.partition(": ")
            flags = Template(flags).substitute(names)
            if name.startswith("cuda"):
                flags = flags.replace("--model", "--device cuda:0 --model")
            again = r"kill \1: \2 --resume kept; \2 --resume kept"
            found[name] = re.sub(r"resumed (\d+): (.*)", again, flags).split("; ")
    return found


def make_place(checkout: Path, place: Path) -> None:
    """Make the models and texts that every run reads."""
    sys.path.insert(0, str(checkout / "tests"))
    import tiny

    models = {name: tiny.ALL[name]() for name in [*ARCHITECTURES, "Zamba2"]}
    models["deep"] = tiny.tiny_llama(num_hidden_layers=4)
    models["tied"] = tiny.tiny_llama(tie_word_embeddings=True, vocab_size=640).bfloat16()
    models["bfloat16"] = tiny.tiny_llama().bfloat16()
    for name, model in models.items():
        tiny.write_model(place / name, model)
    tiny.write_texts(place / "uk", train=200, test=4)
    tiny.write_texts(place / "en", train=tiny.sentences(60, seed=9), test=tiny.sentences(5, 8))
    (place / "made").touch()


def record(checkout: Path, out: Path, cuda: str | None, only: str) -> None:
    """Run the kinds whose names hold `only`, and put what they leave into `out`."""
    place, runs = out.parent / "place", out.with_name(f"{out.stem}-runs")
    os.environ |= dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ |= dict(XDG_CACHE_HOME=str(place / "cache"), MPLBACKEND="agg")
    if not (place / "made").exists():
        subprocess.run([sys.executable, __file__, "make", str(checkout), str(place)], check=True)
    sys.path.insert(0, str(checkout))
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import main  # noqa: F401

    on_cuda = "PRETENDED_CUDA" in os.environ
    for name, steps in kinds().items():
        if only in name and name.startswith("cuda") == on_cuda:
            folder = runs / re.sub(r"\W+", "_", name)
            for which in (r"\1", r"\2"):
                spelled = [re.sub(r"\{(.*?)(?:\|(.*?))?\}", which, step) for step in steps]
                failure = run_all(spelled, checkout, folder, place)
                if not failure or spelled == steps:
                    break
            found = {"failure": failure} if failure else left_behind(folder)
            print(f"{name}: {failure or 'recorded'}", flush=True)
            recorded = json.loads(out.read_text()) if out.exists() else {}
            out.write_text(json.dumps(recorded | {name: found}, indent=1, ensure_ascii=False))
    if cuda and not on_cuda:
        argv = [cuda, __file__, "record", checkout, out, "--only", only]
        subprocess.run([sys.executable, *map(str, argv)], env=os.environ | {"PRETENDED_CUDA": "1"})


def run_all(steps: list[str], checkout: Path, folder: Path, place: Path) -> str:
    """Run main.py in an empty folder, once for each step; return why the first one failed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for step in steps:
        how, number, flags = re.match(r"(?:(kill|ranks) (\d+): )?(.*)", step).groups()
        argv = shlex.split(f"{COMMON} {flags}".replace("@", f"{place}/"))
        argv += [] if "--device" in argv else ["--device", "cpu"]
        argv += [] if {"--save_model", "--eval_only"} & set(argv) else ["--save_model", "model"]
        kill_at, size = (int(number) if how == what else None for what in ("kill", "ranks"))
        children = []
        for settings in settings_of_ranks(size or 1):
            children.append(os.fork())
            if not children[-1]:
                child(argv, checkout, folder, kill_at, settings)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if set(codes) != {-signal.SIGKILL if kill_at else 0}:
            said = (folder / "said").read_text().splitlines()
            said = [line for line in said if "error" in line.lower()]
            return f"status {codes}: {' '.join(said[-1:])[:300]}"
    return ""


def settings_of_ranks(size: int) -> list[dict[str, str]]:
    """Return the environment that torchrun gives each process; nothing for a single one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = dict(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks = [common | dict(RANK=rank, LOCAL_RANK=rank) for rank in range(size if size > 1 else 0)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks] or [{}]


def child(
    argv: list[str], checkout: Path, folder: Path, kill_at: int | None, settings: dict[str, str]
) -> None:
    """Be `python main.py ARGV` in this forked process, in `folder`; never returns.

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
    sys.argv, status = ["main.py", *argv], 0
    try:
        runpy.run_path(str(checkout / "main.py"), run_name="__main__")
    except SystemExit as left:
        status = left.code or 0
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def left_behind(folder: Path) -> dict[str, Any]:
    """Return digests of the saved tensors and of all zeros, and the figures of results.json."""
    import torch
    from safetensors.torch import load_file

    tensors, digests, zeros, figures = {}, {}, hashlib.sha256(), {}
    for file in folder.glob("model/*.safetensors"):
        tensors |= load_file(file)
    for name, tensor in sorted(tensors.items()):
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
        digests[name] = hashlib.sha256(header + data).hexdigest()[:16]
        zeros.update(f"{name} {tuple(tensor.shape)}".encode() + (tensor == 0).numpy().tobytes())
    collect(json.loads((folder / "out/results.json").read_text()), figures)
    figures = {name: sorted(values) for name, values in sorted(figures.items())}
    return {"weights": digests, "masks": zeros.hexdigest()[:16], "figures": figures}


def collect(value: object, figures: dict[str, set], name: str = "") -> None:
    """Put every number measured into `figures`, by its key alone, wherever it stands."""
    if isinstance(value, dict):
        for key, entry in value.items():
            collect(entry, figures, name if name in ("perplexity", "bits_per_byte") else key)
    elif isinstance(value, list):
        for entry in value:
            collect(entry, figures, name)
    elif isinstance(value, float) and name in FIGURES.split():
        figures.setdefault(name, set()).add(value)


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Say in what a kind of run differs between two commits."""
    if not one or not two or "failure" in {**one, **two}:
        ends = [run.get("failure", "runs") if run else "is missing" for run in (one, two)]
        return [] if ends[0] == ends[1] else [" / ".join(ends)]
    names = {**one["weights"], **two["weights"]}
    odd = [name for name in names if one["weights"].get(name) != two["weights"].get(name)]
    told = [f"{len(odd)} of {len(names)} tensors: {', '.join(odd[:3])}"] if odd else []
    told += ["masks"] if one["masks"] != two["masks"] else []
    for name in one["figures"]:
        values = one["figures"].get(name, []), two["figures"].get(name, [])
        told += [] if {*values[0]} <= {*values[1]} else [f"{name} {values[0]} / {values[1]}"]
    return told


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print what differs; return how many kinds do."""
    names = {**before, **after}
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
    parser.add_argument("--cuda", metavar="PROGRAM", help="runs a program with a CUDA device")
    parser.add_argument("--only", default="", metavar="TEXT", help="of the names of kinds")
    given = parser.parse_args()
    first, second = (path.absolute() for path in given.paths)
    if given.do == "make":
        make_place(first, second)
    elif given.do == "record":
        record(first, second, given.cuda, given.only)
    else:
        sys.exit(compare(*(json.loads(path.read_text()) for path in (first, second))) > 0)
