"""The CPU's kernels against the dense weight in float64: all instructions, dtypes, widths."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from processes import forkserver
from support import LIMIT, PACKED, ROOT, needs_kernels

from lib.packed import kernels
from lib.packed.embedding import dense_rows, quantize_rows
from lib.packed.layout import row_offsets

EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(1, 1), (3, 7), (5, 64), (7, 65), (33, 100), (16, 128), (9, 1000), (2, 2050)]
TOKENS = [1, 2, 3, 4, 5, 7, 8, 9, 70]
BITS = [16, 8, 4]
PATHS = ["avx2", "avx512", "avx512_bf16", None]


@pytest.fixture(scope="module", autouse=True)
def _built():
    needs_kernels()


@pytest.fixture(params=PATHS)
def path(request):
    if request.param not in [*torch.ops.packed_bitmask.paths(), None]:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def sparse(rows: int, columns: int, share: float, dtype: torch.dtype) -> torch.Tensor:
    """Random, `share` of it zeros; one row wholly pruned and one without a zero where there are
    rows to spare."""
    weight = torch.randn(rows, columns)
    weight[torch.rand(rows, columns) < share] = 0
    if rows > 2:
        weight[0], weight[-1] = 0, torch.randn(columns).abs() + 0.1
    return weight.to(dtype)


def arguments(weight: torch.Tensor, bits: int) -> tuple[tuple, torch.Tensor]:
    """Mask, weight, offsets and scale, and the dense matrix, float64, that they stand for."""
    rows, columns = weight.shape
    if bits == 8:  # nothing is pruned, and there is one mask
        codes, scale = quantize_rows(weight)
        mask = PACKED[16].encode(torch.ones(1, columns)).mask
        offsets = torch.arange(0, (rows + 1) * columns, columns)
        return (mask, codes.flatten(), offsets, scale), dense_rows(codes, scale).double()
    packed = PACKED[bits].encode(weight)
    parts = packed.mask, packed.weight, row_offsets(packed.mask), packed.scale
    return parts, PACKED[bits].decode(packed, columns).double()


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry of the exact product."""
    return float((y.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_products_are_those_of_the_dense_weight(path, dtype, bits):
    torch.manual_seed(0)
    for rows, columns in SHAPES:
        for share in (0.0, 0.3, 0.5, 0.9, 1.0):
            parts, dense = arguments(sparse(rows, columns, share, dtype), bits)
            bias = torch.randn(rows).to(dtype)
            for tokens in TOKENS:
                x = torch.randn(tokens, columns).to(dtype)
                y = kernels.linear(x, *parts, bias, path)
                assert y.shape == (tokens, rows) and y.dtype == dtype
                exact = x.double() @ dense.T + bias.double()
                # unpacked for many tokens, 8-bit weights are rounded to x's dtype first
                assert off(y, exact) <= 2 * EPS[dtype], (rows, columns, share, tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_one_token_by_many_rows(path, dtype, bits):
    """More rows, and wider ones, than are unpacked at a time; inputs whose mean is not zero."""
    torch.manual_seed(4)
    for rows, columns in [(90, 70), (70, 1500), (3, 20011)]:
        parts, dense = arguments(sparse(rows, columns, 0.3, dtype), bits)
        for mean in (0, 5):
            x = ((torch.randn(1, columns) + mean) / 16).to(dtype)
            y = kernels.linear(x, *parts, None, path)
            assert off(y, x.double() @ dense.T) <= 2 * EPS[dtype], (rows, columns, mean)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("tokens", [1, 8, 40, 200])
def test_a_token_does_not_depend_on_its_neighbours(tokens, bits):
    """What isn't finite stays in its row; others are what they are alone. No bias is needed."""
    torch.manual_seed(1)
    parts, _ = arguments(sparse(24, 200, 0.5, torch.float32), bits)
    x = torch.randn(tokens, 200)
    alone = kernels.linear(x[:1], *parts)
    x[1:] = float("nan")
    y = kernels.linear(x, *parts)
    assert torch.allclose(y[:1], alone, rtol=1e-5, atol=1e-5)
    assert y[1:, 1:].isnan().all()  # row 0 is wholly pruned
    x[0, 3] = float("inf")
    for dtype in kernels.DTYPES[1:] if bits < 16 else ():  # where inputs are taken as integers
        y = kernels.linear(x[:1].to(dtype), *parts)
        assert not y[0, -1].isfinite()


@pytest.mark.parametrize("larger", [30, 300, 3000, 30000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_one_channel_may_be_many_times_the_others(dtype, larger, bits):
    """As in real models: inputs taken as integers have a scale for every 64 columns, and where that
    is too coarse they are not taken as integers."""
    torch.manual_seed(2)
    weight = sparse(16, 512, 0.5, torch.float32)
    weight[:, 70] = 0  # the channel's own weights: the others must still be exact
    parts, dense = arguments(weight, bits)
    x = torch.randn(1, 512)
    x[0, 70] = larger
    x = x.to(dtype)
    assert off(kernels.linear(x, *parts), x.double() @ dense.T) < 0.005


def test_what_does_not_fit_is_refused():
    """None of these may be read beyond its end."""
    (mask, weight, offsets, scale), _ = arguments(sparse(4, 16, 0.5, torch.float32), 16)
    x = torch.randn(2, 16)
    beyond = offsets.clone()
    beyond[2] = 10**15
    wrong = [
        (x[:, :0], mask[:, :0], weight[:0], offsets * 0, scale),
        (x.double(), mask, weight.double(), offsets, scale),
        (x.bfloat16(), mask, weight, offsets, scale),
        (x, mask, weight[:-1], offsets, scale),
        (x, mask, weight.to(torch.int8), offsets, torch.ones(4)),
        (x, mask, weight, offsets.flip(0), scale),
        (x, mask, weight, beyond, scale),
    ]
    (mask, weight, offsets, scale), _ = arguments(sparse(4, 100, 0.5, torch.float32), 4)
    x = torch.randn(2, 100)
    wrong += [
        (x, mask, weight[:-1], offsets, scale),
        (x, mask, weight, offsets, None),
        (x, mask, weight, offsets, scale.float()),
        (x, mask, weight, offsets, scale[:3]),
        (x, mask[:1], weight, offsets, scale),
    ]
    for one in wrong:
        with pytest.raises(RuntimeError):
            kernels.linear(*one)


@pytest.mark.parametrize("bits", BITS)
def test_threads_give_the_same_bytes(bits):
    torch.manual_seed(3)
    parts, _ = arguments(sparse(300, 1000, 0.5, torch.bfloat16), bits)
    x = torch.randn(5, 1000).bfloat16()
    threads, products = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            products.append(kernels.linear(x, *parts))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, products[0]) for one in products)


def report(environment: dict[str, str], file: str) -> None:
    """In a process that has called no kernel: whether they are ready, and the warnings."""
    os.environ.update(environment)
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    warnings.simplefilter("always")
    print(kernels.ready(), kernels.ready(), file=sys.stderr, flush=True)


def reported(folder: Path, **environment: str) -> list[str]:
    arguments = environment | {"TORCH_EXTENSIONS_DIR": str(folder)}, str(folder / "said")
    process = forkserver().Process(target=report, args=arguments)
    process.start()
    process.join(LIMIT)
    return (folder / "said").read_text().splitlines()


FAILING = "#!/bin/sh\necho 'g++ 14'; echo 'x.cpp:1:2: error: no AVX'; test $1 = --version\n"


@pytest.mark.parametrize(
    "there, reason", [(False, "g++: not found"), (True, "x.cpp:1:2: error: no AVX")]
)
def test_without_a_working_compiler_one_line_says_so(there, reason, tmp_path):
    compiler = tmp_path / "g++"
    if there:
        compiler.write_text(FAILING)
        compiler.chmod(0o700)
    *lines, ready = reported(tmp_path, CXX=str(compiler))
    [line] = [line for line in lines if "run unpacked, slowly" in line]
    assert ready == "False False" and line.endswith(f"{reason}. Install a C++ compiler (g++)."), (
        line
    )
    assert not any("WARNING" in line for line in lines)


def test_what_was_built_is_found_again_in_a_folder_of_ones_own(tmp_path):
    base = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    folder = tmp_path / f"packed_bitmask-{os.geteuid()}"
    shutil.copytree(base / folder.name, folder)
    folder.chmod(0o700)
    assert reported(tmp_path, CXX="/none") == ["True True"]
    folder.chmod(0o777)  # whoever can write there could have put another library there
    *lines, ready = reported(tmp_path, CXX="/none")
    assert ready == "False False" and "others can write" in " ".join(lines)


PROGRAM = """
from importlib.util import find_spec
assert find_spec("pip")  # setuptools hands out Python's own distutils from now on
from lib.packed import kernels
print(kernels.ready())
"""


@pytest.mark.full
def test_a_program_that_has_imported_pip_builds_them(tmp_path: Path) -> None:
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout == "True\n", done.stderr


def test_they_are_built_in_a_process_of_their_own(tmp_path: Path, monkeypatch) -> None:
    """Whatever this one has imported: a small source is, from a program without torch's builder."""
    source = tmp_path / "small.cpp"
    source.write_text("int small() { return 0; }\n")
    shutil.copy(kernels.SOURCE.with_name("build_kernels.py"), tmp_path)
    monkeypatch.setattr(kernels, "SOURCE", source)
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)  # importing it fails
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    kernels._load_or_build()
    [built] = tmp_path.glob("packed_bitmask-*/*")
    assert built.suffix == ".so"
