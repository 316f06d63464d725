"""The operators as PyTorch sees them: opcheck, fakes, torch.compile and gradients."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from formats import DTYPES, FORMATS, each
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import flash_llm
from flash_llm import PackedWeight, ops, testing
from flash_llm.ops import ACTIVATIONS


def packed_and_dense(format, m=130, k=70, dtype=torch.float16, device="cpu", sparsity=0.6):
    dense = testing.random_sparse(m, k, sparsity, dtype=dtype, device=device)
    return flash_llm.pack(dense, format), dense


def arguments(w):
    return list(w.header), w.offsets, w.payload


# ---- opcheck ----


@each(
    ("n", "activation", "dtype"),
    [
        (0, "none", torch.float16),
        (1, "gelu", torch.bfloat16),
        (9, "gelu", torch.float16),
        (33, "none", torch.bfloat16),
    ],
)
def test_opcheck_spmm(n, activation, format, device, dtype):
    w, _ = packed_and_dense(format, dtype=dtype, device=device)
    x = torch.randn(n, 70).to(device, dtype)
    bias = torch.randn(130).to(device, dtype)
    op = torch.ops.flash_llm.spmm.default
    torch.library.opcheck(op, (x, *arguments(w)))
    torch.library.opcheck(
        op, (x.requires_grad_(), *arguments(w), bias.requires_grad_(), activation)
    )


def test_opcheck_spmm_with_every_argument(format, device):
    w, _ = packed_and_dense(format, device=device)
    x, bias = torch.randn(3, 70, device=device).half(), torch.randn(130, device=device).half()
    for prefetch in (True, False):
        every = (x, *arguments(w), bias, "silu", "dense", 1, prefetch)
        torch.library.opcheck(torch.ops.flash_llm.spmm.default, every)


def test_tracers_record_a_call_of_spmm(device):
    """Without tracers, spmm calls the operator past torch's Python functions."""
    w, _ = packed_and_dense("row_bitmap" if device == "cpu" else "tiled_csl", device=device)
    x = torch.randn(3, 70, device=device).half()
    calls = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    expected = flash_llm.spmm(x, w)
    with Recorder():
        assert torch.equal(flash_llm.spmm(x, w), expected)
    assert "flash_llm.spmm" in "".join(calls)
    fx = make_fx(lambda x: flash_llm.spmm(x, w))(x)
    traced = torch.jit.trace(lambda x: flash_llm.spmm(x, w), x)
    for recorded in (fx, traced):
        assert "spmm" in str(recorded.graph)
        other = torch.randn(3, 70, device=device).half()
        assert torch.equal(recorded(other), flash_llm.spmm(other, w))
    with torch.profiler.profile() as profile:
        flash_llm.spmm(x, w)
    assert "flash_llm::spmm" in {event.name for event in profile.events()}


@each(
    "x_of",
    [
        lambda x: x[:, 1:71],
        lambda x: x[:, 0:140:2],
        lambda x: x[:6, :140].view(3, 2, 2, 70),
        lambda x: x[0, :70],
        lambda x: x[:1, :70].expand(4, -1),
    ],
    ids=["sliced", "strided", "batch", "one-dimensional", "expanded"],
)
def test_opcheck_spmm_on_views(x_of, format, device):
    w, _ = packed_and_dense(format, device=device)
    x = x_of(torch.randn(8, 150, device=device).half())
    torch.library.opcheck(torch.ops.flash_llm.spmm.default, (x, *arguments(w)))


@each(
    ("m", "k", "dtype"),
    [
        (130, 70, torch.float16),
        (128, 64, torch.bfloat16),
        (0, 5, torch.float16),
        (5, 0, torch.bfloat16),
    ],
)
def test_opcheck_conversions(m, k, format, device, dtype):
    w, dense = packed_and_dense(format, m, k, dtype=dtype, device=device)
    pack, prune_pack = torch.ops.flash_llm.pack.default, torch.ops.flash_llm.prune_pack.default
    torch.library.opcheck(pack, (dense, format))
    torch.library.opcheck(prune_pack, (dense, 0.7, "row", format))
    torch.library.opcheck(torch.ops.flash_llm.unpack.default, arguments(w))
    torch.library.opcheck(torch.ops.flash_llm.validate.default, arguments(w))


def test_opcheck_packing_by_default(device):
    dense = testing.random_sparse(130, 70, device=device)
    torch.library.opcheck(torch.ops.flash_llm.pack.default, (dense.t(),))
    torch.library.opcheck(torch.ops.flash_llm.prune_pack.default, (dense, None, "2:4"))


@each("dtype", DTYPES)
def test_fakes_have_the_shapes_of_the_real_thing(format, device, dtype):
    w, _ = packed_and_dense(format, dtype=dtype, device=device)
    x = torch.randn(2, 3, 70).to(device, dtype)
    with FakeTensorMode() as mode:
        header, offsets, payload = arguments(w)
        fake_offsets, fake_payload = mode.from_tensor(offsets), mode.from_tensor(payload)
        y = torch.ops.flash_llm.spmm(mode.from_tensor(x), header, fake_offsets, fake_payload)
        assert (y.shape, y.dtype, y.device) == ((2, 3, 130), dtype, x.device)
        unpacked = torch.ops.flash_llm.unpack(header, fake_offsets, fake_payload)
        assert (unpacked.shape, unpacked.dtype) == ((130, 70), dtype)
        with pytest.raises(ValueError, match="flash_llm::spmm: offsets "):
            torch.ops.flash_llm.spmm(
                mode.from_tensor(x), header, fake_offsets.new_empty(3), fake_payload
            )
        with pytest.raises(ValueError, match="flash_llm::spmm: x .*K=70"):
            torch.ops.flash_llm.spmm(
                mode.from_tensor(x)[..., 1:], header, fake_offsets, fake_payload
            )
        with pytest.raises(TypeError, match="flash_llm::spmm: x "):
            torch.ops.flash_llm.spmm(
                mode.from_tensor(x).float(), header, fake_offsets, fake_payload
            )


def test_fakes_of_packing_know_the_offsets_of_a_named_format(format):
    dense = torch.ones(130, 70).half()
    shape_env = torch.fx.experimental.symbolic_shapes.ShapeEnv(allow_dynamic_output_shape_ops=True)
    with FakeTensorMode(shape_env=shape_env, static_shapes=True) as mode:
        fake = mode.from_tensor(dense)
        for name in (format, "auto"):
            header, offsets, payload = torch.ops.flash_llm.pack(fake, name)
            assert header.shape == (8,) and payload.dtype == offsets.dtype == torch.int32
            known = isinstance(offsets.shape[0], int)
            assert known == (name != "auto")
            if known:
                assert offsets.shape[0] == PackedWeight.class_for(format).num_offsets(130, 70, 1)


def test_meta_tensors_flow_through(format):
    w, _ = packed_and_dense(format)
    y = flash_llm.spmm(torch.empty(4, 70, dtype=torch.float16, device="meta"), w.to("meta"))
    assert y.is_meta and y.shape == (4, 130)
    assert w.to("meta").to_dense().shape == (130, 70)


# ---- torch.compile ----


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each(("activation", "dtype"), zip(ACTIVATIONS, itertools.cycle(DTYPES)))
def test_compiles_into_one_graph(activation, format, device, dtype, fresh_dynamo):
    torch._dynamo.reset()  # which gives up on code that it has compiled often
    w, dense = packed_and_dense(format, dtype=dtype, device=device)
    bias = torch.randn(130).to(device, dtype)

    def block(x):
        return flash_llm.spmm(x * 2, w, bias, activation=activation) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 70).to(device, dtype)
    assert torch.equal(compiled(x), block(x))


def test_compiled_graph_serves_every_number_of_tokens(format, device, fresh_dynamo):
    w, _ = packed_and_dense(format, device=device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: flash_llm.spmm(x, w).relu(), fullgraph=True, dynamic=True, backend=counter
    )
    for n in (3, 2, 9, 17, 64, 129):
        x = testing.small_integers(n, 70, device=device)
        assert torch.equal(compiled(x), flash_llm.spmm(x, w).relu()), n
    assert counter.frame_count == 1


def test_cached_code_is_used_by_builds_with_the_same_schemas_alone(fresh_dynamo):
    w, _ = packed_and_dense("row_bitmap")
    x = torch.randn(5, 70).half()

    def hits():
        """How often compiling finds its code in the caches on the disk."""
        torch._dynamo.reset()
        counters.clear()
        torch.compile(lambda x: flash_llm.spmm(x, w), fullgraph=True)(x)
        return counters["aot_autograd"]["autograd_cache_hit"] + sum(
            counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "guard_hit")
        )

    with fresh_cache(), torch.compiler.config.patch(cache_key_tag="of a user"):
        ops._tag_compile_caches()
        assert torch.compiler.config.cache_key_tag.startswith("of a user ")
        assert (hits() > 0, hits() > 0) == (False, True)
        with torch.library._scoped_library("flash_llm", "FRAGMENT") as library:
            library.define("of_another_build(Tensor x) -> Tensor")
            torch.compiler.config.cache_key_tag = "of a user"
            ops._tag_compile_caches()
            assert not hits()


@pytest.mark.slow
def test_compiles_with_inductor(format, device, fresh_dynamo):
    w, _ = packed_and_dense(format, device=device)
    compiled = torch.compile(lambda x: flash_llm.spmm(x + 1, w, activation="relu"), fullgraph=True)
    x = testing.small_integers(5, 70, device=device)
    assert torch.equal(compiled(x), flash_llm.spmm(x + 1, w, activation="relu"))


@pytest.mark.gpu
@pytest.mark.slow
def test_compiles_with_cuda_graphs(gpu_format, fresh_dynamo):
    w, _ = packed_and_dense(gpu_format, device="cuda")
    compiled = torch.compile(
        lambda x: flash_llm.spmm(x + 1, w), fullgraph=True, mode="reduce-overhead"
    )
    for seed in range(5):
        x = testing.small_integers(5, 70, device="cuda", seed=seed)
        assert torch.equal(compiled(x).clone(), flash_llm.spmm(x + 1, w))


def test_gradients_compile(format, device, fresh_dynamo):
    w, _ = packed_and_dense(format, device=device)
    bias = torch.randn(130, device=device).half().requires_grad_()

    def loss(x):
        return flash_llm.spmm(x, w, bias, activation="silu").float().square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-1, 1, 350, device=device).view(5, 70).half().requires_grad_()
        results.append(torch.autograd.grad(function(x), (x, bias)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_exports(format, device):
    w, _ = packed_and_dense(format, device=device)

    class Block(torch.nn.Module):
        def forward(self, x):
            return flash_llm.spmm(x, w)

    x = testing.small_integers(5, 70, device=device)
    exported = torch.export.export(
        Block(), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},)
    )
    x = testing.small_integers(9, 70, device=device)
    assert torch.equal(exported.module()(x), flash_llm.spmm(x, w))


# ---- gradients ----


def rounding(dtype):
    return {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]


@each("activation", ACTIVATIONS)
@each("shape", [(9,), (2, 3), (), (0,)])
@each("dtype", DTYPES)
def test_gradients_match_a_dense_float64_layer(activation, shape, format, device, dtype):
    w, dense = packed_and_dense(format, dtype=dtype, device=device)
    x = torch.randn(*shape, 70).to(device, dtype).requires_grad_()
    bias = torch.randn(130).to(device, dtype).requires_grad_()
    upstream = torch.randn(*shape, 130).to(device, dtype)
    flash_llm.spmm(x, w, bias, activation=activation).backward(upstream)

    x64 = x.detach().double().requires_grad_()
    bias64 = bias.detach().double().requires_grad_()
    z = torch.nn.functional.linear(x64, dense.double(), bias64)
    testing.activate(z, activation).backward(upstream.double())

    u = rounding(dtype)
    # The gradient of the sum is rounded (u), its activation's slope is taken at a rounded sum
    # (second derivatives stay below 1.2), then K or N terms add up and are rounded once more.
    per_sum = upstream.double().abs() * (2 * u + 1.2 * u * z.detach().abs() + 2**-20)
    for grad, exact_grad, slack in (
        (x.grad, x64.grad, per_sum @ dense.double().abs()),
        (bias.grad, bias64.grad, per_sum.reshape(-1, 130).sum(0)),
    ):
        assert grad.dtype == dtype and grad.shape == exact_grad.shape
        error = (grad.double() - exact_grad).abs()
        assert bool((error <= 1.2 * slack + 2 * u * exact_grad.abs() + 1e-7).all()), error.max()


@each("dtype", DTYPES)
def test_integer_gradients_are_exact(format, device, dtype):
    weight = testing.small_integers(130, 70, sparsity=0.5, dtype=dtype, device=device)
    x = testing.small_integers(4, 70, dtype=dtype, device=device, seed=1).requires_grad_()
    bias = testing.small_integers(130, dtype=dtype, device=device, seed=2).requires_grad_()
    upstream = testing.small_integers(4, 130, dtype=dtype, device=device, seed=3)
    w = flash_llm.pack(weight, format)
    flash_llm.spmm(x, w, bias, activation="relu").backward(upstream)
    z = testing.spmm_reference(x, weight, bias).detach()
    grad_z = upstream.double() * (z > 0)
    assert torch.equal(x.grad, (grad_z @ weight.double()).to(dtype))
    assert torch.equal(bias.grad, grad_z.sum(0).to(dtype))


@each("activation", [None, "silu"])
def test_only_the_gradients_that_are_asked_for_are_computed(activation, format, monkeypatch):
    w, _ = packed_and_dense(format)
    bias = torch.zeros(130, dtype=torch.float16)
    unpacked = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.flash_llm.unpack.default:
                unpacked.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, 70).half()
    y = flash_llm.spmm(x, w, bias.clone().requires_grad_(), activation=activation)
    with Watch():
        y.sum().backward()
    assert not unpacked  # a gradient of bias alone needs no dense weight
    y = flash_llm.spmm(x.requires_grad_(), w, bias, activation=activation)
    with Watch():
        y.sum().backward()
    assert len(unpacked) == 1 and x.grad is not None and bias.grad is None
    assert not flash_llm.spmm(x.detach(), w, bias).requires_grad
    with torch.no_grad():
        assert not flash_llm.spmm(x, w, bias).requires_grad
    with torch.inference_mode():
        assert flash_llm.spmm(x, w, bias).is_inference()


@each("activation", ["silu", "gelu"])
def test_gradient_of_a_gradient_follows_the_same_formulas(format, device, activation):
    w, dense = packed_and_dense(format, device=device)
    x = torch.randn(3, 70, device=device).half().requires_grad_()
    y = flash_llm.spmm(x, w, activation=activation)
    (grad,) = torch.autograd.grad(y.float().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.float().sum(), x)
    x64 = x.detach().double().requires_grad_()
    y64 = getattr(torch.nn.functional, activation)(x64 @ dense.double().t())
    (grad64,) = torch.autograd.grad(y64.sum(), x64, create_graph=True)
    (second64,) = torch.autograd.grad(grad64.sum(), x64)
    torch.testing.assert_close(second.double(), second64, rtol=2e-2, atol=2e-2)


def test_forward_mode_is_refused_instead_of_giving_no_derivative(format, device):
    w, _ = packed_and_dense(format, device=device)
    x = torch.randn(3, 70, device=device).half()
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="jvp"):
            flash_llm.spmm(dual, w)


def test_packing_a_parameter_detaches_it(format, device):
    weight = torch.nn.Parameter(testing.random_sparse(130, 70, device=device))
    w = flash_llm.pack(weight, format)
    assert not w.payload.requires_grad and not w.to_dense().requires_grad
    assert not flash_llm.prune_pack(weight, 0.5, format=format).payload.requires_grad


def test_autocast_leaves_the_operator_alone(format, device):
    w, dense = packed_and_dense(format, device=device)
    x = testing.small_integers(20, 70, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(flash_llm.spmm(x, w), flash_llm.spmm(x, w))
        assert flash_llm.spmm(x, w).dtype == torch.float16
        with pytest.raises(TypeError, match="flash_llm::spmm: x .*Half"):
            flash_llm.spmm(x.float(), w)


@each("shape", [(0, 8), (8, 0), (0, 0)])
@each("leading", [(), (0,), (3,), (2, 0)])
def test_bias_gradient_of_empty_shapes(shape, leading, format):
    """M = 0 once failed in backward: "cannot reshape tensor of 0 elements"."""
    m, k = shape
    w = PackedWeight.class_for(format).empty(m, k)
    x = torch.ones(*leading, k, dtype=torch.float16, requires_grad=True)
    bias = torch.ones(m, dtype=torch.float16, requires_grad=True)
    flash_llm.spmm(x, w, bias).sum().backward()
    tokens = torch.Size(leading).numel()
    assert torch.equal(bias.grad, torch.full((m,), float(tokens)).half())
    assert torch.equal(x.grad, torch.zeros_like(x))


# ---- other threads, and hostile arguments ----


def run_program(source, *arguments, **environment):
    """Run Python in a process of its own, which a crash ends; return what it printed."""
    run = subprocess.run(
        [sys.executable, "-X", "faulthandler", *source, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,  # a damaged heap may end in a deadlock
    )
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout}\n{run.stderr}"
    return run.stdout


ENVIRONMENT = """
import os, threading, time
import torch, flash_llm

weight, x = torch.eye(64).half(), torch.ones(1, 64).half()
w, stop = flash_llm.pack(weight, "row_bitmap"), time.monotonic() + 2

def write():
    for i in range(10**9):  # more variables, and longer ones: libc moves its table
        os.environ[f"FLASH_LLM_TEST_{i % 5000}"] = "x" * (i % 300)
        if time.monotonic() > stop:
            return

thread = threading.Thread(target=write)
thread.start()
while thread.is_alive():
    flash_llm.spmm(x, w)
    flash_llm.unpack(w)
    flash_llm.pack(weight, "row_bitmap")
    flash_llm.prune_pack(weight, 0.5)
    w.validate()
"""


def test_writing_the_environment_in_another_thread_is_no_segfault():
    run_program(("-c", ENVIRONMENT))


CHANGED_WEIGHT = """
import sys, threading, time
import torch, flash_llm

torch.set_num_threads(1)
weight = torch.randn(256, 512).half()
others = [weight * (torch.rand(256, 512) < density) for density in (1.0, 0.5, 0.1, 0.0)]

def write(stop):
    while time.monotonic() < stop:
        for other in others:
            weight.copy_(other)

for fmt in sys.argv[1:]:
    print(fmt, flush=True)
    counts = {"packed": 0, "refused": 0}
    thread = threading.Thread(target=write, args=(time.monotonic() + 0.7,))
    thread.start()
    while thread.is_alive():
        for pack in (flash_llm.pack, lambda w, f: flash_llm.prune_pack(w, 0.3, format=f)):
            try:
                pack(weight, fmt).validate()
                counts["packed"] += 1
            except RuntimeError as error:
                assert "pack: dense " in str(error), error
                counts["refused"] += 1
    assert counts["packed"] > 0, counts
    print(counts)
"""


def test_packing_a_weight_that_another_thread_changes_corrupts_nothing():
    print(run_program(("-c", CHANGED_WEIGHT), *FORMATS))


SHARED_CORE = """
import os, time
import torch, flash_llm

torch.set_grad_enabled(False)
weight, x = torch.randn(576, 576).half(), torch.randn(1, 576).half()
layers = [flash_llm.pack(weight, "row_bitmap") for _ in range(60)]

def seconds_of_a_token(threads):
    torch.set_num_threads(threads)
    start = time.monotonic()
    for w in layers:
        flash_llm.spmm(x, w)
    return time.monotonic() - start

seconds_of_a_token(2)  # starts the second thread
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), {min(os.sched_getaffinity(0))})
one = min(seconds_of_a_token(1) for _ in range(10))
two = min(seconds_of_a_token(2) for _ in range(10))
print(f"one thread {one * 1e3:.1f} ms, two {two * 1e3:.1f} ms")
assert two < 5 * one
"""


def test_small_layers_do_not_wait_for_a_thread_that_has_no_core():
    """Two threads on one core: as on a busy machine, each layer once took milliseconds."""
    # Threads wait as they do outside of tests (conftest.py): this is libgomp's default.
    print(run_program(("-c", SHARED_CORE), GOMP_SPINCOUNT="300000"))


@pytest.mark.slow
def test_hostile_operators(tmp_path):
    """Every argument damaged at random: a result or an error, and memory that is not ours alone."""
    program = str(Path(__file__).with_name("hostile_operators.py"))
    call = tmp_path / "call"
    try:
        print(run_program((program,), "3", HOSTILE_CALL=str(call)))
    except AssertionError as error:
        raise AssertionError(f"{call.read_text()}{error}") from None
