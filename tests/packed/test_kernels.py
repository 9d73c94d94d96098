"""The CPU's kernels against the dense weight in float64: all instructions, dtypes, widths."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from skips import NO_COMPILER
from support import LIMIT, ROOT

from lib.packed import kernels
from lib.packed.errors import PackedWarning
from lib.packed.layout import Packed, pack, row_offsets, unpack

EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(1, 1), (3, 7), (5, 64), (7, 65), (33, 100), (16, 128), (9, 1000), (2, 2050)]
TOKENS = [1, 2, 3, 4, 5, 7, 8, 9, 70]


@pytest.fixture(scope="module", autouse=True)
def _built():
    if not kernels.ready():
        pytest.skip(NO_COMPILER)


def sparse(rows: int, columns: int, share: float, dtype: torch.dtype) -> torch.Tensor:
    """Random, `share` of it zeros; one row wholly pruned and one without a zero where there are
    rows to spare."""
    weight = torch.randn(rows, columns)
    weight[torch.rand(rows, columns) < share] = 0
    if rows > 2:
        weight[0], weight[-1] = 0, torch.randn(columns).abs() + 0.1
    return weight.to(dtype)


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry of the exact product."""
    return float((y.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("path", ["portable", "avx2", "avx512", "avx512_bf16", None])
@pytest.mark.parametrize("bits, group", [(16, 64), (8, 64), (4, 32), (4, 64), (4, 128)])
def test_products_are_those_of_the_dense_weight(path, dtype, bits, group):
    """At 8 and 4 bits: of the weight that the integers and their scales stand for."""
    if path not in [*kernels.paths(), None]:
        pytest.skip(f"this processor has no {path}")
    torch.manual_seed(0)
    for rows, columns in SHAPES:
        for share in (0.0, 0.3, 0.5, 0.9, 1.0):
            packed = pack(sparse(rows, columns, share, dtype), bits, group)
            if bits < 16:
                dense = unpack(packed, columns, dtype=torch.float64)
                dense = dense.float().double()
            else:
                dense = unpack(packed, columns).double()
            bias = torch.randn(rows).to(dtype)
            for tokens in TOKENS:
                x = torch.randn(tokens, columns).to(dtype)
                y = kernels.linear(x, *shuffled(packed), bias, path)
                assert y.shape == (tokens, rows) and y.dtype == dtype
                exact = x.double() @ dense.T + bias.double()
                # unpacked for many tokens, 8-bit weights are rounded to x's dtype first
                assert off(y, exact) <= 2 * EPS[dtype], (rows, columns, share, tokens)


@pytest.mark.parametrize("path", ["portable", "avx2", "avx512", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits, group", [(8, 64), (4, 32), (4, 64), (4, 128)])
def test_one_token_by_many_rows(path, dtype, bits, group):
    """More rows, and wider ones, than are unpacked at a time; inputs whose mean is not zero."""
    if path not in [*kernels.paths(), None]:
        pytest.skip(f"this processor has no {path}")
    torch.manual_seed(4)
    for rows, columns in [(90, 70), (70, 1500), (3, 20011)]:
        packed = pack(sparse(rows, columns, 0.3, dtype), bits, group)
        dense = unpack(packed, columns, dtype=torch.float64).float().double()
        for mean in (0, 5):
            x = ((torch.randn(1, columns) + mean) / 16).to(dtype)
            y = kernels.linear(x, *shuffled(packed), None, path)
            assert off(y, x.double() @ dense.T) <= 2 * EPS[dtype], (rows, columns, mean)


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("path", ["portable", "avx2", "avx512", "avx512_bf16", None])
@pytest.mark.parametrize("columns", [1, 63, 64, 100, 640])
def test_one_mask_for_all_rows(path, dtype, columns):
    """Of a head that keeps every weight; and one mask that does not."""
    if path not in [*kernels.paths(), None]:
        pytest.skip(f"this processor has no {path}")
    torch.manual_seed(5)
    codes = torch.randint(-127, 128, (40, columns)).to(torch.int8)
    scale = torch.rand(40) + 0.5
    for keep in (torch.ones(columns, dtype=torch.bool), torch.arange(columns) % 3 > 0):
        mask = pack(keep[None].float()).mask
        kept = int(keep.sum())
        offsets = torch.arange(0, 40 * kept + 1, kept) if kept else torch.zeros(41).long()
        dense = codes.double() * keep * scale[:, None].double()
        for tokens in (1, 2, 5):
            x = torch.randn(tokens, columns).to(dtype)
            y = kernels.linear(x, mask, codes[:, keep].flatten(), offsets, scale, None, path)
            assert off(y, x.double() @ dense.T) <= 2 * EPS[dtype], (kept, tokens)


def shuffled(packed: Packed) -> tuple:
    """In the order of the kernel's arguments: mask, weight, offsets, scale."""
    return packed.mask, packed.weight, row_offsets(packed.mask), packed.scale


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_without_bias_and_without_weights(dtype):
    packed = pack(torch.zeros(4, 9, dtype=dtype))
    for tokens in (1, 9, 100):
        x = torch.randn(tokens, 9).to(dtype)
        assert torch.equal(
            kernels.linear(x, *shuffled(packed)), torch.zeros(tokens, 4, dtype=dtype)
        )


@pytest.mark.parametrize("tokens", [1, 8, 40, 200])
def test_a_token_does_not_depend_on_its_neighbours(tokens):
    """What isn't finite stays in its row; others are what they are alone."""
    torch.manual_seed(1)
    packed = pack(sparse(24, 200, 0.5, torch.float32))
    x = torch.randn(tokens, 200)
    alone = kernels.linear(x[:1], *shuffled(packed))
    x[1:] = float("nan")
    y = kernels.linear(x, *shuffled(packed))
    assert torch.allclose(y[:1], alone, rtol=1e-5, atol=1e-5)
    assert y[1:, 1:].isnan().all()  # row 0 is wholly pruned


@pytest.mark.parametrize("larger", [30, 300, 3000, 30000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_one_channel_may_be_many_times_the_others(dtype, larger, bits):
    """As in real models: inputs taken as integers have a scale for every 64 columns, and where that
    is too coarse they are not taken as integers."""
    torch.manual_seed(2)
    packed = pack(sparse(16, 512, 0.5, torch.float32), bits)
    dense = unpack(packed, 512, dtype=torch.float32).double()
    x = torch.randn(1, 512)
    x[0, 70] = larger
    dense[:, 70] = 0  # whose weights are zero: the others must still be exact
    packed = pack(dense.float(), bits)
    dense = unpack(packed, 512, dtype=torch.float32).double()
    x = x.to(dtype)
    y = kernels.linear(x, *shuffled(packed))
    assert off(y, x.double() @ dense.T) < 0.005


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_inputs_that_are_not_finite_are_not_hidden(bits):
    packed = pack(sparse(8, 100, 0.2, torch.float32), bits)
    x = torch.randn(2, 100).bfloat16()
    x[0, 3] = float("inf")
    y = kernels.linear(x, *shuffled(packed))
    assert not y[0, 1:].isfinite().any() and y[1].isfinite().all()


def test_what_does_not_fit_is_refused():
    packed = pack(sparse(4, 16, 0.5, torch.float32))
    mask, weight, offsets, scale = shuffled(packed)
    x = torch.randn(2, 16)
    wrong = [
        (x[:, :15], mask[:, :1], weight, offsets, scale),
        (x.double(), mask, weight.double(), offsets, scale),
        (x.bfloat16(), mask, weight, offsets, scale),
        (x, mask, weight[:-1], offsets, scale),
        (x, mask, weight, offsets[:-1], scale),
        (x, mask, weight, offsets, torch.ones(4)),
        (x, mask, weight.to(torch.int8), offsets, None),
        (x, mask, weight, offsets.flip(0), scale),
        (x, mask, weight, offsets - 1, scale),
        (x, mask, weight, replaced(offsets, 2, -(10**9)), scale),
        (x, mask, weight, replaced(offsets, 2, 10**15), scale),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError):
            kernels.linear(*arguments)
    with pytest.raises(RuntimeError, match="no path amx"):
        kernels.linear(x, mask, weight, offsets, scale, None, "amx")


def replaced(offsets: torch.Tensor, index: int, value: int) -> torch.Tensor:
    offsets = offsets.clone()
    offsets[index] = value
    return offsets


def test_four_bits_that_do_not_fit_are_refused():
    packed = pack(sparse(4, 100, 0.5, torch.float32), 4)
    mask, weight, offsets, scale = shuffled(packed)
    x = torch.randn(2, 100)
    for arguments in (
        (x, mask, weight[:-1], offsets, scale),
        (x, mask, weight, offsets, None),
        (x, mask, weight, offsets, scale.float()),
        (x, mask, weight, offsets, scale[:3]),
        (x, mask, weight, offsets, scale.repeat(1, 4)),
        (x, mask[:1], weight, offsets, scale),
    ):
        with pytest.raises(RuntimeError):
            kernels.linear(*arguments)


@pytest.mark.parametrize("bits", [16, 4])
def test_threads_give_the_same_bytes(bits):
    torch.manual_seed(3)
    packed = pack(sparse(300, 1000, 0.5, torch.bfloat16), bits)
    x = torch.randn(5, 1000).bfloat16()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(kernels.linear(x, *shuffled(packed)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


def test_compiles_into_a_graph():
    packed = pack(sparse(8, 64, 0.5, torch.float32))
    operator = torch.library.opcheck
    arguments = (torch.randn(3, 64), *shuffled(packed), None, None)
    operator(
        torch.ops.packed_bitmask.linear.default,
        arguments,
        test_utils=["test_schema", "test_faketensor"],
    )


def test_torchs_own_threads_are_used():
    """No second OpenMP library comes with the kernels, whose threads would compete with torch's."""
    code = (
        "import re, torch;"
        "names = lambda: re.findall(r'lib[gi]?omp\\S*', open('/proc/self/maps').read());"
        "loaded = lambda: set(names());"
        "before = loaded(); from lib.packed import kernels; kernels.ready();"
        "print(loaded() - before)"
    )
    assert python(code).stdout.strip() == "set()"


@pytest.mark.parametrize("compiler", ["/none", "/bin/false"])
def test_without_a_working_compiler_one_line_says_so(compiler, tmp_path):
    """One that is missing, and one that fails."""
    code = (
        "import warnings; warnings.simplefilter('default'); from lib.packed import kernels;"
        "print(kernels.ready(), kernels.ready())"
    )
    done = python(code, CXX=compiler, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.stdout.strip() == "False False"
    assert done.stderr.count("packed linears run unpacked, slowly") == 1, done.stderr


def test_a_built_library_is_found_again(tmp_path):
    """A second process loads what was built, without a compiler."""
    done = python(READY, CXX=str(tmp_path / "none"))
    assert done.stdout.strip() == "True" and "building" not in done.stderr


READY = "from lib.packed import kernels; print(kernels.ready())"


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """A copy of the built library where this process looks for one."""
    built = kernels._private_folder() / f"{kernels._digest_of_source()}.so"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    library = kernels._private_folder() / built.name
    shutil.copyfile(built, library)
    kernels._sum_file(library).write_text(kernels._sum(library), "ascii")
    assert kernels._is_whole(library)
    return library


def cut_short(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:1000])


def make_empty(library: Path) -> None:
    library.write_bytes(b"")


def change_a_byte(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def lose_the_sum(library: Path) -> None:
    kernels._sum_file(library).unlink()


def let_others_write(library: Path) -> None:
    library.chmod(0o666)


def replace_by_a_link(library: Path) -> None:
    library.rename(library.with_suffix(".other"))
    library.symlink_to(library.with_suffix(".other"))


@pytest.mark.parametrize(
    "damage",
    [cut_short, make_empty, change_a_byte, lose_the_sum, let_others_write, replace_by_a_link],
)
def test_a_library_that_is_not_as_it_was_built_is_built_anew(cached, damage, monkeypatch):
    built = []
    monkeypatch.setattr(kernels, "_compile_and_load", built.append)
    monkeypatch.setattr(kernels.torch.ops, "packed_bitmask", object())
    monkeypatch.setattr(kernels.torch.library, "register_fake", lambda name: lambda fake: fake)
    monkeypatch.setattr(kernels, "_loads", lambda library: True)
    kernels._load()
    assert built == []
    damage(cached)
    kernels._load()
    assert built == [cached]


def test_a_library_for_another_system_is_built_anew(cached, monkeypatch):
    cached.write_bytes(b"no library")
    kernels._sum_file(cached).write_text(kernels._sum(cached), "ascii")
    assert kernels._is_whole(cached) and not kernels._loads(cached)


def test_a_folder_that_others_may_write_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = kernels._private_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.warns(PackedWarning, match="other users may write it"):
        assert kernels._private_folder() is None
    monkeypatch.setattr(kernels.os, "geteuid", lambda: 12345)
    (tmp_path / "packed_bitmask-12345").mkdir(mode=0o700)
    with pytest.warns(PackedWarning, match="belongs to another user"):
        assert kernels._private_folder() is None
    (tmp_path / "packed_bitmask-12345").rmdir()
    (tmp_path / "packed_bitmask-12345").symlink_to(folder)
    with pytest.warns(PackedWarning, match="is no folder"):
        assert kernels._private_folder() is None


def test_what_is_kept_is_whole(tmp_path):
    built, library = tmp_path / "built.so", tmp_path / "kept.so"
    built.write_bytes(b"abc")
    kernels._keep(built, library)
    assert kernels._is_whole(library) and library.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "built.so",
        "kept.sha256",
        "kept.so",
    ]


def test_of_processes_that_start_together_one_builds(tmp_path):
    """The others wait for it, and load what it has kept; a stand-in for the compiler counts."""
    code = (
        "import sys, time, pathlib; from lib.packed import kernels\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "def build(library):\n"
        "    (folder / f'built-{time.time_ns()}').touch(); time.sleep(1)\n"
        "    (folder / 'so').write_bytes(b'x'); kernels._keep(folder / 'so', library)\n"
        "kernels._compile_and_load = build\n"
        "kernels._loads = lambda library: True\n"
        "kernels.torch.library.register_fake = lambda name: lambda fake: fake\n"
        "(folder / f'ready-{sys.argv[2]}').touch()\n"
        "while len(list(folder.glob('ready-*'))) < 2: time.sleep(0.01)\n"
        "kernels._load()\n"
    )
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, str(i)], cwd=ROOT, env=environment)
        for i in range(2)
    ]
    assert [process.wait(timeout=LIMIT) for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("built-*"))) == 1


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
