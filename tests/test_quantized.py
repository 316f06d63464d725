"""Quantised values: their bytes, rounding, products, and the layers and files that hold them."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from formats import (
    DTYPES,
    QUANTIZED_FORMATS,
    each,
    read_quantized_row_bitmap,
    write_quantized_row_bitmap,
)

import flash_llm
from flash_llm import (
    PackedWeight,
    QuantizedBitmap,
    RowBitmap,
    SparseLinear,
    _extension,
    bench,
    ops,
    quantize,
    testing,
)

TINY = torch.finfo(torch.float32).tiny
KINDS = ops.STORED_VALUES[1:]


@pytest.fixture(params=_extension.require().cpu_isas())
def isa(request, force_isa):
    """Force the kernels of an instruction set, one that this CPU has."""
    force_isa(request.param)
    return request.param


def random_values(m, k, sparsity=0.5, seed=0, kind="int8"):
    """Values and scales; every row, or group of columns of a row, has a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "fp8_e4m3":
        steps = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        steps = steps[steps.isfinite()]
        values = steps[torch.randint(len(steps), (m, k), generator=generator)] + 0.0
    else:
        largest = {"int8": 127, "int4": 7}[kind]
        values = torch.randint(-largest, largest + 1, (m, k), generator=generator)
    values[torch.rand(m, k, generator=generator) < sparsity] = 0
    values = values.to(torch.float8_e4m3fn if kind == "fp8_e4m3" else torch.int8)
    scales = 2.0 ** torch.randn(quantize.scales_shape(m, k, kind), generator=generator)
    return values, scales.half().float() if kind == "int4" else scales


def random_int8(m, k, sparsity=0.5, seed=0):
    return random_values(m, k, sparsity, seed)


def small_steps(integers, kind):
    """Values that stand for small integers, and scales that differ by powers of 2.

    Returns:
        Values, scales, and the weight as float32.
    """
    m, k = integers.shape
    shape = quantize.scales_shape(m, k, kind)
    factors = 2.0 ** torch.arange(m * shape[-1] if len(shape) > 1 else m).remainder(3)
    scales = factors.reshape(shape) / (2 if kind == "int4" else 4)
    steps = integers.float() * (2 if kind == "int4" else 4)
    dtype = torch.float8_e4m3fn if kind == "fp8_e4m3" else torch.int8
    weight = steps * quantize.scales_of_elements(scales, k)
    return (steps + 0.0).to(dtype), scales, weight


def raw(values):
    """A tensor in a dtype that torch can compare and numpy knows: fp8 as bytes."""
    return values.cpu().view(torch.uint8 if values.dtype == torch.float8_e4m3fn else values.dtype)


def assert_same_values(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(raw(one), raw(other))


def exact_weight(w):
    """The elements of a quantised weight without any rounding, as float64."""
    values, scales = w.to_quantized()
    return values.double() * quantize.scales_of_elements(scales, w.shape[1]).double()


# ---- rounding ----


@each("dtype", (*DTYPES, torch.float32))
def test_rows_are_rounded_to_nearest_with_their_largest_at_127(dtype):
    weight = testing.random_sparse(300, 200, 0.5, dtype=torch.float32).to(dtype)
    weight[7] = 0
    values, scales = quantize.round_to_int8(weight)
    exact, scale = weight.double(), scales.double()[:, None]
    assert values.dtype == torch.int8 and scales.dtype == torch.float32
    assert bool((values.abs().amax(1)[scales != 1] == 127).all()) and int(values.min()) >= -127
    assert scales[7] == 1 and not values[7].any()
    assert bool(((values.double() * scale - exact).abs() <= 0.5001 * scale).all())


def test_ties_are_rounded_to_even_and_tiny_rows_keep_a_normal_scale():
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5], [2.0**-133, 0, 0, 0]]).bfloat16()
    values, scales = quantize.round_to_int8(weight)
    assert values.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    assert scales.tolist() == [1.0, TINY]


@each("values", KINDS)
@each("dtype", DTYPES)
def test_values_and_scales_are_those_of_the_grid(values, dtype):
    weight = testing.random_sparse(70, 333, 0.4, dtype=dtype)
    weight[3, :128], weight[5] = 0, 0
    steps, scales = quantize.round_to_values(weight, values)
    assert scales.shape == quantize.scales_shape(70, 333, values)
    assert scales.dtype == torch.float32 and bool((scales[5] == 1).all())
    rounded = quantize.dequantize(steps, scales, dtype)
    assert torch.equal(rounded, quantize.round_to_grid(weight, values))
    # So a model that was pruned onto the grid is packed without a second rounding.
    assert_same_values(quantize.round_to_values(rounded, values), (steps, scales))


def test_a_group_of_tiny_int4_weights_keeps_a_normal_scale():
    tiny = torch.finfo(torch.float16).tiny
    values, scales = quantize.round_to_values(torch.tensor([[tiny, -2.6 * tiny, 1e-7]]), "int4")
    assert scales.tolist() == [[tiny]] and values.tolist() == [[1, -3, 0]]


@each("values", KINDS)
def test_parts_of_a_large_weight_are_rounded_alike(values, monkeypatch):
    weight = testing.random_sparse(67, 150, 0.3, dtype=torch.bfloat16)
    whole = quantize.round_to_values(weight, values)
    monkeypatch.setattr(quantize, "_PART_ELEMENTS", 400)
    assert_same_values(quantize.round_to_values(weight, values), whole)


@each("number", [float("nan"), float("inf"), -float("inf")])
@each("dtype", DTYPES)
@each("values", KINDS)
def test_a_row_that_is_not_finite_is_named(number, dtype, values):
    weight = torch.ones(9, 140, dtype=dtype)
    weight[6, 139] = number
    with pytest.raises(ValueError, match=f"row 6 .*{values}"):
        flash_llm.pack(weight, values=values)


def test_a_weight_whose_float16_scale_is_infinite_is_refused():
    weight = torch.ones(3, 8).bfloat16()
    weight[1, 2] = 1e6
    with pytest.raises(ValueError, match="row 1 .*int4"):
        flash_llm.pack(weight, values="int4")
    assert flash_llm.pack(weight, values="fp8_e4m3").nnz == 17  # 1 rounds to 0 beside 1e6


def test_elements_that_float32_cannot_hold_are_not_finite():
    with pytest.raises(ValueError, match="row 1 "):
        quantize.round_to_int8(torch.tensor([[1.0], [1e300]], dtype=torch.float64))


@each("part", [(512, 300), (128, 300), (256, 300), (300, 300), (301, 300), (44, 44)])
def test_parts_of_columns_that_cut_no_group(part):
    for values in KINDS:
        quantize.check_parts(values, part[1], part[0])


def test_parts_of_columns_that_cut_groups_are_refused():
    quantize.check_parts("int8", 300, 150)
    with pytest.raises(ValueError, match="150 .*300 .*128 .*int4"):
        quantize.check_parts("int4", 300, 150)


# ---- bytes ----


@each("sparsity", [0.0, 0.5, 0.97, 1.0])
@each(("m", "k"), [(0, 7), (7, 0), (1, 1), (3, 31), (4, 32), (5, 33), (130, 70), (200, 576)])
@each("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_as_described(m, k, sparsity, dtype, kind):
    values, scales = random_values(m, k, sparsity, kind=kind)
    w = ops.pack_quantized(values, scales, dtype, "row_bitmap")
    w.validate()
    written = write_quantized_row_bitmap(raw(values).numpy(), scales.numpy(), kind)
    np.testing.assert_array_equal(w.payload.numpy().view(np.uint8), np.concatenate([*written, []]))
    found, expected = w.to_quantized(), read_quantized_row_bitmap(w)
    np.testing.assert_array_equal(raw(found[0]).numpy(), expected[0])
    np.testing.assert_array_equal(found[1].numpy().reshape(expected[1].shape), expected[1])
    assert_same_values(found[:1], [values])
    assert w.nnz == int(values.float().count_nonzero())
    assert w.values == kind and w.dtype == dtype and w.to_dense().dtype == dtype
    assert torch.equal(w.to_dense(), quantize.dequantize(*found, dtype))


@each("dtype", DTYPES)
@each("kind", KINDS)
def test_packing_rounds_and_unpacking_gives_the_products(dtype, kind, isa):
    weight = testing.random_sparse(301, 200, 0.6, dtype=dtype)
    weight[8:12] = 0
    values, scales = quantize.round_to_values(weight, kind)
    for w in (
        flash_llm.pack(weight, values=kind),
        flash_llm.pack(weight.t().contiguous().t(), "row_bitmap", values=kind),
    ):
        assert_same_values(w.to_quantized(), (values, scales))
        assert torch.equal(w.to_dense(), quantize.dequantize(values, scales, dtype))
        assert w.stats().exact_bytes == 301 * 25 + w.nnz * w.header.value_bits // 8
    large = flash_llm.pack(testing.random_sparse(512, 4096, 0.5), values=kind)
    # int4: scales are 2 bytes for 128 elements, and half of the rows of a group end in half a byte.
    factor = 1.09 if kind == "int4" else 1.006
    assert large.stats().packed_bytes < factor * large.stats().exact_bytes


def test_negative_zeros_of_fp8_are_dropped():
    values = torch.tensor([[-0.0, 1.0], [0.0, -0.0]]).to(torch.float8_e4m3fn)
    for format in QUANTIZED_FORMATS:
        w = ops.pack_quantized(values, torch.full((2,), 3.0), torch.float16, format)
        w.validate()
        assert w.nnz == 1 and w.to_quantized()[1].tolist() == [3.0, 1.0]
        assert raw(w.to_quantized()[0]).tolist() == [[0, 0x38], [0, 0]]


def test_pruning_chooses_the_elements_that_are_quantised():
    weight = testing.random_sparse(64, 100, 0.0)
    for scope, sparsity in (("row", 0.7), ("2:4", None)):
        pruned = flash_llm.prune_pack(weight, sparsity, scope=scope).to_dense()
        for kind in KINDS:
            w = flash_llm.prune_pack(weight, sparsity, scope=scope, values=kind)
            assert_same_values(w.to_quantized(), quantize.round_to_values(pruned, kind))


@each("kind", KINDS)
def test_classes_of_formats_pack_quantised_values(kind):
    weight = testing.random_sparse(37, 300, 0.5)
    for format in QUANTIZED_FORMATS:
        cls = PackedWeight.class_for(format)
        w = cls.from_dense(weight, values=kind)
        assert type(w) is cls
        assert_same_values(w.to_quantized(), quantize.round_to_values(weight, kind))
        assert type(ops.repack(w)) is RowBitmap
        cls.empty(37, 300, values=kind).validate()
    with pytest.raises(TypeError, match="flash_llm::pack: .*quantized_bitmap.* 16-bit"):
        QuantizedBitmap.from_dense(weight)


@each(
    ("rows", "columns"),
    [
        ((0, 8), (0, 170)),
        ((4, 37), (0, 170)),
        ((3, 9), (0, 170)),
        ((0, 37), (5, 140)),
        ((1, 37), (128, 150)),
        ((2, 2), (0, 0)),
        ((0, 37), (150, 150)),
    ],
)
@each("kind", KINDS)
def test_slices_and_concatenations_keep_values_and_scales(rows, columns, kind):
    values, scales = random_values(37, 170, 0.6, kind=kind)
    for part in (values[16:20], values[1, 5:140]):
        raw(part).zero_()
    w = ops.pack_quantized(values, scales, torch.bfloat16)
    slices = slice(*rows), slice(*columns)
    if kind == "int4" and columns == (5, 140):
        with pytest.raises(ValueError, match="flash_llm::slice: .*int4.* 128,.* 5"):
            w.slice(*slices)
        return
    part = w.slice(*slices)
    part.validate()
    if kind == "int4":
        first, count = columns[0] // 128, -(-(columns[1] - columns[0]) // 128)
        scales = scales[:, first : first + count]
    expected = ops.pack_quantized(values[slices], scales[slices[0]], torch.bfloat16)
    assert part.header == expected.header and torch.equal(part.payload, expected.payload)
    assert torch.equal(part.offsets, expected.offsets)
    for border in (8, 13):
        parts = [w.slice(slice(0, border)), w.slice(slice(border, 37))]
        joined = PackedWeight.concat(parts)
        assert joined.header == w.header and torch.equal(joined.payload, w.payload)


# ---- products ----


@each("k", [1, 31, 32, 33, 64, 129, 1031])
@each("dtype", DTYPES)
@each("kind", KINDS)
def test_small_integers_are_exact_on_every_route(k, isa, dtype, kind):
    for m, sparsity in itertools.product((1, 3, 4, 67), (0.0, 0.5, 0.9)):
        integers = testing.small_integers(m, k, sparsity=sparsity, dtype=dtype, seed=m)
        values, scales, weight = small_steps(integers, kind)
        w, weight = ops.pack_quantized(values, scales, dtype), weight.to(dtype)
        assert torch.equal(w.to_dense(), weight)
        x = testing.small_integers(9, k, dtype=dtype, seed=1)
        bias = testing.small_integers(m, dtype=dtype, seed=3)
        expected = testing.spmm_reference(x, weight, bias, "relu").float().to(dtype)
        for n, route in itertools.product(
            (1, 2, 3, 9), ("auto", "cpu_rows", "cpu_blocks", "dense", "cpu_reference")
        ):
            y = flash_llm.spmm(x[:n], w, bias, activation="relu", config=route)
            assert torch.equal(y, expected[:n]), (m, n, sparsity, route)


@each("sparsity", [0.0, 0.4, 0.9, 1.0])
@each("dtype", DTYPES)
@each("kind", KINDS)
def test_results_stay_within_the_float64_bound(sparsity, isa, dtype, kind):
    weight = testing.random_sparse(131, 1100, sparsity, dtype=dtype)
    w, bias = flash_llm.pack(weight, values=kind), torch.randn(131).to(dtype)
    for n, activation in itertools.product((1, 4, 7, 16), (None, "silu")):
        x = torch.randn(n, 1100).to(dtype)
        y = flash_llm.spmm(x, w, bias, activation=activation, config="cpu_rows")
        testing.assert_spmm_close(y, x, exact_weight(w), bias, activation)
        y = flash_llm.spmm(x, w, bias, activation=activation, config="cpu_blocks")
        testing.assert_spmm_close(y, x, w.to_dense(), bias, activation, rounds_sum=True)


def int8_tokens(x):
    """The steps and scales of tokens, by the rule of `spmm`."""
    largest = x.float().abs().amax(1, keepdim=True).clamp(min=2.0**-100)
    inverse = torch.full_like(largest, 127) / largest  # torch has another result for 127 / largest
    return (x.double() * inverse.double()).round(), largest / 127  # the product is exact


@each("k", [1, 31, 32, 33, 64, 129, 1031])
@each("dtype", DTYPES)
def test_quantised_tokens_give_exact_sums(k, isa, dtype):
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(19, k, generator=generator).to(dtype)
    x[1], x[2] = 0, x[2] * 2.0**-12
    x[3], x[3, 0] = torch.arange(k).remainder(9) - 4.5, 127  # ties
    x[4] *= 2.0**-110 if dtype == torch.bfloat16 else 2.0**-20
    x[5, k // 2], x[7, 0] = float("inf"), float("nan")
    steps, token_scales = int8_tokens(x)
    for m, sparsity in itertools.product((1, 3, 4, 67), (0.0, 0.5, 0.95, 1.0)):
        values, scales = random_int8(m, k, sparsity, seed=m)
        w = ops.pack_quantized(values, scales, dtype)
        bias = torch.randn(m, generator=generator).to(dtype)
        sums = (steps @ values.double().t()).float() * token_scales
        expected = testing.activate(sums * scales + bias.float(), "relu").to(dtype)
        for n in (1, 2, 3, 4, 7, 8, 9, 17, 19):
            y = flash_llm.spmm(x[:n], w, bias, activation="relu", config="cpu_rows_int8x")
            assert torch.equal(y.isnan(), expected[:n].isnan()), (m, n, sparsity)
            assert torch.equal(y.nan_to_num(9), expected[:n].nan_to_num(9)), (m, n, sparsity)


def test_which_kernel_quantises_x(isa):
    w = ops.pack_quantized(*random_int8(40, 64), torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(
        flash_llm.spmm(x, w, x_quantization="dynamic"),
        flash_llm.spmm(x, w, config="cpu_rows_int8x"),
    )
    facts = {"value_type": "int8_bfloat16", "format": "row_bitmap"}
    for asked, n, k, chosen in (
        ("dynamic", 1, 64, "cpu_rows_int8x"),
        ("dynamic", 1, 133145, "cpu_rows"),
        (None, 1, 64, "cpu_rows"),
    ):
        plan = flash_llm.explain_plan(64, n, k, 64, x_quantization=asked, **facts)
        assert plan.startswith(f"{chosen} ")
    with pytest.raises(ValueError, match="cpu_rows_int8x.* 133144, got 133145"):
        flash_llm.explain_plan(64, 1, 133145, 64, **{**facts, "config": "cpu_rows_int8x"})
    dense = flash_llm.pack(testing.random_sparse(40, 64, 0.5), "row_bitmap")
    with pytest.raises(ValueError, match="config must be"):
        flash_llm.spmm(x.half(), dense, config="cpu_rows_int8x")
    assert torch.equal(
        flash_llm.spmm(x.half(), dense, x_quantization="dynamic"), flash_llm.spmm(x.half(), dense)
    )


@each("dtype", DTYPES)
@each("kind", KINDS)
def test_infinity_and_nan_in_x_meet_absent_zeros(isa, dtype, kind):
    values, scales = random_values(24, 150, 0.7, kind=kind)
    for part in (values[:, 32:64], values[8:12]):
        raw(part).zero_()
    scales /= 128
    w = ops.pack_quantized(values, scales, dtype)
    x = torch.ones(3, 150, dtype=dtype)
    x[0, 40], x[2, 149] = float("inf"), float("nan")
    y = flash_llm.spmm(x, w, config="cpu_rows")
    expected = x.double() @ exact_weight(w).t()
    assert torch.equal(y.isnan(), expected.isnan()) and bool(y[1].isfinite().all())


@each("kind", KINDS)
def test_malformed_weights_stay_within_their_memory(isa, kind):
    values, scales = random_values(37, 200, 0.8, kind=kind)
    w = ops.pack_quantized(values, scales, torch.float16)
    x = torch.randn(3, 200).half()
    for count in range(5, w.payload.numel() - 1, 4):
        payload = w.payload.clone()
        payload[count:] = -1
        broken = RowBitmap(w.header, w.offsets, payload)
        for route in ("cpu_rows", *["cpu_rows_int8x"] * (kind == "int8"), "cpu_blocks"):
            assert flash_llm.spmm(x, broken, config=route).shape == (3, 37)
        assert broken.to_quantized()[0].shape == (37, 200)
    with pytest.raises(ValueError, match="flash_llm::validate"):
        broken.validate()


@each("dtype", DTYPES)
@each("kind", KINDS)
def test_gradients_and_compiled_calls_are_those_of_the_unpacked_weight(dtype, kind):
    w = flash_llm.pack(testing.random_sparse(60, 90, 0.5, dtype=dtype), values=kind)
    x = torch.randn(5, 90).to(dtype).requires_grad_()
    y = flash_llm.spmm(x, w, activation="relu")
    y.sum().backward()
    expected = (y > 0).to(dtype) @ w.to_dense()
    assert torch.equal(x.grad, expected)
    compiled = torch.compile(lambda x: flash_llm.spmm(x, w), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), flash_llm.spmm(x, w))


@each("kind", KINDS)
def test_opcheck(kind):
    # torch cannot multiply fp8 numbers, which the other checks do with arguments and results.
    checks = {} if kind != "fp8_e4m3" else {"test_utils": "test_faketensor"}
    values, scales = random_values(30, 150, kind=kind)
    op = torch.ops.flash_llm.pack_quantized.default
    torch.library.opcheck(op, (values, scales, torch.float16, "row_bitmap"), **checks)
    w = ops.pack_quantized(values, scales, torch.bfloat16)
    parts = (list(w.header), w.offsets, w.payload)
    torch.library.opcheck(torch.ops.flash_llm.unpack_quantized.default, parts, **checks)
    torch.library.opcheck(torch.ops.flash_llm.unpack.default, parts)
    x = torch.ones(2, 150).bfloat16()
    torch.library.opcheck(torch.ops.flash_llm.spmm.default, (x, *parts))


# ---- bad input ----


@each(
    ("values", "scales", "dtype", "format", "error", "match"),
    [
        ([[-128, 1]], [1.0], torch.float16, "auto", ValueError, "values .*-128"),
        ([[1, 1]], [0.0], torch.float16, "auto", ValueError, r"scales\[0\] = 0"),
        ([[1, 1]], [-1.0], torch.float16, "auto", ValueError, r"scales\[0\] = -1"),
        ([[1, 1]], [float("nan")], torch.float16, "auto", ValueError, r"scales\[0\] = nan"),
        ([[1, 1]], [float("inf")], torch.float16, "auto", ValueError, r"scales\[0\] = inf"),
        ([[1, 1]], [TINY / 2], torch.float16, "auto", ValueError, r"scales\[0\]"),
        ([[1, 1]], [1.0, 1.0], torch.float16, "auto", ValueError, r"scales .*\[M=1\]"),
        ([1, 1], [1.0, 1.0], torch.float16, "auto", ValueError, "values .*dimension"),
        ([[1, 1]], [1.0], torch.float32, "auto", TypeError, "dtype .*Float"),
        ([[1, 1]], [1.0], None, "auto", TypeError, "dtype .*NoneType"),
        ([[9, 1], [-66, 1]], [1e3, 1e3], torch.float16, "auto", ValueError, "row 1 .*66 .*1000"),
        ([[1, 1]], [1.0], torch.float16, "bitmap", TypeError, '"bitmap" .*int8'),
        ([[1, 1]], [1.0], torch.float16, "tiled_csl", TypeError, '"tiled_csl" .*int8'),
        ([[1, 1]], [1.0], torch.float16, "csr", ValueError, "format .*csr"),
    ],
)
def test_values_and_scales_that_cannot_be_packed(values, scales, dtype, format, error, match):
    values, scales = torch.tensor(values, dtype=torch.int8), torch.tensor(scales)
    with pytest.raises(error, match=match):
        ops.pack_quantized(values, scales, dtype, format)


@each(
    ("values", "scales", "match"),
    [
        ([[-8, 1]], [[1.0]], "values .*-7 ... 7, got -8"),
        ([[1, 8]], [[1.0]], "values .*-7 ... 7, got 8"),
        ([[1, 1]], [[2.0**-15]], r"scales .*float16.*scales\[0, 0\] = 3"),
        ([[1, 1]], [[1.0002]], r"scales .*float16.*scales\[0, 0\] = 1.0002"),
        ([[1, 1]], [[65536.0]], r"scales .*float16.*scales\[0, 0\] = 65536"),
        ([[1] * 130] * 2, [[1.0, 1.0], [1.0, float("nan")]], r"scales\[1, 1\] = nan"),
        ([[1] * 130], [[1.0]], r"scales .*\[M=1, .*=2\].*\[1, 1\]"),
        ([[1] * 129 + [-7]], [[1.0, 9600.0]], "row 0 .*Half, got a value of -7 .*9600"),
    ],
)
def test_int4_values_and_scales_that_cannot_be_packed(values, scales, match):
    values, scales = torch.tensor(values, dtype=torch.int8), torch.tensor(scales)
    with pytest.raises(ValueError, match=match):
        ops.pack_quantized(values, scales, torch.float16)


def test_a_large_scale_of_small_int4_values_is_no_overflow():
    values = torch.tensor([[6, 0, -1]], dtype=torch.int8)
    w = ops.pack_quantized(values, torch.tensor([[9600.0]]), torch.float16)
    assert w.to_dense().tolist() == [[57600.0, 0.0, -9600.0]]


@each(
    ("values", "scales", "match"),
    [
        ([[1.0, float("nan")]], [1.0], "values .*NaN"),
        ([[1.0, 1.0]], [0.0], r"scales\[0\] = 0"),
        ([[1.0, 1.0]], [[1.0]], r"scales .*\[M=1\]"),
        ([[1.0, -448.0]], [200.0], "row 0 .*Half, got a value of -448 .*200"),
    ],
)
def test_fp8_values_and_scales_that_cannot_be_packed(values, scales, match):
    values = torch.tensor(values).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=match):
        ops.pack_quantized(values, torch.tensor(scales), torch.float16)


def test_dtypes_and_names_that_are_wrong():
    values, scales = random_int8(4, 8)
    with pytest.raises(TypeError, match="values .*int8"):
        ops.pack_quantized(values.int(), scales, torch.float16)
    with pytest.raises(TypeError, match="scales .*float32"):
        ops.pack_quantized(values, scales.half(), torch.float16)
    with pytest.raises(ValueError, match='values .*"int5"'):
        flash_llm.pack(torch.ones(4, 8).half(), values="int5")
    with pytest.raises(TypeError, match="not quantised"):
        flash_llm.pack(torch.ones(4, 8).half()).to_quantized()
    with pytest.raises(TypeError, match='"bitmap" .*int8'):
        SparseLinear(8, 4, format="bitmap", values="int8")
    weight = torch.ones(4, 8).half()
    with pytest.raises(TypeError, match='flash_llm::pack: .*"bitmap" .*int8.*"row_bitmap"'):
        flash_llm.pack(weight, "bitmap", values="int8")
    with pytest.raises(TypeError, match='flash_llm::prune_pack: .*"bitmap" .*int8'):
        flash_llm.prune_pack(weight, 0.5, format="bitmap", values="int8")
    mixed = [
        flash_llm.pack(torch.ones(4, 8).half(), "row_bitmap", values=v) for v in ops.STORED_VALUES
    ]
    with pytest.raises(TypeError, match="weight 1 .*int8_float16"):
        PackedWeight.concat(mixed)
    w = mixed[1]
    with pytest.raises(TypeError, match="x must be"):
        flash_llm.spmm(torch.ones(1, 8).bfloat16(), w)


# ---- layers and files ----


def small_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    layers = torch.nn.Linear(96, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32, bias=False)
    return torch.nn.Sequential(*layers).to(dtype)


@each("kind", KINDS)
def test_a_layer_keeps_its_values_through_casts_copies_and_state_dicts(kind):
    layer = SparseLinear.from_linear(small_model()[0], sparsity=0.5, values=kind)
    values, scales = layer.packed.to_quantized()
    assert layer.values == kind and kind in repr(layer)
    cast = SparseLinear.from_packed(layer.packed, layer.bias).half()
    assert cast.dtype == torch.float16 and cast.values == kind
    assert_same_values(cast.packed.to_quantized(), (values, scales))
    x = torch.randn(3, 96).half()
    testing.assert_spmm_close(cast(x), x, exact_weight(layer.packed), cast.bias.detach())
    largest = torch.full_like(scales, 65504 if kind == "int4" else 1e7)
    large = SparseLinear.from_packed(ops.pack_quantized(values, largest, torch.bfloat16))
    with pytest.raises(ValueError, match="row 0 .*Half"):
        large.half()
    assert large.dtype == torch.bfloat16
    empty = SparseLinear(96, 64, dtype=torch.bfloat16, values=kind)
    assert empty.values == kind and not empty.weight.any()
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.weight_payload, layer.weight_payload)
    dense = layer.to_linear()
    assert torch.equal(dense.weight, quantize.dequantize(values, scales, torch.bfloat16))
    empty.load_state_dict(dense.state_dict())  # packs a dense weight with these values again
    assert empty.values == kind and torch.equal(empty.weight, dense.weight)
    assert_same_values(empty.packed.to_quantized(), (values, scales))
    empty.weight = torch.eye(64, 96).bfloat16()
    assert empty.values == kind and torch.equal(empty.weight.round(), torch.eye(64, 96).bfloat16())
    empty.reset_parameters()
    assert empty.values == kind and not empty.weight.any()


@each("format", QUANTIZED_FORMATS)
@each("kind", KINDS)
def test_models_are_sparsified_saved_and_loaded(kind, format, tmp_path):
    model = small_model()
    report = flash_llm.sparsify_(model, sparsity=0.5, values=kind, format=format)
    assert [row.values for row in report.rows] == [kind, kind]
    assert f"{format} {kind}" in str(report) and f"{format} {kind}" in report.summary()
    flash_llm.save(model, tmp_path)
    found = flash_llm.inspect_checkpoint(tmp_path).rows
    assert [(row.format, row.values) for row in found] == [(format, kind)] * 2
    assert [row.packed_bytes for row in found] == [row.packed_bytes for row in report.rows]
    again = flash_llm.load(small_model(), tmp_path)
    assert again[0].values == kind and again[0].packed.FORMAT == "row_bitmap"
    for name in ("0", "2"):
        assert_same_values(
            again.get_submodule(name).packed.to_quantized(),
            model.get_submodule(name).packed.to_quantized(),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_converted_and_inspected(kind, tmp_path):
    from test_cli import invoke

    model = small_model()
    for layer in (model[0], model[2]):
        layer.weight.data *= torch.rand_like(layer.weight) < 0.5
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    flash_llm.save(model, dense)
    run = invoke("convert", dense, packed, "--values", kind, "--json")
    assert [row["values"] for row in json.loads(run.stdout)["rows"]] == [kind, kind]
    rows = flash_llm.inspect_checkpoint(packed).rows
    assert [(row.decision, row.values) for row in rows] == [("packed", kind)] * 2
    loaded = flash_llm.load(small_model(), packed)
    expected = flash_llm.pack(model[0].weight.detach(), values=kind)
    assert torch.equal(loaded[0].weight_payload, expected.payload)
    flash_llm.verify_checkpoint(packed, dense)
    with pytest.raises(TypeError, match=f'convert_checkpoint: .*"bitmap" .*{kind}'):
        flash_llm.convert_checkpoint(dense, tmp_path / "no", format="bitmap", values=kind)
    assert not list(tmp_path.glob("no*"))


def test_layers_without_zeros_are_packed_because_int8_values_shrink_them(tmp_path):
    model = small_model()
    flash_llm.save(model, tmp_path / "dense")
    report = flash_llm.sparsify_(model, values="int8")
    assert [row.decision for row in report.rows] == ["packed", "packed"]
    rows = flash_llm.convert_checkpoint(
        tmp_path / "dense", tmp_path / "packed", values="int8", ignore="2"
    ).rows
    assert [(row.name, row.values) for row in rows] == [("0", "int8")]


def test_packed_layers_are_timed_with_their_values(tmp_path, quick):
    model = small_model()
    flash_llm.sparsify_(model, values="int8")
    flash_llm.save(model, tmp_path)
    report = bench.bench_checkpoint(tmp_path, tokens=[1])
    assert {shape.values for shape in report.shapes} == {"int8"}
    assert report.shapes[0].packed_bytes == model[0].packed.nbytes
    assert "row_bitmap int8" in str(report)


def test_a_model_or_checkpoint_with_a_weight_that_cannot_be_quantised_names_it(tmp_path):
    model = small_model()
    model[2].weight.data[5, 5] = float("nan")
    with pytest.raises(ValueError, match="flash_llm.sparsify_: 2: .*row 5"):
        flash_llm.sparsify_(model, values="int8")
    assert type(model[0]) is torch.nn.Linear
    flash_llm.save(model, tmp_path / "dense")
    with pytest.raises(ValueError, match="2: .*row 5"):
        flash_llm.convert_checkpoint(tmp_path / "dense", tmp_path / "packed", values="int8")


@each("kind", KINDS)
def test_damaged_scales_of_a_stored_layer_are_found_when_it_is_loaded(kind):
    w = flash_llm.pack(testing.random_sparse(8, 64, 0.5), values=kind)
    payload = w.payload.clone()
    payload[1] = 0  # the scale of the first row
    with pytest.raises(ValueError, match="block 0: row 0.*: .*scale"):
        PackedWeight.from_tensors(w.header, w.offsets, payload)
    dataclasses.replace(w, payload=w.payload.clone()).validate()
