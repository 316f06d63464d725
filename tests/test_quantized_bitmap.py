"""Quantised bitmap: its bytes, what it refuses, and its products on GPUs."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formats import DTYPES, each, read_quantized_bitmap, runs_here, write_quantized_bitmap
from test_quantized import (
    KINDS,
    assert_same_values,
    exact_weight,
    random_int8,
    random_values,
    raw,
    small_steps,
)

import flash_llm
from flash_llm import PackedWeight, QuantizedBitmap, SparseLinear, ops, quantize, testing

FORMAT = "quantized_bitmap"
KERNEL = "quantized8"
WGMMA = tuple(f"quantized{n}_wgmma" for n in (16, 32, 64, 128))  # Hopper's own
WGMMA_INT8_X = tuple(f"{config}_int8x" for config in WGMMA)
WIDE = (KERNEL, "quantized16", *WGMMA)
INT8_X = ("quantized8_int8x", "quantized16_int8x", *WGMMA_INT8_X)
FP8_X = tuple(f"{config}_fp8x" for config in WGMMA)


def here(*configs, kind="int8"):
    """The configurations of all kernel families that this GPU runs, for values of a kind."""
    without = {
        "int8": (*FP8_X, "dense_fp8x"),
        "fp8_e4m3": INT8_X,
        "int4": ("quantized16", *WGMMA_INT8_X, *FP8_X),
    }[kind]
    multiply = [config for config in configs if config not in without]
    sm80 = [
        f"sm80_{config}" for config in multiply if re.fullmatch(r"quantized\d+(_int8x)?", config)
    ]
    return [
        name for name in (*multiply, *sm80) if runs_here(FORMAT, "cuda", name, f"{kind}_float16")
    ]


def pack(values, scales, dtype=torch.float16, device="cpu"):
    return ops.pack_quantized(values.to(device), scales.to(device), dtype, FORMAT)


def assert_same_weight(found, expected):
    assert type(found) is QuantizedBitmap and found.header == expected.header
    assert torch.equal(found.offsets.cpu(), expected.offsets.cpu())
    assert torch.equal(found.payload.cpu(), expected.payload.cpu())


# ---- bytes ----


@each("sparsity", [0.0, 0.3, 0.5, 0.97, 1.0])
@each(
    ("m", "k"),
    [(0, 7), (7, 0), (1, 1), (3, 31), (16, 256), (17, 257), (40, 600), (17, 512), (33, 1030)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_as_described(m, k, sparsity, kind, device):
    values, scales = random_values(m, k, sparsity, kind=kind)
    w = pack(values, scales, device=device)
    w.validate()
    written = write_quantized_bitmap(raw(values).numpy(), scales.numpy(), kind)
    expected = np.concatenate([*written, np.zeros(0, np.uint8)])
    np.testing.assert_array_equal(w.payload.cpu().numpy().view(np.uint8), expected)
    sizes = np.array([len(chunk) for chunk in written], np.int64)
    np.testing.assert_array_equal(w.offsets.cpu().diff().numpy() * 32, sizes)
    found, read = w.to_quantized(), read_quantized_bitmap(w)
    np.testing.assert_array_equal(raw(found[0]).numpy(), read[0])
    np.testing.assert_array_equal(found[1].cpu().numpy().reshape(read[1].shape), read[1])
    assert_same_values(found[:1], [values])
    assert w.nnz == int(values.float().count_nonzero())


@each("kind", KINDS)
def test_stats_tell_scales_from_values(kind):
    # int4: the scales of a strip take as many bytes as a small chunk.
    values, scales = random_values(32, 40 * 512, 1.0, kind=kind)
    raw(values)[0, 512] = raw(values)[16, 0] = 1
    w = pack(values, scales)
    assert w.stats().empty_chunks == w.offsets.numel() - 1 - 2


@each("dtype", DTYPES)
@each(("m", "k"), [(1, 3), (16, 256), (65, 513), (40, 772)])
@each("kind", KINDS)
def test_unpacking_gives_torchs_products(m, k, dtype, kind, device):
    values, scales = random_values(m, k, 0.6, kind=kind)
    w = pack(values, scales, dtype, device)
    assert torch.equal(w.to_dense().cpu(), quantize.dequantize(*w.to_quantized(), dtype).cpu())
    assert torch.ops.flash_llm.count_stored(list(w.header), w.offsets, w.payload) == w.nnz


@each(
    ("kind", "fixed", "factor", "most"),
    [("int8", 0.134, 1.06, 1.08), ("fp8_e4m3", 0.134, 1.06, 1.08), ("int4", 0.15, 0.53, 1.13)],
)
def test_a_large_weight_takes_few_bytes_more_than_its_bits_and_values(kind, fixed, factor, most):
    stats = pack(*random_values(512, 4096, 0.5, kind=kind)).stats()
    assert stats.packed_bytes < most * stats.exact_bytes
    estimate = fixed + factor * (1 - stats.sparsity)
    assert abs(stats.bytes_per_element / estimate - 1) < 0.02


@each(
    ("rows", "columns"),
    [((0, 32), (0, 600)), ((16, 40), (0, 600)), ((3, 9), (0, 600)), ((0, 40), (128, 300))],
)
@each("kind", KINDS)
def test_slices_and_concatenations_keep_values_and_scales(rows, columns, kind, device):
    values, scales = random_values(40, 600, 0.6, kind=kind)
    for part in (values[16:32], values[1, 128:300]):
        raw(part).zero_()
    w = pack(values, scales, device=device)
    rows, columns = slice(*rows), slice(*columns)
    of_part = scales[rows]
    if kind == "int4":
        of_part = of_part[:, columns.start // 128 : -(-columns.stop // 128)]
    assert_same_weight(w.slice(rows, columns), pack(values[rows, columns], of_part))
    for border in (16, 23):
        parts = [w.slice(slice(0, border)), w.slice(slice(border, 40))]
        assert_same_weight(PackedWeight.concat(parts), w)


# ---- bad input ----


def packed_word(edit, kind="int8"):
    """A weight of one chunk of one row of values, with one thing edited."""
    values = torch.zeros(16, 256, dtype=torch.int8)
    values[0, :2], values[3, 200] = torch.tensor([5, -7], dtype=torch.int8), 6
    if kind == "fp8_e4m3":
        values = values.float().to(torch.float8_e4m3fn)
    w = pack(values, torch.full(quantize.scales_shape(16, 256, kind), 0.5))
    payload = w.payload.clone()
    edit(payload.view(torch.uint8))
    return dataclasses.replace(w, payload=payload)


@each(
    ("edit", "match"),
    [
        (lambda b: b[:4].zero_(), "row 0: the scale must be a positive normal number"),
        (lambda b: b[4:8].zero_(), "row 1: the scale must be 1"),
        (lambda b: b[64:65].fill_(128), "chunk 0: a value is zero"),
        (lambda b: b[64:65].fill_(0), "chunk 0: a value is -128"),
        (lambda b: b[70:71].fill_(3), "chunk 0: bytes outside the runs"),
        (lambda b: b[-1:].fill_(4), "chunk 0: the columns"),
        (lambda b: b[-32 - 4 * 128 : -32].fill_(255), "chunk 0: must have 145 units"),
    ],
)
def test_damage_is_found_and_named(edit, match):
    w = packed_word(edit)
    with pytest.raises(ValueError, match=f"strip 0: {match}"):
        w.validate()
    with pytest.raises(ValueError, match="strip 0"):
        QuantizedBitmap.from_tensors(w.header, w.offsets, w.payload)


@each(
    ("kind", "edit", "match"),
    [
        ("fp8_e4m3", lambda b: b[64:65].fill_(0), "chunk 0: a value is zero"),
        ("fp8_e4m3", lambda b: b[64:65].fill_(0x80), "chunk 0: a value is zero"),
        ("fp8_e4m3", lambda b: b[64:65].fill_(0xFF), "chunk 0: a value is NaN"),
        # The scales are two units, the values of plane 0 the low nibbles of what follows.
        ("int4", lambda b: b[:2].zero_(), "row 0, columns from 0 .*: the scale must be a positive"),
        ("int4", lambda b: b[1:2].fill_(3), "row 0, columns from 0 .*: the scale must be a pos"),
        ("int4", lambda b: b[2:4].zero_(), "row 1, columns from 0 .*: the scale must be 1"),
        ("int4", lambda b: b[32:34].zero_(), "row 0, columns from 128 .*: the scale must be 1"),
        ("int4", lambda b: b[64:65].fill_(8), "chunk 0: a value is zero"),
        ("int4", lambda b: b[64:65].fill_(0), "chunk 0: a value is -8"),
        ("int4", lambda b: b[64:65].bitwise_or_(0x10), "chunk 0: bytes outside the runs"),
        ("int4", lambda b: b[-1:].fill_(4), "chunk 0: the columns"),
        ("int4", lambda b: b[-33:-32].fill_(4), "chunk 0: the columns"),
        ("int4", lambda b: b[-64 - 1024 : -64 - 512].fill_(255), "chunk 0: must have 162 units"),
        ("int4", lambda b: b[-64 - 512 : -64].fill_(255), "chunk 0: a bit lies outside"),
    ],
)
def test_damage_of_other_values_is_found_and_named(kind, edit, match):
    packed_word(lambda b: None, kind).validate()
    with pytest.raises(ValueError, match=f"strip 0: {match}"):
        packed_word(edit, kind).validate()


def test_int4_chunks_without_scales_are_refused():
    # The scales of so many columns take more units than one chunk.
    values, scales = random_values(16, 40 * 512, 1.0, kind="int4")
    values[0, 0] = 3
    w = pack(values, scales)
    cut = w.payload[8 * 160 :].clone()
    header = w.header._replace(payload_words=len(cut))
    with pytest.raises(ValueError, match="strip 0: chunk 0: no chunk has"):
        QuantizedBitmap.from_tensors(header, (w.offsets - 160).clamp(min=0), cut)


def test_bits_outside_the_matrix_are_found():
    values, scales = random_int8(16, 255, 0.5)
    w = pack(values, scales)
    wide = dataclasses.replace(w, header=w.header._replace(k=200))
    with pytest.raises(ValueError, match="strip 0: chunk 0: a bit lies outside"):
        wide.validate()


def test_other_values_are_refused():
    with pytest.raises(TypeError, match='"quantized_bitmap" .*16-bit'):
        flash_llm.pack(torch.ones(4, 8).half(), FORMAT)
    for kind in KINDS:
        assert flash_llm.pack(torch.ones(4, 8).half(), FORMAT, values=kind).nnz == 32


@each("kind", KINDS)
def test_weights_of_zeros_need_no_packing(kind, device):
    layer = SparseLinear(600, 40, device=device, format=FORMAT, values=kind)
    layer.packed.validate()
    assert_same_weight(layer.packed, pack(*random_values(40, 600, 1.0, kind=kind)))


# ---- plans ----


def plan_of(m, n, k, config="auto", **options):
    gpu = {"compute_capability": 90, "num_sms": 132, "smem_per_sm_bytes": 228 * 1024, **options}
    facts = {"value_type": "int8_float16", "format": FORMAT, "config": config}
    return flash_llm.explain_plan(m, n, k, m * k // 2, **facts, **gpu)


def test_plans():
    assert ops.explain_format(64, 64, 2048, compute_capability=90, values="int8")[0] == FORMAT
    assert plan_of(2048, 64, 4096).startswith("quantized16 ctas=33 unit_cols=16 ")
    assert plan_of(7168, 64, 7168).startswith("quantized64_wgmma ctas=132 ")
    assert plan_of(28672, 65, 7168).startswith("quantized128_wgmma ")
    assert plan_of(2048, 65, 4096).startswith("dense ")
    # X is quantised where it is asked for and saves time.
    for m, n, k, config in (
        (7168, 8, 7168, INT8_X[0]),
        (64, 1, 64, INT8_X[0]),
        (4096, 16, 4096, INT8_X[1]),
        (4096, 17, 4096, WGMMA_INT8_X[1]),
        (28672, 64, 7168, WGMMA_INT8_X[2]),
        (7168, 512, 7168, WGMMA_INT8_X[3]),
        (7168, 8193, 7168, "dense"),
        (4096, 8, 65537, KERNEL),
    ):
        assert plan_of(m, n, k, x_quantization="dynamic").startswith(f"{config} ")
    assert plan_of(28672, 8, 7168).startswith(f"{KERNEL} ctas=132 unit_cols=28 ")
    assert "workspace" not in plan_of(4096, 8, 8192)
    assert f"workspace_bytes={2 * 4096 * 8 * 4} " in plan_of(4096, 8, 8448)
    assert plan_of(4096, 8, 4096, compute_capability=80).startswith(f"sm80_{KERNEL} ")
    # Fewer warps fit the shared memory, so K has more sections.
    assert "unit_cols=16 " in plan_of(4096, 8, 8192, smem_per_sm_bytes=100 * 1024)
    with pytest.raises(NotImplementedError, match=f"{KERNEL}.*shared memory"):
        plan_of(64, 8, 64, KERNEL, smem_per_sm_bytes=8 * 1024)
    assert plan_of(64, 8, 65536, INT8_X[0]).startswith(INT8_X[0])
    with pytest.raises(ValueError, match=f"{INT8_X[1]}.*65537"):
        plan_of(64, 8, 65537, INT8_X[1])
    with pytest.raises(NotImplementedError, match=f"{KERNEL}.*9.0"):
        plan_of(64, 8, 64, KERNEL, compute_capability=80)


def test_quantising_x_is_asked_for_by_name(device):
    m, k = (40, 600) if device == "cpu" else (8192, 4096)
    w = flash_llm.pack(testing.random_sparse(m, k, 0.5, device=device), values="int8")
    x = torch.randn(3, k).half().to(device)
    y = flash_llm.spmm(x, w, x_quantization="dynamic")
    expected = "cpu_rows_int8x" if device == "cpu" else here(INT8_X[0])[0]
    assert torch.equal(y, flash_llm.spmm(x, w, config=expected))
    layer = SparseLinear.from_packed(w)
    assert torch.equal(layer(x), flash_llm.spmm(x, w))
    layer.x_quantization = "dynamic"
    assert torch.equal(layer(x), y)
    with pytest.raises(ValueError, match="x_quantization .*static"):
        flash_llm.spmm(x, w, x_quantization="static")
    with pytest.raises(ValueError, match='config .*"dense"'):
        flash_llm.spmm(x, w, x_quantization="dynamic", config="dense")


def test_compiled_calls_and_gradients_with_quantised_x(device):
    m, k = (40, 600) if device == "cpu" else (8192, 4096)
    w = flash_llm.pack(testing.random_sparse(m, k, 0.5, device=device), values="int8")
    x = torch.randn(3, k).half().to(device).requires_grad_()

    def product(x):
        return flash_llm.spmm(x, w, activation="relu", x_quantization="dynamic")

    y = product(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    # The gradient ignores that x is rounded.
    assert torch.equal(grad, (y > 0).half() @ w.to_dense())
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), y)


# ---- products ----

K = [1, 7, 64, 256, 257, 600, 1031, 4096, 8200, 17000]


@pytest.mark.gpu
@pytest.mark.parametrize("k", K)
@each("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_small_integers_are_exact(k, dtype, kind):
    for m, sparsity in itertools.product((1, 16, 67), (0.0, 0.5, 0.95, 1.0)):
        integers = testing.small_integers(m, k, sparsity=sparsity, dtype=dtype, seed=m)
        values, scales, exact = small_steps(integers, kind)
        w, weight = pack(values, scales, dtype, "cuda"), exact.to(dtype)
        assert torch.equal(w.to_dense().cpu(), weight)
        x = testing.small_integers(64, k, dtype=dtype, seed=1)
        bias = testing.small_integers(m, dtype=dtype, seed=3)
        expected = testing.spmm_reference(x, weight, bias, "relu").float().to(dtype)
        for n in (1, 2, 8, 9, 33, 64):
            for config in here(*WIDE, kind=kind):
                y = flash_llm.spmm(x[:n].cuda(), w, bias.cuda(), activation="relu", config=config)
                assert torch.equal(y.cpu(), expected[:n]), (m, n, sparsity, config)
            # cuBLAS may add partial sums in bf16, so its product of the unpacked weight is exact
            # only in its own sense.
            y = flash_llm.spmm(x[:n].cuda(), w, bias.cuda(), activation="relu", config="dense")
            assert torch.equal(y, F.linear(x[:n].cuda(), weight.cuda(), bias.cuda()).relu())


def quantize_tokens(x):
    """X as INT8_X rounds it: int8 values, as float64, and a scale for each token."""
    largest = x.abs().amax(dim=1).float()
    largest = torch.where(largest.isfinite(), largest.clamp(min=2.0**-100), torch.nan)
    inverse = torch.tensor(127.0) / largest  # 127 / x is 127 * (1 / x)
    values = (x.double() * inverse.double()[:, None]).round()
    return values, largest / 127


@pytest.mark.gpu
@pytest.mark.parametrize("k", K)
@each("dtype", DTYPES)
@each("kind", ["int8", "int4"])
def test_quantised_tokens_are_multiplied_exactly(k, dtype, kind):
    for m, sparsity in itertools.product((1, 16, 67), (0.0, 0.5, 0.95, 1.0)):
        values, scales = random_values(m, k, sparsity, m, kind)
        x = torch.randint(-127, 128, (64, k)).to(dtype)
        x[:, 0] = 127  # so every scale is 1
        # Scaled sums of int4's groups are exact in fp32 too: fewer than 2^24 steps of the least.
        scales = (2.0 ** torch.arange(scales.numel()).remainder(3) / 2**12).reshape(scales.shape)
        w = pack(values, scales, dtype, "cuda")
        expected = (x.double() @ exact_weight(w).cpu().t()).float().to(dtype)
        for n in (1, 2, 8, 9, 33, 64):
            for config in here(*INT8_X, kind=kind):
                y = flash_llm.spmm(x[:n].cuda(), w, config=config)
                assert torch.equal(y.cpu(), expected[:n]), (m, n, sparsity, config)


@pytest.mark.gpu
@pytest.mark.parametrize("k", K)
@each("dtype", DTYPES)
def test_tokens_rounded_to_fp8_are_multiplied_exactly(k, dtype):
    for m, sparsity in itertools.product((1, 16, 67), (0.0, 0.5, 0.95, 1.0)):
        integers = testing.small_integers(m, k, sparsity=sparsity, dtype=dtype, seed=m)
        values, scales, exact = small_steps(integers, "fp8_e4m3")
        w = pack(values, scales, dtype, "cuda")
        x = testing.small_integers(64, k, dtype=dtype, seed=1)
        x[:, 0] = 448  # so every scale is 1
        expected = testing.spmm_reference(x, exact.to(dtype)).float().to(dtype)
        for n in (1, 9, 33, 64):
            for config in here(*FP8_X, kind="fp8_e4m3"):
                y = flash_llm.spmm(x[:n].cuda(), w, config=config)
                assert torch.equal(y.cpu(), expected[:n]), (m, n, sparsity, config)


@pytest.mark.gpu
@each("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_are_multiplied_exactly_however_ctas_share_the_work(dtype, kind):
    for m, k in ((600, 1031), (4000, 2304)):  # some output tiles of up to 256 rows
        integers = testing.small_integers(m, k, sparsity=0.5, dtype=dtype, seed=m)
        values, scales, exact = small_steps(integers, kind)
        w = pack(values, scales, dtype, "cuda")
        x = testing.small_integers(300, k, dtype=dtype, seed=1)
        x[:, 0] = 448 if kind == "fp8_e4m3" else 127  # so the scale of rounded tokens is 1
        x = x.cuda()
        expected = (x.double() @ exact.cuda().double().t()).float().to(dtype)
        for n, ctas in itertools.product((65, 129, 300), (0, 3, 40)):
            for config in here(*WGMMA, *WGMMA_INT8_X, *FP8_X, kind=kind):
                y = flash_llm.spmm(x[:n], w, config=config, ctas=ctas)
                assert torch.equal(y, expected[:n]), (m, n, ctas, config)


@pytest.mark.gpu
@each("dtype", DTYPES)
@each("magnitude", [1e-33, 1e-30, 1e-6, 1.0, 3e4])
def test_tokens_are_rounded_to_nearest(dtype, magnitude):
    values, scales = random_int8(70, 4100, 0.6)
    w = pack(values, scales, dtype, "cuda")
    x = (torch.randn(9, 4100) * magnitude / 4).to(dtype)
    x[3] = 0
    rounded, token_scales = quantize_tokens(x)
    sums = (rounded @ values.double().t()).float()
    expected = ((sums * token_scales[:, None]) * scales).to(dtype)
    for config in here(*INT8_X):  # one section of K: its sums are exact
        assert torch.equal(flash_llm.spmm(x.cuda(), w, config=config).cpu(), expected), config


@pytest.mark.gpu
@each("dtype", DTYPES)
@each(("m", "k"), [(16, 16), (64, 272), (4000, 2304)])
def test_the_dense_fp8_product_is_exact(m, k, dtype):
    integers = testing.small_integers(m, k, sparsity=0.5, dtype=dtype, seed=m)
    integers[:16] = 0  # no scales are stored for such a strip
    values, scales, exact = small_steps(integers, "fp8_e4m3")
    w = pack(values, scales, dtype, "cuda")
    x = testing.small_integers(600, k, dtype=dtype, seed=1)
    x[:, 0] = 448  # so every scale is 1
    bias = testing.small_integers(m, dtype=dtype, seed=3)
    expected = testing.spmm_reference(x, exact.to(dtype), bias, "relu").float().to(dtype)
    arguments = w, bias.cuda()
    for n in (1, 129, 600):
        for config in here("dense_fp8x", kind="fp8_e4m3"):
            y = flash_llm.spmm(x[:n].cuda(), *arguments, activation="relu", config=config)
            assert torch.equal(y.cpu(), expected[:n]), n
    y = flash_llm.spmm(x.cuda().t().contiguous().t(), *arguments, x_quantization="dynamic")
    plain = testing.spmm_reference(x, exact.to(dtype), bias).float().to(dtype)
    assert torch.equal(y.cpu(), plain)


def fp8_tokens(x):
    """X as FP8_X rounds it: e4m3 values, as float64, and a scale for each token."""
    largest = x.abs().amax(dim=1, keepdim=True).float().clamp(min=2.0**-100)
    inverse = torch.tensor(448.0) / largest  # 448 / x is 448 * (1 / x)
    return (x.float() * inverse).to(torch.float8_e4m3fn).double(), largest / 448


@pytest.mark.gpu
@each("dtype", DTYPES)
@each("magnitude", [1e-33, 1e-30, 1e-6, 1.0, 3e4])
def test_tokens_are_rounded_to_nearest_fp8(dtype, magnitude):
    # A nonzero in each row, so that nothing else is rounded before the result.
    values, scales = random_values(4112, 4112, 0.0, kind="fp8_e4m3")
    values = (values.float() * torch.eye(4112)).to(values.dtype)
    w = pack(values, scales, dtype, "cuda")
    x = (torch.randn(9, 4112) * magnitude / 4).to(dtype)
    x[3] = 0
    rounded, token_scales = fp8_tokens(x)
    products = (rounded * values.float().diagonal().double()).float()
    expected = ((products * token_scales) * scales).to(dtype)
    for config in here(*FP8_X, kind="fp8_e4m3"):
        assert torch.equal(flash_llm.spmm(x.cuda(), w, config=config).cpu(), expected), config
    # cuBLASLt applies the scales in another order.
    for config in here("dense_fp8x", kind="fp8_e4m3"):
        y = flash_llm.spmm(x.cuda(), w, config=config).cpu()
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=smallest)


@pytest.mark.gpu
@each("dtype", DTYPES)
@each("sparsity", [0.0, 0.5, 0.9])
def test_products_of_fp8_tokens_stay_within_their_bound(dtype, sparsity):
    for m, k in ((131, 1100), (2000, 9000)):
        values, scales = random_values(m, k, sparsity, kind="fp8_e4m3")
        w = pack(values, scales / 64, dtype, "cuda")
        x = torch.randn(16, k).to(dtype)
        rounded, token_scales = fp8_tokens(x)
        rounded *= token_scales.double()
        weight = exact_weight(w).cpu()
        expected = rounded @ weight.t()
        # The tensor cores keep 13 bits of a sum behind its leading one, and drop the others
        # whenever they have added 32 products.
        steps = -(-k // 32) * 2.0**-13
        bound = steps * (rounded.abs() @ weight.abs().t())
        bound += expected.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
        for config in here(*FP8_X, kind="fp8_e4m3"):
            y = flash_llm.spmm(x.cuda(), w, config=config).cpu().double()
            assert bool(((y - expected).abs() <= bound).all()), config
            assert torch.equal(flash_llm.spmm(x.cuda(), w, config=config).cpu().double(), y)


@pytest.mark.gpu
@each("dtype", DTYPES)
@each("number", [float("inf"), float("nan")])
@each("kind", ["int8", "fp8_e4m3"])
def test_a_quantised_token_that_is_not_finite_gives_nan(dtype, number, kind):
    # 9000 columns are two sections of K, 16 tokens the wide configurations.
    few, many = INT8_X[:1], (*INT8_X[1:], *FP8_X, "dense_fp8x")
    for n, k, configs in ((1, 704, few), (3, 700, few), (16, 704, many), (3, 9000, few)):
        values, scales = random_values(48, k, 0.7, kind=kind)
        w = pack(values, scales / 8, dtype, "cuda")
        x = torch.ones(n, k, dtype=dtype)
        x[n // 2, k - 1] = number
        for name in here(*configs, kind=kind):
            y = flash_llm.spmm(x.cuda(), w, config=name)
            assert bool(y[n // 2].isnan().all()), (n, k, name)
            assert y.isfinite().all(1).sum() == n - 1, (n, k, name)


@pytest.mark.gpu
def test_quantised_tokens_in_graphs_and_without_prefetch():
    w = flash_llm.pack(testing.random_sparse(8192, 4096, 0.5, device="cuda"), values="int8")
    x = torch.randn(3, 4096).half().cuda()
    expected = flash_llm.spmm(x, w, x_quantization="dynamic")
    assert torch.equal(flash_llm.spmm(x, w, x_quantization="dynamic", prefetch=False), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = flash_llm.spmm(x, w, x_quantization="dynamic")
    x.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(y, expected.flip(0))


@pytest.mark.gpu
@each("n", [1, 2, 16, 40, 130, 600])
@each("prefetch", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_calls_that_round_their_input_wait_for_the_calls_before(kind, n, prefetch):
    size = 4096  # enough work for the kernels of many tokens
    layers = [
        flash_llm.pack(testing.random_sparse(size, size, 0.6, seed=i, device="cuda"), values=kind)
        for i in range(3)
    ]
    x = torch.randn(n, size).half().cuda()

    def chain(synchronize):
        y = torch.empty_like(x)
        y.copy_(x)
        for step in range(6):
            z = y
            for layer in (layers[step % 3], layers[(step + 1) % 3]):
                z = flash_llm.spmm(z, layer, prefetch=prefetch, x_quantization="dynamic")
                if synchronize:
                    torch.cuda.synchronize()
            y.copy_(z / z.float().norm(dim=1, keepdim=True) * 64)  # what the calls have read
        return y

    expected = chain(True)
    assert bool(expected.isfinite().all()) and bool(expected.any())
    for _ in range(3):
        assert torch.equal(chain(False), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(False)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@each("sparsity", [0.0, 0.4, 0.9, 1.0])
@each("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_results_stay_within_the_float64_bound(sparsity, dtype, kind):
    for m, k in ((131, 1100), (2000, 9000)):
        values, scales = random_values(m, k, sparsity, kind=kind)
        w, bias = pack(values, scales / 64, dtype, "cuda"), torch.randn(m).to(dtype)
        for n, config in itertools.product((1, 4, 16), here(*WIDE, kind=kind)):
            # With scales for groups, the elements are rounded before they are multiplied there.
            rounded = kind == "int4" and config in WGMMA
            exact = (w.to_dense().double() if rounded else exact_weight(w)).cpu()
            x = torch.randn(n, k).to(dtype)
            y = flash_llm.spmm(x.cuda(), w, bias.cuda(), activation="silu", config=config)
            testing.assert_spmm_close(y.cpu(), x, exact, bias, "silu")
            again = flash_llm.spmm(x.cuda(), w, bias.cuda(), activation="silu", config=config)
            assert torch.equal(y, again)


@pytest.mark.gpu
@each("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_infinity_and_nan_in_x_meet_absent_zeros(dtype, kind):
    values, scales = random_values(40, 1300, 0.7, kind=kind)
    values = values.float().index_fill(1, torch.arange(512, 1024), 0.0).to(values.dtype)
    w = pack(values, scales / 64, dtype, "cuda")
    x = torch.ones(3, 1300, dtype=dtype)
    x[0, 600], x[2, 1299] = float("inf"), float("nan")
    expected = x.double() @ exact_weight(w).cpu().t()
    for config in here(KERNEL, *WGMMA, kind=kind):
        y = flash_llm.spmm(x.cuda(), w, config=config).cpu()
        assert torch.equal(y.isnan(), expected.isnan()) and bool(y[1].isfinite().all()), config


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_malformed_weights_stay_within_their_memory(kind):
    values, scales = random_values(40, 700, 0.5, kind=kind)
    w = pack(values, scales / 64, device="cuda")
    x = torch.randn(3, 700).half().cuda()
    for count in range(0, w.payload.numel() - 8, 97):
        broken = dataclasses.replace(w, payload=w.payload.clone())
        broken.payload[count:] = -1
        for config in here(*WIDE, *INT8_X, *FP8_X, kind=kind):
            assert flash_llm.spmm(x, broken, config=config).shape == (3, 40)
        assert broken.to_dense().shape == (40, 700)
    for offset in (-1, 0, 1, 2**31 - 1):
        broken = dataclasses.replace(w, offsets=w.offsets.clone())
        broken.offsets[1:-1:2] = offset
        for config in here(*WIDE, *INT8_X, *FP8_X, kind=kind):
            assert flash_llm.spmm(x, broken, config=config).shape == (3, 40)
        assert broken.to_dense().shape == (40, 700)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_layers_move_between_devices_without_rounding_again(kind):
    weight = testing.random_sparse(130, 600, 0.5)
    linear = torch.nn.Linear(600, 130).half()
    linear.weight.data = weight
    layer = SparseLinear.from_linear(linear, values=kind)
    values = layer.packed.to_quantized()
    layer.cuda()
    assert layer.packed.FORMAT == FORMAT
    x = torch.randn(3, 600).half()
    y = layer(x.cuda())
    testing.assert_spmm_close(
        y.cpu(), x, exact_weight(layer.packed).cpu(), layer.bias.detach().cpu()
    )
    layer.cpu()
    assert layer.packed.FORMAT == "row_bitmap"
    for found, expected in zip(layer.packed.to_quantized(), values, strict=True):
        assert torch.equal(found.float(), expected.float())
