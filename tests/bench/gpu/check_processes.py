"""Several processes: what goes between GPUs, masks as of one process, and one that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import made
import torch
import torch.distributed as torch_dist
from measure import seconds
from sizes import NotHere, Size
from steps import ROOT, SAID, descendants, end

ENDS_WITHIN = 60  # seconds after one process is killed
STARTS_WITHIN = 120
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def check_collectives(device: str, size: Size) -> dict[str, Any]:
    """What a dist does with NCCL (Gloo on a CPU), by one process: a group can be made, dtypes."""
    there = torch.device(device)
    cuda = there if there.type == "cuda" else None
    if cuda:
        torch.cuda.set_device(cuda)
    place = Path(size.work, f"store-{os.getpid()}")
    store = torch_dist.FileStore(str(place), 1)
    start = time.perf_counter()
    kind = "nccl" if cuda else "gloo"
    torch_dist.init_process_group(kind, store=store, rank=0, world_size=1, device_id=cuda)
    beside = torch_dist.new_group(backend="gloo")  # for what stays on the host
    found = {"backend": kind, "s, to make a group": time.perf_counter() - start}
    width = size.of(11008, 64)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        tensor = torch.randn(width, width, device=there).to(dtype)
        before = tensor.clone()
        torch_dist.all_reduce(tensor, async_op=True).wait()
        torch_dist.broadcast(tensor, 0)
        assert torch.equal(tensor, before), f"{dtype} is changed"
        spent = seconds(lambda tensor=tensor: torch_dist.all_reduce(tensor), there)
        found[f"ms, {str(dtype).removeprefix('torch.')}"] = 1000 * spent
    values: list = [None]
    torch_dist.all_gather_object(values, {"tokens": width}, beside)
    assert values == [{"tokens": width}]
    torch_dist.destroy_process_group()
    place.unlink(missing_ok=True)
    return found


def two_flags(device: str, size: Size, kind: str) -> list[str]:
    """Of main.py for two processes; NotHere where each can't have a GPU of its own."""
    there = torch.device(device)
    if there.type == "cuda" and torch.cuda.device_count() < (there.index or 0) + 2:
        raise NotHere("needs two GPUs, the second after --device")
    return [str(ROOT / "main.py"), *made.flags_of(kind, size, device), "--prune_method", "wanda"]


def check_two(device: str, size: Size) -> dict[str, Any]:
    """Wanda by two processes: the weights of one."""
    flags = two_flags(device, size, "medium")
    with made.scratch(size) as folder:
        found, digests = {}, []
        for name, command in (("one", [sys.executable]), ("two", LAUNCHER)):
            target = ["--save_model", str(folder / name), "--save", str(folder / f"{name}-out")]
            start = time.perf_counter()
            done = subprocess.run([*command, *flags, *target], capture_output=True, text=True)
            found[f"s, {name}"] = time.perf_counter() - start
            print(done.stdout[-SAID:], done.stderr[-SAID:], flush=True)
            assert done.returncode == 0, f"{name}: status {done.returncode}"
            digests.append(made.digest(folder / name))
    assert digests[0] == digests[1], "two processes give other weights than one"
    return found


def check_killed(device: str, size: Size) -> dict[str, Any]:
    """One of two processes is killed at work: the other ends too, and the launcher says so."""
    flags = two_flags(device, size, "large")
    with made.scratch(size) as folder, (folder / "said").open("w+") as said:
        command = [*LAUNCHER, *flags, "--save", str(folder / "out")]
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            workers = at_work(process, folder / "said")
            os.kill(workers[1], signal.SIGKILL)
            start = time.perf_counter()
            status = process.wait(ENDS_WITHIN)
            spent = time.perf_counter() - start
            left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        finally:
            end(process)
        print((folder / "said").read_text("utf-8")[-SAID:], flush=True)
    assert status, "the launcher tells of success"
    assert not left, f"{len(left)} processes are still there"
    return {"s, until all had ended": spent, "status": status}


def at_work(process: subprocess.Popen, said: Path) -> list[int]:
    """The two processes, once the memory line tells that they have what they need."""
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline:
        text = said.read_text("utf-8")
        assert process.poll() is None, f"ended before it came to work: {text[-300:]}"
        if "memory:" in text:
            return [pid for pid in descendants(process.pid) if is_main(pid)]
        time.sleep(0.1)
    raise AssertionError(f"not at work after {STARTS_WITHIN} s")


def is_main(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return (
        any(word.endswith(b"main.py") for word in words) and b"torch.distributed.run" not in words
    )
