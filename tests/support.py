"""What many tests need: main.py as a user calls it, models pruned, windows, folders read.

`call` runs main.py in this process; `start`, `python` and `ended` are for processes of their own.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pytest import MonkeyPatch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

import main
from lib.calibration.allocation import Allocation, uniform
from lib.data.samples import Windows
from lib.formats.registry import FORMATS, GRIDS  # noqa: F401  for tests
from lib.methods.registry import method_of
from lib.methods.sparsity import Sparsity
from lib.model import pretrained
from lib.model.blocks import BlockRunner
from lib.model.checkpoint import Checkpoint
from lib.model.linears import find_linears
from lib.model.matrix import PrunableLinear
from lib.model.parts import StructureLayout, find_parts
from lib.model.skeleton import auto_class, build_skeleton, decoder_blocks
from lib.packed import kernels
from lib.packed.linear import SparseLinear
from lib.prune import Pruner
from lib.run.flags import build_parser
from lib.run.windows import named_corpora
from lib.stages.quantize import Quantizer, check_quantized, form_of  # noqa: F401  for tests
from lib.util import cli
from lib.util.errors import UserError, one_line
from lib.util.processes import main_of
from lib.util.ranks import DistContext

ROOT = Path(__file__).resolve().parent.parent
FAILED = cli.FAILED
CPU = torch.device("cpu")
ALONE = DistContext(CPU, alone=True)
HALF = Sparsity(0.5)
PACKED = {16: FORMATS["16"], 4: FORMATS["int4"]}  # formats of packed checkpoints, by bits
LIMIT = 600  # seconds after which a process that a test waits for hangs, on a busy machine too
PROGRESS = re.compile(r"\[\d+:\d\d[<,]")  # a line of a progress bar
QUICK = ["--device", "cpu", "--seqlen", "32", "--nsamples", "8", "--completions", "0"]


@dataclass(frozen=True)
class Done:
    """How a command ended and what it said."""

    status: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """Lines on stderr that are neither progress nor argparse's usage."""
        lines = [line.rpartition("\r")[2] for line in self.err.splitlines()]
        usage = next((i for i, line in enumerate(lines) if line.startswith("usage:")), len(lines))
        said = lines[:usage] + [line for line in lines[usage + 1 :] if not line.startswith(" ")]
        return [line for line in said if line.strip() and not PROGRESS.search(line)]


def needs_kernels() -> None:
    """Skip a test where the kernels cannot be built; fail where building them fails."""
    if why := kernels.why_not():
        there = why != kernels.NO_PROCESSOR and not why.endswith(kernels.NO_COMPILER)
        (pytest.fail if there else pytest.skip)(f"needs the kernels: {why}")


def call(*argv: object, program: Callable = main.main) -> Done:
    """Run main.py's main in this process, with its error handling and exit status."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = cli.run(program, [str(part) for part in argv])
        except SystemExit as left:  # argparse
            status = left.code
    return Done(status, out.getvalue(), err.getvalue())


def succeed(*argv: object, program: Callable = main.main) -> Done:
    """`call`, of a run that ends well."""
    done = call(*argv, program=program)
    assert done.status == 0, done.err
    return done


def refused(act: Callable, *args: Any, **options: Any) -> str:
    """The one line of the mistake by which a call fails."""
    with pytest.raises(UserError) as caught:
        act(*args, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def named(*argv: str) -> Any:
    """The corpora of calibration and tests that flags of main.py name."""
    return named_corpora(build_parser().parse_args(["--model", "m", *argv]))


def trimmed(model: Path | str, out: Path | str, *texts: object, **flags: object) -> Path:
    """The folder `out` that `trim` makes of a model by its texts; flags such as rows=64.

    Models of random weights may cost anything.
    """
    flags = {"most_cost": "9999%"} | flags
    given = (word for name, value in flags.items() for word in (f"--{name}", value))
    succeed(model, out, "--data", *texts, *given, program=program_of("trim"))
    return Path(out)


def attempt(*argv: object, program: Callable = main.main) -> tuple[Done, UserError | None]:
    """`call`, and the error in which it ends, if it is a user's."""
    raised: list[UserError | None] = [None]

    def watched(words: list[str]) -> None:
        try:
            program(words)
        except UserError as error:
            raised.append(error)
            raise

    return call(*argv, program=watched), raised[-1]


def mistake(*argv: object, program: Callable = main.main) -> UserError:
    """The error in which a command ends; nothing but its line is on stderr."""
    done, error = attempt(*argv, program=program)
    assert error and done.status == cli.FAILED, done
    assert done.complaints == [f"error: {one_line(str(error))}"], done.err
    return error


def program_of(name: str) -> Callable[[list[str]], None]:
    """The `main` of a command by its name in the console's list, or of `main.py`."""
    return main.main if name in ("main.py", "prune") else main_of(f"commands.{name}")


def call_here(module: str, *argv: object) -> int:
    """As lib.util.processes.call, but in this process, where torch is imported already."""
    try:
        return cli.run(main_of(module), [str(each) for each in argv])
    except SystemExit as left:  # a status of its own
        return left.code


def replace_call(patch: MonkeyPatch, function: Callable[..., int]) -> None:
    """Replace `call`, which starts a command in a process of its own, wherever it is known."""
    for name in ("compress", "sweep", "demo"):
        program_of(name)
    for module in [each for name, each in sys.modules.items() if name.startswith("lib.")]:
        own = vars(module).get("call")
        if own in REPLACED or getattr(own, "__module__", "").startswith("lib.util."):
            patch.setattr(module, "call", function)
    REPLACED.append(function)


REPLACED: list[Callable[..., int]] = []


@contextmanager
def at(what: str, number: int, act: Callable[[], object]) -> Iterator[None]:
    """Inside, `act()` is called when the step `what` of a run comes to its unit `number`."""

    def on_step(name: str, reached: int) -> None:
        if (name, reached) == (what, number):
            act()

    with mock.patch("lib.util.progress.on_step", on_step):
        yield


def raising(error: BaseException, what: str, number: int = 0):
    """Inside, a run that comes there, see `at`, fails by this error."""

    def fail() -> None:
        raise error

    return at(what, number, fail)


@contextmanager
def counted(what: str) -> Iterator[list[int]]:
    """Inside, the list grows by the number of every unit that the step `what` comes to."""
    reached: list[int] = []

    def on_step(name: str, number: int) -> None:
        if name == what:
            reached.append(number)

    with mock.patch("lib.util.progress.on_step", on_step):
        yield reached


@contextmanager
def eager_experts() -> Iterator[None]:
    """Inside, models that are loaded take experts one by one, without grouped products."""
    load = pretrained.load_model

    def load_model(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        if hasattr(model.config, "num_local_experts"):
            model.set_experts_implementation("eager")
        return model

    with mock.patch.object(pretrained, "load_model", load_model):
        yield


def packed_product(factor: float):
    """Inside, a packed linear's product is wrong by a factor."""
    own = SparseLinear.forward
    return mock.patch.object(SparseLinear, "forward", lambda self, x: factor * own(self, x))


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Inside, writing beyond `size` bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full_disk(what: str, number: int = 0, size: int = 10_000) -> Iterator[None]:
    """Inside, from a moment of a run on, see `at`, no file takes more than `size`."""
    with (
        ExitStack() as full,
        at(what, number, lambda: full.enter_context(no_file_larger_than(size))),
    ):
        yield


def start(command: list[object], folder: Path, **environment: str) -> subprocess.Popen:
    """Start a command in `folder`, with one thread and its caches there."""
    settings = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", XDG_CACHE_HOME=str(folder))
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def python(code: str, *argv: object, folder: Path, **environment: str) -> subprocess.Popen:
    """Start `python -c CODE ARGV...`, which finds this package."""
    own = {"PYTHONPATH": str(ROOT)} | environment
    return start([sys.executable, "-c", code, *argv], folder, **own)


def wait_until(condition: Callable[[], object]) -> None:
    """Until something is so that another process does; the test fails where it never comes."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """The processes that a process has started, on Linux."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(process: subprocess.Popen) -> Done:
    """Wait for the end of a process."""
    out, err = process.communicate(timeout=LIMIT)
    return Done(process.returncode, out, err)


def launch(argv: list[object], folder: Path, **environment: str) -> Done:
    """Run `bash launch.sh ARGV...` from `folder`, to its end."""
    own = {"PYTHON": sys.executable} | environment
    return ended(start(["bash", ROOT / "launch.sh", *argv], folder, **own))


def launched(argv: list[object], folder: Path, **environment: str) -> str:
    """What a command of launch.sh that succeeds writes to stdout."""
    done = launch(argv, folder, **environment)
    assert done.status == 0, done.err
    return done.out


def windows(count: int, tokens: int = 24, seed: int = 0) -> Tensor:
    """Random token ids (count, tokens), longer than the sliding windows of the tiny models."""
    return torch.randint(3, 300, (count, tokens), generator=torch.Generator().manual_seed(seed))


def alike_inputs(
    width: int, *outputs: int, tokens: int = 600, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Inputs (tokens, in) that are alike, of several sizes, and weights (out, in)."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + torch.randn(width, width, generator=draw) / width**0.5
    x = torch.randn(tokens, width, generator=draw) @ mix
    x *= torch.rand(width, generator=draw) + 0.1
    return x, [torch.randn(out, width, generator=draw) for out in outputs]


def layout_of(kind: str, model: nn.Module) -> StructureLayout:
    """The neurons or experts of a model's blocks."""
    bare = build_skeleton(model.config, Checkpoint("model"))
    return find_parts(kind, model.config, Checkpoint("model"), bare, decoder_blocks(bare)[0])


def runner_of(model: nn.Module, batch_size: int = 3) -> BlockRunner:
    """The model's decoder blocks, run on the CPU."""
    return BlockRunner(model, CPU, batch_size=batch_size)


def patches(model: nn.Module) -> list[str]:
    """Forwards and hooks of modules that are not as they were built."""
    return [
        name
        for name, module in model.named_modules()
        if "forward" in vars(module) or module._forward_pre_hooks or module._forward_hooks
    ]


def through(runner: BlockRunner, ids: Tensor | Windows, positions: Tensor) -> Tensor:
    """Logits (n, positions, vocabulary) by way of the runner, in batches of three."""
    states = runner.capture(ids, 3, CPU)
    for index in range(len(runner.blocks)):
        runner.advance_(states, index)
    chunks = positions.split(13)
    rows = [[runner.logits(states, batch)(chunk) for chunk in chunks] for batch in states.batches]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def representative(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Cases of a test: those that are not among the quick ones run by `pytest -m full` only."""
    values = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    full = pytest.mark.full
    return [pytest.param(*v, marks=() if case in quick else full) for case, v in values]


def linears_of(runner: BlockRunner, index: int = 0) -> list[PrunableLinear]:
    """What can be pruned in one block; names begin with the block's number."""
    return find_linears(runner.blocks[index], str(index))[0]


def linears_on(runner: BlockRunner, form) -> dict[str, bool]:
    """{weight's name: whether it is (in, out)} of all that a 4-bit format can hold."""
    linears = (one for one in runner.each_linear() if form_of(form, one))
    return {one.parameter_name: one.transposed for one in linears}


def packed_weights(runner: BlockRunner) -> dict[str, bool]:
    """{weight's name: whether it is (in, out)} of the linears that are packed."""
    packed = (one for one in runner.each_linear() if form_of(PACKED[4], one))
    return {f"{linear.name}.weight": linear.transposed for linear in packed}


def prune_(
    model: nn.Module | BlockRunner,
    method: str = "wanda",
    sparsity: Sparsity | Allocation = HALF,
    ids: Tensor | None = None,
) -> Pruner:
    """Prune a model, or the one of a runner, in place; by default on five windows."""
    runner = model if isinstance(model, BlockRunner) else runner_of(model)
    if isinstance(sparsity, Sparsity):
        sparsity = uniform(runner, sparsity)
    pruner = Pruner(runner, method_of(method), sparsity)
    pruner.run(windows(5) if ids is None else ids)
    return pruner


def loaded(folder: Path | str, **options: object) -> PreTrainedModel:
    """A saved model as the class of transformers that its checkpoint names loads it."""
    kind = auto_class(AutoConfig.from_pretrained(folder))
    return kind.from_pretrained(folder, **options).eval()


def weights(folder: Path | str) -> dict[str, Tensor]:
    """All tensors of a saved model where transformers looks for them: by its index, if it has one.

    No other file of weights lies in the folder.
    """
    folder = Path(folder)
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.exists():
        places = json.loads(index.read_text("utf-8"))["weight_map"]
        files = set(places.values())
    assert {file.name for file in folder.glob("*.safetensors")} == files
    held = {file: load_file(folder / file) for file in sorted(files)}
    tensors = {name: tensor for each in held.values() for name, tensor in each.items()}
    if index.exists():
        assert places == {name: file for file, each in held.items() for name in each}
    return tensors


def whole(folder: Path | str) -> dict[str, Tensor]:
    """`weights` of a saved model in which transformers misses no tensor and finds no other."""
    kind = auto_class(AutoConfig.from_pretrained(folder))
    _, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return weights(folder)


def reloaded(
    folder: Path | str, run: Path | str, *flags: object, rel: float = 1e-6
) -> dict[str, Any]:
    """A saved model is one for transformers and main.py, which measures the run's perplexity.

    Returns what main.py measures.
    """
    before = results(run)
    whole(folder)
    dtype = before["fingerprint"]["pruning"]["--dtype"].split(",")[0]
    argv = ["--model", folder, "--eval_only", "--dtype", dtype, *QUICK, *flags]
    succeed(*argv, "--save", f"{run}-again")
    after = results(f"{run}-again")
    for name, perplexity in before["perplexity"].items():
        again = after["perplexity"][name]
        assert abs(again / perplexity - 1) <= rel, (name, again, perplexity)
    return after


def results(folder: Path | str = "out") -> dict[str, Any]:
    """What a run has left in its `--save` folder."""
    return json.loads((Path(folder) / "results.json").read_text("utf-8"))


def content(folder: Path | str) -> dict[str, str]:
    """{path in the folder: digest of the file}."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }
