"""Row bitmap: what only this format has: its bytes, and a kernel for each instruction set."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from formats import DTYPES, bits_of, blocks_of, each, from_bits, weights, write_row_bitmap
from hypothesis import given
from test_import import outputs_of

import flash_llm
from flash_llm import RowBitmap, _extension, testing

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "neon")
ROUTES = ("cpu_rows", "cpu_blocks")
# Around the 32 columns of a group, and the 64 bytes of a load.
AWKWARD_K = (1, 2, 31, 32, 33, 63, 64, 65, 95, 127, 129, 300, 1031, 4099)


@pytest.fixture(params=_extension.require().cpu_isas())
def isa(request, force_isa):
    """Force the kernels of an instruction set, one that this CPU has."""
    force_isa(request.param)
    assert _extension.require().cpu_isa() == request.param
    return request.param


def exact(x, weight, bias=None, activation=None):
    return testing.spmm_reference(x, weight, bias, activation).float().to(x.dtype)


def bits_at(m, k, columns, dtype):
    """A weight of small integers in these columns alone."""
    weight = torch.zeros(m, k, dtype=dtype)
    values = testing.small_integers(m, len(columns), dtype=dtype, seed=k)
    weight[:, columns] = values
    return weight


# ---- bytes ----


@each("sparsity", [0.0, 0.5, 0.97, 1.0])
@each(("m", "k"), [(1, 1), (3, 31), (4, 32), (5, 33), (130, 70), (200, 576)])
@each("dtype", DTYPES)
def test_bytes_are_as_described(m, k, sparsity, dtype):
    dense = testing.random_sparse(m, k, sparsity, dtype=dtype)
    blocks, written = blocks_of(RowBitmap.from_dense(dense)), write_row_bitmap(bits_of(dense))
    assert len(blocks) == len(written) == -(-m // 4)
    for block, expected in zip(blocks, written, strict=True):
        np.testing.assert_array_equal(block, expected)


@given(weights())
def test_property_bytes_are_as_described(weight):
    bits, dtype = weight
    blocks, written = (
        blocks_of(RowBitmap.from_dense(from_bits(bits, dtype))),
        write_row_bitmap(bits),
    )
    for block, expected in itertools.zip_longest(blocks, written, fillvalue=None):
        np.testing.assert_array_equal(block, expected)


@each("dtype", DTYPES)
def test_stats_count_what_a_dense_count_counts(dtype):
    dense = testing.random_sparse(301, 200, 0.6, dtype=dtype)
    dense[8:12] = 0
    stats = RowBitmap.from_dense(dense).stats()
    assert stats.nnz == int((dense != 0).sum()) and stats.dense_bytes == dense.nbytes
    assert stats.exact_bytes == 301 * 25 + 2 * stats.nnz
    assert stats.empty_blocks == 1
    rows = torch.nn.functional.pad(dense.float() != 0, (0, 0, 0, 3)).view(76, -1).sum(1)
    assert stats.block_bytes_max == int(-(-(4 + 16 * 7 + 2 * rows.max()) // 16) * 16)
    assert stats.packed_bytes == 64 + 77 * 4 + RowBitmap.from_dense(dense).payload.nbytes


def test_a_large_weight_is_as_large_as_its_bits_and_values():
    stats = RowBitmap.from_dense(testing.random_sparse(512, 4096, 0.5)).stats()
    assert stats.packed_bytes < 1.002 * stats.exact_bytes


# ---- every instruction set ----


def test_this_cpu_has_every_instruction_set():
    """Says which kernels the tests below could not run here."""
    missing = [isa for isa in ISAS if isa not in _extension.require().cpu_isas()]
    if missing:
        pytest.skip(f"this CPU has no {', '.join(missing)}")


@pytest.mark.parametrize("route", ROUTES)
@each("k", AWKWARD_K)
@each("dtype", DTYPES)
def test_small_integers_are_exact(k, route, isa, dtype):
    for m, sparsity in itertools.product((1, 2, 3, 4, 5, 67), (0.0, 0.5, 0.9)):
        weight = testing.small_integers(m, k, sparsity=sparsity, dtype=dtype, seed=m)
        w = RowBitmap.from_dense(weight)
        bias = testing.small_integers(m, dtype=dtype, seed=3)
        sizes = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 33) if m == 67 else (1, 5, 8)
        tokens = testing.small_integers(max(sizes), k, dtype=dtype, seed=1)
        expected = exact(tokens, weight, bias, "relu")
        for n in sizes:
            y = flash_llm.spmm(tokens[:n], w, bias, activation="relu", config=route)
            assert torch.equal(y, expected[:n]), (m, n, sparsity)


@each("sparsity", [0.0, 0.4, 0.9, 0.99, 1.0])
@each("pattern", testing.PATTERNS)
@each("dtype", DTYPES)
def test_results_stay_within_the_float64_bound(pattern, sparsity, isa, dtype):
    weight = testing.random_sparse(131, 1100, sparsity, pattern=pattern, dtype=dtype)
    w, bias = RowBitmap.from_dense(weight), torch.randn(131).to(dtype)
    for n, activation in itertools.product((1, 4, 7, 16), (None, "silu")):
        x = torch.randn(n, 1100).to(dtype)
        y = flash_llm.spmm(x, w, bias, activation=activation, config="cpu_rows")
        testing.assert_spmm_close(y, x, weight, bias, activation)


@each("k", [64, 70, 129])
@each("dtype", DTYPES)
def test_masks_of_one_bit_anywhere(k, isa, dtype):
    """The first and the last column of a group, and of the matrix, each on its own."""
    x = testing.small_integers(9, k, dtype=dtype)
    for column in range(k):
        weight = bits_at(6, k, [column], dtype)
        y = flash_llm.spmm(x, RowBitmap.from_dense(weight), config="cpu_rows")
        assert torch.equal(y, exact(x, weight)), column
        assert torch.equal(RowBitmap.from_dense(weight).to_dense(), weight), column


@each("dtype", DTYPES)
def test_full_and_empty_rows_next_to_each_other(isa, dtype):
    weight = testing.small_integers(64, 200, dtype=dtype)
    for period in (2, 3, 5, 8):
        mixed = weight.clone()
        mixed[::period] = 0
        mixed[(torch.arange(64) // 4) % period == 1] = 0
        for n in (1, 8):
            x = testing.small_integers(n, 200, dtype=dtype, seed=1)
            y = flash_llm.spmm(x, RowBitmap.from_dense(mixed), config="cpu_rows")
            assert torch.equal(y, exact(x, mixed)), (period, n)


@each("sparsity", [0.0, 0.3, 0.8, 1.0])
@each(("m", "k"), [(1, 1), (3, 31), (4, 32), (6, 33), (9, 200)])
@each("dtype", DTYPES)
def test_every_instruction_set_packs_the_same_bytes(m, k, sparsity, isa, dtype, force_isa):
    # Every pattern of 16 bits may come: subnormals, infinities, NaN, and both zeros among them.
    bits = torch.randint(-(2**15), 2**15, (m, k + 1), dtype=torch.int16)
    bits[torch.rand(m, k + 1) < sparsity] = 0
    bits[torch.rand(m, k + 1) < 0.1] = -(2**15)  # -0, which is not stored
    dense = bits.view(dtype)[:, 1:]  # rows apart, beginning anywhere
    force_isa("portable")
    expected = flash_llm.pack(dense, "row_bitmap")
    force_isa(isa)
    packed = flash_llm.pack(dense, "row_bitmap")
    assert packed.header == expected.header
    assert torch.equal(packed.offsets, expected.offsets)
    assert torch.equal(packed.payload, expected.payload)
    packed.validate()


@each("dtype", DTYPES)
def test_unpacking_keeps_every_bit(isa, dtype):
    rng = np.random.default_rng(0)
    for m, k, density in itertools.product((1, 4, 7, 66), (1, 31, 32, 33, 70, 161), (0.1, 1.0)):
        bits = rng.integers(1, 1 << 15, (m, k), dtype=np.uint16)
        bits[rng.random((m, k)) >= density] = 0
        np.testing.assert_array_equal(
            bits_of(RowBitmap.from_dense(from_bits(bits, dtype)).to_dense()), bits
        )


@each("dtype", DTYPES)
def test_infinity_and_nan_meet_absent_zeros(isa, dtype):
    """In x, in the weight, in a group that stores nothing and in a block that stores nothing."""
    weight = testing.small_integers(24, 150, sparsity=0.7, dtype=dtype)
    weight[:, 32:64], weight[8:12] = 0, 0
    weight[1, 70], weight[23, 149] = float("inf"), float("nan")
    x = testing.small_integers(9, 150, dtype=dtype, seed=1)
    x[0, 40], x[3, 149], x[5, 0], x[8, 32] = float("inf"), float("nan"), -float("inf"), float("nan")
    for n in (1, 4, 6, 9):
        y = flash_llm.spmm(x[:n], RowBitmap.from_dense(weight), config="cpu_rows")
        expected = torch.nn.functional.linear(x[:n].float(), weight.float())
        assert torch.equal(y.isnan(), expected.isnan())
        finite = ~expected.isnan()
        assert torch.equal(y[finite], expected[finite].to(dtype))


@each("k", [96, 2100])
@each("n", [1, 8])
@each("where", ["weight", "x", "product", "sum"])
def test_tiny_bf16_numbers_count(where, n, k, isa):
    """An instruction that flushes subnormals is used only where there can be none."""
    weight, x = torch.zeros(16, k), torch.zeros(n, k)
    if where == "weight":
        weight[3, 5], x[:, 5] = 2.0**-130, 2.0**100
    elif where == "x":
        weight[3, 5], x[:, 5] = 2.0**100, 2.0**-130
    elif where == "product":
        weight[3, 5], x[:, 5] = 2.0**-70, 2.0**-60
    else:  # of two neighbours, or of products of different steps
        weight[3, 4:6], x[:, 4:6] = torch.tensor([1.0, -1.0]), 2.0**-120
        x[:, 5] *= 1 + 2.0**-7
        weight[7, 4], weight[7, 70], x[:, 70] = 1.0, -1.0, 2.0**-120 * (1 + 2.0**-7)
    weight, x = weight.bfloat16(), x.bfloat16()
    expected = exact(x, weight)
    assert int((expected != 0).sum()) == (2 * n if where == "sum" else n)
    y = flash_llm.spmm(x, RowBitmap.from_dense(weight), config="cpu_rows")
    assert torch.equal(y, expected)


def test_a_tiny_number_in_one_block_changes_no_other(isa):
    weight = testing.random_sparse(64, 300, 0.5, dtype=torch.bfloat16)
    weight[20, 7] = 2.0**-130
    x = torch.randn(5, 300).bfloat16()
    y = flash_llm.spmm(x, RowBitmap.from_dense(weight), config="cpu_rows")
    testing.assert_spmm_close(y, x, weight)


@each("n", [6, 97, 130, 963])
@each("dtype", DTYPES)
def test_many_tokens_columns_and_blocks_at_once(n, isa, dtype):
    # More of each than a kernel takes in one go: 96 or 960 tokens, 1024 columns and 64 rows.
    weight = testing.small_integers(201, 2100, sparsity=0.5, dtype=dtype)
    weight[64:72] = 0
    x = testing.small_integers(n, 2100, dtype=dtype, seed=1)
    y = flash_llm.spmm(x, RowBitmap.from_dense(weight), config="cpu_rows")
    assert torch.equal(y, exact(x, weight))


@each("n", [1, 9, 100])
@each("dtype", DTYPES)
def test_thread_count_does_not_change_a_bit(n, isa, dtype):
    weight = testing.random_sparse(1003, 700, 0.5, dtype=dtype)
    w, x = RowBitmap.from_dense(weight), torch.randn(n, 700).to(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, dense = flash_llm.spmm(x, w, config="cpu_rows"), w.to_dense()
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(flash_llm.spmm(x, w, config="cpu_rows"), one), count
            assert torch.equal(w.to_dense(), dense), count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(dense, weight)


@each("dtype", DTYPES)
def test_malformed_weights_stay_within_their_memory(isa, dtype):
    """Masks that promise more values than the payload has, at its very end."""
    for k, step in ((200, 4), (2100, 404)):
        weight = testing.random_sparse(37, k, 0.8, dtype=dtype)
        w = RowBitmap.from_dense(weight)
        for n in (1, 3, 8, 100):
            x = torch.randn(n, k).to(dtype)
            for count in range(0, w.payload.numel() - 1, step if n < 100 else 10 * step):
                payload = w.payload.clone()
                payload[count:] = -1
                broken = RowBitmap(w.header, w.offsets, payload)
                for route in ROUTES:
                    assert flash_llm.spmm(x, broken, config=route).shape == (n, 37)
    with pytest.raises(ValueError, match="flash_llm::validate"):
        broken.validate()


# ---- choosing one ----


@each("dtype", DTYPES)
def test_results_of_all_instruction_sets_agree(force_isa, dtype):
    weight = testing.random_sparse(300, 500, 0.5, dtype=dtype)
    w, x = RowBitmap.from_dense(weight), torch.randn(5, 500).to(dtype)
    for name in _extension.require().cpu_isas():
        force_isa(name)
        testing.assert_spmm_close(flash_llm.spmm(x, w), x, weight)


def test_the_best_is_taken_unless_one_is_forced(force_isa):
    extension = _extension.require()
    isas = extension.cpu_isas()
    assert isas[0] == "portable" and isas == [name for name in ISAS if name in isas]
    if "FLASH_LLM_CPU_ISA" not in os.environ:
        # Intel's BF16 is slower than its fp32 (cpu_isa.cpp).
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
        best = [isa for isa in isas if not (intel and isa == "avx512_bf16")][-1]
        assert extension.cpu_isa() == best
    default = extension.cpu_isa()
    force_isa("portable")
    assert extension.cpu_isa() == "portable"
    force_isa("")
    assert extension.cpu_isa() == default


def test_a_name_that_cannot_be_forced_changes_nothing(force_isa):
    force_isa("portable")
    known = ".*".join([*ISAS, "sse9"])
    with pytest.raises(ValueError, match=f"flash_llm::set_cpu_isa: name .*{known}"):
        force_isa("sse9")
    for name in set(ISAS) - set(_extension.require().cpu_isas()):
        with pytest.raises(NotImplementedError, match=f"flash_llm::set_cpu_isa: name={name} "):
            force_isa(name)
    assert _extension.require().cpu_isa() == "portable"


ENVIRONMENT = """
import os
os.environ["FLASH_LLM_CPU_ISA"] = {name!r}
import torch, flash_llm
os.environ["FLASH_LLM_CPU_ISA"] = "read too late"
w = flash_llm.pack(torch.eye(8).half(), "row_bitmap")
for call in (lambda: flash_llm.spmm(torch.ones(1, 8).half(), w), w.to_dense):
    try:
        call()
        print(flash_llm._extension.require().cpu_isa())
    except (ValueError, NotImplementedError) as error:
        print(type(error).__name__, error)
"""


def test_the_environment_is_read_when_the_library_is_loaded():
    said, _ = outputs_of(ENVIRONMENT.format(name=name) for name in ("portable", "sse9"))
    known, unknown = (text.splitlines() for text in said)
    assert known == ["portable"] * 2
    for line, op in zip(unknown, ("spmm", "unpack"), strict=True):
        assert line.startswith(f"ValueError flash_llm::{op}: FLASH_LLM_CPU_ISA ")
        assert '"sse9"' in line
