"""What is said of memory before a run, against what the run then takes."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from support import (
    ALONE,
    CPU,
    LIMIT,
    QUICK,
    call,
    prune_,
    pruner_of,
    results,
    runner_of,
    spawn,
    start,
    windows,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lib.data.training import TrainingText
from lib.eval import perplexity
from lib.methods.registry import METHODS, ROUNDING, MethodSpec
from lib.methods.sparsity import Sparsity
from lib.model.access import Checkpoint
from lib.model.mlp import MlpLayout, find_mlps
from lib.model.pretrained import (
    decoder_blocks,
    default_batch_size,
    footprint,
    fresh_copy,
    set_current_device,
    skeleton,
)
from lib.model.quantised import packed_linears
from lib.model.shapes import PackedLinears, Workload, shapes
from lib.pruning.by_error import allocation_bytes, by_error
from lib.pruning.neurons import NeuronPruner, Removal
from lib.recover import Grid, Recoverer, TrainSchedule
from lib.round import Rounder
from lib.run import memory
from lib.run.memory import Plan, Training, check_memory, lay_out, needed
from lib.sparse import packed_weights, packing_bytes, swap_linears_
from lib.util import host
from lib.util.errors import UserError

CUDA = torch.device("cuda", 0)
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def of(model, **changes) -> Plan:
    name, _ = decoder_blocks(model)
    sizes = dict(windows=8, tests=4, seqlen=32, batch_size=4, device="cpu")
    sizes |= dict(working=torch.float32, saved=torch.float32)
    sizes |= {key: changes.pop(key) for key in list(changes) if key in sizes}
    load = Workload(shapes=shapes(skeleton(model.config), name), **sizes)
    return Plan(load=load, **dict(method_spec=MethodSpec("wanda")) | changes)


def on_cpu(plan: Plan) -> Plan:
    return replace(plan, load=replace(plan.load, device="cpu"))


def covers(said: int, taken: int) -> bool:
    """Never below what is taken, and at most a quarter above."""
    return taken <= said <= 1.25 * taken


class Alive(TorchDispatchMode):
    """Bytes of what operations have made and of what is still there of it: now, and at most."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in there}
        self.now = self.most = 0

    def count(self, there: Iterable[Tensor]) -> None:
        """Count what was there before as well, as long as it lives."""
        for tensor in there:
            self._note(tensor.untyped_storage())

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_tensors_of_a_run_take_what_was_said(name: str, method: str) -> None:
    """Within a quarter. What operations take inside themselves is not seen."""
    size = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=3, vocab_size=2000)
    model = tiny.build(name, **size, **(tiny.EXPERTS if name == "mixtral" else {}))
    ids, method_spec = windows(8, 32), MethodSpec(method)
    need = needed(of(model, method_spec=method_spec))
    there = [*model.parameters(), *model.buffers(), ids]
    with Alive(there) as alive:
        pruner_of(runner_of(model), method_spec).run(ids if method_spec.cls.observes else None, 4)
        perplexity(runner_of(model), ids[:4], 4)
    taken = sum(weight.nbytes for weight in set(model.parameters())) + alive.most
    assert covers(need.total, taken), need.total / taken


@pytest.mark.parametrize("bits", [8, 4])
def test_tensors_of_a_rounding_take_what_was_said(bits: int) -> None:
    size = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=2, vocab_size=300)
    model, ids = tiny.tiny_llama(**size), windows(8, 32)
    prune_(model, "magnitude", ids=ids)
    rounding = MethodSpec(ROUNDING, {"bits": bits})
    need = needed(of(model, method_spec=None, rounding=rounding))
    with Alive([*model.parameters(), *model.buffers(), ids]) as alive:
        Rounder(runner_of(model), rounding, dist=ALONE).run(ids, 4)
    taken = sum(weight.nbytes for weight in set(model.parameters())) + alive.most
    assert covers(need.total, taken), need.total / taken


@pytest.mark.parametrize(
    ("bits", "packing", "unpacking"), [(16, 2.68, 1.58), (8, 2.25, 1.79), (4, 1.71, 1.51)]
)
def test_packed_linears_take_what_was_said(
    bits: int, packing: float, unpacking: float, without_kernels: None
) -> None:
    """What stands of them exactly; what packing and unpacking take, no more than was said.

    What is said is `packing` and `unpacking` times what this model takes, within a tenth: dense
    values are counted where kept ones are packed, and scratch tensors as if all were there at once.
    """
    size = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=2, vocab_size=300)
    model, ids = tiny.tiny_llama(**size), windows(8, 32)
    prune_(model, "magnitude", ids=ids)
    plan = of(model, method_spec=None, pack_bits=bits)
    with Alive([*model.parameters(), *model.buffers(), ids]) as alive:
        swap_linears_(model, decoder_blocks(model)[1], bits=bits)
    packed = PackedLinears.of(*packed_linears(model.config))
    standing = packed.nbytes(4)
    said = sum(packing_bytes(plan.load, bits))
    assert said / (alive.most - standing) == pytest.approx(packing, rel=0.1)
    need = needed(of(model, method_spec=None, packed=packed))
    buffers = sum(one.nbytes for name, one in model.named_buffers() if "inv_freq" in name)
    assert need.weights == footprint(model) - buffers
    with Alive([*model.parameters(), *model.buffers(), ids]) as alive:
        perplexity(runner_of(model), ids[:4], 4)
    assert (need.hidden + need.work) / alive.most == pytest.approx(unpacking, rel=0.1)


@pytest.mark.parametrize(
    "name, rank, saved, checkpointed, bits",
    [
        ("llama", None, torch.float32, False, None),
        ("llama", None, torch.bfloat16, True, None),
        ("llama", None, torch.float32, False, 8),
        ("llama", None, torch.bfloat16, True, 4),
        ("llama", 8, torch.bfloat16, False, None),
        ("gpt2", None, torch.bfloat16, False, None),
        ("gpt2", 8, torch.float32, True, None),
        ("mixtral", None, torch.bfloat16, False, None),
        ("mixtral", 8, torch.bfloat16, True, None),
    ],
)
def test_tensors_of_a_recovery_take_what_was_said(
    name: str,
    rank: int | None,
    saved: torch.dtype,
    checkpointed: bool,
    bits: int | None,
) -> None:
    """Within a quarter; the state that is kept for an interruption is on its way to the disk."""
    size = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, vocab_size=2000)
    size = size if name == "llama" else size | dict(n_inner=352)
    model = tiny.build(name, **size, **(tiny.EXPERTS if name == "mixtral" else {}))
    model.requires_grad_(False)
    runner = runner_of(model)
    prune_(runner, "magnitude")
    ids = windows(8, 32)
    training = Training(rank, 4, checkpointed)
    need = needed(of(model, method_spec=None, training=training, saved=saved, pack_bits=bits))
    weights = packed_weights(runner.blocks, runner.name) if bits else {}
    grids = {name: Grid(bits, transposed) for name, transposed in weights.items()}
    text = TrainingText(ids, torch.arange(8), ids[:4], {"sources": []})
    there = [*model.parameters(), *model.buffers(), ids]
    with Alive(there) as alive:
        teacher = runner_of(fresh_copy(model))
        # two steps: AdamW begins in the first
        schedule = TrainSchedule(8 * 32, 32, 1e-3, rank, least=4 * 32)
        known = runner, teacher, schedule, text, 4
        measure = lambda one, ids: perplexity(one, ids, 4).value  # noqa: E731
        more = dict(dist=ALONE, checkpointed=checkpointed, grids=grids)
        Recoverer(*known, measure, saved, **more).run()
    taken = sum(weight.nbytes for weight in set(model.parameters())) + alive.most
    assert covers(need.total, taken), need.total / taken


def without_neurons(model: PreTrainedModel, left: int) -> tuple[MlpLayout, Removal]:
    """The model's MLPs, and the plan to leave `left` neurons in each."""
    bare, config = skeleton(model.config), copy.deepcopy(model.config)
    layout = find_mlps(config, Checkpoint("model"), bare, decoder_blocks(bare)[0])
    layout.set_width(config, left)
    smaller = skeleton(config)
    return layout, Removal(layout.width, left, shapes(smaller, decoder_blocks(smaller)[0]))


def storage_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in set(model.parameters()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name, dtype",
    [("llama", torch.float32), ("gemma3_text", torch.bfloat16), ("gpt2", torch.float32)],
)
def test_tensors_of_removing_neurons_take_what_was_said(
    name: str, dtype: torch.dtype, method: str
) -> None:
    """Within a quarter; the dense weights are among what is counted, and go one by one."""
    size = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=3, vocab_size=300)
    size |= {"gpt2": dict(n_inner=352), "gemma3_text": tiny.WIDE}.get(name, {})
    model = tiny.build(name, **size).to(dtype).requires_grad_(False)
    layout, removal = without_neurons(model, 256)
    ids, method_spec = windows(8, 32), MethodSpec(method)
    plan = of(model, method_spec=method_spec, removal=removal, working=dtype, saved=dtype)
    runner, need = runner_of(model), needed(plan)
    there = Alive([*model.buffers(), ids])
    there.count(model.parameters())
    with there as alive:
        pruner = NeuronPruner(runner, method_spec, layout, 256, dist=ALONE, rounding=dtype)
        pruner.run(ids if method_spec.cls.observes else None, 4)
    assert covers(need.total, alive.most), need.total / alive.most


@pytest.mark.parametrize("left", [256, 64])
def test_a_recovery_after_removing_neurons_takes_what_was_said(
    left: int,
) -> None:
    """Of the smaller model, beside the whole teacher."""
    size = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, vocab_size=300)
    model = tiny.build("llama", **size).requires_grad_(False)
    layout, removal = without_neurons(model, left)
    ids, method_spec = windows(8, 32), MethodSpec("magnitude")
    training = Training(None, 4)
    need = needed(of(model, method_spec=method_spec, removal=removal, training=training))
    there = Alive([*model.buffers(), ids])
    there.count(model.parameters())
    with there as alive:
        runner, teacher = runner_of(model), runner_of(fresh_copy(model))
        NeuronPruner(runner, method_spec, layout, left, dist=ALONE).run(None, 4)
        text = TrainingText(ids, torch.arange(8), ids[:4], {"sources": []})
        # two steps: AdamW begins in the first
        schedule = TrainSchedule(8 * 32, 32, 1e-3, None, least=4 * 32)
        known = runner, teacher, schedule, text, 4
        measure = lambda one, ids: perplexity(one, ids, 4).value  # noqa: E731
        Recoverer(*known, measure, torch.float32, whole=True, dist=ALONE).run()
    assert covers(need.total, alive.most), need.total / alive.most


def test_the_teacher_of_another_folder_is_counted_as_it_is() -> None:
    """Read with its whole vocabulary, then with the model's rows; as wide as it is."""
    model = tiny.tiny_llama(num_hidden_layers=6)
    read, kept = storage_bytes(model) // 4 + 10**6, storage_bytes(model) // 4
    plan = of(model, method_spec=None, teacher=kept, teacher_read=read)
    alone = needed(of(model, method_spec=None))
    assert needed(plan).weights == alone.weights + 4 * kept
    assert needed(plan).work == int(memory.MARGIN * 4 * 10**6)


@pytest.mark.parametrize("hidden, vocabulary", [(32, 2000), (128, 300), (256, 300)])
def test_tensors_of_an_allocation_take_what_was_said(hidden: int, vocabulary: int) -> None:
    """Within a quarter: the logits decide, hidden states and graphs, or a matrix in order."""
    size = dict(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=4)
    model = tiny.tiny_llama(**size, vocab_size=vocabulary).requires_grad_(False)
    ids = windows(8, 32)
    plan = of(model)
    with Alive([*model.parameters(), *model.buffers(), ids]) as alive:
        by_error(runner_of(model), ids, 4, 0.7, ALONE)
    hidden, work = allocation_bytes(plan.load, 8)
    said = hidden + int(memory.MARGIN * work)
    assert covers(said, alive.most), said / alive.most


@pytest.mark.parametrize("method", METHODS)
def test_solving_takes_what_the_method_said(method: str) -> None:
    """Beside its statistics, for a linear with more inputs than outputs."""
    width, rows = 384, 128
    solver, weight = MethodSpec(method)(width, CPU), torch.randn(rows, width)
    x = torch.randn(2 * width, width)
    solver.observe(x, *([x + 1, x[:, :rows]] if MethodSpec(method).cls.dense_stream else []))
    with Alive([weight, *solver.statistics()]) as alive:
        solver.prune_([weight], [Sparsity(0.5, 2, 4)])
    _, said = MethodSpec(method)(width, torch.device("meta")).bytes_needed([rows])
    said = int(memory.MARGIN * said)
    assert covers(said, alive.most), said / alive.most


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    middle = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=6, vocab_size=16000)
    tiny.write_model(folder / "tiny")
    tiny.write_model(folder / "middle", tiny.tiny_llama(**middle, num_attention_heads=8))
    tiny.write_texts(folder / "uk", train=300, test=4)
    return folder


@pytest.mark.parametrize("more, own", [([], 96), (["--offload", "away"], 64)])
def test_a_process_takes_what_it_says(
    more: list[str], own: int, place: Path, tmp_path: Path
) -> None:
    """Within a quarter; at least `own` MiB come on top of the libraries: these don't decide."""
    data = ["--calibration_data", place / "uk", "--eval_data", place / "uk"]
    flags = ["--prune_method", "wanda", *QUICK, "--save", "out", *more]
    done = spawn(["--model", place / "middle", *data, *flags], tmp_path)
    assert done.status == 0, done.err
    said = re.search(r"^memory: about ([\d.]+) (\w+) \(libraries ([\d.]+) (\w+), ", done.out, re.M)
    said, base = (float(said[i]) * UNITS[said[i + 1]] for i in (1, 3))
    measured = results(tmp_path / "out")["peak_memory"]["host"]
    assert covers(said, measured), said / measured
    assert measured - base > own * UNITS["MiB"]


def test_inputs_are_shared_as_in_a_forward_pass() -> None:
    (block,) = of(tiny.tiny_llama()).load.shapes.blocks
    found = sorted((each.width, sorted(each.outputs)) for each in block.inputs)
    assert found == [(32, [16, 16, 32]), (32, [32]), (32, [64, 64]), (64, [32])]
    assert block.pruned == 32 * 64 + 32 * 32 + 32 * 128 + 64 * 32


def test_every_expert_has_statistics_of_its_own() -> None:
    found = of(tiny.ARCHITECTURES["Mixtral"]()).load.shapes
    (block,) = found.blocks
    assert found.routed == 2
    assert sum(each.experts == 4 for each in block.inputs) == 8


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES])
def test_weights_are_counted_once(name: str) -> None:
    model = tiny.ARCHITECTURES[name]()
    size = sum(parameter.nbytes for parameter in set(model.parameters()))
    assert needed(of(model)).weights == size


def test_what_makes_it_grow_and_shrink() -> None:
    model = tiny.tiny_llama(num_hidden_layers=6)
    plan = of(model)
    whole = needed(plan)
    assert needed(of(model, windows=80)).hidden == 80 * 32 * 32 * 4
    assert needed(of(model, method_spec=MethodSpec("sparsegpt"))).work >= whole.work
    assert needed(of(model, fetched=True)).weights < whole.weights / 2
    assert needed(of(model, load_bit="4")).weights < whole.weights / 2
    few = dict(windows=1, tests=1, seqlen=4)
    assert needed(of(model, **few, stored=torch.bfloat16)).total > needed(of(model, **few)).total
    more = needed(of(model, method_spec=MethodSpec("admm"), windows=80, cache_inputs=False))
    assert more.hidden == 2 * 80 * 32 * 32 * 4
    kept = needed(of(model, method_spec=MethodSpec("admm"), windows=80))
    assert kept.hidden > more.hidden and kept.work == more.work
    probed = needed(of(model, windows=1, probed=90))
    assert probed.hidden == (6 + 1) * 90 * 32 * 32 * 4


def test_too_little_memory_on_the_host(place: Path, tmp_path: Path, no_weights: None) -> None:
    vast = shutil.copytree(place / "tiny", tmp_path / "vast")
    config = json.loads((vast / "config.json").read_text("utf-8"))
    config["intermediate_size"] = 2**36  # 8 TiB of float32
    (vast / "config.json").write_text(json.dumps(config), "utf-8")
    data = ["--calibration_data", place / "uk", "--eval_data", place / "uk"]
    done = call("--model", vast, *QUICK, *data, "--prune_method", "wanda")
    assert done.status == 1
    (line,) = done.complaints
    assert line.startswith("error: --model: the run needs about ")
    for way in ("--nsamples", "--seqlen", "--batch_size", "--offload"):
        assert way in line


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert host.available(tmp_path) > 10**6
    (tmp_path / "memory.max").write_text("5000\n")
    assert host.available(tmp_path) == 4900


@pytest.mark.parametrize("version", [1, 2])
def test_files_that_a_container_has_read_do_not_count(version: int, tmp_path: Path) -> None:
    """Their pages go when memory is needed; those of shared memory do not."""
    kinds = "anon 100\nfile 900\nshmem 200\ninactive_file 500\nactive_file 200\n"
    if version == 1:
        (tmp_path / "memory").mkdir()
        names = "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"
        kinds += "total_inactive_file 510\ntotal_active_file 200\n"
    else:
        names = "memory.max", "memory.current", "memory.stat"
    for name, text in zip(names, ("5000\n", "1000\n", kinds), strict=True):
        (tmp_path / name).write_text(text)
    assert host.available(tmp_path) == 4700 + 10 * (version == 1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A device with `free` bytes."""
    found = SimpleNamespace(free=0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (found.free, 2**40))
    return found


def test_what_torch_keeps_unused_is_free(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the run before, in a sweep."""
    gpu.free = 100
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 300)
    assert memory.free_on(CUDA) == 800


def test_what_names_no_device_is_on_the_runs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --device cuda:1, the current one would stay the first."""
    made = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    for device in (CPU, torch.device("cuda", 1)):
        set_current_device(device)
    assert made == [torch.device("cuda", 1)]


def test_a_narrow_model_takes_more_tokens_on_a_gpu() -> None:
    sizes = [default_batch_size(CUDA, 512, width) for width in (1024, 2048, 4096, 8192)]
    assert sizes == [64, 32, 16, 16]
    assert default_batch_size(CPU, 512, 1024) == 2


def test_a_recovery_computes_activations_again_before_it_gives_up(gpu: SimpleNamespace) -> None:
    model, cuda = tiny.tiny_llama(num_hidden_layers=8), dict(device="cuda")
    plan = of(model, training=Training(None, 4), **cuda)
    need = needed(plan)
    less = needed(of(model, training=Training(None, 4, checkpointed=True), **cuda))
    gpu.free = 2 * need.total
    assert not check_memory(plan, CUDA).checkpointed
    gpu.free = int(1.13 * less.total)
    assert gpu.free < need.total
    room = check_memory(plan, CUDA)
    assert room.checkpointed and not room.fetched
    gpu.free = less.total // 2
    with pytest.raises(UserError, match="--device cuda:0: .* --recover_rank 16, which trains"):
        check_memory(plan, CUDA)
    low = of(model, training=Training(4, 4), **cuda)
    assert needed(low).work < need.work


def test_blocks_stay_on_the_host_where_the_device_is_small(gpu: SimpleNamespace) -> None:
    plan = of(tiny.tiny_llama(num_hidden_layers=8), device="cuda")
    need, fetched = needed(plan), needed(replace(plan, fetched=True))
    gpu.free = 2 * (need.weights + need.hidden + need.work)
    room = check_memory(plan, CUDA)
    assert not room.fetched and room.state_device == CUDA
    gpu.free = int(1.12 * (need.weights + need.work))
    room = check_memory(plan, CUDA)
    assert not room.fetched and room.state_device == CPU
    gpu.free = need.weights + need.work
    room = check_memory(plan, CUDA)
    assert room.fetched and room.line.startswith("memory: device about ")
    assert "host about" in room.line
    gpu.free = fetched.work // 2
    with pytest.raises(UserError, match="--device cuda:0: the run needs .* --batch_size"):
        check_memory(plan, CUDA)
    room = check_memory(on_cpu(plan), CPU)
    assert not room.fetched and room.state_device == CPU


def test_processes_that_share_take_the_blocks_once() -> None:
    """On the host of GPUs that are too small, and of CPUs."""
    model = tiny.tiny_llama(num_hidden_layers=8)
    inside = 8 * sum(weight.nbytes for weight in model.model.layers[0].parameters())
    whole = sum(weight.nbytes for weight in model.parameters())
    eight = dict(processes=8, windows=1, tests=1, batch_size=1)
    least = needed(of(model, fetched=True, device="cuda", **eight))
    for shared in (True, False):
        found = lay_out(of(model, device="cuda", shared=shared, **eight), least.total)
        assert found.plan.fetched and found.states_on_device
        assert found.machine == inside * (1 if shared else 8) + 8 * found.host.total
        assert ("once for all" in found.describe_host(0)) == shared
        found = lay_out(of(model, shared=shared, **eight))
        assert found.plan.fetched == shared
        each = found.host.total
        assert found.machine == (whole + 8 * each if shared else 8 * each)
        long = lay_out(of(model, shared=shared, **eight | dict(tests=10**6, method_spec=None)))
        assert long.host.hidden == long.plan.load.hidden_states(
            1
        )  # of a batch, from where no block need move
        on_disk = lay_out(of(model, shared=shared, on_disk=True, **eight))
        assert on_disk.plan.in_files == (whole - inside if shared else 0)


def test_one_process_that_must_fetch_makes_all_fetch(gpu: SimpleNamespace) -> None:
    plan = of(tiny.tiny_llama(num_hidden_layers=8), device="cuda")
    gpu.free = 2**40
    assert not check_memory(plan, CUDA).fetched
    assert check_memory(plan, CUDA, lambda _: True).fetched


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_freed_activations_are_not_faulted_in_again(tmp_path: Path) -> None:
    """Page faults of tensors made and dropped together, in a process of its own."""
    code = (
        "import resource, torch\n"
        "from lib.util.host import keep_freed_memory\n"
        "import sys; sys.argv[1:] and keep_freed_memory()\n"
        "def turn():\n"
        "    for _ in range(5): [torch.ones(2**20) for _ in range(8)]\n"
        "turn(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "turn(); print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    plain, kept = (
        int(start(["-c", code, *more], tmp_path).communicate(timeout=LIMIT)[0])
        for more in ([], ["keep"])
    )
    assert kept < plain / 10
