"""The packed form and the packed linear, against slow obvious references."""

import itertools

import pytest
import tiny
import torch
from support import CPU
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lib import sparse
from lib.methods.sparsity import n_of_m
from lib.packed import cuda, few_tokens, layout
from lib.packed import linear as sparse_linear
from lib.packed.layout import check_packed, is_packable, pack, packed_shapes, unpack
from lib.packed.linear import SparseLinear, fast_bytes
from lib.util.errors import UserError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def two_of_four(rows, columns, dtype=torch.float32, seed=0):
    """A random 2:4 matrix whose groups keep none, one or two weights."""
    torch.manual_seed(seed)
    weight = torch.randint(-9, 10, (rows, columns)).to(dtype)
    weight[n_of_m(torch.rand(rows, columns), 2, 4)] = 0
    return weight


def slow_pack(weight):
    """Loops over every group, straight from the description of the form."""
    rows, groups = weight.shape[0], weight.shape[1] // 4
    half = -(-groups // 2)
    values = torch.zeros(rows, 2 * groups, dtype=weight.dtype)
    positions = torch.zeros(rows, half, dtype=torch.uint8)
    for row, group in itertools.product(range(rows), range(2 * half)):
        four = weight[row, 4 * group : 4 * group + 4].tolist()
        kept = [k for k, value in enumerate(four) if value != 0]
        kept = sorted((kept + [k for k in range(4) if k not in kept])[:2])
        if group < groups:
            values[row, group], values[row, groups + group] = four[kept[0]], four[kept[1]]
        byte = (kept[0] | kept[1] << 2) << (0 if group < half else 4)
        positions[row, group % half] |= byte
    return values, positions


def dense_linear(rows=24, columns=40, bias=True, dtype=torch.float32):
    linear = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    linear.weight.data = two_of_four(rows, columns, dtype)
    return linear.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 8), (5, 12), (7, 20), (16, 64)])
def test_packing_is_what_it_says_and_comes_back(dtype, shape):
    weight = two_of_four(*shape, dtype)
    values, positions = pack(weight)
    slow_values, slow_positions = slow_pack(weight)
    assert torch.equal(values, slow_values) and torch.equal(positions, slow_positions)
    assert torch.equal(unpack(values, positions), weight) and values.dtype == dtype
    assert (tuple(values.shape), tuple(positions.shape)) == packed_shapes(*shape)
    check_packed(values, positions, *shape)


def test_every_pattern_of_at_most_two():
    patterns = [p for p in itertools.product((0.0, 1.0), repeat=4) if sum(p) <= 2]
    weight = torch.tensor(patterns) * torch.tensor([1.5, -2.5, 3.5, -4.5])  # (11, 4)
    assert torch.equal(unpack(*pack(weight)), weight)
    two_groups = torch.cat([weight, weight.flip(0)], 1).to(torch.bfloat16)
    assert torch.equal(unpack(*pack(two_groups)), two_groups)


def test_extreme_values_and_ties():
    weight = torch.tensor([[0, float("inf"), 0, -float("inf"), 0, 0, float("nan"), 0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(unpack(*pack(weight.to(dtype))).isnan(), weight.isnan())
        packed = unpack(*pack(weight.to(dtype))).nan_to_num(1)
        assert torch.equal(packed, weight.to(dtype).nan_to_num(1))
    tied = torch.ones(4, 16)
    tied[n_of_m(tied, 2, 4)] = 0
    assert torch.equal(unpack(*pack(tied)), tied)
    signed = torch.tensor([[-0.0, 0.0, 2.0, -0.0]])  # equal matrices, equal bytes
    for a, b in zip(pack(signed), pack(signed.abs()), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # a subnormal is no zero
        small = torch.finfo(dtype).smallest_normal
        weight = torch.tensor([[0, small / 4, -0.0, -small / 2]], dtype=torch.float64).to(dtype)
        assert weight.count_nonzero() == 2 and torch.equal(unpack(*pack(weight)), weight)


def test_tiles_and_strides_change_nothing(monkeypatch):
    weight = two_of_four(50, 44, torch.bfloat16)
    whole = pack(weight)
    monkeypatch.setattr(layout, "TILE_GROUPS", 11)
    shifted = torch.cat([weight.new_ones(3), weight.flatten()])[3:].view(weight.shape)
    wider = torch.cat([weight, weight[:, :2]], 1)[:, :44]
    for tensor in (weight, weight.T.contiguous().T, shifted, wider):
        values, positions = pack(tensor)
        assert torch.equal(values, whole[0]) and torch.equal(positions, whole[1])
    assert torch.equal(unpack(*whole), weight) and is_packable(weight)


def test_what_cannot_be_packed():
    weight = two_of_four(4, 8)
    weight[2, 4:] = 1
    assert not is_packable(weight)
    with pytest.raises(UserError, match="4 x 8 is not 2:4"):
        pack(weight)
    assert not is_packable(torch.zeros(4, 6))
    with pytest.raises(UserError, match="multiple of 4"):
        pack(torch.zeros(4, 6))
    with pytest.raises(UserError, match="matrix"):
        pack(torch.zeros(4, 4, 4))


@pytest.mark.parametrize("nibble", [0, 1 | 1 << 2, 3 | 1 << 2, 2 | 0 << 2])
@pytest.mark.parametrize("high", [False, True])
def test_positions_out_of_order(nibble, high):
    values, positions = pack(two_of_four(3, 16))
    positions[1, 1] = (positions[1, 1] & 15 | nibble << 4) if high else nibble | 4 << 4
    with pytest.raises(UserError, match="out of order"):
        check_packed(values, positions, 3, 16)


def test_packed_shapes_that_do_not_match():
    values, positions = pack(two_of_four(3, 16))
    for wrong in ((values[:2], positions), (values, positions[:, :1]), (values[:, :6], positions)):
        with pytest.raises(UserError, match="a matrix of 3 x 16 has"):
            check_packed(*wrong, 3, 16)
    with pytest.raises(UserError, match="not uint8"):
        check_packed(values, positions.int(), 3, 16)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_dense(dtype, bias, monkeypatch):
    dense = dense_linear(bias=bias, dtype=dtype)
    packed = SparseLinear.from_linear(dense)
    for shape in ((40,), (3, 40), (2, 3, 40), (2, 1, 3, 40), (0, 40)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(packed(x), dense(x))
    monkeypatch.setattr(sparse_linear, "TILE_WEIGHTS", 100)  # several tiles
    x = torch.randn(2, 3, 40).to(dtype)
    torch.testing.assert_close(packed(x), dense(x))
    assert torch.equal(packed.to_linear().weight, dense.weight)


def test_conv1d():
    dense = Conv1D(24, 40).requires_grad_(False)
    dense.weight.data = two_of_four(24, 40).T.contiguous()
    packed, x = SparseLinear.from_linear(dense), torch.randn(2, 3, 40)
    assert (packed.in_features, packed.out_features) == (40, 24)
    torch.testing.assert_close(packed(x), dense(x))
    again = packed.to_linear()
    assert isinstance(again, Conv1D) and torch.equal(again.weight, dense.weight)
    assert torch.equal(again(x), dense(x))


def test_gradients_are_refused():
    packed = SparseLinear.from_linear(dense_linear())
    assert not any(p.requires_grad for p in packed.parameters())
    x = torch.randn(3, 40, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradients"):
        packed(x)
    with torch.no_grad():
        packed(x)
    packed(x.detach())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend):
    torch._dynamo.reset()
    dense = dense_linear()
    packed = SparseLinear.from_linear(dense)
    compiled, x = torch.compile(packed, backend=backend, fullgraph=True), torch.randn(2, 3, 40)
    assert torch.equal(compiled(x), dense(x))


@pytest.mark.parametrize("columns", [4, 40, 44])
def test_kernel_for_few_tokens(columns, monkeypatch):
    monkeypatch.setattr(few_tokens, "_kernel", lambda: few_tokens._one_token)
    for dtype in few_tokens.DTYPES:
        dense = dense_linear(columns=columns, dtype=dtype)
        packed = SparseLinear.from_linear(dense)
        packed.compiled_decoding = True
        for shape in ((1, columns), (columns,), (2, 1, columns), (2, 4, columns)):
            x = torch.randn(shape).to(dtype)
            torch.testing.assert_close(packed(x), dense(x), atol=0.2, rtol=0.02)
            if dtype == torch.float32:
                torch.testing.assert_close(packed(x), dense(x))


@pytest.mark.skipif(not few_tokens.can_compile(), reason="needs a C++ compiler")
def test_kernel_for_few_tokens_compiled():
    torch._dynamo.reset()
    model = nn.Sequential(SparseLinear.from_linear(dense := dense_linear()))
    assert sparse.compile_decoding_(model) == 1
    x = torch.randn(1, 40)
    torch.testing.assert_close(model(x), dense(x))


class Fast(torch.Tensor):
    """Stands for torch's sparse tensor on a machine without CUDA."""

    packed = meta = None

    def to_dense(self):
        return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            args[0].view(-1, args[0].shape[-1])  # torch's fails where this does
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture
def pretend_cuda(monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda *_: None)
    monkeypatch.setattr(cuda, "build", lambda dense: (dense.clone().as_subclass(Fast), "pretended"))


def test_fast_path_drops_the_packed_tensors_and_gives_them_back(pretend_cuda):
    dense = dense_linear()
    packed, x = SparseLinear.from_linear(dense), torch.randn(3, 40)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    assert torch.equal(packed(x), dense(x))
    assert packed.fast is not None and packed.weight.numel() == packed.positions.numel() == 0
    for x in (torch.randn(40), torch.randn(5, 2, 40).transpose(0, 1), torch.randn(0, 40)):
        torch.testing.assert_close(packed(x), dense(x))
    saved = packed.state_dict()
    assert saved.keys() == before.keys() and all(torch.equal(saved[k], before[k]) for k in before)
    assert packed.fast is not None  # saving leaves it
    packed.to("cpu")  # any move
    assert packed.fast is None and torch.equal(packed.weight, before["weight"])
    assert torch.equal(packed.to_linear().weight, dense.weight)


def test_refused_fast_path_is_tried_once(monkeypatch):
    calls = []
    monkeypatch.setattr(cuda, "why_not", lambda *_: None)
    monkeypatch.setattr(cuda, "build", lambda dense: (calls.append(1), (None, "too small"))[1])
    dense = dense_linear()
    packed, x = SparseLinear.from_linear(dense), torch.randn(3, 40)
    for _ in range(3):
        assert torch.equal(packed(x), dense(x))
    assert calls == [1] and packed.reason == "too small"


def test_why_not_the_fast_path():
    assert "not on cpu" in cuda.why_not((64, 64), torch.bfloat16, CPU)


@pytest.mark.parametrize(
    "capability, cusparselt, shape, said",
    [
        ((8, 0), True, (64, 64), "cusparselt"),
        ((9, 0), True, (64, 64), "cusparselt"),
        ((8, 6), False, (64, 64), "cutlass"),
        ((9, 0), False, (64, 64), "no 2:4 kernels for"),  # torch's CUTLASS is for 8.x alone
        ((8, 0), True, (16, 16), "cusparselt"),
        ((8, 0), False, (16, 16), "16 x 16: not the multiples"),
        ((7, 5), True, (64, 64), "no 2:4 tensor cores"),
    ],
)
def test_which_library_multiplies(capability, cusparselt, shape, said, monkeypatch):
    there = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
    reason = cuda.why_not(shape, torch.bfloat16, there)
    assert said in (reason or cuda.pick(shape, torch.bfloat16, there).BACKEND)
    assert cuda.why_not(shape, torch.float32, there)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fast_path_on_cuda(dtype):
    dense = dense_linear(128, 256, dtype=dtype).cuda()
    packed = SparseLinear.from_linear(dense)
    bytes_before = {k: v.cpu() for k, v in packed.state_dict().items()}
    for shape in ((1, 256), (2, 3, 256), (64, 256)):
        x = torch.randn(shape, device="cuda").to(dtype)
        torch.testing.assert_close(packed(x), dense(x), atol=0.5, rtol=0.02)
    assert packed.fast is not None, packed.reason
    assert all(torch.equal(v.cpu(), bytes_before[k]) for k, v in packed.state_dict().items())
    packed.cpu()
    assert torch.equal(packed.dense(), dense.weight.cpu())


@needs_cuda
def test_unpacking_on_cuda():
    dense = dense_linear(24, 44).cuda()
    packed, x = SparseLinear.from_linear(dense), torch.randn(3, 44, device="cuda")
    assert torch.equal(packed(x), dense(x)) and packed.fast is None and packed.reason


def test_swap_reports_and_keeps_outputs():
    model = tiny.ARCHITECTURES["Llama"]().eval()
    ids = torch.arange(12)[None]
    blocks = model.model.layers
    pruned = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    for linear in pruned[1:]:  # the first stays unpruned
        linear.weight.data[n_of_m(linear.weight.data.abs(), 2, 4)] = 0
    with torch.no_grad():
        before = model(ids).logits
        report = sparse.swap_linears_(model, blocks)
        assert torch.equal(model(ids).logits, before)
    assert sparse.check_same_outputs(before, before) == 0
    assert list(report.dense.values()) == ["not 2:4"] and not report.fast
    assert len(report.unpacked) == len(pruned) - 1
    assert str(report) == (
        f"2:4 linears: {len(pruned) - 1} unpacked at each forward (torch's 2:4 kernels run on "
        "CUDA, not on cpu), 1 left dense (not 2:4)"
    )
    assert len(sparse.swap_linears_(model, blocks).unpacked) == len(pruned) - 1  # again: the same
    assert fast_bytes(model) == 0


def test_swap_of_an_unpruned_model():
    model = tiny.ARCHITECTURES["Llama"]()
    with pytest.raises(UserError, match="no linear is 2:4"):
        sparse.swap_linears_(model, model.model.layers)


def test_swap_of_a_quantised_model():
    model = tiny.ARCHITECTURES["Llama"]()
    model.quantization_method = "bitsandbytes"
    with pytest.raises(UserError, match="run without --load_bit"):
        sparse.swap_linears_(model, model.model.layers)


def test_outputs_that_differ_stop_the_run():
    logits = torch.randn(1, 5, 7)
    assert 0 < sparse.check_same_outputs(logits, logits * (1 + 1e-6)) < 1e-5
    for wrong in (logits + 0.01, logits * float("nan")):
        with pytest.raises(UserError, match="outputs differ"):
            sparse.check_same_outputs(logits, wrong)
    half = logits.to(torch.bfloat16)
    sparse.check_same_outputs(half, half * (1 + 1 / 64))


def test_float_products_of_the_packed_form_are_those_of_the_dense_one():
    weight, x = two_of_four(8, 16, torch.float64), torch.randn(2, 16, dtype=torch.float64)
    values, positions = pack(weight)
    y = torch.zeros(2, 8, dtype=torch.float64)
    for row, group in itertools.product(range(8), range(4)):
        nibble = int(positions[row, group % 2]) >> (4 if group >= 2 else 0)
        for slot, column in enumerate((nibble & 3, nibble >> 2 & 3)):
            y[:, row] += values[row, 4 * slot + group] * x[:, 4 * group + column]
    torch.testing.assert_close(y, F.linear(x, weight))
