"""Devices, seeds and the hypothesis profile of the test suite.

Every test with a ``device`` runs on the CPU and on CUDA. Without a usable GPU the CUDA half is
skipped with its reason; FLASH_LLM_REQUIRE_GPU=1 makes those skips failures. Tests of a ``format``
run for each packed format. Those marked hopper are skipped on other GPUs, and those marked
runs_here where the GPU does not run their kernel.
"""

import functools
import os

# Before torch loads OpenMP. By default a thread that waits for others keeps its core busy, which
# takes it from those others where the machine does something else as well.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
from formats import DTYPES, FORMATS, GPU_FORMATS, has_hopper, runs_here

from flash_llm import _extension, bench, timing

hypothesis.settings.register_profile(
    "flash_llm",
    # Packing on a shared 2-core machine takes what it takes, and a red run must be repeatable.
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("flash_llm")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "hopper: needs a GPU of compute capability 9.0 and a build for 9.0a; also gpu"
    )
    config.addinivalue_line(
        "markers", "runs_here(format, device, config): needs a GPU that runs this plan; also gpu"
    )


def why_no_gpu():
    """The reason why GPU tests cannot run here, or ""."""
    if not torch.cuda.is_available():
        return "no CUDA GPU: torch.cuda.is_available() is False"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"needs compute capability 8.0, found {capability[0]}.{capability[1]}"
    build = _extension.require().build_info()
    return "" if build["cuda"] else f"the extension has no CUDA part: {build['reason']}"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None:
        return
    reason = why_no_gpu()
    if not reason and item.get_closest_marker("hopper") is not None and not has_hopper():
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a Hopper GPU")
        reason = "the extension has no code for 9.0a"
    plan = item.get_closest_marker("runs_here")
    if not reason and plan is not None and not runs_here(*plan.args):
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("this GPU does not run the kernel")
        reason = "the extension lacks a kernel, and a Hopper GPU runs all of them"
    if not reason:
        return
    if os.environ.get("FLASH_LLM_REQUIRE_GPU") == "1":
        pytest.fail(f"FLASH_LLM_REQUIRE_GPU=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=["fp16", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=FORMATS)
def format(request):
    return request.param


@pytest.fixture(params=GPU_FORMATS)
def gpu_format(request):
    return request.param


@pytest.fixture
def force_isa():
    """Give the function that forces the CPU kernels of an instruction set, for this test."""
    force = _extension.require().set_cpu_isa
    yield force
    force("")


@pytest.fixture
def quick(monkeypatch):
    """Few copies and short turns: the times say nothing, but they are there."""
    monkeypatch.setattr(timing, "ROTATION_BYTES", 2**16)
    monkeypatch.setattr(bench, "time_cpu", functools.partial(timing.time_cpu, min_seconds=1e-4))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
