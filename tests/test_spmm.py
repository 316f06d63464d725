"""SpMM against two oracles: exact small integers, and float64 within a stated bound."""

import itertools

import pytest
import torch

import flash_llm
from flash_llm import TiledCSL, _extension, testing

SIZES = (0, 1, 7, 8, 63, 64, 65, 127, 129, 200, 576)
AWKWARD_N = (0, 1, 7, 9, 65)
ACTIVATIONS = (None, "relu", "gelu", "silu")


CUDA_PLANS = _extension.require().plan_names(True)
# Each kernel on its device.
EVERY_PLAN = [
    *(
        pytest.param("cpu", name, id=f"cpu-{name}")
        for name in _extension.require().plan_names(False)
    ),
    *(pytest.param("cuda", name, marks=pytest.mark.gpu, id=f"cuda-{name}") for name in CUDA_PLANS),
]


def exact(x, weight, bias=None, activation=None):
    """The one right answer for small integers: exact in float32, rounded once."""
    z = testing.spmm_reference(x, weight, bias, activation)
    return z.float().to(x.dtype)


def integers(m, k, n, dtype, device, sparsity=0.6, seed=0):
    weight = testing.small_integers(m, k, sparsity=sparsity, dtype=dtype, device=device, seed=seed)
    x = testing.small_integers(n, k, dtype=dtype, device=device, seed=seed + 1)
    bias = testing.small_integers(m, dtype=dtype, device=device, seed=seed + 2)
    return x, weight, bias


# ---- every shape ----


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("k", SIZES)
def test_small_integers_are_exact_for_every_shape(m, k, device, dtype):
    for n in AWKWARD_N:
        x, weight, bias = integers(m, k, n, dtype, device)
        w = TiledCSL.from_dense(weight)
        y = flash_llm.spmm(x, w)
        assert y.shape == (n, m) and y.dtype == dtype and y.is_contiguous()
        assert torch.equal(y, exact(x, weight)), n
        y = flash_llm.spmm(x, w, bias, activation="relu")
        assert torch.equal(y, exact(x, weight, bias, "relu")), n


@pytest.mark.parametrize(("device", "config"), EVERY_PLAN)
@pytest.mark.parametrize(
    ("m", "k"), [(128, 64), (1, 1), (63, 127), (129, 65), (200, 576), (576, 200), (384, 1024)]
)
def test_every_configuration_is_exact_for_every_n_and_grid(device, config, m, k, dtype):
    for n in (1, 7, 8, 9, 16, 31, 32, 33, 64, 65, 128, 129):
        x, weight, bias = integers(m, k, n, dtype, device)
        w = TiledCSL.from_dense(weight)
        expected = exact(x, weight, bias, "relu")
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
@pytest.mark.parametrize(("device", "config"), EVERY_PLAN)
@pytest.mark.parametrize("pattern", testing.PATTERNS)
def test_every_configuration_stays_within_the_float64_bound(device, config, pattern, dtype):
    weight = testing.random_sparse(
        300, 450, 0.7, pattern=pattern, dtype=dtype, device=device, seed=3
    )
    w = TiledCSL.from_dense(weight)
    bias = torch.randn(300).to(device, dtype)
    for n, activation in itertools.product((1, 9, 40), ACTIVATIONS):
        x = torch.randn(n, 450).to(device, dtype)
        y = flash_llm.spmm(x, w, bias, activation=activation, config=config)
        testing.assert_spmm_close(y, x, weight, bias, activation, rounds_sum=config == "dense")


@pytest.mark.parametrize("n", [1, 40])
def test_the_dense_route_gives_the_bits_of_linear(n, device, dtype):
    """So torch's own precision settings hold for it."""
    weight = testing.random_sparse(300, 450, 0.7, dtype=dtype, device=device)
    x, bias = torch.randn(n, 450).to(device, dtype), torch.randn(300).to(device, dtype)
    y = flash_llm.spmm(x, TiledCSL.from_dense(weight), bias, config="dense")
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("device", "config"), EVERY_PLAN)
def test_any_density_gives_right_numbers(device, config, sparsity, dtype):
    """The published kernel is silently wrong for tiles that are more than half full."""
    x, weight, bias = integers(257, 192, 17, dtype, device, sparsity)
    y = flash_llm.spmm(x, TiledCSL.from_dense(weight), bias, config=config)
    assert torch.equal(y, exact(x, weight, bias))


@pytest.mark.parametrize(("device", "config"), EVERY_PLAN)
def test_uneven_tiles_rows_and_columns(device, config, dtype):
    for pattern in testing.PATTERNS:
        mask = testing.random_sparse(
            400, 300, 0.5, pattern=pattern, dtype=dtype, device=device, seed=5
        )
        x, weight, bias = integers(400, 300, 9, dtype, device, sparsity=0.0)
        weight = weight * (mask != 0)
        y = flash_llm.spmm(x, TiledCSL.from_dense(weight), bias, config=config)
        assert torch.equal(y, exact(x, weight, bias)), pattern


@pytest.mark.usefixtures("full_precision_gemm")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_plan_that_is_chosen_stays_within_the_bound(activation, device, dtype):
    weight = testing.random_sparse(576, 1536, 0.6, dtype=dtype, device=device)
    w = TiledCSL.from_dense(weight)
    for n in (1, 8, 16, 17, 128, 129):
        x = torch.randn(n, 1536).to(device, dtype)
        y = flash_llm.spmm(x, w, activation=activation)
        testing.assert_spmm_close(y, x, weight, None, activation, rounds_sum=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_tokens_and_no_inputs(activation, device, dtype):
    bias = torch.randn(130).to(device, dtype)
    w = TiledCSL.empty(130, 0, dtype=dtype, device=device)
    x = torch.empty(5, 0, dtype=dtype, device=device)
    y = flash_llm.spmm(x, w, bias, activation=activation)
    testing.assert_spmm_close(
        y, x, torch.empty(130, 0, dtype=dtype, device=device), bias, activation
    )
    w = TiledCSL.empty(130, 64, dtype=dtype, device=device)
    y = flash_llm.spmm(torch.empty(2, 0, 64, dtype=dtype, device=device), w, bias)
    assert y.shape == (2, 0, 130)
    w = TiledCSL.empty(0, 64, dtype=dtype, device=device)
    assert flash_llm.spmm(torch.ones(3, 64, dtype=dtype, device=device), w).shape == (3, 0)


# ---- views of the inputs ----


@pytest.mark.parametrize(
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
@pytest.mark.parametrize(
    ("device", "config"),
    [
        *EVERY_PLAN,
        *(
            pytest.param("cpu", "auto", id="cpu-auto"),
            pytest.param("cuda", "auto", marks=pytest.mark.gpu, id="cuda-auto"),
        ),
    ],
)
def test_views_of_x_multiply_like_their_contiguous_copy(view, device, config, dtype):
    x = view(testing.small_integers(80, 150, dtype=dtype, device=device))
    weight = testing.small_integers(130, 70, sparsity=0.5, dtype=dtype, device=device, seed=7)
    y = flash_llm.spmm(x, TiledCSL.from_dense(weight), config=config)
    assert y.shape == (*x.shape[:-1], 130) and y.is_contiguous()
    assert torch.equal(y, exact(x, weight))


def test_bias_may_be_a_view(device, dtype):
    x, weight, _ = integers(130, 70, 5, dtype, device)
    w = TiledCSL.from_dense(weight)
    big = testing.small_integers(400, dtype=dtype, device=device)
    for bias in (big[1:131], big[0:260:2], big[:1].expand(130)):
        assert torch.equal(flash_llm.spmm(x, w, bias), exact(x, weight, bias))


# ---- what else must hold ----


@pytest.mark.parametrize(("device", "config"), EVERY_PLAN)
def test_every_output_element_is_written(device, config, dtype, poisoned_memory):
    """Fresh memory holds NaN here, so an element that no one wrote shows."""
    for m, k, n in ((1, 1, 1), (129, 65, 9), (300, 200, 33)):
        x, weight, _ = integers(m, k, n, dtype, device)
        w = TiledCSL.from_dense(weight)
        for _ in range(3):
            torch.full(
                (n, m), float("nan"), dtype=dtype, device=device
            )  # freed at once, reused next
            assert torch.equal(flash_llm.spmm(x, w, config=config), exact(x, weight))


@pytest.mark.parametrize(("device", "config"), EVERY_PLAN)
def test_inf_and_nan_spread_as_in_a_dense_product(device, config, dtype):
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
    y = flash_llm.spmm(x, TiledCSL.from_dense(weight), config=config)
    expected = torch.nn.functional.linear(x.float(), weight.float())
    assert torch.equal(y.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(y[finite], expected[finite].to(dtype))


@pytest.mark.parametrize(("device", "config"), EVERY_PLAN)
def test_sums_leave_the_range_of_fp16_only_at_the_end(device, config):
    """Partial sums pass 65504 on the way; a sum that ends above it is infinite."""
    weight = torch.zeros(130, 256, dtype=torch.float16, device=device)
    weight[:, :128], weight[:, 128:] = 1, -1
    weight[7, 128:] = 0
    x = torch.full((9, 256), 1000.0, dtype=torch.float16, device=device)
    y = flash_llm.spmm(x, TiledCSL.from_dense(weight), config=config)
    expected = torch.zeros(9, 130, dtype=torch.float16, device=device)
    expected[:, 7] = float("inf")
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("device", "config"), EVERY_PLAN)
def test_single_products_of_every_bit_pattern_round_correctly(device, config, dtype):
    """K = 1: one exact product and one rounding, for subnormal, overflowing and NaN results too."""
    bits = torch.arange(-(1 << 15), 1 << 15).to(device, torch.int16)
    weight = bits.view(dtype).view(-1, 1)
    x = torch.tensor([1.0, -0.3, 777.0, 2.0**-9, 0.0], device=device).to(dtype).view(-1, 1)
    y = flash_llm.spmm(x, TiledCSL.from_dense(weight), config=config)
    expected = (x.double() * weight.double().t()).float().to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    y, expected = y.nan_to_num(nan=0), expected.nan_to_num(nan=0)
    if config == "dense" and dtype == torch.bfloat16:
        # Vendors' bf16 GEMMs flush subnormals, as torch.nn.functional.linear does.
        tiny = torch.finfo(dtype).tiny
        normal = (expected.abs() > tiny) & (weight.t().abs() >= tiny)
        y, expected = y[normal], expected[normal]
    assert torch.equal(y, expected)


def test_subnormal_weights_and_inputs_count(device):
    weight = torch.full((128, 64), 2.0**-24, dtype=torch.float16, device=device)
    x = torch.full((8, 64), 1.0, dtype=torch.float16, device=device)
    y = flash_llm.spmm(x, TiledCSL.from_dense(weight))
    assert torch.equal(y, torch.full_like(y, 2.0**-18))
    y = flash_llm.spmm(weight[:8], TiledCSL.from_dense(torch.ones_like(weight)))
    assert torch.equal(y, torch.full_like(y, 2.0**-18))


@pytest.mark.parametrize("config", ["cpu_tiles", "cpu_reference"])
def test_thread_count_does_not_change_a_bit(config):
    weight = testing.random_sparse(1000, 300, 0.5)
    w = TiledCSL.from_dense(weight)
    x = torch.randn(9, 300).half()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = flash_llm.spmm(x, w, config=config)
        torch.set_num_threads(4)
        assert torch.equal(flash_llm.spmm(x, w, config=config), one)
    finally:
        torch.set_num_threads(threads)


def test_repeated_calls_agree_bit_for_bit(device, dtype):
    weight = testing.random_sparse(576, 576, 0.7, dtype=dtype, device=device)
    w = TiledCSL.from_dense(weight)
    x = torch.randn(16, 576).to(device, dtype)
    first = flash_llm.spmm(x, w)
    for _ in range(5):
        assert torch.equal(flash_llm.spmm(x, w), first)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_tiles", "dense"])
def test_a_layer_of_a_real_model(config):
    weight = testing.random_sparse(4096, 4096, 0.8, dtype=torch.bfloat16)
    x = torch.randn(4, 4096).bfloat16()
    y = flash_llm.spmm(x, TiledCSL.from_dense(weight), config=config)
    testing.assert_spmm_close(y, x, weight)


# ---- CUDA only ----


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["auto", *CUDA_PLANS])
def test_second_stream_orders_with_its_own_work(config):
    x, weight, bias = integers(576, 576, 8, torch.float16, "cuda")
    w = TiledCSL.from_dense(weight)
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


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["auto", *CUDA_PLANS])
@pytest.mark.parametrize("k", [576, 200])
def test_captured_graph_replays_with_new_inputs(config, k):
    x, weight, bias = integers(576, k, 8, torch.bfloat16, "cuda")
    w = TiledCSL.from_dense(weight)
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
@pytest.mark.parametrize("n", [8, 32, 64])
def test_chained_calls_see_each_others_results(n):
    """A call's kernels overlap their launches; each must still wait for what it reads."""
    weights = [
        TiledCSL.from_dense(testing.random_sparse(512, 512, 0.8, device="cuda", seed=seed))
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
def test_second_device():
    x, weight, _ = integers(200, 200, 8, torch.float16, "cuda:1")
    y = flash_llm.spmm(x, TiledCSL.from_dense(weight))
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y, exact(x, weight))


@pytest.mark.gpu
def test_many_streams_at_once():
    """Workspaces of calls in flight must not be shared."""
    cases = [integers(576, 1024, 8, torch.float16, "cuda", seed=seed) for seed in range(8)]
    packed = [TiledCSL.from_dense(weight) for _, weight, _ in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = [[] for _ in cases]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(flash_llm.spmm(cases[i][0], packed[i], cases[i][2]))
    torch.cuda.synchronize()
    for (x, weight, bias), ys in zip(cases, results, strict=True):
        expected = exact(x, weight, bias)
        assert all(torch.equal(y, expected) for y in ys)
