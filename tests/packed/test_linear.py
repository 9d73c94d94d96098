"""The packed linear, its paths, and whole models that are swapped for it."""

import copy
import pickle

import pytest
import tiny
import torch
from support import CPU
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lib import sparse
from lib.methods.sparsity import n_of_m
from lib.model.pretrained import decoder_blocks
from lib.packed import cuda, kernels
from lib.packed import linear as packed_linear
from lib.packed.grid import dequantise, quantise
from lib.packed.layout import row_offsets
from lib.packed.linear import SparseLinear, semi_structured_bytes
from lib.util.errors import UserError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


# the kernels are compared with this path in tests of their own
pytestmark = pytest.mark.usefixtures("without_kernels")


def dense_linear(rows=24, columns=40, bias=True, dtype=torch.float32, share=0.5):
    """Any pattern; whole numbers, so that sums are exact in every dtype."""
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    weight = torch.randint(-9, 10, (rows, columns)).masked_fill(
        torch.rand(rows, columns) < share, 0
    )
    linear.weight.data = weight.to(dtype)
    return linear.requires_grad_(False)


def two_of_four_linear(rows=24, columns=40, dtype=torch.float32):
    linear = dense_linear(rows, columns, dtype=dtype, share=0)
    linear.weight[n_of_m(torch.rand(rows, columns), 2, 4)] = 0
    return linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [40, 43])
def test_linear_equals_dense(dtype, bias, columns, monkeypatch):
    dense = dense_linear(columns=columns, bias=bias, dtype=dtype)
    packed = SparseLinear.from_linear(dense)
    for shape in ((columns,), (3, columns), (2, 3, columns), (2, 1, 3, columns), (0, columns)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(packed(x), dense(x))
    monkeypatch.setattr(packed_linear, "TILE_WEIGHTS", 100)  # several tiles
    x = torch.randn(2, 3, columns).to(dtype)
    torch.testing.assert_close(packed(x), dense(x))
    mixed = torch.randn(5, 2, columns).to(dtype).transpose(0, 1)  # no view makes rows of it
    torch.testing.assert_close(packed(mixed), dense(mixed))
    assert torch.equal(packed.to_linear().weight, dense.weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_equal_the_rounded_weight_and_come_near(dtype):
    dense = dense_linear(dtype=dtype)
    dense.weight *= torch.rand(24, 40).to(dtype)
    packed, x = SparseLinear.from_linear(dense, 8), torch.randn(3, 40).to(dtype)
    assert packed.dtype == dtype and packed.dense().dtype == dtype
    assert torch.equal(packed(x), F.linear(x, packed.dense(), dense.bias))
    exact = F.linear(x.double(), dense.weight.double(), dense.bias.double())
    step = packed.scale.double() / 2
    kept = (dense.weight != 0).double()
    limit = step * F.linear(x.double().abs(), kept)  # every weight off by half a step
    slack = (
        4 * torch.finfo(dtype).eps * (F.linear(x.double().abs(), dense.weight.double().abs()) + 1)
    )
    assert ((packed(x).double() - exact).abs() <= limit + slack).all()
    assert torch.equal(packed.to_linear().weight, packed.dense())


def test_conv1d():
    dense = Conv1D(24, 40).requires_grad_(False)
    dense.weight.data = dense_linear(24, 40).weight.T.contiguous()
    packed, x = SparseLinear.from_linear(dense), torch.randn(2, 3, 40)
    assert (packed.in_features, packed.out_features) == (40, 24)
    torch.testing.assert_close(packed(x), dense(x))
    again = packed.to_linear()
    assert isinstance(again, Conv1D) and torch.equal(again.weight, dense.weight)
    assert torch.equal(again(x), dense(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("columns", [40, 200])
def test_four_bits_equal_the_rounded_weight_in_every_dtype(dtype, group, columns):
    dense = dense_linear(columns=columns, dtype=dtype)
    dense.weight *= torch.rand(24, columns).to(dtype)
    packed = SparseLinear.from_linear(dense, 4, group)
    x = torch.randn(3, columns).to(dtype)
    assert packed.dtype == dtype and packed.group == group
    assert torch.equal(packed.dense().float(), packed.dense(torch.float32))  # no dtype loses a bit
    torch.testing.assert_close(packed(x), F.linear(x, packed.dense(), dense.bias))
    codes, scales = quantise(dense.weight, None, 4, group)
    assert torch.equal(packed.dense(torch.float32), dequantise(codes, scales, group))
    again = SparseLinear.from_linear(packed.to_linear(), 4, group)
    assert torch.equal(again.dense(), packed.dense())


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_casts_copies_and_state(bits):
    dense = dense_linear()
    dense.weight /= 127  # a scale that half precision would round
    packed = SparseLinear.from_linear(dense, bits)
    state, scale = packed.state_dict(), packed.scale
    assert set(state) == {"weight", "mask", "bias"} | ({"scale"} if bits < 16 else set())
    for one in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(one.dense(), packed.dense())
        assert torch.equal(one.offsets, packed.offsets) and one.mask is not packed.mask
    half = copy.deepcopy(packed).to(torch.bfloat16)
    assert half.dtype == half.dense().dtype == half.bias.dtype == torch.bfloat16
    assert half.mask.dtype == torch.uint8 and half.offsets.dtype == torch.int64
    if bits < 16:
        assert torch.equal(half.scale, scale) and half.weight.dtype == packed.weight.dtype
        assert torch.equal(half.dense(), packed.dense().bfloat16())
        assert torch.equal(half.half().float().scale, scale)
    empty = SparseLinear.skeleton(dense, packed.nnz, bits).to("meta")
    assert empty.offsets.is_meta and (empty.scale is None or empty.scale.is_meta)
    empty(torch.empty(2, 40, device="meta"))  # shapes alone
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty.offsets, row_offsets(packed.mask))
    assert torch.equal(empty.dense(), packed.dense())


def test_a_mask_that_is_fetched_is_counted_again():
    dense, x = dense_linear(), torch.randn(3, 40)
    packed = SparseLinear.from_linear(dense)
    state = packed.state_dict()
    packed.to("meta")
    packed.weight = nn.Parameter(state["weight"], requires_grad=False)
    packed.bias = nn.Parameter(state["bias"], requires_grad=False)
    packed.mask = state["mask"]
    assert packed.offsets.is_meta and torch.equal(packed(x), dense(x))


def test_the_kernels_are_given_what_they_need(monkeypatch):
    calls = []

    def linear(x, mask, weight, offsets, scale, bias):
        calls.append((x, mask, weight, offsets, scale, bias))
        return x.new_zeros(len(x), len(mask))

    monkeypatch.setattr(kernels, "ready", lambda: True)
    monkeypatch.setattr(kernels, "linear", linear)
    for bits in (16, 8, 4):
        packed = SparseLinear.from_linear(dense_linear(), bits)
        assert packed(torch.randn(2, 3, 40)).shape == (2, 3, 24)
        x, *rest = calls.pop()
        assert x.shape == (6, 40) and x.is_contiguous()
        held = (packed.mask, packed.weight, packed.offsets, packed.scale, packed.bias)
        assert all(a is b for a, b in zip(rest, held, strict=True))
    packed(torch.randn(0, 40))
    packed.double()(torch.randn(3, 40, dtype=torch.float64))  # a dtype that they don't know
    with sparse.unpacking(packed):
        packed.float()(torch.randn(3, 40))
    assert not calls


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_second_call_goes_straight_to_the_kernels_where_it_may(bits, monkeypatch):
    monkeypatch.undo()
    if not kernels.ready():
        pytest.skip("no C++ compiler")
    dense = dense_linear()
    packed, x = SparseLinear.from_linear(dense, bits), torch.randn(2, 3, 40)
    first = packed(x)
    assert packed._by_kernel and torch.equal(packed(x), first)
    assert packed(x[0, 0]).shape == (24,) and packed(x[:0]).shape == (0, 3, 24)
    torch.testing.assert_close(packed(x), F.linear(x, packed.dense(), dense.bias))
    with pytest.raises(RuntimeError, match="no gradients"):
        packed(x.clone().requires_grad_())
    with sparse.unpacking(packed):
        assert torch.equal(packed(x), F.linear(x, packed.dense(), dense.bias))
    packed(x)
    torch.testing.assert_close(
        packed.to(torch.bfloat16)(x.bfloat16()).float(), first, rtol=0.1, atol=0.5
    )
    packed.float()(x)
    state = packed.state_dict()
    packed.weight = nn.Parameter(packed.weight.to("meta"), requires_grad=False)  # it is offloaded
    with pytest.raises(RuntimeError, match="not in memory"):
        packed(x)
    packed.weight = nn.Parameter(state["weight"], requires_grad=False)
    assert packed(x).shape == first.shape and not packed(x).is_meta


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


def test_semi_structured_drops_the_packed_tensors_and_gives_them_back(pretend_cuda):
    dense = two_of_four_linear()
    packed, x = SparseLinear.from_linear(dense), torch.randn(3, 40)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    assert torch.equal(packed(x), dense(x))
    assert packed.semi_structured is not None and packed.weight.numel() == packed.mask.numel() == 0
    for x in (torch.randn(40), torch.randn(5, 2, 40).transpose(0, 1), torch.randn(0, 40)):
        torch.testing.assert_close(packed(x), dense(x))
    saved = packed.state_dict()
    assert saved.keys() == before.keys() and all(torch.equal(saved[k], before[k]) for k in before)
    assert packed.semi_structured is not None  # saving leaves it
    packed.to("cpu")  # any move
    assert packed.semi_structured is None and torch.equal(packed.weight, before["weight"])
    assert torch.equal(packed.to_linear().weight, dense.weight)


def test_refused_semi_structured_is_tried_once(monkeypatch):
    calls = []
    monkeypatch.setattr(cuda, "why_not", lambda *_: None)
    monkeypatch.setattr(cuda, "build", lambda dense: (calls.append(1), (None, "too small"))[1])
    dense = dense_linear()
    packed, x = SparseLinear.from_linear(dense), torch.randn(3, 40)
    for _ in range(3):
        assert torch.equal(packed(x), dense(x))
    assert calls == [1] and packed.reason == "too small"


def test_why_not_the_semi_structured_path():
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
def test_semi_structured_on_cuda(dtype):
    dense = two_of_four_linear(128, 256, dtype=dtype).cuda()
    packed = SparseLinear.from_linear(dense)
    bytes_before = {k: v.cpu() for k, v in packed.state_dict().items()}
    for shape in ((1, 256), (2, 3, 256), (64, 256)):
        x = torch.randn(shape, device="cuda").to(dtype)
        torch.testing.assert_close(packed(x), dense(x), atol=0.5, rtol=0.02)
    assert packed.semi_structured is not None, packed.reason
    assert all(torch.equal(v.cpu(), bytes_before[k]) for k, v in packed.state_dict().items())
    packed.cpu()
    assert torch.equal(packed.dense(), dense.weight.cpu())


@needs_cuda
def test_unpacking_on_cuda():
    dense = dense_linear(24, 44).cuda()
    for bits in (16, 8):
        packed, x = SparseLinear.from_linear(dense, bits), torch.randn(3, 44, device="cuda")
        assert packed.semi_structured is None and packed.offsets.is_cuda
        torch.testing.assert_close(packed(x), F.linear(x, packed.dense(), dense.bias))
    assert packed.reason


def test_what_is_not_2_4_does_not_try_torchs_kernels(monkeypatch):
    there = torch.device("cuda", 0)
    monkeypatch.setattr(cuda, "why_not", lambda *_: None)
    assert SparseLinear.from_linear(two_of_four_linear()).why_not_semi_structured(there) is None
    assert "2:4 alone" in SparseLinear.from_linear(dense_linear()).why_not_semi_structured(there)
    assert "8-bit" in SparseLinear.from_linear(two_of_four_linear(), 8).why_not_semi_structured(
        there
    )


def swapped(model, bits=16):
    return sparse.swap_linears_(model, decoder_blocks(model)[1], bits=bits)


def prune_(model, share=0.6):
    torch.manual_seed(0)
    linears = [m for m in decoder_blocks(model)[1].modules() if isinstance(m, nn.Linear | Conv1D)]
    for linear in linears:
        linear.weight.data[torch.rand_like(linear.weight) < share] = 0
    return linears


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_swap_reports_and_keeps_outputs(bits):
    model = tiny.ARCHITECTURES["Llama"]().eval()
    dense = model.model.layers[0].self_attn.q_proj
    kept = dense.weight.data.clone()
    pruned = prune_(model)
    dense.weight.data = kept  # the first stays unpruned
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
        report = swapped(model, bits)
        after = model(ids).logits
        with sparse.unpacking(model):
            assert torch.equal(model(ids).logits, after)
    difference = sparse.relative_difference(before, after)
    assert difference == 0 if bits == 16 else 0 < difference < (0.05 if bits == 8 else 0.5)
    assert list(report.dense.values()) == ["too few zeros to be smaller packed"]
    assert report.packed == len(report.unpacked) == len(pruned) - 1 and report.bits == bits
    at = "" if bits == 16 else f" at {bits} bits"
    assert str(report) == (
        f"packed linears{at}: {len(pruned) - 1} unpacked at each forward (the kernels could not be "
        "built), 1 left dense (too few zeros to be smaller packed)"
    )
    assert swapped(model, bits).packed == len(pruned) - 1  # again: the same
    assert swapped(model, 16).bits == bits  # what 8 bits have lost doesn't come back
    assert semi_structured_bytes(model) == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_packed_at_16_bits_is_packed_again_at_fewer(bits):
    model = tiny.ARCHITECTURES["GPT-2"]().eval()
    prune_(model)
    other = copy.deepcopy(model)
    swapped(model), swapped(model, bits), swapped(other, bits)
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert model.hf_quantizer.quantization_config.bits == bits


def test_sizes_are_those_of_the_tensors():
    model = tiny.ARCHITECTURES["Llama"]()
    prune_(model)
    other = copy.deepcopy(model)
    for bits, one in ((16, model), (8, other), (4, copy.deepcopy(other))):
        swapped(one, bits)
        size = sparse.packed_size(one, torch.float32)
        state = {k: v for k, v in one.model.layers.state_dict().items() if "norm" not in k}
        assert size.packed == sum(v.nbytes for v in state.values()) and size.linears == 14
        assert size.bits == bits and size.packed < size.dense
    assert sparse.packed_size(model, torch.bfloat16).dense * 2 == size.dense


def test_experts_in_one_tensor_are_told():
    model = tiny.ARCHITECTURES["Mixtral"]()
    prune_(model)
    report = swapped(model)
    assert set(report.dense.values()) >= {"experts in one tensor"} and report.packed


def test_each_block_is_at_hand_in_its_turn():
    model = tiny.ARCHITECTURES["Llama"]()
    prune_(model)
    seen, inside = [], []

    class Near:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            inside.append(self.index)

        def __exit__(self, *_):
            seen.append(self.index)
            block = model.model.layers[inside.pop()]
            assert not any(isinstance(m, nn.Linear) for m in block.modules())

    sparse.swap_linears_(model, model.model.layers, on_device=Near)
    assert seen == [0, 1]


def test_swap_of_an_unpruned_model():
    model = tiny.ARCHITECTURES["Llama"]()
    with pytest.raises(UserError, match="no linear is smaller packed .*14 stay dense"):
        swapped(model)
    with pytest.raises(UserError, match="no linear is smaller packed"):
        swapped(model, 8)  # what isn't sparse isn't rounded


def test_swap_of_a_quantised_model():
    model = tiny.ARCHITECTURES["Llama"]()
    model.quantization_method = "bitsandbytes"
    with pytest.raises(UserError, match="run without --load_bit"):
        swapped(model)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_wrong_packing_names_the_linear(monkeypatch, bits):
    model = tiny.ARCHITECTURES["Llama"]()
    prune_(model)
    right = SparseLinear.dense
    monkeypatch.setattr(SparseLinear, "dense", lambda *args: right(*args).roll(1))
    with pytest.raises(UserError, match=f"--pack_bits {bits}: model.layers.0.self_attn.q_proj"):
        swapped(model, bits)


def test_outputs_that_differ_stop_the_run():
    logits = torch.randn(1, 5, 7)
    assert 0 < sparse.check_same_outputs(logits, logits * (1 + 1e-6)) < 1e-5
    for wrong in (logits + 0.01, logits * float("nan")):
        with pytest.raises(UserError, match="outputs differ"):
            sparse.check_same_outputs(logits, wrong)
    half = logits.to(torch.bfloat16)
    sparse.check_same_outputs(half, half * (1 + 1 / 64))
