"""SpMM against two oracles: exact small integers, and float64 within a stated bound."""

import functools
import inspect
import itertools

import pytest
import pytest_timeout
import torch
import torch.nn.functional as F
from formats import DTYPES, each, every_plan

import flash_llm
from flash_llm import PackedWeight, testing
from flash_llm.ops import ACTIVATIONS

SIZES = (0, 1, 8, 63, 65, 129, 576)
AWKWARD_N = (0, 1, 7, 9, 65)


def test_each_runs_every_combination_and_names_those_that_fail():
    seen = []

    @each("m", [1, 2])
    @each(("n", "k"), [(3, 4), (5, 6)])
    def body(m, n, k, case):
        seen.append((m, n, k, case, torch.initial_seed()))
        torch.manual_seed(1)
        assert (m, n) != (2, 5)
        if n == 3 and m == 2:
            pytest.fail("as pytest.raises does")

    with pytest.raises(AssertionError) as caught:
        body(case="here")
    assert seen == [(m, n, k, "here", 0) for m in (1, 2) for n, k in ((3, 4), (5, 6))]
    _, *failed = str(caught.value).split("\nm=")
    assert [text[:8] for text in failed] == ["2, n=3, ", "2, n=5, "]
    assert list(inspect.signature(body).parameters) == ["case"]


def test_each_ends_at_a_timeout_and_counts_a_skip_as_a_failure():
    seen = []

    @each("what", ["fails", "skips", "takes too long", "comes later"])
    def body(what):
        seen.append(what)
        assert what != "fails"
        if what == "skips":
            pytest.skip("which would hide the failure")
        if what == "takes too long":
            pytest.fail(pytest_timeout.PYTEST_FAILURE_MESSAGE % 600.0)

    with pytest.raises(AssertionError) as caught:
        body()
    assert seen == ["fails", "skips", "takes too long"]
    assert all(f"\nwhat={what}: " in str(caught.value) for what in seen)


# Each kernel on its device.
EVERY_PLAN = every_plan("cpu", "cuda")
EVERY_PLAN_AND_AUTO = every_plan("cpu", "cuda", auto=True)
CUDA_PLANS_AND_AUTO = every_plan("cuda", auto=True)


def exact(x, weight, bias=None, activation=None):
    """The one right answer for small integers: exact in float32, rounded once."""
    z = testing.spmm_reference(x, weight, bias, activation)
    return z.float().to(x.dtype)


def rounds_sum(format, config):
    """Whether a plan rounds the sum before its activation, as kernels for many tokens do."""
    widths = {row["name"]: row["tile_n"] for row in flash_llm.configs()}
    dense = config in ("dense", "cpu_blocks")
    return dense or (format == "bitmap" and widths.get(config, 0) > 64)


def poison_memory(device):
    """Leave NaN in the memory that the next allocations will get, so unwritten output shows."""
    sizes = [1 << power for power in range(9, 22)]
    blocks = [
        torch.full((size,), float("nan"), dtype=torch.float32, device=device) for size in sizes
    ]
    del blocks


def integers(m, k, n, dtype, device, sparsity=0.6, seed=0):
    weight = testing.small_integers(m, k, sparsity=sparsity, dtype=dtype, device=device, seed=seed)
    x = testing.small_integers(n, k, dtype=dtype, device=device, seed=seed + 1)
    bias = testing.small_integers(m, dtype=dtype, device=device, seed=seed + 2)
    return x, weight, bias


# ---- every shape ----


@each("m", SIZES)
@each("k", SIZES)
def test_small_integers_are_exact_for_every_shape(m, k, format, device, dtype):
    tokens, weight, bias = integers(m, k, max(AWKWARD_N), dtype, device)
    w = flash_llm.pack(weight, format)
    expected, with_bias = exact(tokens, weight), exact(tokens, weight, bias, "relu")
    for n in AWKWARD_N:
        x = tokens[:n]
        y = flash_llm.spmm(x, w)
        assert y.shape == (n, m) and y.dtype == dtype and y.is_contiguous()
        assert torch.equal(y, expected[:n]), n
        y = flash_llm.spmm(x, w, bias, activation="relu")
        assert torch.equal(y, with_bias[:n]), n


@pytest.mark.parametrize(("device", "format", "config"), EVERY_PLAN)
@each(
    ("m", "k"),
    [
        *((128, 64), (1, 1), (63, 127), (129, 65), (200, 576), (576, 200), (384, 1024)),
        # Several blocks of 512 rows; more columns than any ring of stages holds.
        *((1100, 300), (130, 2300)),
    ],
)
def test_every_configuration_is_exact_for_every_n_and_grid(device, format, config, m, k, dtype):
    many = (255, 256, 257, 600) if device == "cuda" else ()
    sizes = (1, 7, 8, 9, 16, 31, 32, 33, 64, 65, 128, 129, *many)
    if config == "cpu_reference":
        sizes = (1, 9)  # it multiplies token after token
    tokens, weight, bias = integers(m, k, max(sizes), dtype, device)
    w = flash_llm.pack(weight, format)
    all_expected = exact(tokens, weight, bias, "relu")
    for n in sizes:
        x, expected = tokens[:n], all_expected[:n]
        if device == "cuda" and config == "dense":
            # cuBLAS adds partial sums in bf16 even where torch has told it not to (H100, N = 33).
            expected = F.linear(x, weight, bias).relu()
        for ctas in (0, 1, 2, 7, 133) if device == "cuda" else (0,):
            y = flash_llm.spmm(x, w, bias, activation="relu", config=config, ctas=ctas)
            assert torch.equal(y, expected), (n, ctas)


@pytest.fixture
def full_precision_gemm():
    """Let cuBLAS sum in float32: by torch's default it may add partial sums in 16 bits."""
    matmul = torch.backends.cuda.matmul
    before = (
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    yield
    matmul.allow_bf16_reduced_precision_reduction = before[0]
    matmul.allow_fp16_reduced_precision_reduction = before[1]


@pytest.mark.usefixtures("full_precision_gemm")
@pytest.mark.parametrize(("device", "format", "config"), EVERY_PLAN)
@each("pattern", testing.PATTERNS)
@each("dtype", DTYPES)
def test_every_configuration_stays_within_the_float64_bound(device, format, config, pattern, dtype):
    weight = testing.random_sparse(
        300, 450, 0.7, pattern=pattern, dtype=dtype, device=device, seed=3
    )
    w = flash_llm.pack(weight, format)
    bias = torch.randn(300).to(device, dtype)
    many = (130,) if device == "cuda" else ()
    for n, activation in itertools.product((1, 9, 40, *many), ACTIVATIONS):
        x = torch.randn(n, 450).to(device, dtype)
        y = flash_llm.spmm(x, w, bias, activation=activation, config=config)
        testing.assert_spmm_close(
            y, x, weight, bias, activation, rounds_sum=rounds_sum(format, config)
        )


@each("n", [1, 40])
@each("dtype", DTYPES)
def test_the_dense_route_gives_the_bits_of_linear(n, format, device, dtype):
    """So torch's own precision settings hold for it."""
    weight = testing.random_sparse(300, 450, 0.7, dtype=dtype, device=device)
    x, bias = torch.randn(n, 450).to(device, dtype), torch.randn(300).to(device, dtype)
    y = flash_llm.spmm(x, flash_llm.pack(weight, format), bias, config="dense")
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


@each("sparsity", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("device", "format", "config"), EVERY_PLAN)
@each("dtype", DTYPES)
def test_any_density_gives_right_numbers(device, format, config, sparsity, dtype):
    """The published kernel is silently wrong for tiles that are more than half full."""
    x, weight, bias = integers(257, 192, 17, dtype, device, sparsity)
    y = flash_llm.spmm(x, flash_llm.pack(weight, format), bias, config=config)
    assert torch.equal(y, exact(x, weight, bias))


@pytest.mark.parametrize(("device", "format", "config"), EVERY_PLAN)
@each("dtype", DTYPES)
def test_uneven_tiles_rows_and_columns(device, format, config, dtype):
    for pattern in testing.PATTERNS:
        mask = testing.random_sparse(
            400, 300, 0.5, pattern=pattern, dtype=dtype, device=device, seed=5
        )
        x, weight, bias = integers(400, 300, 9, dtype, device, sparsity=0.0)
        weight = weight * (mask != 0)
        y = flash_llm.spmm(x, flash_llm.pack(weight, format), bias, config=config)
        assert torch.equal(y, exact(x, weight, bias)), pattern


@each("density", [0.02, 0.6])
@pytest.mark.parametrize(("device", "format", "config"), EVERY_PLAN)
@each("dtype", DTYPES)
def test_full_and_empty_parts_among_others(device, format, config, density, dtype):
    """What a kernel sets aside for a part is not what every part takes."""
    m, k, n = 1100, 1500, 9
    generator = torch.Generator().manual_seed(1)
    chunks = torch.randint(4, (-(-m // 32), -(-k // 128)), generator=generator)
    density = torch.tensor([0.0, 1.0, density, density])[chunks]
    density = density.repeat_interleave(32, 0).repeat_interleave(128, 1)[:m, :k]
    keep = torch.rand(m, k, generator=generator) < density
    x, weight, bias = integers(m, k, n, dtype, device, sparsity=0.0)
    weight = weight * keep.to(device)
    y = flash_llm.spmm(x, flash_llm.pack(weight, format), bias, config=config)
    assert torch.equal(y, exact(x, weight, bias))


@pytest.mark.usefixtures("full_precision_gemm")
@pytest.mark.parametrize(("device", "format", "config"), EVERY_PLAN)
@each("dtype", DTYPES)
def test_tiles_of_every_number_of_batches_in_turn(device, format, config, dtype):
    """A kernel that clears only what a tile has stored must leave nothing for the next tile."""
    # Around the multiples of a batch, 7 vectors of 4 for each of 32 lanes; padding as well.
    counts = [batches * 896 + extra for batches in range(1, 5) for extra in (-4, -1, 0, 1)]
    counts = [0, 1, 3, 4, 127, 128, 8191, 8192, *counts]
    generator = torch.Generator().manual_seed(2)
    tiles = []
    for turn in torch.randperm(3 * len(counts), generator=generator).tolist():
        kept = torch.randperm(128 * 64, generator=generator)[: counts[turn % len(counts)]]
        tiles.append(torch.zeros(128 * 64, dtype=torch.bool).index_fill_(0, kept, True))
    keep = torch.cat([tile.view(128, 64) for tile in tiles], dim=1)
    x, weight, bias = integers(128, keep.shape[1], 9, dtype, device, sparsity=0.0)
    weight = weight * keep.to(device)
    w = flash_llm.pack(weight, format)
    for ctas in (0, 1, 5) if device == "cuda" else (0,):
        y = flash_llm.spmm(x, w, bias, config=config, ctas=ctas)
        assert torch.equal(y, exact(x, weight, bias)), ctas


@pytest.mark.usefixtures("full_precision_gemm")
@each(("activation", "dtype"), zip(ACTIVATIONS, itertools.cycle(DTYPES)))
def test_the_plan_that_is_chosen_stays_within_the_bound(activation, format, device, dtype):
    weight = testing.random_sparse(576, 1536, 0.6, dtype=dtype, device=device)
    w = flash_llm.pack(weight, format)
    many = (193, 300) if device == "cuda" else ()
    for n in (1, 8, 16, 17, 128, 129, *many):
        x = torch.randn(n, 1536).to(device, dtype)
        y = flash_llm.spmm(x, w, activation=activation)
        testing.assert_spmm_close(y, x, weight, None, activation, rounds_sum=True)


@each("activation", ACTIVATIONS)
@each("dtype", DTYPES)
def test_no_tokens_and_no_inputs(activation, format, device, dtype):
    empty = PackedWeight.class_for(format).empty
    bias = torch.randn(130).to(device, dtype)
    w = empty(130, 0, dtype=dtype, device=device)
    x = torch.empty(5, 0, dtype=dtype, device=device)
    y = flash_llm.spmm(x, w, bias, activation=activation)
    testing.assert_spmm_close(
        y, x, torch.empty(130, 0, dtype=dtype, device=device), bias, activation
    )
    w = empty(130, 64, dtype=dtype, device=device)
    y = flash_llm.spmm(torch.empty(2, 0, 64, dtype=dtype, device=device), w, bias)
    assert y.shape == (2, 0, 130)
    w = empty(0, 64, dtype=dtype, device=device)
    assert flash_llm.spmm(torch.ones(3, 64, dtype=dtype, device=device), w).shape == (3, 0)


# ---- views of the inputs ----


@each(
    "view",
    [
        lambda big: big[3:9, 5:75],
        lambda big: big[1:8, 0:140:2],
        lambda big: big.t()[0:6, 2:72],
        lambda big: big[:1, :70].expand(9, -1),
        lambda big: big[:5, :1].expand(-1, 70),
        lambda big: big.flip(1)[:5, :70],
        lambda big: big.flatten()[1 : 1 + 4 * 70].view(4, 70),
        lambda big: big[0, :70],
        lambda big: big[:6, :140].view(2, 3, 2, 70),
        lambda big: big[:6, :140].view(2, 3, 2, 70).permute(2, 0, 1, 3),
        lambda big: big.as_strided((5, 70), (3, 1)),
    ],
    ids=[
        *("sliced", "every-second", "transposed", "expanded-rows", "expanded-columns", "flipped"),
        *("odd-offset", "one-dimensional", "batch", "permuted-batch", "overlapping"),
    ],
)
@pytest.mark.parametrize(("device", "format", "config"), EVERY_PLAN_AND_AUTO)
@each("dtype", DTYPES)
def test_views_of_x_multiply_like_their_contiguous_copy(view, device, format, config, dtype):
    x = view(testing.small_integers(80, 150, dtype=dtype, device=device))
    weight = testing.small_integers(130, 70, sparsity=0.5, dtype=dtype, device=device, seed=7)
    y = flash_llm.spmm(x, flash_llm.pack(weight, format), config=config)
    assert y.shape == (*x.shape[:-1], 130) and y.is_contiguous()
    assert torch.equal(y, exact(x, weight))


@each("dtype", DTYPES)
def test_bias_may_be_a_view(format, device, dtype):
    x, weight, _ = integers(130, 70, 5, dtype, device)
    w = flash_llm.pack(weight, format)
    big = testing.small_integers(400, dtype=dtype, device=device)
    for bias in (big[1:131], big[0:260:2], big[:1].expand(130)):
        assert torch.equal(flash_llm.spmm(x, w, bias), exact(x, weight, bias))


# ---- what else must hold ----


@pytest.mark.parametrize(("device", "format", "config"), EVERY_PLAN)
@each("dtype", DTYPES)
def test_every_output_element_is_written(device, format, config, dtype):
    """Fresh memory holds NaN here, so an element that no one wrote shows."""
    poison_memory(device)
    for m, k, n in ((1, 1, 1), (129, 65, 9), (300, 200, 33)):
        x, weight, _ = integers(m, k, n, dtype, device)
        w = flash_llm.pack(weight, format)
        for _ in range(3):
            torch.full(
                (n, m), float("nan"), dtype=dtype, device=device
            )  # freed at once, reused next
            assert torch.equal(flash_llm.spmm(x, w, config=config), exact(x, weight))


@pytest.mark.parametrize(("device", "format", "config"), EVERY_PLAN)
@each("dtype", DTYPES)
def test_inf_and_nan_spread_as_in_a_dense_product(device, format, config, dtype):
    weight = testing.small_integers(140, 130, sparsity=0.7, dtype=dtype, device=device)
    weight[:, 128] = 0
    weight[:, 60] = 0
    weight[3, 7], weight[139, 129] = float("inf"), float("nan")
    x = testing.small_integers(12, 130, dtype=dtype, device=device, seed=1)
    # Infinity meets a stored value, an absent zero, the last column; token 5 stays finite.
    x[0, 5], x[1, 60], x[2, 129], x[4, 128] = (
        float("inf"),
        float("-inf"),
        float("nan"),
        float("inf"),
    )
    y = flash_llm.spmm(x, flash_llm.pack(weight, format), config=config)
    expected = torch.nn.functional.linear(x.float(), weight.float())
    assert torch.equal(y.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(y[finite], expected[finite].to(dtype))


@pytest.mark.parametrize(("device", "format", "config"), EVERY_PLAN)
@each("dtype", DTYPES)
def test_inf_meets_a_part_of_the_weight_that_stores_nothing(device, format, config, dtype):
    weight = testing.small_integers(600, 400, sparsity=0.5, dtype=dtype, device=device)
    weight[:, 128:256] = 0
    x = testing.small_integers(9, 400, dtype=dtype, device=device, seed=1)
    x[2, 200], x[8, 255] = float("inf"), float("nan")
    y = flash_llm.spmm(x, flash_llm.pack(weight, format), config=config)
    assert bool(y[2].isnan().all()) and bool(y[8].isnan().all())
    finite = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(y[finite], exact(x[finite], weight))


@pytest.mark.parametrize(("device", "format", "config"), EVERY_PLAN)
def test_sums_leave_the_range_of_fp16_only_at_the_end(device, format, config):
    """Partial sums pass 65504 on the way; a sum that ends above it is infinite."""
    weight = torch.zeros(130, 256, dtype=torch.float16, device=device)
    weight[:, :128], weight[:, 128:] = 1, -1
    weight[7, 128:] = 0
    x = torch.full((9, 256), 1000.0, dtype=torch.float16, device=device)
    y = flash_llm.spmm(x, flash_llm.pack(weight, format), config=config)
    expected = torch.zeros(9, 130, dtype=torch.float16, device=device)
    expected[:, 7] = float("inf")
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("device", "format", "config"), EVERY_PLAN)
@each("dtype", DTYPES)
def test_single_products_of_every_bit_pattern_round_correctly(device, format, config, dtype):
    """K = 1: one exact product and one rounding, for subnormal, overflowing and NaN results too."""
    bits = torch.arange(-(1 << 15), 1 << 15).to(device, torch.int16)
    weight = bits.view(dtype).view(-1, 1)
    x = torch.tensor([1.0, -0.3, 777.0, 2.0**-9, 0.0], device=device).to(dtype).view(-1, 1)
    y = flash_llm.spmm(x, flash_llm.pack(weight, format), config=config)
    expected = (x.double() * weight.double().t()).float().to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    y, expected = y.nan_to_num(nan=0), expected.nan_to_num(nan=0)
    if config in ("dense", "cpu_blocks") and dtype == torch.bfloat16:
        # Vendors' bf16 GEMMs flush subnormals, as torch.nn.functional.linear does.
        tiny = torch.finfo(dtype).tiny
        normal = (expected.abs() > tiny) & (weight.t().abs() >= tiny)
        y, expected = y[normal], expected[normal]
    assert torch.equal(y, expected)


def test_subnormal_weights_and_inputs_count(format, device):
    weight = torch.full((128, 64), 2.0**-24, dtype=torch.float16, device=device)
    x = torch.full((8, 64), 1.0, dtype=torch.float16, device=device)
    y = flash_llm.spmm(x, flash_llm.pack(weight, format))
    assert torch.equal(y, torch.full_like(y, 2.0**-18))
    y = flash_llm.spmm(weight[:8], flash_llm.pack(torch.ones_like(weight), format))
    assert torch.equal(y, torch.full_like(y, 2.0**-18))


@pytest.mark.parametrize(
    ("format", "config"),
    [
        *(("tiled_csl", "cpu_tiles"), ("tiled_csl", "cpu_reference"), ("bitmap", "cpu_reference")),
        *(("row_bitmap", "cpu_rows"), ("row_bitmap", "cpu_reference")),
    ],
)
def test_thread_count_does_not_change_a_bit(format, config):
    weight = testing.random_sparse(1000, 300, 0.5)
    w = flash_llm.pack(weight, format)
    x = torch.randn(9, 300).half()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = flash_llm.spmm(x, w, config=config)
        torch.set_num_threads(4)
        assert torch.equal(flash_llm.spmm(x, w, config=config), one)
    finally:
        torch.set_num_threads(threads)


@each("dtype", DTYPES)
def test_prefetch_changes_no_bit(format, device, dtype):
    weight = testing.random_sparse(1100, 700, 0.7, dtype=dtype, device=device)
    w = flash_llm.pack(weight, format)
    bias = torch.randn(1100).to(device, dtype)
    sizes = (1, 9, 64, 100, 200) if device == "cuda" else (1, 9)  # a CPU prefetches nothing
    for n, activation in itertools.product(sizes, ACTIVATIONS):
        x = torch.randn(n, 700).to(device, dtype)
        with_it = flash_llm.spmm(x, w, bias, activation=activation, prefetch=True)
        without = flash_llm.spmm(x, w, bias, activation=activation, prefetch=False)
        assert torch.equal(with_it, without), (n, activation)
        assert torch.equal(flash_llm.spmm(x, w, bias, activation=activation), without)


def strided(w):
    """The same weight in buffers that no kernel can read as they are."""
    offsets = torch.stack([w.offsets, -w.offsets], dim=1)[:, 0]
    payload = torch.stack([w.payload, ~w.payload], dim=1)[:, 0]
    return type(w)(w.header, offsets, payload)


@each("prefetch", [True, False])
@each("dtype", DTYPES)
def test_a_weight_packed_just_now_multiplies_right(prefetch, format, device, dtype):
    """Its memory held another weight of the same size a moment ago."""
    mask = testing.small_integers(600, 300, sparsity=0.5, dtype=dtype, device=device) != 0
    cases = [integers(600, 300, 9, dtype, device, sparsity=0.0, seed=seed) for seed in range(3)]
    weights = [weight * mask for _, weight, _ in cases]
    expected = [exact(x, weight, bias) for (x, _, bias), weight in zip(cases, weights, strict=True)]
    for make in (
        lambda weight: flash_llm.pack(weight, format),
        lambda weight: flash_llm.prune_pack(weight, 0.0, format=format),
        lambda weight: flash_llm.pack(weight.cpu(), format).to(device),
        lambda weight: strided(flash_llm.pack(weight, format)),  # which each call makes contiguous
    ):
        results = [
            flash_llm.spmm(x, make(weight), bias, prefetch=prefetch)
            for (x, _, bias), weight in zip(cases, weights, strict=True)
        ]
        for y, right in zip(results, expected, strict=True):
            assert torch.equal(y, right)


@each("dtype", DTYPES)
def test_repeated_calls_agree_bit_for_bit(format, device, dtype):
    weight = testing.random_sparse(576, 576, 0.7, dtype=dtype, device=device)
    w = flash_llm.pack(weight, format)
    x = torch.randn(16, 576).to(device, dtype)
    first = flash_llm.spmm(x, w)
    for _ in range(5):
        assert torch.equal(flash_llm.spmm(x, w), first)


@pytest.mark.slow
def test_a_layer_of_a_real_model():
    weight = testing.random_sparse(4096, 4096, 0.8, dtype=torch.bfloat16)
    x = torch.randn(4, 4096).bfloat16()
    for format, configs in (
        ("tiled_csl", ("cpu_tiles", "dense")),
        ("bitmap", ("dense",)),
        ("row_bitmap", ("cpu_rows", "cpu_blocks", "dense")),
    ):
        w = flash_llm.pack(weight, format)
        for config in configs:
            testing.assert_spmm_close(flash_llm.spmm(x, w, config=config), x, weight)


# ---- CUDA only ----


@pytest.mark.parametrize(("device", "format", "config"), CUDA_PLANS_AND_AUTO)
def test_second_stream_orders_with_its_own_work(device, format, config):
    x, weight, bias = integers(576, 576, 8, torch.float16, "cuda")
    w = flash_llm.pack(weight, format)
    expected = exact(x, weight, bias)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # The input is ready only after this, and only this stream knows.
        torch.cuda._sleep(20_000_000)
        late = torch.zeros_like(x)
        late.copy_(x)
        y = flash_llm.spmm(late, w, bias, config=config)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("device", "format", "config"), CUDA_PLANS_AND_AUTO)
@each("k", [576, 200, 70])
def test_captured_graph_replays_with_new_inputs(device, format, config, k):
    x, weight, bias = integers(576, k, 8, torch.bfloat16, "cuda")
    w = flash_llm.pack(weight, format)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        flash_llm.spmm(x, w, bias, activation="relu", config=config)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y = flash_llm.spmm(x, w, bias, activation="relu", config=config)
    for seed in range(4):
        x.copy_(testing.small_integers(8, k, dtype=x.dtype, device="cuda", seed=seed + 10))
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, exact(x, weight, bias, "relu")), seed


@pytest.mark.gpu
@each("n", [8, 32, 64, 100, 200])
def test_chained_calls_see_each_others_results(n, gpu_format):
    """A call's kernels overlap their launches; each must still wait for what it reads."""
    weights = [
        flash_llm.pack(testing.random_sparse(512, 512, 0.8, device="cuda", seed=seed), gpu_format)
        for seed in range(3)
    ]

    def chain(x, pause):
        results = []
        for step in range(24):
            x = flash_llm.spmm(x, weights[step % 3], activation="relu")
            x = x / x.abs().amax().clamp(min=1e-3)
            results.append(x)
            if pause:
                torch.cuda.synchronize()
        return torch.stack(results)

    x = torch.randn(n, 512, device="cuda").half()
    chain(x, pause=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(x, pause=False)
    for seed in range(5):
        x.copy_(torch.randn(n, 512, generator=torch.Generator().manual_seed(seed)))
        captured.fill_(float("nan"))
        graph.replay()
        expected = chain(x, pause=True)
        assert torch.equal(captured, expected), seed
        assert torch.equal(chain(x, pause=False), expected), seed


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device(format):
    x, weight, _ = integers(200, 200, 8, torch.float16, "cuda:1")
    y = flash_llm.spmm(x, flash_llm.pack(weight, format))
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y, exact(x, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [True, False])
def test_many_streams_at_once(prefetch, format):
    """Workspaces of calls in flight must not be shared."""
    cases = [integers(576, 1024, 8, torch.float16, "cuda", seed=seed) for seed in range(8)]
    packed = [flash_llm.pack(weight, format) for _, weight, _ in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = [[] for _ in cases]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                x, _, bias = cases[i]
                results[i].append(flash_llm.spmm(x, packed[i], bias, prefetch=prefetch))
    torch.cuda.synchronize()
    for (x, weight, bias), ys in zip(cases, results, strict=True):
        expected = exact(x, weight, bias)
        assert all(torch.equal(y, expected) for y in ys)


# ---- CUDA only: launches that depend on each other ----
#
# Kernels may start while the kernel before them still runs, and what they read and write is often
# what that one writes and reads: X, and memory that the allocator hands on.

ON_HOPPER = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.hopper])]
)
WITH_AND_WITHOUT_PREFETCH = pytest.mark.parametrize(
    "prefetch", [True, False], ids=["prefetch", "no-prefetch"]
)
LINKS = pytest.mark.parametrize(
    "links",
    [("bitmap",), ("tiled_csl",), ("bitmap", "tiled_csl")],
    ids=["bitmap", "tiled_csl", "mixed"],
)
CHAIN_LENGTH = 24


@functools.cache
def relay(size, seed):
    """A weight that permutes the first half of x and changes signs, if the other half is zero.

    Most of its elements meet those zeros, so chains of any length stay exact, and a NaN that stands
    where the input was not written yet shows.
    """
    generator = torch.Generator().manual_seed(seed)
    half = size // 2
    weight = testing.small_integers(size, size, sparsity=0.4, seed=seed)
    weight[:, :half] = 0
    signs = torch.randint(2, (half,), generator=generator).half() * 2 - 1
    weight[torch.arange(half), torch.randperm(half, generator=generator)] = signs
    return weight


def relay_input(n, size, dtype, device, seed):
    x = testing.small_integers(n, size, dtype=dtype, device=device, seed=seed)
    x[:, size // 2 :] = 0
    return x


def chain(x, packed, prefetch, keep=True, ctas=0):
    """Feed x through the weights in turns; results of every step, or of the last one."""
    results = []
    for step in range(CHAIN_LENGTH):
        x = flash_llm.spmm(x, packed[step % len(packed)], prefetch=prefetch, ctas=ctas)
        results = [*results, x] if keep else [x]
    return results


def exact_chain(x, weights):
    results = []
    for step in range(CHAIN_LENGTH):
        x = exact(x, weights[step % len(weights)])
        results.append(x)
    return results


def poison(like, count):
    """Leave NaN in `count` blocks of the size of `like`, for the next allocations."""
    blocks = [torch.full_like(like, float("nan")) for _ in range(count)]
    del blocks


def relay_weights(links, size, dtype, device):
    weights = [relay(size, seed).to(device, dtype) for seed in range(4)]
    packed = [flash_llm.pack(weight, links[i % len(links)]) for i, weight in enumerate(weights)]
    return weights, packed


@ON_HOPPER
@WITH_AND_WITHOUT_PREFETCH
@LINKS
@pytest.mark.parametrize("keep", [True, False], ids=["new-memory", "same-memory"])
@each(
    ("size", "n", "ctas"),
    [
        *((576, 8, 0), (576, 1, 5), (1024, 16, 0), (1024, 100, 0)),
        *((1024, 200, 0), (2048, 100, 7), (2048, 200, 7)),
        *((2048, 8, 0), (2048, 32, 7), (2048, 64, 0), (4096, 16, 0), (4096, 256, 0)),
    ],
)
def test_spmm_feeds_spmm(device, size, n, ctas, keep, links, prefetch, dtype):
    poison_memory(device)
    weights, packed = relay_weights(links, size, dtype, device)
    for seed in range(4):
        x = relay_input(n, size, dtype, device, seed)
        expected = exact_chain(x, weights)
        poison(x, CHAIN_LENGTH + 2 if keep else 2)
        results = chain(x, packed, prefetch, keep, ctas)
        if keep:
            for step, (y, right) in enumerate(zip(results, expected, strict=True)):
                assert torch.equal(y, right), (seed, step)
        else:
            assert torch.equal(results[-1], expected[-1]), seed


@ON_HOPPER
@WITH_AND_WITHOUT_PREFETCH
@LINKS
@each(("size", "n"), [(576, 8), (1024, 64), (2048, 16), (2048, 100), (1024, 200)])
@each("dtype", DTYPES)
def test_spmm_feeds_spmm_in_a_graph(device, size, n, links, prefetch, dtype):
    weights, packed = relay_weights(links, size, dtype, device)
    inputs = [relay_input(n, size, dtype, device, seed) for seed in range(6)]
    x = inputs[0].clone()
    chain(x, packed, prefetch)  # kernels load on first use, which a capture may not do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(x, packed, prefetch)
    for y in captured:
        y.fill_(float("nan"))
    copies = []
    for replacement in inputs:
        x.copy_(replacement)
        graph.replay()
        copies.append([y.clone() for y in captured])
        for y in captured:
            y.fill_(float("nan"))
    for seed, found in enumerate(copies):
        for step, right in enumerate(exact_chain(inputs[seed], weights)):
            assert torch.equal(found[step], right), (seed, step)


def ternary_rounds(multiply, x, weights, mixes, rounds=8):
    """A long dependent computation on -1, 0 and 1: each product is exact, each input is new."""
    results = []
    for step in range(rounds):
        turn = step % len(weights)
        y = multiply(x, weights[turn])
        results.append(y)
        x = torch.sign(torch.sign(y) @ mixes[turn])
    return results


@ON_HOPPER
@WITH_AND_WITHOUT_PREFETCH
@pytest.mark.usefixtures("full_precision_gemm")
@each("n", [8, 32, 64, 100, 200])
@each("k", [512, 72, 70])
def test_torch_ops_between_calls_are_waited_for(device, n, k, format, prefetch, dtype):
    poison_memory(device)
    weights = [
        testing.small_integers(1100, k, sparsity=0.6, dtype=dtype, device=device, seed=seed)
        for seed in range(3)
    ]
    mixes = [
        testing.small_integers(1100, k, sparsity=0.9, dtype=dtype, device=device, seed=seed + 3)
        for seed in range(3)
    ]
    packed = [flash_llm.pack(weight, format) for weight in weights]
    for seed in range(3):
        x = testing.small_integers(n, k, dtype=dtype, device=device, seed=seed).sign()
        expected = ternary_rounds(
            testing.spmm_reference,
            x.double(),
            weights,
            [mix.double() for mix in mixes],
        )
        poison(torch.empty(n, 1100, dtype=dtype, device=device), 10)
        results = ternary_rounds(
            lambda x, w: flash_llm.spmm(x, w, prefetch=prefetch), x, packed, mixes
        )
        for step, (y, right) in enumerate(zip(results, expected, strict=True)):
            assert torch.equal(y, right.float().to(dtype)), (seed, step)


@ON_HOPPER
@WITH_AND_WITHOUT_PREFETCH
@each("n", [8, 64, 200])
@each("dtype", DTYPES)
def test_an_input_that_is_written_in_place_between_calls(device, n, format, prefetch, dtype):
    """The kernel before a call writes the memory that the call reads, and so does the one after."""
    _, weight, _ = integers(2048, 1024, n, dtype, device)
    w = flash_llm.pack(weight, format)
    inputs = [
        testing.small_integers(n, 1024, dtype=dtype, device=device, seed=seed) for seed in range(40)
    ]
    zero = torch.zeros_like(inputs[0])
    x = torch.full_like(zero, float("nan"))
    results = []
    for values in inputs:
        torch.add(values, zero, out=x)  # a kernel; copy_ need not be one
        results.append(flash_llm.spmm(x, w, prefetch=prefetch))
        x.fill_(float("nan"))
    for seed, (y, values) in enumerate(zip(results, inputs, strict=True)):
        assert torch.equal(y, exact(values, weight)), seed


@ON_HOPPER
@WITH_AND_WITHOUT_PREFETCH
@each("n", [8, 200])
@each("shared", [True, False], ids=["one-weight", "own-weights"])
def test_chains_on_two_streams_at_once(device, shared, n, format, prefetch):
    weights, packed = relay_weights((format,), 2048, torch.float16, device)
    # Each stream begins with another weight, or both use the first.
    turns = (
        [(weights[:1], packed[:1])] * 2
        if shared
        else [
            (weights[:2], packed[:2]),
            (weights[2:], packed[2:]),
        ]
    )
    inputs = [relay_input(n, 2048, torch.float16, device, seed) for seed in range(2)]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(6):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i] += chain(inputs[i], turns[i][1], prefetch, keep=False)
    torch.cuda.synchronize()
    for i, found in enumerate(results):
        expected = exact_chain(inputs[i], turns[i][0])[-1]
        assert all(torch.equal(y, expected) for y in found)


@ON_HOPPER
@WITH_AND_WITHOUT_PREFETCH
def test_an_input_that_another_stream_makes(device, format, prefetch):
    """The kernel before on this stream is a call too; the input depends on an event only."""
    _, weight, _ = integers(1100, 576, 8, torch.float16, device)
    w = flash_llm.pack(weight, format)
    inputs = [testing.small_integers(8, 576, device=device, seed=seed) for seed in range(10)]
    x = torch.full_like(inputs[0], float("nan"))
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    results = []
    for values in inputs:
        producer.wait_stream(consumer)
        with torch.cuda.stream(producer):
            torch.cuda._sleep(1_000_000)
            torch.mul(values, 1, out=x)
        consumer.wait_stream(producer)
        with torch.cuda.stream(consumer):
            results.append(flash_llm.spmm(x, w, prefetch=prefetch))
    torch.cuda.synchronize()
    for seed, (y, values) in enumerate(zip(results, inputs, strict=True)):
        assert torch.equal(y, exact(values, weight)), seed


@ON_HOPPER
@WITH_AND_WITHOUT_PREFETCH
@each("source", ["cuda", "pinned"])
def test_a_weight_that_is_replaced_by_a_copy_between_calls(device, source, gpu_format, prefetch):
    """load_state_dict copies in place; copies are no kernels, so prefetching waits for them."""
    x, weight, _ = integers(1100, 700, 8, torch.float16, device)
    w = flash_llm.pack(weight, gpu_format)
    payloads = [w.payload.clone(), flash_llm.pack(-weight, gpu_format).payload]
    if source == "pinned":
        payloads = [payload.cpu().pin_memory() for payload in payloads]

    def alternate():
        results = []
        for step in range(12):
            w.payload.copy_(payloads[step % 2], non_blocking=True)
            results.append(flash_llm.spmm(x, w, prefetch=prefetch))
        return results

    expected = exact(x, weight)
    for step, y in enumerate(alternate()):
        assert torch.equal(y, -expected if step % 2 else expected), step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = alternate()
    for _ in range(3):
        graph.replay()
    for step, y in enumerate(captured):
        assert torch.equal(y, -expected if step % 2 else expected), step
